"""Every method on every kind of base, all adapters of a base in one bank: each still equals the oracle's adapter.

test_oracle_parity.py grafts adapters one by one; here ranks and prefix lengths are padded to the largest, gated and
ungated adapters share slots, and grafting happens once a base, so that every combination can be tried.
"""

import functools

import pytest
import torch

import torchgraft
from grafted import EVERY_WAY, base, saved_adapter
from models import VARIANTS, Batch, Variant, make_batch
from oracle import CONFIGS, TOLERANCE, Result, assert_gates_close, difference, oracle_for, runs_on

DOUBLE = torch.float64
# The bases of every run: one of each way of writing, and of the library's families. The others are slow: what a bank
# adds to one adapter (test_oracle_parity.py has each, on each base) depends little on the base.
_OFTEN = {*EVERY_WAY, "distilbert_sdpa", "roberta_sdpa", "own_post_packed_matmul", "encoder_script_post"}
_VERIFIED = ("bert_eager", "own_post_scaled_query", "encoder_fast_post_nested")


@functools.cache
def _bank(name: str) -> torch.jit.ScriptModule:
    """The variant with all adapters, each under the name of its config."""
    directories = {
        config: saved_adapter(VARIANTS[name], DOUBLE, config).directory for config in CONFIGS if runs_on(config, name)
    }
    # To verify 39 adapters takes most of a graft's time: one base of each kind does. The results are compared below.
    return torchgraft.graft(base(name, DOUBLE), adapters=directories, verify=name in _VERIFIED)


def _batch(variant: Variant) -> Batch:
    return make_batch([8, 3, 5] if variant.masked else [8, 8, 8], 8, DOUBLE, seed=3)


def _expected(variant: Variant, batch: Batch, config: str | None) -> Result:
    saved = saved_adapter(variant, DOUBLE, config) if config else None
    return oracle_for(variant, DOUBLE).run(variant, batch, saved)


def _marks(name: str, *often: pytest.MarkDecorator) -> tuple[pytest.MarkDecorator, ...]:
    return often if name in _OFTEN else (pytest.mark.slow(seconds=2),)


def _in_turn(name: str, config: str) -> tuple[pytest.MarkDecorator, ...]:
    """Of two bases in their order, each run has one with each method."""
    is_often = name in EVERY_WAY or (list(VARIANTS).index(name) + list(CONFIGS).index(config)) % 2 == 0
    return () if is_often else (pytest.mark.slow(seconds=1),)


@pytest.mark.parametrize(
    ("name", "config"),
    [pytest.param(n, c, marks=_marks(n) or _in_turn(n, c)) for n in VARIANTS for c in CONFIGS if runs_on(c, n)],
)
def test_an_adapter_in_a_bank_equals_the_oracle(name: str, config: str) -> None:
    variant, bank = VARIANTS[name], _bank(name)
    batch = _batch(variant)
    bank.activate(config)
    with torch.no_grad():
        result, gates = bank.forward_with_gates(*variant.arguments(batch))
    expected = _expected(variant, batch, config)
    actual = variant.compared(variant.hidden(result), batch)
    assert difference(actual, variant.compared(expected.hidden, batch)) <= TOLERANCE[DOUBLE]
    assert sorted(gates) == [config]
    assert_gates_close(gates[config], expected.gates, TOLERANCE[DOUBLE])
    if variant.inputs == "ids" and variant.own is None:  # Hugging Face: pooled output, too
        assert len(result) == len(expected.outputs)
        for found, wanted in zip(result, expected.outputs, strict=True):
            assert difference(found, wanted) <= TOLERANCE[DOUBLE]


# -1 and adapters of every kind: methods, gates, ranks, prefix lengths, layers left out.
_MIXED = [None, "unipelt", "mam", "prefix_two_gates", "lora_all", "prefix_leave_out", "seq_bn_map", "union_everything",
          None, "lora_k_leave_out", "double_seq_bn_gated", "mh_only", "unipelt", "ia3_gated", "dora", "bn_last",
          "bn_norms", "bn_residual_normed", "bn_norm_all", "compacter", None]  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=_marks(name, *[pytest.mark.quick] * (name in EVERY_WAY))) for name in VARIANTS],
)
def test_each_row_of_a_mixed_batch_equals_the_oracle(name: str) -> None:
    """The oracle runs each row alone, padded as far as the batch is."""
    variant, bank = VARIANTS[name], _bank(name)
    lengths = [9 - i % 5 if variant.masked else 9 for i in range(len(_MIXED))]
    batch = make_batch(lengths, 9, DOUBLE, seed=4)
    known = bank.adapter_names()
    ids = torch.tensor([known.index(config) if config else -1 for config in _MIXED])
    with torch.no_grad():
        result, gates = bank.forward_with_gates(*variant.arguments(batch), adapter_ids=ids)
    hidden = variant.hidden(result)
    for row, config in enumerate(_MIXED):
        single = batch.row(row)
        expected = _expected(variant, single, config)
        found = difference(variant.compared(hidden[row : row + 1], single), variant.compared(expected.hidden, single))
        assert found <= TOLERANCE[DOUBLE], f"row {row} ({config}) differs by {found}"
        if config and expected.gates:
            position = _MIXED[:row].count(config)
            rows = {
                layer: {location: gate[position : position + 1] for location, gate in locations.items()}
                for layer, locations in gates[config].items()
            }
            assert_gates_close(rows, expected.gates, TOLERANCE[DOUBLE])
