"""The errors of tests/mutations can still be made. Whether tests notice them, its run.py asks."""

import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.quick


def test_every_mutation_finds_its_text() -> None:
    command = [sys.executable, str(_ROOT / "tests" / "mutations" / "run.py"), "--tree", str(_ROOT), "--find"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, [line for line in done.stdout.splitlines() if " found " not in line]
