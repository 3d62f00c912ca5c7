"""A projection with a LoRA that the model also applies to relative positions, which all rows share (DeBERTa v2 and v3
with share_att_key). That the result is the library's: test_architectures.py, deberta_v2_shared."""

import warnings

import pytest
import torch

import torchgraft
from all_cases import CASES
from oracle import difference
from restated_reference import randomise_grafted


@pytest.fixture(scope="module")
def grafted() -> torch.jit.ScriptModule:
    """Two adapters, 0 and 1."""
    base = CASES["deberta_v2_shared_eager"].to_script("traced", torch.float64)
    config = torchgraft.LoRAConfig(attn_matrices=["q", "k"], use_gating=True)
    module = torchgraft.graft(torchgraft.graft(base, config=config, name="first"), config=config, name="second")
    randomise_grafted(module)
    return module


def _arguments() -> tuple:
    return CASES["deberta_v2_shared_eager"].arguments(torch.float64, 1)


def test_nothing_is_noted() -> None:
    base = CASES["deberta_v2_shared_eager"].to_script("traced", torch.float32)
    assert all(layer["notes"] == [] for layer in torchgraft.inspect(base)["layers"])


@pytest.mark.parametrize(("name", "number"), [("first", 0), ("second", 1)])
def test_rows_of_one_adapter_are_as_if_it_were_active(grafted, name: str, number: int) -> None:
    arguments = _arguments()
    ids = torch.full((arguments[0].size(0),), number)
    with torch.no_grad():
        grafted.activate("first" if name == "second" else "second")
        by_ids = grafted(*arguments, ids)
        grafted.activate(name)
        active = grafted(*arguments)
        assert difference(by_ids, active) <= 1e-12
        base = grafted.base_forward(*arguments)
        assert difference(grafted(*arguments, torch.full_like(ids, -1)), base) <= 1e-12
        assert difference(active, base) > 1e-3


def test_rows_of_several_adapters_are_refused(grafted) -> None:
    arguments = _arguments()
    with pytest.raises(torch.jit.Error, match="rows of one batch cannot have different adapters"):
        grafted(*arguments, torch.tensor([0, 1, 0]))


@pytest.mark.parametrize(("config", "says"), [("lora", True), ("lora[attn_matrices=['v']]", False), ("seq_bn", False)])
def test_a_frozen_module_whose_relative_positions_are_projected_already_is_warned_of(config: str, says: bool) -> None:
    """A LoRA on the projection does not reach the constants that torch.jit.freeze has made with it."""
    base = torch.jit.freeze(CASES["deberta_v2_shared_eager"].to_script("traced", torch.float32).eval())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torchgraft.graft(base, config, "task")
    assert any("multiplies by constants" in str(each.message) for each in caught) == says
