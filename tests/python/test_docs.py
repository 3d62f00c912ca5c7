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
    _run("adapters.md", 18, tmp_path)
    for written in (
        "reviews_adapter/adapter.safetensors",
        "tweets_adapter/pytorch_adapter.bin",
        "gates.png",
        "each.svg",
        "lowered.pt",
    ):
        assert (tmp_path / written).stat().st_size > 0


def test_the_examples_of_compositions_run(tmp_path) -> None:
    _run("compositions.md", 2, tmp_path)
    for setup in ("en_ner_setup", "both_setup"):
        assert (tmp_path / setup / "adapter_setup.json").stat().st_size > 0


def test_the_example_of_export_runs(tmp_path) -> None:
    _run("export.md", 1, tmp_path)


def test_the_example_of_int8_runs(tmp_path) -> None:
    _run("int8.md", 1, tmp_path)


def test_the_example_of_generation_runs(tmp_path) -> None:
    _run("generation.md", 1, tmp_path)
    assert (tmp_path / "grafted.pt").stat().st_size > 0


def test_the_examples_of_training_run(tmp_path) -> None:
    _run("training.md", 2, tmp_path)
    for written in ("trained/adapter.safetensors", "served.pt", "checkpoint.pt"):
        assert (tmp_path / written).stat().st_size > 0
