"""benchmarks/train_step.py runs, and both sides train the same parameters. No times are asserted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

_SCRIPT = Path(__file__).resolve().parents[3] / "benchmarks" / "train_step.py"


@pytest.mark.slow(seconds=60)
def test_a_small_run_prints_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "steps.json"
    options = ["--model", "MiniLM", "--shapes", "1x4", "--threads", "1", "--steps", "2", "--json", str(path)]
    done = subprocess.run([sys.executable, str(_SCRIPT), *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = {row["variant"]: row for row in json.loads(path.read_text())["rows"]}
    assert set(rows) == {"library", "torchgraft", "floor", "fine-tuning"}
    assert rows["library"]["parameters"] == rows["torchgraft"]["parameters"] > 0 == rows["floor"]["parameters"]
    assert rows["library"]["ratio"] == rows["library"]["needed_ratio"] == rows["library"]["held_ratio"] == 1.0
    assert all(row["milliseconds"] > 0 and row["needed"] > 0 and row["held"] > 0 for row in rows.values())
