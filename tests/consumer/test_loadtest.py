"""scripts/loadtest.py against examples/server: every point is measured, and written as table, JSON and picture."""

import json
import sys

import pytest

from hosts_support import ROOT, run


@pytest.mark.slow(seconds=60)
def test_every_point_is_there(server_program, tmp_path):
    document, picture = tmp_path / "points.json", tmp_path / "points.png"
    command = [sys.executable, ROOT / "scripts" / "loadtest.py", "--server", server_program]
    text = run(*command, "--distinct", "0", "2", "--requests", "30", "--seconds", "1", "--clients", "4",
               "--json", document, "--picture", picture).stdout  # fmt: skip
    written = json.loads(document.read_text())
    assert written["machine"]["processor"]
    points = written["points"]
    assert [point["x"] for point in points if point["series"] == "distinct"] == [0, 2]
    assert len([point for point in points if point["series"] == "offered"]) == 5
    assert [point["x"] for point in points if point["series"] == "library"] == [8]
    for point in points:
        assert point["refused"] == 0 and 0 < point["answered"] <= 30
        assert 0 < point["p50"] <= point["p95"] <= point["p99"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "2 adapters:" in text and "MiB of memory" in text
