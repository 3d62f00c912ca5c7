"""benchmarks/lora_factors.py runs, and its variants are what their names say."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = """
import sys; sys.path.insert(0, "benchmarks")
import lora_factors, models, torch
lora_factors.SIZES = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
variants, sizes = lora_factors.make_variants(6)
batch = models.batch_of("6x7")
with torch.no_grad():  # fresh ones change nothing
    results = {name: run(*batch) for name, run in variants.items()}
for result in results.values():
    torch.testing.assert_close(result, results["base"], rtol=0, atol=1e-5)
assert sizes["VeRA"] < sizes["LoRA"] + 4000, sizes
sys.argv = ["lora_factors.py", "--rounds", "2", "--shapes", "6x4"]
sys.exit(lora_factors.main())
"""


@pytest.mark.slow(seconds=15)
def test_variants_give_the_same():
    environment = {"MALLOC_TRIM_THRESHOLD_": "1000000000"}  # in this process
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, cwd=ROOT, env=os.environ | environment
    )
    assert result.returncode == 0, result.stderr
    assert "all three in one batch" in result.stdout
