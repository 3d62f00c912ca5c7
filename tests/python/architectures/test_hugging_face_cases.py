"""The references themselves: bases that have nothing baked in, and a library that runs and does something."""

import pytest
import torch

from all_cases import base, dtypes, methods, tolerance
from hugging_face_cases import CASES
from oracle import difference
from oracle_reference import distance_of_unrepaired

_SEEDS = range(4)
_CASES = [(name, dtype) for name in CASES for dtype in dtypes(name)]


@pytest.mark.parametrize(("name", "dtype"), _CASES, ids=[f"{name}-{str(dtype)[6:]}" for name, dtype in _CASES])
def test_traced_base_equals_its_model_and_the_library_without_adapter(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    script = base(name, "traced", dtype)
    model = case.make(dtype)
    for seed in _SEEDS:
        arguments = case.arguments(dtype, seed)
        with torch.no_grad():
            expected = case.hidden(model(*arguments))
            actual = case.hidden(script(*arguments))
        library, _ = case.reference.expected(None, dtype, arguments)
        assert difference(actual, expected) <= tolerance(name, "traced", dtype)
        assert difference(library, expected) <= tolerance(name, "traced", dtype)


@pytest.mark.parametrize("name", CASES)
def test_every_method_moves_the_result_and_its_gates(name: str) -> None:
    case = CASES[name]
    arguments = case.arguments(torch.float32, 1)
    plain, _ = case.reference.expected(None, torch.float32, arguments)
    for method in methods(name):
        result, gates = case.reference.expected(method, torch.float32, arguments)
        assert difference(result, plain) > 0.05
        for gate in (gate for locations in gates.values() for gate in locations.values()):
            assert gate.size(0) == plain.size(0) and (gate - 0.5).abs().mean() > 0.02


@pytest.mark.parametrize(
    ("name", "method"),
    [("t5_eager", "prefix_gated"), ("t5_gated_eager", "prefix_gated")],
)
def test_repairs_repair_what_they_say(name: str, method: str) -> None:
    case = CASES[name]
    arguments = case.arguments(torch.float32, 1)
    assert distance_of_unrepaired(case.reference, method, torch.float32, arguments) > 0.05
    untouched = distance_of_unrepaired(case.reference, "lora_all", torch.float32, arguments)
    assert untouched <= tolerance(name, "traced", torch.float32)
