"""benchmarks/products.py runs. No times are asserted."""

import subprocess
import sys
from pathlib import Path

import pytest

_SCRIPT = Path(__file__).resolve().parents[3] / "benchmarks" / "products.py"


@pytest.mark.slow(seconds=15)
@pytest.mark.parametrize("cold", [[], ["--cold"]], ids=["one weight", "cold"])
def test_a_small_run_prints_its_rows(cold: list[str]) -> None:
    options = ["--sizes", "32x48", "--tokens", "3", "20", "--turns", "2", *cold]
    done = subprocess.run([sys.executable, str(_SCRIPT), *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.stdout.splitlines() if "│" in line]
    assert [row[:2] for row in rows] == [["32x48", "3"], ["32x48", "20"]]
    assert all(float(row[4]) > 0 for row in rows)
