"""benchmarks/int8.py runs, and its variants are what their names say."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = """
import sys; sys.path.insert(0, "benchmarks")
import int8, models, torch
sizes = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
models.MODELS["MiniLM"] = sizes
variants = int8.make_variants(sizes)
batch = models.batch_of("6x7")
with torch.no_grad():
    results = {name: run(*batch) for name, run in variants.items()}
assert 1e-4 < (results["float32"] - results["int8"]).abs().max() < 0.2
assert (results["int8"] - results["UniPELT on int8"]).abs().max() > 1e-3
assert "quantized::linear_dynamic" in str(variants["UniPELT on int8"].graph)
sys.argv = ["int8.py", "--rounds", "2", "--models", "MiniLM", "--shapes", "6x4"]
sys.exit(int8.main())
"""


@pytest.mark.slow(seconds=15)
def test_variants_of_int8():
    environment = {"MALLOC_TRIM_THRESHOLD_": "1000000000"}  # in this process
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, cwd=ROOT, env=os.environ | environment
    )
    assert result.returncode == 0, result.stderr
    assert "UniPELT on int8" in result.stdout
