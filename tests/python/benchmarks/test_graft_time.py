"""benchmarks/graft_time.py runs, and what it writes has the form that is said. No times are asserted."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

_SCRIPT = Path(__file__).resolve().parents[3] / "benchmarks" / "graft_time.py"


def test_rows_of_a_small_run(tmp_path: Path) -> None:
    command = [sys.executable, str(_SCRIPT), "--layers", "1", "2", "--base-hidden", "48", "--runs", "2"]
    pictures = ["--picture", str(tmp_path / "curve.svg")] if importlib.util.find_spec("matplotlib") else []
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "rows.json"), *pictures], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["model"], row["layers"]) for row in rows] == [
        ("traced BERT", 12),
        ("traced BERT", 1),
        ("traced BERT", 2),
        ("scripted nn.TransformerEncoder", 1),
        ("scripted nn.TransformerEncoder", 2),
    ]
    for row in rows:
        assert len(row["seconds"]) == 2 and min(row["seconds"]) > 0
        assert 0 < row["adapters"] < row["weights"]
        assert 0 <= row["remaining"] and 0 <= row["peak"]
    assert "seconds ~ layers^" in done.stdout
    assert not pictures or (tmp_path / "curve.svg").read_text().startswith("<?xml")


def test_exponent() -> None:
    specification = importlib.util.spec_from_file_location("graft_time", _SCRIPT)
    graft_time = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(graft_time)
    assert graft_time.exponent([dict(layers=n, seconds=[0.5 * n**2]) for n in (3, 6, 12)]) == pytest.approx(2.0)
    assert graft_time.exponent([dict(layers=n, seconds=[0.1 * n, 7.0, 0.1 * n]) for n in (3, 6)]) == pytest.approx(1.0)
