"""The case table of the ops: every case is a name and a recipe for arguments, made anew for a dtype."""

import math
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Case:
    """gate: None, "gated" or "partly" (adapter 0 is stored as not gated: weight 0, bias +inf)."""

    name: str
    batch: int = 3
    tokens: int = 5
    adapters: int = 3
    gate: str | None = None
    gates: int = 1
    ids: tuple[int, ...] | None = None
    adapter: int = 0
    token_mask: str | None = None  # "ragged", or "empty_row" where one row has no token
    extra: dict = field(default_factory=dict)

    def __str__(self):
        return self.name


ROW_CASES = [
    Case("plain"),
    Case("second_adapter", adapter=1),
    Case("base", adapter=-1),
    Case("base_beside_gate", adapter=-1, gate="gated"),
    Case("gated", gate="gated"),
    Case("gated_last_adapter", gate="gated", adapter=2),
    Case("gated_ragged", gate="gated", token_mask="ragged"),
    Case("gated_empty_row", gate="gated", token_mask="empty_row"),
    Case("ungated_in_gated_bank", gate="partly"),
    Case("ids", ids=(2, 0, 1)),
    Case("ids_with_base", ids=(2, -1, 0)),
    Case("ids_all_base", ids=(-1, -1, -1)),
    Case("ids_all_equal", ids=(1, 1, 1), gate="gated"),
    Case("ids_gated", ids=(2, -1, 0), gate="gated"),
    Case("ids_gated_ragged", ids=(2, -1, 1), gate="gated", token_mask="ragged"),
    Case("ids_partly_gated_empty_row", ids=(0, 2, -1), gate="partly", token_mask="empty_row"),
    Case("ids_repeat", ids=(1, 0, 1), gate="gated"),
    Case("one_token_one_row", batch=1, tokens=1, gate="gated"),
    Case("bank_of_one", adapters=1, gate="gated", ids=(0, -1, 0)),
]


def randn(*shape, dtype):
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def row_arguments(case, features, dtype):
    """The trailing arguments that all ops share."""
    args = {"adapter": case.adapter}
    if case.gate:
        weight = randn(case.adapters, case.gates, features, dtype=dtype)
        bias = randn(case.adapters, case.gates, dtype=dtype)
        if case.gate == "partly":
            weight[0], bias[0] = 0, math.inf
        args |= {"gate_weight": weight, "gate_bias": bias}
    if case.ids is not None:
        args["adapter_ids"] = torch.tensor(case.ids)
    if case.token_mask:
        args["token_mask"] = (
            torch.arange(case.tokens) < torch.arange(case.tokens, case.tokens - case.batch, -1)[:, None]
        )
        if case.token_mask == "empty_row":
            args["token_mask"][0] = False
    return args


def lora(case, dtype, features=8, out_features=6):
    torch.manual_seed(0)
    rank = case.extra.get("rank", 2)
    return {
        "x": randn(case.batch, case.tokens, features, dtype=dtype),
        "base": randn(case.batch, case.tokens, out_features, dtype=dtype),
        "lora_a": randn(case.adapters, rank, features, dtype=dtype),
        "lora_b": randn(case.adapters, out_features, rank, dtype=dtype),
        "scaling": randn(case.adapters, dtype=dtype),
        **row_arguments(case, features, dtype),
    }


def lora_linear(case, dtype, features=8, out_features=6):
    args = lora(case, dtype, features, out_features)
    del args["base"]
    weight = {"weight": randn(out_features, features, dtype=dtype)}
    if case.extra.get("bias", True):
        weight["bias"] = randn(out_features, dtype=dtype)
    return {"x": args.pop("x"), **weight, **({} if "bias" in weight else {"bias": None}), **args}


def bottleneck(case, dtype, features=8):
    torch.manual_seed(0)
    size = case.extra.get("size", 3)
    return {
        "x": randn(case.batch, case.tokens, features, dtype=dtype),
        "residual": randn(case.batch, case.tokens, features, dtype=dtype),
        "down_weight": randn(case.adapters, size, features, dtype=dtype),
        "down_bias": randn(case.adapters, size, dtype=dtype),
        "up_weight": randn(case.adapters, features, size, dtype=dtype),
        "up_bias": randn(case.adapters, features, dtype=dtype),
        "scaling": randn(case.adapters, case.extra.get("channels", 1), dtype=dtype),
        "non_linearity": case.extra.get("non_linearity", "tanh"),
        **row_arguments(case, features, dtype),
    }


def bottleneck_linear(case, dtype, features=8, in_features=5):
    args = bottleneck(case, dtype, features)
    del args["residual"]
    given = {
        "x": args.pop("x"),
        "input": randn(case.batch, case.tokens, in_features, dtype=dtype),
        "weight": randn(features, in_features, dtype=dtype),
        "bias": randn(features, dtype=dtype) if case.extra.get("bias", True) else None,
    }
    return given | args


def attention_mask(kind, batch, heads, queries, keys, dtype):
    """Masks by name; the "blind" ones leave some query of row 0 without any key."""
    real = torch.arange(keys) < torch.arange(keys, keys - batch, -1)[:, None]  # [B, S_k]: row b ends in b pads
    padding = real[:, None, None, :]
    low = torch.finfo(dtype).min
    if kind == "bool_padding":
        return padding
    if kind == "float_padding":
        return torch.zeros(batch, 1, 1, keys, dtype=dtype).masked_fill(~padding, low)
    if kind == "infinite_padding":
        return torch.zeros(batch, 1, 1, keys, dtype=dtype).masked_fill(~padding, -math.inf)
    if kind == "bool_2d":
        return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    if kind == "float_2d":
        return randn(queries, keys, dtype=dtype)
    if kind == "float_3d":
        return randn(heads, queries, keys, dtype=dtype)
    if kind == "float_4d":
        return randn(batch, heads, queries, keys, dtype=dtype)
    if kind == "float_keys_1":
        return randn(batch, 1, queries, 1, dtype=dtype)
    if kind == "bool_blind":
        mask = padding.repeat(1, heads, queries, 1)
        mask[0, :, 1] = False
        return mask
    if kind == "float_blind":
        mask = randn(batch, 1, queries, keys, dtype=dtype)
        mask[0, :, 1] = -math.inf
        mask[-1] = low
        return mask
    raise ValueError(kind)


def prefix(case, dtype, size=4):
    torch.manual_seed(0)
    extra = {"heads": 2, "kv_heads": 2, "positions": 3, "hidden": 6, **case.extra}
    heads, kv_heads, positions = extra["heads"], extra["kv_heads"], extra["positions"]
    keys = extra.get("keys", case.tokens)
    args = {
        "query": randn(case.batch, heads, case.tokens, size, dtype=dtype),
        "key": randn(case.batch, kv_heads, keys, size, dtype=dtype),
        "value": randn(case.batch, kv_heads, keys, size, dtype=dtype),
        "x": randn(case.batch, case.tokens, extra["hidden"], dtype=dtype),
        "prefix_key": randn(case.adapters, kv_heads, positions, size, dtype=dtype),
        "prefix_value": randn(case.adapters, kv_heads, positions, size, dtype=dtype),
        "prefix_length": torch.tensor(extra.get("lengths", [positions] * case.adapters)),
        **row_arguments(case, extra["hidden"], dtype),
    }
    for name in ("is_causal", "scale"):
        if name in extra:
            args[name] = extra[name]
    if heads != kv_heads:
        args["enable_gqa"] = True
    if "mask" in extra:
        args["attn_mask"] = attention_mask(extra["mask"], case.batch, heads, case.tokens, keys, dtype)
    if extra.get("token_major"):
        for name in ("query", "key", "value"):
            args[name] = args[name].transpose(1, 2).contiguous().transpose(1, 2)
    return args


LORA_CASES = [*ROW_CASES, Case("rank_0", extra={"rank": 0}, gate="gated"), Case("no_tokens", tokens=0, gate="gated")]

BOTTLENECK_CASES = [
    *ROW_CASES,
    Case("channel_scaling", extra={"channels": 8}),
    Case("channel_scaling_gated", extra={"channels": 8}, gate="gated", adapter=1),
    Case("channel_scaling_ids", extra={"channels": 8}, gate="partly", ids=(0, -1, 2), token_mask="ragged"),
    Case("relu_ids", extra={"non_linearity": "relu"}, ids=(1, -1, 0), gate="gated"),
    Case("gelu", extra={"non_linearity": "gelu"}, gate="gated"),
    Case("size_0", extra={"size": 0}, gate="gated"),
]

MASKS = [
    "bool_padding",
    "float_padding",
    "infinite_padding",
    "bool_2d",
    "float_2d",
    "float_3d",
    "float_4d",
    "float_keys_1",
    "bool_blind",
    "float_blind",
]

MIXED = {"ids": (2, -1, 0), "gate": "gated"}
RAGGED_BANK = {"lengths": [2, 0, 3]}

PREFIX_CASES = [
    *ROW_CASES,
    Case("two_gates", gate="gated", gates=2),
    Case("two_gates_ids", gates=2, token_mask="ragged", **MIXED),
    Case("causal", gate="gated", extra={"is_causal": True}),
    Case("causal_more_keys_ids", extra={"is_causal": True, "keys": 7}, **MIXED),
    Case("causal_fewer_keys", gate="gated", extra={"is_causal": True, "keys": 3}),
    Case("causal_base", adapter=-1, extra={"is_causal": True}),
    Case("cross", gate="gated", extra={"keys": 9, "mask": "bool_padding"}),
    Case("scale", gate="gated", extra={"scale": 0.3}),
    Case("shorter", adapter=0, gate="gated", extra=RAGGED_BANK),
    Case("length_0", adapter=1, gate="gated", extra=RAGGED_BANK),
    Case("lengths_ids", extra={**RAGGED_BANK, "mask": "float_blind"}, ids=(2, 1, 0), gate="gated"),
    Case("lengths_ids_bool", extra={**RAGGED_BANK, "mask": "bool_blind"}, ids=(1, -1, 2), gate="partly", gates=2),
    Case("no_positions", gate="gated", extra={"positions": 0}),
    Case("no_positions_ids", extra={"positions": 0}, **MIXED),
    Case("no_keys", gate="gated", extra={"keys": 0}),
    Case("no_keys_ids", extra={"keys": 0}, **MIXED),
    Case("no_keys_base", adapter=-1, extra={"keys": 0}),
    Case("grouped", gate="gated", extra={"heads": 6, "kv_heads": 2}),
    Case("grouped_ids", extra={"heads": 6, "kv_heads": 2, "mask": "float_4d"}, **MIXED),
    Case("grouped_causal_base", adapter=-1, extra={"heads": 4, "kv_heads": 2, "is_causal": True}),
    Case("token_major", gate="gated", extra={"token_major": True}),
    Case("token_major_grouped", extra={"heads": 4, "kv_heads": 2, "token_major": True}, **MIXED),
    *(Case(f"mask_{mask}", gate="gated", adapter=1, extra={"mask": mask}) for mask in MASKS),
    *(Case(f"mask_{mask}_ids", extra={"mask": mask}, **MIXED) for mask in MASKS),
    Case("mask_bool_blind_base", adapter=-1, extra={"mask": "bool_blind"}),
    # A query whose keys are all at finfo.min and that sees no prefix attends to all of them alike, also in float32.
    Case("lowest_mask_length_0", adapter=1, gate="gated", extra={**RAGGED_BANK, "mask": "float_blind"}),
    Case("lowest_mask_ids", extra={**RAGGED_BANK, "mask": "float_blind"}, ids=(2, 0, 1)),
    Case("mask_float_3d_base", adapter=-1, extra={"mask": "float_3d"}),
]
