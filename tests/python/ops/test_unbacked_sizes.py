"""Sizes that are unknown while a graph is made (torch.export's unbacked ones): results have them, no guard is added."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import op_checks

ops = torch.ops.torchgraft
HIDDEN, RANK, HEADS, POSITIONS = 16, 4, 2, 3


def lora_bank():
    return torch.randn(2, RANK, HIDDEN), torch.randn(2, HIDDEN, RANK), torch.ones(2)


def bottleneck_bank():
    down = torch.randn(2, RANK, HIDDEN), torch.randn(2, RANK)
    return *down, torch.randn(2, HIDDEN, RANK), torch.randn(2, HIDDEN), torch.ones(2, 1), "gelu"


def reft_bank():
    unit = torch.randn(2, 2, RANK, HIDDEN)
    positions = torch.tensor([[1, 2], [0, 1]])
    return unit, torch.randn(2, 2, RANK), unit, torch.ones(2), positions, "relu"


def gate():
    return torch.randn(2, 1, HIDDEN), torch.randn(2, 1)


def prefix_attention(x, heads, **options):
    query = torch.randn(x.size(0), heads, x.size(1), 8)
    key = torch.randn(x.size(0), HEADS, x.size(1), 8)
    prefix = torch.randn(2, HEADS, POSITIONS, 8)
    return ops.gated_prefix_attention(query, key, key, x, prefix, prefix, torch.full((2,), POSITIONS), **options)


CALLS = {
    "gated_lora": lambda x, ids: ops.gated_lora(x, x, *lora_bank(), *gate(), ids),
    "gated_lora_linear": lambda x, ids: ops.gated_lora_linear(x, torch.randn(HIDDEN, HIDDEN), None, *lora_bank()),
    "gated_bottleneck": lambda x, ids: ops.gated_bottleneck(x, x, *bottleneck_bank(), *gate(), ids),
    "gated_bottleneck_linear": lambda x, ids: ops.gated_bottleneck_linear(
        x, x, torch.randn(HIDDEN, HIDDEN), None, *bottleneck_bank(), adapter=-1
    ),
    "gated_prefix_attention": lambda x, ids: prefix_attention(x, HEADS),
    "grouped heads under a mask": lambda x, ids: prefix_attention(
        x, 2 * HEADS, attn_mask=x.new_zeros(x.size(0), 1, 1, x.size(1)), enable_gqa=True, adapter_ids=ids
    ),
    "reft": lambda x, ids: (ops.reft(x, *reft_bank(), ids),) * 2,
    "linear": lambda x, ids: (ops.linear(x, torch.randn(HIDDEN, HIDDEN), None, "gelu"),) * 2,
    "residual_norm": lambda x, ids: ops.residual_norm(x, x, [HIDDEN], torch.randn(HIDDEN), None),
    "attention_token_mask": lambda x, ids: (ops.attention_token_mask(x, x.new_zeros(x.size(0), 1, 1, x.size(1))),) * 2,
}


def test_every_operator_is_called():
    assert op_checks.registered_operators() <= set(CALLS)


@pytest.mark.parametrize("name", CALLS)
def test_unbacked_batch_and_tokens_pass_without_guards(name):
    shapes = ShapeEnv()
    with FakeTensorMode(shape_env=shapes):
        batch, tokens = shapes.create_unbacked_symint(), shapes.create_unbacked_symint()
        torch._check(batch >= 1)
        torch._check(tokens >= 1)
        results = CALLS[name](torch.randn(batch, tokens, HIDDEN), torch.zeros(batch, dtype=torch.long))
    assert all(str(result.shape[0]) == str(batch) for result in results)
    assert not shapes.guards
