"""Grafted models of many architectures equal their references: results and gates, for every method."""

import pytest
import torch
from case import METHODS
from hugging_face_cases import CASES, dtypes, tolerance
from oracle import assert_gates_close, difference

_SEEDS = (1, 2)  # other batch sizes, lengths and paddings than the one that was traced
_BASES: dict = {}

# What is known not to work yet, and why. Strict: a case that begins to pass must leave the list.
NOT_YET = {
    (name, method): "LoRA on a projection that DeBERTa also applies to its relative positions changes the tokens only"
    for name in ("deberta_v2_shared_eager",)
    for method in ("unipelt", "lora_all")
}

# The library takes the attention's sum for the branch, and the feed-forward block for the residual, of GPT-J's output
# adapter: not the definition, and not what is grafted. Its traces also mix float32 into float64.
_LEFT_OUT = {"gptj_eager"}


def _base(name: str, dtype: torch.dtype) -> torch.jit.ScriptModule:
    if (name, dtype) not in _BASES:
        _BASES[name, dtype] = CASES[name].to_script("traced", dtype)
    return _BASES[name, dtype]


def _cases() -> list:
    cases = []
    for name, case in CASES.items():
        for method in METHODS:
            known = NOT_YET.get((name, method))
            marks = [pytest.mark.xfail(reason=known, strict=True)] if known else []
            if method not in case.without and name not in _LEFT_OUT:
                cases += [pytest.param(name, method, dtype, marks=marks) for dtype in dtypes(name)]
    return cases


@pytest.mark.parametrize("name, method, dtype", _cases())
def test_equals_the_reference(name: str, method: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    grafted = case.reference.graft(_base(name, dtype), method, dtype)
    for seed in _SEEDS:
        arguments = case.arguments(dtype, seed)
        expected, expected_gates = case.reference.run(grafted, method, arguments)
        with torch.no_grad():
            result, gates = grafted.forward_with_gates(*arguments)
        assert difference(case.hidden(result), expected) <= tolerance(name, dtype)
        if expected_gates:
            assert_gates_close(gates["task"], expected_gates, tolerance(name, dtype))
        else:
            assert dict(gates["task"]) == {}
