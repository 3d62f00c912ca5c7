"""A projection with a LoRA that the model also applies to relative positions, which all rows share (DeBERTa v2 and v3
with share_att_key). That the result is the library's: test_architectures.py, deberta_v2_shared."""

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
