"""What an operator costs to change: in how many files its arguments stand, and which folders know each other."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHARED_ARGUMENTS = ["gate_weight", "gate_bias", "adapter_ids", "adapter", "token_mask"]
MOST_FILES = 10


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*")) if path.is_file()]


def files_with_word(word: str) -> list[str]:
    """As `grep -rlw WORD ops registration`."""
    pattern = re.compile(rf"\b{word}\b")
    return [str(path.relative_to(ROOT)) for path in sources("ops", "registration") if pattern.search(path.read_text())]


@pytest.mark.parametrize("argument", SHARED_ARGUMENTS)
def test_shared_argument_stands_in_at_most_ten_files(argument: str) -> None:
    files = files_with_word(argument)
    assert 0 < len(files) <= MOST_FILES, files


@pytest.mark.parametrize("argument", SHARED_ARGUMENTS)
def test_contributing_lists_the_files_of_a_shared_argument(argument: str) -> None:
    section = (ROOT / "CONTRIBUTING.md").read_text().split("## Add an operator\n")[1].split("\n## ")[0]
    assert [name for name in files_with_word(argument) if f"`{name}`" not in section] == []


@pytest.mark.parametrize("folder", ["activations", "config", "plan"])
def test_folder_includes_nothing_of_the_operators(folder: str) -> None:
    includes = re.compile(r"#include [<\"](?:torchgraft/)?ops/")
    assert sources(folder)
    assert [str(path.relative_to(ROOT)) for path in sources(folder) if includes.search(path.read_text())] == []
