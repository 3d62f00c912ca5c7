"""benchmarks/models.py runs, and what it writes has the form that is said. No times are asserted."""

import json
import subprocess
import sys
from pathlib import Path

_SCRIPT = Path(__file__).resolve().parents[3] / "benchmarks" / "models.py"


def test_rows_of_a_small_run(tmp_path: Path) -> None:
    options = ["--models", "MiniLM", "--shapes", "1x8", "--threads", "1", "--rounds", "3"]
    files = ["--json", str(tmp_path / "rows.json"), "--picture", str(tmp_path / "bars.svg")]
    done = subprocess.run([sys.executable, str(_SCRIPT), *options, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "rows.json").read_text())
    assert written["machine"]["kernels"] in ("auto", "fused", "reference")
    variants = ["base, eager", "base", "library, eager", "library, traced", "torchgraft"]
    found = [(row["config"], row["variant"]) for row in written["rows"]]
    assert found == [(config, variant) for config in ("UniPELT", "MAM") for variant in variants]
    for row in written["rows"]:
        assert (row["model"], row["shape"], row["threads"]) == ("MiniLM", "1x8", 1)
        assert row["milliseconds"] > 0 and row["quartiles"][0] <= row["quartiles"][1]
        assert row["variant"] != "base" or row["ratio"] == 1.0
    assert (tmp_path / "bars.svg").read_text().startswith("<?xml")
    for name in variants:
        assert name in done.stdout
