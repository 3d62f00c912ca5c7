"""The examples of docs/adapters.md, compositions.md, export.md, generation.md, int8.md and training.md run as they
stand, one after the other."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def _run(document: str, blocks: int, folder: Path) -> None:
    """The marked Python blocks of a document, which are all that it has, in one process."""
    text = (ROOT / "docs" / document).read_text()
    marked = re.findall(r"<!-- test -->\n```python\n(.*?)```", text, re.DOTALL)
    assert len(marked) == text.count("```python") == blocks
    environment = os.environ | {"PYTHONPATH": str(ROOT / "python")}
    program = folder / "blocks.py"  # a file: torch.jit.script reads the source of what it scripts
    program.write_text("\n".join(marked))
    done = subprocess.run(
        [sys.executable, str(program)], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def test_the_examples_of_adapters_run(tmp_path) -> None:
    _run("adapters.md", 20, tmp_path)
    for written in (
        "reviews_adapter/adapter.safetensors",
        "tweets_adapter/pytorch_adapter.bin",
        "gates.png",
        "each.svg",
        "lowered.pt",
    ):
        assert (tmp_path / written).stat().st_size > 0


def test_the_examples_of_compositions_run(tmp_path) -> None:
    _run("compositions.md", 5, tmp_path)
    for setup in ("en_ner_setup", "both_setup"):
        assert (tmp_path / setup / "adapter_setup.json").stat().st_size > 0


def test_the_example_of_export_runs(tmp_path) -> None:
    _run("export.md", 1, tmp_path)


def test_the_examples_of_int8_run(tmp_path) -> None:
    _run("int8.md", 2, tmp_path)


def test_the_example_of_generation_runs(tmp_path) -> None:
    _run("generation.md", 1, tmp_path)
    assert (tmp_path / "grafted.pt").stat().st_size > 0


def test_the_examples_of_training_run(tmp_path) -> None:
    _run("training.md", 2, tmp_path)
    for written in ("trained/adapter.safetensors", "served.pt", "checkpoint.pt"):
        assert (tmp_path / written).stat().st_size > 0


# Sentences that a reader had to read twice (issue 26).
_READ_TWICE = (
    "what is written the library reads", "what you say goes before what is detected", "is no change of a weight, for a",
    "an adapter that needs more is a rebuild", "rows that have it alike", "as much is taken for each of the capacity",
    "bore 0.001 and ended in one class",
)  # fmt: skip


def test_sentences_that_had_to_be_read_twice_are_gone() -> None:
    folders = ("docs", "python", "patch", "plan", "config", "ops", "examples", "scripts", "registration")
    suffixes = {".md", ".py", ".cpp", ".h", ".txt", ".html"}
    files = [*ROOT.glob("*.md"), *(path for folder in folders for path in (ROOT / folder).rglob("*"))]
    for path in files:
        if path.suffix in suffixes and path.is_file():
            text = re.sub(r"[\s/#]+", " ", path.read_text().lower())  # also where a line ends within
            assert not [sentence for sentence in _READ_TWICE if sentence in text], path


def test_what_the_documents_start_directly_is_executable() -> None:
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md"), ROOT / "tests/README.md"]
    shown = {line.split()[0] for path in documents for line in path.read_text().splitlines()
             if line.strip().startswith("scripts/")}  # fmt: skip
    assert {"scripts/demo", "scripts/test", "scripts/setup"} <= shown
    for script in [*shown, "scripts/graft.py", "scripts/train.py"]:  # these two are named as commands, too
        assert os.access(ROOT / script, os.X_OK), script
