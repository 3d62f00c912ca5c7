"""benchmarks/generation.py runs, and what it compares writes the same tokens. No times are asserted."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow(seconds=60)
def test_the_benchmark_of_generation_runs() -> None:
    small = ["--layers", "2", "--vocabulary", "997", "--cached", "12", "--tokens", "6"]
    command = [sys.executable, "benchmarks/generation.py", *small, "--rounds", "2", "--generations", "2"]
    done = subprocess.run([*command, "--processor-time"], capture_output=True, text=True, cwd=ROOT, timeout=900)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.stdout.splitlines() if "│" in line]
    steps, texts = [row for row in rows if len(row) == 6], [row for row in rows if len(row) == 5]
    assert [row[2] for row in steps] == ["base", "UniPELT", "base", "UniPELT", "one of 16", "16 distinct"]
    assert all(float(row[3]) > 0 for row in steps)
    methods = ["UniPELT, adapters", "UniPELT, torchgraft", "LoRA, adapters", "LoRA, torchgraft", "PEFT's LoRA, PEFT"]
    bases = ["base, transformers", "base", "base, ONNX Runtime"]
    assert [row[1] for row in texts] == [*bases, *methods, "PEFT's LoRA, torchgraft"] * 2
    compared = [row[4] for row in texts if row[4]]
    assert compared == ["100%"] * 10
