"""Grafted models of many architectures equal their references: results and gates, for every method, all in one bank."""

import pytest
import torch

from all_cases import CASES, FORMS, QUICK, base, dtypes, is_second_spelling, methods, tolerance
from oracle import assert_gates_close, difference

_SEEDS = (1, 2)  # other batch sizes, lengths and paddings than the one that was traced


def _marks(name: str, form: str, dtype: torch.dtype) -> list:
    """float32 beside float64 is there for the path, which the spellings of a model's attention and its forms share."""
    is_other = is_second_spelling(name) or form != CASES[name].forms[0]
    if is_other and (name, form) not in QUICK and dtype == torch.float32 and len(dtypes(name)) > 1:
        return [pytest.mark.slow(seconds=2)]
    return [pytest.mark.quick] * ((name, form) in QUICK)


def _is_verified(name: str, form: str, dtype: torch.dtype) -> bool:
    """Once for each base of a run, in float32 where it is there twice: rounding is what verification must bear. To
    verify takes half of a graft's time, and results are compared below."""
    has_float32 = torch.float32 in dtypes(name) and not is_second_spelling(name) and form == CASES[name].forms[0]
    return dtype == torch.float32 or not has_float32


def _parameters() -> list:
    """(name, form, dtype)."""
    return [
        pytest.param(
            name,
            form,
            dtype,
            id=f"{name}-{form}-{str(dtype).removeprefix('torch.')}",
            marks=_marks(name, form, dtype),
        )
        for name, form in FORMS
        for dtype in dtypes(name)
    ]


@pytest.mark.parametrize(("name", "form", "dtype"), _parameters())
def test_results_and_gates_of_every_method_equal_the_reference(name: str, form: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    verify = _is_verified(name, form, dtype)
    grafted = case.reference.graft(base(name, form, dtype), methods(name), dtype, verify=verify)
    for seed in _SEEDS:
        arguments = case.arguments(dtype, seed)
        for method in methods(name):
            grafted.activate(method)
            expected, expected_gates = case.reference.run(grafted, method, arguments)
            with torch.no_grad():
                result, gates = grafted.forward_with_gates(*arguments)
            assert torch.isfinite(expected).all()
            assert difference(case.hidden(result), expected) <= tolerance(name, form, dtype), method
            if expected_gates:
                assert_gates_close(gates[method], expected_gates, tolerance(name, form, dtype))
            else:
                assert dict(gates[method]) == {}
