"""Parameters of which each run has some, and the slow tests the others."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def thinned(values: Iterable[Any], is_often: Callable[[Any], bool], seconds: float = 1) -> list[Any]:
    """Returns `values` for pytest.mark.parametrize, slow where `is_often` does not hold.

    Args:
        values: parameters, each one value or a tuple of several.
        seconds: about how long a test takes.
    """
    marks = [pytest.mark.slow(seconds=seconds)]
    return [
        value if is_often(value) else pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=marks)
        for value in values
    ]
