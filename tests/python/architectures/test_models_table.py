"""docs/models.md has a row for every architecture that is tested, and says of none more than the tests do."""

from pathlib import Path

import torch
from case import METHODS
from hugging_face_cases import CASES, tolerance
from test_architectures import NOT_YET, _LEFT_OUT

_TABLE = Path(__file__).resolve().parents[3] / "docs" / "models.md"


def test_the_table_is_of_the_tested_cases() -> None:
    rows = [line.strip("|").split("|") for line in _TABLE.read_text().splitlines() if line.startswith("| ")]
    cells = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}
    assert cells.pop("traced model") == [*METHODS, "frozen"], "made by an older make_models_table.py; make it anew"
    assert sorted(cells) == sorted(set(CASES) - _LEFT_OUT), "make it anew: make_models_table.py"
    for name, values in cells.items():
        for method, value in zip([*METHODS, "unipelt"], values, strict=True):
            if method in CASES[name].without:
                assert value == "-", name
            elif (name, method) in NOT_YET:
                assert value == "not yet", name
            else:
                assert float(value) <= tolerance(name, torch.float32), f"{name}, {method}"
