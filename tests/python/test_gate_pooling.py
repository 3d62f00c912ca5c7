"""gate_pooling="unpadded": a row's result does not depend on how far its batch was padded."""

import pytest
import torch

import torchgraft
from grafted import base, grafted, saved_adapter
from models import VARIANTS, make_batch
from oracle import difference

_MASKED = ["bert_sdpa", "bert_eager", "own_post_packed_matmul", "own_pre_sdpa_bool", "own_post_scaled_query",
           "encoder_script_post", "encoder_fast_post_nested", "encoder_slow_post_seq_first"]  # fmt: skip


def _moved_by_padding(name: str, module: torch.jit.ScriptModule, dtype: torch.dtype = torch.float64) -> float:
    """How far 8 more pad tokens move the real tokens of a row."""
    variant = VARIANTS[name]
    short = make_batch([9, 5], 9, dtype)
    long = short.padded(8)
    with torch.no_grad():
        a = variant.hidden(module(*variant.arguments(short)))
        b = variant.hidden(module(*variant.arguments(long)))
    return difference(b[long.mask == 1], a[short.mask == 1])


@pytest.mark.parametrize("config", ["unipelt", "union_everything"])
@pytest.mark.parametrize("name", _MASKED)
def test_padding_does_not_move_a_row(name: str, config: str) -> None:
    assert _moved_by_padding(name, grafted(name, torch.float64, config, "unpadded")) <= 1e-12
    assert _moved_by_padding(name, grafted(name, torch.float64, config)) > 1e-3  # what the oracle does


@pytest.mark.parametrize("name", _MASKED)
def test_in_float32_padding_moves_a_row_no_more_than_the_base(name: str) -> None:
    """Longer rows are summed in another order, so BERT's own result moves too: 1e-6 on these steep random weights."""
    moved = _moved_by_padding(name, grafted(name, torch.float32, "unipelt", "unpadded"), torch.float32)
    of_base = _moved_by_padding("bert_eager", base("bert_eager", torch.float32), torch.float32)
    assert moved <= max(1e-6, 4 * of_base)


def test_without_padding_both_poolings_agree() -> None:
    variant = VARIANTS["bert_sdpa"]
    batch = make_batch([8, 8], 8, torch.float32)
    with torch.no_grad():
        results = [
            grafted("bert_sdpa", torch.float32, "unipelt", pooling)(*variant.arguments(batch))[0]
            for pooling in ("all", "unpadded")
        ]
    assert difference(*results) <= 1e-6


def test_the_mask_can_be_an_input_by_name() -> None:
    variant = VARIANTS["bert_sdpa"]
    saved = saved_adapter(variant, torch.float64, "unipelt")
    named = torchgraft.graft(
        base("bert_sdpa", torch.float64),
        adapters={"task": saved.directory},
        gate_pooling="unpadded",
        token_mask="attention_mask",
    )
    assert _moved_by_padding("bert_sdpa", named) <= 1e-12
    batch = make_batch([9, 5], 9, torch.float64)
    derived = grafted("bert_sdpa", torch.float64, "unipelt", "unpadded")
    with torch.no_grad():
        assert torch.equal(named(*variant.arguments(batch))[0], derived(*variant.arguments(batch))[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(gate_pooling="some"), 'expected gate_pooling "all" or "unpadded"'),
        (dict(gate_pooling="unpadded", token_mask="mask"), "no argument 'mask'; it has: input_ids, attention_mask"),
        (dict(token_mask="attention_mask"), 'with gate_pooling "unpadded" only'),
    ],
)
def test_bad_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(torchgraft.GraftError, match=message):
        torchgraft.graft(base("bert_sdpa", torch.float32), config="unipelt", name="task", **options)
