"""benchmarks/two_builds.py runs. No times are asserted."""

import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[3]
_SCRIPT = _ROOT / "benchmarks" / "two_builds.py"


@pytest.mark.slow(seconds=60)
def test_a_checkout_is_measured_against_itself() -> None:
    options = [str(_ROOT), "--models", "MiniLM", "--threads", "1", "--rounds", "2"]
    done = subprocess.run([sys.executable, str(_SCRIPT), *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.stdout.splitlines() if "│" in line]
    assert [row[:4] for row in rows[:2]] == [["MiniLM", "1x16", "1", "UniPELT"], ["MiniLM", "1x16", "1", "MAM"]]
    assert len(rows) == 9 and all(float(row[6]) > 0 for row in rows)


@pytest.mark.slow(seconds=10)
def test_a_folder_that_is_no_checkout_is_said(tmp_path: Path) -> None:
    options = [str(tmp_path), "--models", "MiniLM", "--rounds", "1"]
    done = subprocess.run([sys.executable, str(_SCRIPT), *options], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and f"--serve {tmp_path} ended" in done.stderr
