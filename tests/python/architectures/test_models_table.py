"""docs/models.md has a row for every architecture that is tested, and says of none more than the tests do."""

from pathlib import Path

import torch

from all_cases import CASES, FORMS, METHODS, methods, tolerance
from make_models_table import COLUMNS, NOT_YET, directories

_TABLE = Path(__file__).resolve().parents[3] / "docs" / "models.md"
_ANEW = "make it anew: make_models_table.py"


def _method(column: str, name: str) -> str:
    return column if column in METHODS else methods(name)[0]


def test_the_table_is_of_the_tested_cases() -> None:
    rows = [line.strip("|").split("|") for line in _TABLE.read_text().splitlines() if line.startswith("| ")]
    cells = {(row[0].strip(), row[1].strip()): [cell.strip() for cell in row[3:]] for row in rows}
    assert cells.pop(("model", "form")) == COLUMNS, _ANEW
    assert sorted(cells) == sorted(FORMS), _ANEW
    for (name, form), values in cells.items():
        for column, value in zip(COLUMNS, values, strict=True):
            method = _method(column, name)
            not_yet = (name, form) in NOT_YET.get(column, {})
            if method in CASES[name].without:
                assert value == "-", (name, form, column)
            elif not_yet:
                assert value == "not yet", (name, form, column)
            else:
                assert float(value) <= tolerance(name, form, torch.float32), (name, form, column)


def test_it_says_what_becomes_of_directories_of_the_library() -> None:
    assert " ".join(directories().split()) in " ".join(_TABLE.read_text().split()), _ANEW
