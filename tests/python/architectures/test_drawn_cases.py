"""Drawn adapters of AdapterHub and PEFT: what the library gives, or refused with a reason (drawn_cases.py)."""

import argparse
import collections
import sys
from pathlib import Path

_HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(_HERE), str(_HERE.parent), str(_HERE.parents[2] / "python")]

import pytest  # noqa: E402

from drawn_cases import FINE, draw, outcome  # noqa: E402

_SEED = 19
_CASES = 120


@pytest.mark.parametrize("number", range(_CASES))
def test_equal_or_refused(number: int) -> None:
    case = draw(_SEED, number)
    found = outcome(case)
    assert found.startswith(FINE), f"{case}: {found}; again: {case.command()}"


def _main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=_CASES)
    parser.add_argument("--seed", type=int, default=_SEED)
    parser.add_argument("--case", type=int, help="only the case of this number")
    arguments = parser.parse_args()
    numbers = range(arguments.cases) if arguments.case is None else [arguments.case]
    counts = collections.Counter()
    bugs = 0
    for number in numbers:
        case = draw(arguments.seed, number)
        found = outcome(case)
        counts[found.split(":")[0].split(" by ")[0]] += 1
        bug = not found.startswith(FINE)
        bugs += bug
        if bug or arguments.case is not None:
            print(f"{case}: {found}\n  again: {case.command()}", flush=True)
    print(dict(counts))
    return 1 if bugs else 0


if __name__ == "__main__":
    sys.exit(_main())
