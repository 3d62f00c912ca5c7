"""benchmarks/compositions.py runs: every composition, here and in the library."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow(seconds=30)
@pytest.mark.parametrize("more", [[], ["--processor-time"]])
def test_the_benchmark_of_compositions_runs(more) -> None:
    command = [sys.executable, "benchmarks/compositions.py", "--rounds", "2", "--layers", "1", *more]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stderr
    ratios = re.findall(r"^(.*?)  +([\d.]+) of one", done.stdout, re.MULTILINE)
    assert [name for name, _ in ratios] == ["one, without compositions"] + [
        f"{name} in {where}"
        for where in ("a module with compositions", "the library")
        for name in ("a", "stack", "fuse")
    ]
    assert all(float(value) > 0 for _, value in ratios)
