"""Grafted models of many architectures equal their references: results and gates, for every method."""

import functools

import pytest
import torch

from all_cases import CASES, FORMS, dtypes, methods, tolerance
from oracle import assert_gates_close, difference

_SEEDS = (1, 2)  # other batch sizes, lengths and paddings than the one that was traced


@functools.cache
def _base(name: str, form: str, dtype: torch.dtype) -> torch.jit.ScriptModule:
    return CASES[name].to_script(form, dtype)


def _parameters() -> list:
    """(name, form, method, dtype), the dtypes of one base next to each other."""
    parameters = []
    for name, form in FORMS:
        for dtype in dtypes(name):
            for method in methods(name):
                label = f"{name}-{form}-{method}-{str(dtype).removeprefix('torch.')}"
                parameters.append(pytest.param(name, form, method, dtype, id=label))
    return parameters


@pytest.mark.parametrize(("name", "form", "method", "dtype"), _parameters())
def test_equals_the_reference(name: str, form: str, method: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    grafted = case.reference.graft(_base(name, form, dtype), method, dtype)
    for seed in _SEEDS:
        arguments = case.arguments(dtype, seed)
        expected, expected_gates = case.reference.run(grafted, method, arguments)
        with torch.no_grad():
            result, gates = grafted.forward_with_gates(*arguments)
        assert torch.isfinite(expected).all()
        assert difference(case.hidden(result), expected) <= tolerance(name, form, dtype)
        if expected_gates:
            assert_gates_close(gates["task"], expected_gates, tolerance(name, form, dtype))
        else:
            assert dict(gates["task"]) == {}
