"""Modules whose inputs may be None: what the patcher makes of them can be loaded from a file, and computes the same."""

import pytest
import torch
from torch import Tensor

import optional_inputs
import torchgraft
from grafted import reloaded
from int8_reference import quantised

pytestmark = pytest.mark.quick

KEYS, VALUES = torch.randn(2, 2, optional_inputs.HEADS, 4, optional_inputs.HIDDEN // optional_inputs.HEADS)
PAST = {
    "TupleOrNone": [None, (KEYS, VALUES)],
    "UnpackedTuple": [None, (KEYS, VALUES)],
    "TupleOfOptional": [None, (KEYS, None), (KEYS, VALUES)],
    "InOneLine": [None, (KEYS, VALUES)],
    "IsInstance": [None, (KEYS, VALUES)],
    "ElseSide": [None, (KEYS, VALUES)],
    "Asserted": [(KEYS, VALUES)],
    "ListOrNone": [None, [KEYS, VALUES]],
    "DictOrNone": [None, {}, {"k": KEYS, "v": VALUES}],
    "UnionWithInt": [None, 3, [KEYS, VALUES]],
    "ListOfOptional": [[None], [(KEYS, VALUES)]],
    "OptionalNumber": [None, 1],
    "EarlyReturn": [None, (KEYS, VALUES)],
}


def _layer(name: str) -> torch.nn.Module:
    torch.manual_seed(3)
    return getattr(optional_inputs, name)().eval()


def _tokens() -> Tensor:
    return torch.randn(2, 3, optional_inputs.HIDDEN, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("name", [name for name in PAST if name != "EarlyReturn"])
@torch.no_grad()
def test_a_grafted_module_is_loaded_and_runs_with_and_without_the_input(name: str, verify: bool) -> None:
    layer = _layer(name)
    module = reloaded(torchgraft.graft(torch.jit.script(layer), config="lora", name="task", verify=verify))
    for past in PAST[name]:
        expected = layer(_tokens(), past)
        torch.testing.assert_close(module(_tokens(), past), expected, atol=1e-5, rtol=0)  # a fresh LoRA changes nothing
        module.deactivate()
        assert torch.equal(module(_tokens(), past), expected)
        module.activate("task")


@pytest.mark.parametrize("name", PAST)
@torch.no_grad()
def test_an_int8_module_is_loaded_and_has_torchs_numbers(name: str) -> None:
    module = reloaded(torchgraft.quantize(torch.jit.script(_layer(name))))
    expected = quantised(_layer(name), "per_channel")
    for past in PAST[name]:
        torch.testing.assert_close(module(_tokens(), past), expected(_tokens(), past), atol=1e-5, rtol=0)
