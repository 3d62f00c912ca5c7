"""adapter_ids: one batch, every row with its own adapter or none, each equal to what it gets alone."""

import functools

import pytest
import torch

import torchgraft
from grafted import base, saved_adapter
from models import VARIANTS, make_batch
from oracle import TOLERANCE, difference

pytestmark = pytest.mark.quick

# Different methods, ranks, prefix lengths, with and without gates.
_ADAPTERS = ["unipelt", "mam", "lora_all", "prefix_two_gates", "double_seq_bn_gated"]
_IDS = [1, -1, 0, 3, 2, 4, 0]
_NAMES = ["bert_sdpa", "own_pre_sdpa_bool", "encoder_slow_post_seq_first", "encoder_script_post"]


@functools.cache
def _bank(name: str, dtype: torch.dtype) -> torch.jit.ScriptModule:
    directories = {config: saved_adapter(VARIANTS[name], dtype, config).directory for config in _ADAPTERS}
    return torchgraft.graft(base(name, dtype), adapters=directories)


def _run(module, arguments: tuple, **keywords):
    with torch.no_grad():
        return module.forward_with_gates(*arguments, **keywords)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", _NAMES)
def test_each_row_equals_its_adapter_alone(name: str, dtype: torch.dtype) -> None:
    variant = VARIANTS[name]
    bank = _bank(name, dtype)
    batch = make_batch([9, 7, 9, 4, 9, 6, 8], 9, dtype)
    ids = torch.tensor(_IDS)
    result, gates = _run(bank, variant.arguments(batch), adapter_ids=ids)
    hidden = variant.hidden(result)
    for row, adapter in enumerate(_IDS):
        single = batch.row(row)
        if adapter < 0:
            expected = variant.hidden(base(name, dtype)(*variant.arguments(single)))
        else:
            alone = torchgraft.graft(
                base(name, dtype),
                adapters={"x": saved_adapter(variant, dtype, _ADAPTERS[adapter]).directory},
            )
            result_alone, gates_alone = _run(alone, variant.arguments(single))
            expected = variant.hidden(result_alone)
            position = [i for i, other in enumerate(_IDS) if other == adapter].index(row)
            for layer, locations in gates_alone["x"].items():
                for location, gate in locations.items():
                    found = gates[_ADAPTERS[adapter]][layer][location][position : position + 1]
                    assert difference(found, gate) <= TOLERANCE[dtype]
        actual = hidden[row : row + 1]
        keep = single.mask == 1 if variant.zeroes_padding else torch.ones_like(single.mask, dtype=torch.bool)
        assert difference(actual[keep], expected[keep]) <= TOLERANCE[dtype], f"row {row}, adapter {adapter}"


def test_gates_hold_the_rows_of_each_adapter() -> None:
    variant = VARIANTS["bert_sdpa"]
    batch = make_batch([9] * 7, 9, torch.float32)
    _, gates = _run(_bank("bert_sdpa", torch.float32), variant.arguments(batch), adapter_ids=torch.tensor(_IDS))
    assert sorted(gates) == sorted(_ADAPTERS)
    assert gates["unipelt"][0]["selfattn_lora"].shape == (2, 2)  # two rows; gates of q and v
    assert gates["prefix_two_gates"][0]["self_prefix"].shape == (1, 2)  # one row; gates of keys and values
    assert dict(gates["mam"]) == {} and dict(gates["lora_all"]) == {}  # not gated


def test_all_rows_base_equals_the_base() -> None:
    variant = VARIANTS["bert_sdpa"]
    batch = make_batch([9, 3], 9, torch.float32)
    bank = _bank("bert_sdpa", torch.float32)
    with torch.no_grad():
        result = bank(*variant.arguments(batch), adapter_ids=torch.tensor([-1, -1]))
        expected = base("bert_sdpa", torch.float32)(*variant.arguments(batch))
    assert difference(result[0], expected[0]) <= 1e-5


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([0, 5], "adapter_ids"),
        ([0, -2], "adapter_ids"),
        ([0], "adapter_ids"),
    ],
)
def test_bad_ids_are_named(ids: list[int], message: str) -> None:
    variant = VARIANTS["bert_sdpa"]
    batch = make_batch([9, 3], 9, torch.float32)
    with pytest.raises(Exception, match=message):
        _bank("bert_sdpa", torch.float32)(*variant.arguments(batch), adapter_ids=torch.tensor(ids))
