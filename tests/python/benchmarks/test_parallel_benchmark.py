"""benchmarks/parallel.py runs: every depth, here and in the library."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow(seconds=20)
def test_the_benchmark_of_parallel_runs() -> None:
    command = [sys.executable, "benchmarks/parallel.py", "--rounds", "2", "--layers", "2", "--first", "0", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"^first adapter in layer +(\d): (.*?)  +([\d.]+) of every row twice", done.stdout, re.MULTILINE)
    names = ["every row twice", "Parallel", "Parallel in the library"]
    assert [(layer, name) for layer, name, _ in found] == [(layer, name) for layer in "01" for name in names]
    assert all(float(value) > 0 for *_, value in found)
