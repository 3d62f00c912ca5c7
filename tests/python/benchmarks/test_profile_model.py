"""benchmarks/profile_model.py runs, and names the operators that were grafted. No times are asserted."""

import subprocess
import sys
from pathlib import Path

import pytest

_SCRIPT = Path(__file__).resolve().parents[3] / "benchmarks" / "profile_model.py"


@pytest.mark.slow(seconds=15)
def test_a_small_profile_lists_operators() -> None:
    options = ["--shape", "1x4", "--config", "MAM", "--passes", "2"]
    done = subprocess.run([sys.executable, str(_SCRIPT), *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.stdout.splitlines() if "│" in line]
    calls = {row[0]: (row[1], row[3]) for row in rows}
    # MiniLM has six layers; each gets a bottleneck, which takes a linear map in, and a prefix for its attention.
    assert calls["torchgraft::gated_bottleneck_linear"] == ("0", "6")
    assert calls["torchgraft::gated_prefix_attention"] == ("0", "6")
    assert calls["aten::addmm"] == ("36", "30")
    assert "without a profiler: base" in done.stdout
    assert "gated_lora_linear, gated of next to nothing:" in done.stdout
