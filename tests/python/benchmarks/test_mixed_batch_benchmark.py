"""benchmarks/mixed_batch.py runs, and its variants are what their names say."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = """
import sys; sys.path.insert(0, "benchmarks")
import mixed_batch, models, torch, torchgraft
mixed_batch.ADAPTERS = 3
mixed_batch.SIZES = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
variants = mixed_batch.make_variants(6)
batch = models.batch_of("6x7")
with torch.no_grad():
    results = {name: run(*batch) for name, run in variants.items()}
torch.testing.assert_close(results["one adapter"], results["one of 64"], rtol=0, atol=1e-5)
rows = (results["one of 64"] - results["64 distinct"]).flatten(1).norm(dim=1)
assert (rows[[0, 3]] < 1e-4).all() and (rows[[1, 2, 4, 5]] > 1e-3).all(), rows  # prefixes differ, fresh ones too
assert (results["base"] - results["one adapter"]).abs().max() > 1e-3
sys.argv = ["mixed_batch.py", "--rounds", "2", "--shapes", "6x4", "--threads", "1"]
sys.exit(mixed_batch.main())
"""


@pytest.mark.slow(seconds=15)
def test_variants_of_a_mixed_batch_give_the_same():
    environment = {"MALLOC_TRIM_THRESHOLD_": "1000000000"}  # in this process
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, cwd=ROOT, env=os.environ | environment
    )
    assert result.returncode == 0, result.stderr
    assert "64 distinct" in result.stdout
