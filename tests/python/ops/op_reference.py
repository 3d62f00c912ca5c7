"""The operators restated row by row in plain torch, written from their formulas and as slow as it is obvious."""

import math

import torch
import torch.nn.functional as F
from transformers.activations import ACT2FN


def row_adapter(b, adapter_ids, adapter):
    return adapter if adapter_ids is None else int(adapter_ids[b])


def row_gate(x, weight, bias, tokens):
    """x [S, I], weight [G, I], bias [G], tokens bool [S] -> [G]."""
    sigmoids = torch.sigmoid(x @ weight.T + bias)[tokens]
    return sigmoids.mean(0) if len(sigmoids) else torch.zeros_like(bias)


def gates(x, gate_weight, gate_bias, adapter_ids, adapter, token_mask):
    """[B, G] of all rows; zeros for rows without an adapter, ones without gate_weight."""
    rows = []
    for b in range(x.shape[0]):
        n = row_adapter(b, adapter_ids, adapter)
        count = 1 if gate_weight is None else gate_weight.shape[1]
        tokens = torch.ones(x.shape[1], dtype=torch.bool) if token_mask is None else token_mask[b]
        if n == -1:
            rows.append(torch.zeros(count, dtype=x.dtype))
        elif gate_weight is None:
            rows.append(torch.ones(1, dtype=x.dtype))
        else:
            rows.append(row_gate(x[b], gate_weight[n], gate_bias[n], tokens))
    return torch.stack(rows)


def gated_lora(
    x, base, lora_a, lora_b, scaling, gate_weight=None, gate_bias=None, adapter_ids=None, adapter=0, token_mask=None
):
    gate = gates(x, gate_weight, gate_bias, adapter_ids, adapter, token_mask)
    rows = []
    for b in range(x.shape[0]):
        n = row_adapter(b, adapter_ids, adapter)
        update = 0 if n == -1 else scaling[n] * gate[b, 0] * (x[b] @ lora_a[n].T) @ lora_b[n].T
        rows.append(base[b] + update)
    return torch.stack(rows), gate


def gated_lora_linear(x, weight, bias, *lora, **rows):
    return gated_lora(x, F.linear(x, weight, bias), *lora, **rows)


def activation(name):
    return F.leaky_relu if name == "leakyrelu" else ACT2FN[name]


def linear(x, weight, bias, non_linearity):
    return activation(non_linearity)(F.linear(x, weight, bias))


def residual_norm(x, residual, normalized_shape, weight=None, bias=None, eps=1e-5):
    total = x + residual
    dims = list(range(-len(normalized_shape), 0))
    centered = total - total.mean(dims, keepdim=True)
    output = centered / (centered.square().mean(dims, keepdim=True) + eps).sqrt()
    output = output if weight is None else output * weight
    return output if bias is None else output + bias, total


def gated_bottleneck(
    x,
    residual,
    down_weight,
    down_bias,
    up_weight,
    up_bias,
    scaling,
    non_linearity,
    gate_weight=None,
    gate_bias=None,
    adapter_ids=None,
    adapter=0,
    token_mask=None,
):
    gate = gates(x, gate_weight, gate_bias, adapter_ids, adapter, token_mask)
    rows = []
    for b in range(x.shape[0]):
        n = row_adapter(b, adapter_ids, adapter)
        if n == -1:
            rows.append(residual[b] + 0)
            continue
        hidden = activation(non_linearity)(x[b] @ down_weight[n].T + down_bias[n])
        rows.append(residual[b] + scaling[n] * gate[b, 0] * (hidden @ up_weight[n].T + up_bias[n]))
    return torch.stack(rows), gate


def gated_bottleneck_linear(x, input, weight, bias, *bottleneck, **rows):
    return gated_bottleneck(x, F.linear(input, weight, bias), *bottleneck, **rows)


def dense_mask(attn_mask, is_causal, shape, dtype):
    """Any mask of scaled_dot_product_attention as an additive [B, h, S, S_k]."""
    mask = torch.zeros(shape, dtype=dtype)
    if is_causal:
        mask = mask.masked_fill(~torch.ones(shape[-2:], dtype=torch.bool).tril(), -math.inf)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        mask = mask.masked_fill(~attn_mask.broadcast_to(shape), -math.inf)
    elif attn_mask is not None:
        mask = mask + attn_mask.to(dtype)
    return mask


def safe_softmax(scores):
    """Zeros, and no NaN in the gradient, where a query sees nothing."""
    blind = (scores == -math.inf).all(-1, keepdim=True)
    return torch.softmax(scores.masked_fill(blind, 0), -1).masked_fill(blind, 0)


def gated_prefix_attention(
    query,
    key,
    value,
    x,
    prefix_key,
    prefix_value,
    prefix_length,
    attn_mask=None,
    dropout_p=0.0,
    is_causal=False,
    *,
    scale=None,
    enable_gqa=False,
    gate_weight=None,
    gate_bias=None,
    adapter_ids=None,
    adapter=0,
    token_mask=None,
):
    assert dropout_p == 0.0
    batch, heads, queries, size = query.shape
    gate = gates(x, gate_weight, gate_bias, adapter_ids, adapter, token_mask)
    mask = dense_mask(attn_mask, is_causal, (batch, heads, queries, key.shape[2]), query.dtype)
    repeats = heads // key.shape[1]
    rows = []
    for b in range(batch):
        n = row_adapter(b, adapter_ids, adapter)
        used = 0 if n == -1 else int(prefix_length[n])
        keys = torch.cat([gate[b, 0] * prefix_key[n, :, :used], key[b]], 1).repeat_interleave(repeats, 0)
        values = torch.cat([gate[b, -1] * prefix_value[n, :, :used], value[b]], 1).repeat_interleave(repeats, 0)
        scores = query[b] @ keys.mT * (size**-0.5 if scale is None else scale)
        scores = scores + torch.cat([torch.zeros(heads, queries, used, dtype=mask.dtype), mask[b]], -1)
        rows.append(safe_softmax(scores) @ values)
    return torch.stack(rows), gate


def attention_token_mask(x, attn_mask=None):
    batch, tokens = x.shape[:2]
    if attn_mask is None:
        return torch.ones(batch, tokens, dtype=torch.bool)
    visible = attn_mask if attn_mask.dtype == torch.bool else attn_mask > -9e3
    # Prepend the dimensions that broadcasting would, then ask every head and query of the row.
    while visible.dim() < 4:
        visible = visible[None]
    visible = visible.broadcast_to(batch, visible.shape[1], visible.shape[2], tokens)
    seen = [
        [set(torch.nonzero(heads[:, i].any(0)).flatten().tolist()) for i in range(heads.shape[1])] for heads in visible
    ]
    real = [set().union(*rows) for rows in seen]
    return torch.tensor([[j in real[b] for j in range(tokens)] for b in range(batch)])


def reft_positions(row, tokens, positions, token_mask):
    """The first and the last tokens of a row that are changed: two lists, in order."""
    begin, end = 0, tokens
    if token_mask is not None:
        real = token_mask[row].nonzero()[:, 0].tolist()
        begin = real[0] if real else 0
        end = begin + len(real)
    prefix, suffix = positions
    within = [(max(0, start), min(stop, tokens)) for start, stop in ((begin, begin + prefix), (end - suffix, end))]
    return [list(range(*ends)) for ends in within]


def reft_tokens(x, positions, adapter_ids=None, adapter=0, token_mask=None, **others):
    """bool [B, S]: which tokens are changed."""
    result = torch.zeros(x.shape[:2], dtype=torch.bool)
    for b in range(x.shape[0]):
        n = row_adapter(b, adapter_ids, adapter)
        if n != -1:
            for tokens_of in reft_positions(b, x.shape[1], positions[n].tolist(), token_mask):
                result[b, tokens_of] = True
    return result


def reft(
    x,
    source_weight,
    source_bias,
    projection,
    subtraction,
    positions,
    non_linearity="linear",
    adapter_ids=None,
    adapter=0,
    token_mask=None,
):
    rows = []
    for b in range(x.shape[0]):
        n = row_adapter(b, adapter_ids, adapter)
        tokens = [x[b, t] + 0 for t in range(x.shape[1])]
        both = reft_positions(b, x.shape[1], positions[n].tolist(), token_mask) if n != -1 else ()
        for unit, changed in zip((0, -1), both, strict=False):
            for t in changed:
                source = activation(non_linearity)(source_weight[n, unit] @ x[b, t] + source_bias[n, unit])
                source = source - subtraction[n] * (projection[n, unit] @ x[b, t])
                tokens[t] = x[b, t] + source @ projection[n, unit]
        rows.append(torch.stack(tokens) if tokens else x[b] + 0)
    return torch.stack(rows)
