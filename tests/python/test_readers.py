"""What docs/readers/*.md show runs as it stands: command lines, then Python, in a folder with the files they name."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import peft
import pytest

import torchgraft
from scripts_here import run_here
from training.tiny import make_bert, write_files

ROOT = Path(__file__).resolve().parents[2]
READERS = ROOT / "docs" / "readers"


def saved(folder: Path, config: str, name: str, directory: Path) -> None:
    module = torchgraft.graft(torchgraft.load_module(folder / "base.pt"), config, name)
    torchgraft.save_adapter(module, name, directory)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("readers")
    write_files(folder)
    saved(folder, "unipelt", "reviews", folder / "reviews")
    (folder / "adapters").mkdir()
    for index in range(4):
        saved(folder, "lora" if index % 2 else "unipelt", f"task-{index}", folder / "adapters" / f"task-{index}")
    lora = peft.LoraConfig(r=4, target_modules=["query", "value"], init_lora_weights=False)
    peft.get_peft_model(make_bert(), lora).save_pretrained(folder / "peft_lora")
    return folder


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"<!-- test -->\n```{language}\n(.*?)```", (READERS / f"{page}.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("page", sorted(path.stem for path in READERS.glob("*.md")))
def test_what_a_reader_is_told_runs(page: str, prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(prepared)
    for line in "".join(blocks(page, "bash")).replace("\\\n", "").splitlines():
        command, *arguments = shlex.split(line)
        assert command == "torchgraft"
        done = run_here("graft.py", *arguments)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    program = prepared / f"{page}.py"
    program.write_text("\n".join(blocks(page, "python")))
    environment = os.environ | {"PYTHONPATH": str(ROOT / "python")}
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr


def test_every_block_is_run_or_needs_a_host_of_the_users_own() -> None:
    for page in READERS.glob("*.md"):
        text = page.read_text()
        marked = len(blocks(page.stem, "bash")) + len(blocks(page.stem, "python"))
        shown = text.count("```bash") + text.count("```python")
        assert marked == shown - (page.stem == "serve_cpp")
