"""benchmarks/graft_time.py runs, and what it writes has the form that is said. No times are asserted."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

_SCRIPT = Path(__file__).resolve().parents[3] / "benchmarks" / "graft_time.py"
_SMALL = ["--layers", "2", "1", "--hidden", "24", "--runs", "2"]


@pytest.fixture(scope="module")
def graft_time() -> ModuleType:
    specification = importlib.util.spec_from_file_location("graft_time", _SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.slow(seconds=60)
def test_rows_of_a_small_run(tmp_path: Path) -> None:
    pictures = ["--picture", str(tmp_path / "curve.svg")] if importlib.util.find_spec("matplotlib") else []
    command = [sys.executable, str(_SCRIPT), *_SMALL, "--markdown", "--json", str(tmp_path / "rows.json"), *pictures]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

    written = json.loads((tmp_path / "rows.json").read_text())
    models = ("traced BERT", "scripted nn.TransformerEncoder")
    shapes = ((24, 1), (24, 2))
    assert [(row["model"], row["hidden"], row["layers"]) for row in written["rows"]] == [
        (model, hidden, layers) for model in models for hidden, layers in shapes
    ]
    for row in written["rows"]:
        assert len(row["seconds"]) == 2 and min(row["seconds"]) > 0
        assert 0 < row["adapters"] < row["weights"]
        assert row["peak"] >= 0 and row["remaining"] >= 0  # on many cores, Linux counts pages in coarse batches
    assert [(fit["model"], fit["hidden"]) for fit in written["fits"]] == [(model, 24) for model in models]
    assert "torch " in written["machine"]

    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if "|" in line]
    assert cells[0][:3] == ["model", "layers", "hidden"]
    assert len(cells) == 2 + len(written["rows"]) and {len(line) for line in cells} == {9}
    assert done.stdout.count("layers^") == len(written["fits"])
    assert not pictures or (tmp_path / "curve.svg").read_text().startswith("<?xml")


@pytest.mark.quick
def test_fit_of_a_line_and_of_a_square(graft_time: ModuleType) -> None:
    line = graft_time.fit([dict(layers=n, seconds=[0.1 * n + 2.0, 50.0, 0.1 * n + 2.0]) for n in (3, 6, 12)])
    assert line["start"] == pytest.approx(2.0) and line["per_layer"] == pytest.approx(0.1)
    assert line["r2"] == pytest.approx(1.0)
    assert graft_time.fit([dict(layers=n, seconds=[0.5 * n**2]) for n in (3, 6, 12)])["exponent"] == pytest.approx(2.0)


def test_one_point_is_no_curve(graft_time: ModuleType) -> None:
    rows = [dict(model="a", hidden=24, layers=n) for n in (1, 2)] + [dict(model="b", hidden=24, layers=1)]
    assert {name: [row["layers"] for row in curve] for name, curve in graft_time.curves(rows).items()} == {
        ("a", 24): [1, 2]
    }
