"""Drawn calls of every operator against the float64 reference: sizes from none to more than a kernel's block, dtypes,
strides, ids, masks, gates. Results where nothing is recorded, results where a graph is, and all gradients.

TORCHGRAFT_DRAWN_CALLS: how many of each operator (25). A failure names its number, which is the seed of its call.
"""

import math
import os
import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import op_checks
import op_reference
from op_cases import MASKS, attention_mask

CALLS = int(os.environ.get("TORCHGRAFT_DRAWN_CALLS", "25"))
# Of the largest number of a result or a gradient: what sums of some hundred products may be off.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 0.08, torch.float16: 0.02}
NARROW = (torch.bfloat16, torch.float16)
SMOOTH = ["tanh", "gelu", "silu", "gelu_new", "sigmoid", "linear", "mish"]
WITH_KINKS = ["relu", "leakyrelu"]  # a rounded number may lie on the other side of the kink, where the slope is another


def beside_others(tensor: Tensor) -> Tensor:
    """Every second number of its memory."""
    return torch.stack([tensor, tensor], -1)[..., 0]


def last_dimension_first(tensor: Tensor) -> Tensor:
    return tensor.movedim(-1, 0).contiguous().movedim(0, -1)


def last_dimensions_swapped(tensor: Tensor) -> Tensor:
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2) if tensor.dim() > 1 else tensor


def within_larger_rows(tensor: Tensor) -> Tensor:
    margin = tensor.new_ones(*tensor.shape[:-1], 3)
    return torch.cat([margin, tensor, margin], -1)[..., 3 : 3 + tensor.size(-1)]


def first_repeated(tensor: Tensor) -> Tensor:
    """With a stride of 0."""
    return tensor[:1].expand_as(tensor)


LAYOUTS = [beside_others, last_dimension_first, last_dimensions_swapped, within_larger_rows, first_repeated]


class Draw:
    """The choices of one call. Tensors hold numbers that `dtype` has."""

    def __init__(self, number: int):
        self._source = random.Random(number)
        torch.manual_seed(number)
        self.dtype = self.choose(op_checks.TOLERANCE)

    def choose(self, choices):
        return self._source.choice(list(choices))

    def often(self) -> bool:
        return self._source.random() < 0.6

    def size(self, least: int = 1) -> int:
        """Mostly few; at times more than a block of a kernel; seldom none, where that is allowed."""
        return max(least, self.choose([0, 1, 1, 2, 3, 4, 5, 8, 13, 17, 34, 70]))

    def floats(self, *shape: int, terms: int = 1) -> Tensor:
        """terms: how many products with these numbers are summed up."""
        return (torch.randn(shape, dtype=torch.float64) / max(terms, 1) ** 0.5).to(self.dtype)

    def non_linearity(self) -> str:
        return self.choose(SMOOTH + WITH_KINKS if self.dtype == torch.float64 else SMOOTH)

    def bits(self, *shape: int) -> Tensor:
        return torch.rand(shape) < self.choose([0.2, 0.6, 0.9])

    def rows(self, x: Tensor, adapters: int, most_gates: int = 1) -> dict:
        """The trailing arguments. most_gates: 0 for an operator without a gate."""
        batch, tokens, features = x.shape
        args = {"adapter": self.choose(range(-1, adapters))}
        if most_gates > 0 and self.often():
            gates = self.choose(range(1, most_gates + 1))
            weight = self.floats(adapters, gates, features, terms=features)
            bias = self.floats(adapters, gates)
            if self.often():
                weight[0], bias[0] = 0, math.inf  # an adapter without a gate in a bank that has gates
            args |= {"gate_weight": weight, "gate_bias": bias}
        if self.often():
            least, most = self.choose([(-1, adapters), (0, adapters), (adapters - 1, adapters), (-1, 0)])
            args["adapter_ids"] = torch.randint(least, most, (batch,))
        if self.often():
            args["token_mask"] = self.bits(batch, tokens)
        return args


def lora(draw: Draw) -> dict:
    adapters, features, outputs, rank = draw.size(), draw.size(), draw.size(least=0), draw.size(least=0)
    x = draw.floats(draw.choose([1, 2, 3, 5]), draw.size(least=0), features)
    return {
        "x": x,
        "base": draw.floats(*x.shape[:2], outputs),
        "lora_a": draw.floats(adapters, rank, features, terms=features),
        "lora_b": draw.floats(adapters, outputs, rank, terms=rank),
        "scaling": draw.floats(adapters),
        **draw.rows(x, adapters),
    }


def linear_map(draw: Draw, inputs: int, outputs: int) -> dict:
    bias = draw.floats(outputs) if draw.often() else None
    return {"weight": draw.floats(outputs, inputs, terms=inputs), "bias": bias}


def lora_linear(draw: Draw) -> dict:
    args = lora(draw)
    outputs = args.pop("base").size(2)
    return args | linear_map(draw, args["x"].size(2), outputs)


def bottleneck(draw: Draw) -> dict:
    adapters, hidden, size = draw.size(), draw.size(), draw.size(least=0)
    x = draw.floats(draw.choose([1, 2, 3, 5]), draw.size(least=0), hidden)
    return {
        "x": x,
        "residual": draw.floats(*x.shape),
        "down_weight": draw.floats(adapters, size, hidden, terms=hidden),
        "down_bias": draw.floats(adapters, size),
        "up_weight": draw.floats(adapters, hidden, size, terms=size),
        "up_bias": draw.floats(adapters, hidden),
        "scaling": draw.floats(adapters, draw.choose([1, hidden])),
        "non_linearity": draw.non_linearity(),
        **draw.rows(x, adapters),
    }


def bottleneck_linear(draw: Draw) -> dict:
    args = bottleneck(draw)
    batch, tokens, hidden = args.pop("residual").shape
    inputs = draw.size()
    return args | {"input": draw.floats(batch, tokens, inputs)} | linear_map(draw, inputs, hidden)


def prefix_attention(draw: Draw) -> dict:
    batch, queries, keys, positions = draw.choose([1, 2, 3]), draw.size(), draw.size(least=0), draw.size(least=0)
    kv_heads, size, adapters = draw.choose([1, 2, 3]), draw.choose([1, 4, 12, 33]), draw.choose([1, 2, 3])
    heads = kv_heads * draw.choose([1, 1, 2, 3])
    x = draw.floats(batch, queries, draw.size())
    args = {
        "query": draw.floats(batch, heads, queries, size),
        "key": draw.floats(batch, kv_heads, keys, size),
        "value": draw.floats(batch, kv_heads, keys, size),
        "x": x,
        "prefix_key": draw.floats(adapters, kv_heads, positions, size),
        "prefix_value": draw.floats(adapters, kv_heads, positions, size),
        "prefix_length": torch.randint(0, positions + 1, (adapters,)),
        "enable_gqa": heads != kv_heads or draw.often(),
        "scale": draw.choose([None, 0.3]),
        **draw.rows(x, adapters, most_gates=2),
    }
    mask = draw.choose([None, "causal", *MASKS])
    if mask == "causal":
        args["is_causal"] = True
    elif mask is not None and (queries > 1 or not mask.endswith("blind")):
        args["attn_mask"] = attention_mask(mask, batch, heads, queries, keys, draw.dtype)
    return args


def reft(draw: Draw) -> dict:
    adapters, units, rank, hidden = draw.size(), draw.choose([1, 2]), draw.size(least=0), draw.size()
    x = draw.floats(draw.choose([1, 2, 3, 5]), draw.size(least=0), hidden)
    tokens = x.size(1)
    # Beside first positions the library needs as many tokens as there are last ones.
    counts = [(draw.choose(range(tokens + 3)), draw.choose(range(tokens + 1))) for _ in range(adapters - 1)]
    return {
        "x": x,
        "source_weight": draw.floats(adapters, units, rank, hidden, terms=hidden),
        "source_bias": draw.floats(adapters, units, rank),
        "projection": draw.floats(adapters, units, rank, hidden, terms=hidden),
        "subtraction": torch.randint(0, 2, (adapters,)).to(draw.dtype),
        "positions": torch.tensor([*counts, (0, draw.choose([0, 1, tokens + 2, 2**62, -1, -(2**63)]))]),
        "non_linearity": draw.non_linearity(),
        **draw.rows(x, adapters, most_gates=0),
    }


def linear(draw: Draw) -> dict:
    inputs = draw.choose([0, 1, 5, 37, 150, 600])  # a kernel sums 128 or 512 terms at a time
    x = draw.floats(*(draw.size(least=0) for _ in range(draw.choose([0, 1, 2]))), inputs)
    return {"x": x, **linear_map(draw, inputs, draw.size(least=0)), "non_linearity": draw.non_linearity()}


def residual_norm(draw: Draw) -> dict:
    features = draw.choose(
        [8, 37, 130]
    )  # of fewer, numbers that lie close together would be divided by next to nothing
    rows = [draw.size() for _ in range(draw.choose([0, 1, 2]))]
    shapes = [[*rows, features], [features], [*(1 for _ in rows), features]]
    x, residual = draw.choose([(shapes[0], shapes[0]), (shapes[0], draw.choose(shapes)), (shapes[1], shapes[0])])
    optional = [None, draw.floats(features)]
    return {
        "x": draw.floats(*x),
        "residual": draw.floats(*residual),
        "normalized_shape": [features],
        "weight": draw.choose(optional),
        "bias": draw.choose(optional),
        "eps": draw.choose([1e-3, 1e-1]),
    }


def token_mask(draw: Draw) -> dict:
    batch, tokens, heads = draw.choose([1, 2, 3]), draw.size(), draw.choose([1, 2])
    queries = draw.choose({1, 2, 4, 9} - {tokens})  # not of the tokens themselves, for which the reference has no rule
    shape = [draw.choose([1, batch]), draw.choose([1, heads]), queries, draw.choose([1, tokens])]
    mask = draw.bits(*shape[draw.choose([0, 1, 2]) :])
    if draw.often():
        hidden = draw.choose([-math.inf, torch.finfo(draw.dtype).min, -1e4])
        mask = draw.floats(*mask.shape).masked_fill(~mask, hidden)
    return {"x": draw.floats(batch, tokens, 3), "attn_mask": draw.choose([None, mask, mask, mask])}


@dataclass(frozen=True)
class Operator:
    arguments: Callable[[Draw], dict]
    reference: Callable
    results: int = 2


OPERATORS = {
    "gated_lora": Operator(lora, op_reference.gated_lora),
    "gated_lora_linear": Operator(lora_linear, lambda x, weight, bias, **rest: op_reference.gated_lora(
        x, torch.nn.functional.linear(x, weight, bias), **rest)),
    "gated_bottleneck": Operator(bottleneck, op_reference.gated_bottleneck),
    "gated_bottleneck_linear": Operator(bottleneck_linear, lambda input, weight, bias, **rest:
        op_reference.gated_bottleneck(residual=torch.nn.functional.linear(input, weight, bias), **rest)),
    "gated_prefix_attention": Operator(prefix_attention, op_reference.gated_prefix_attention),
    "reft": Operator(reft, op_reference.reft, results=1),
    "linear": Operator(linear, op_reference.linear, results=1),
    "residual_norm": Operator(residual_norm, op_reference.residual_norm),
    "attention_token_mask": Operator(token_mask, op_reference.attention_token_mask, results=1),
}  # fmt: skip


def test_every_operator_is_drawn() -> None:
    assert set(OPERATORS) == op_checks.registered_operators()


def laid_out(function: Callable, layouts: dict[str, Callable], results: int) -> Callable:
    """`function` of tensors in these layouts, which autograd sees. Returns a tuple."""

    def call(**args):
        given = {name: layouts[name](value) if name in layouts else value for name, value in args.items()}
        result = function(**given)
        return (result,) if results == 1 else result

    return call


def assert_close(actual: Tensor, wanted: Tensor, dtype: torch.dtype, what: str) -> None:
    if actual.dtype == torch.bool:
        assert torch.equal(actual, wanted), what
        return
    assert actual.isfinite().all(), what
    size = max(1.0, wanted.abs().max().item()) if wanted.numel() else 1.0
    torch.testing.assert_close(
        actual.double(), wanted, rtol=0, atol=TOLERANCE[dtype] * size, msg=lambda text: f"{what}: {text}"
    )


def check_call(name: str, number: int) -> None:
    draw, drawn = Draw(number), OPERATORS[name]
    args = drawn.arguments(draw)
    tensors = [key for key, value in args.items() if isinstance(value, Tensor)]
    layouts = {key: draw.choose(LAYOUTS) for key in tensors if not draw.often()}
    op = laid_out(getattr(torch.ops.torchgraft, name), layouts, drawn.results)
    reference = laid_out(drawn.reference, layouts, drawn.results)
    wide = op_checks.cast(args, torch.float64)
    wanted = reference(**wide)
    with torch.no_grad():
        plain = op(**args)
    recorded = op(**op_checks.with_grad(args))
    for result, of_graph, want in zip(plain, recorded, wanted, strict=True):
        assert_close(result, want, draw.dtype, "result")
        assert_close(of_graph.detach(), want, draw.dtype, "result of a recorded call")
    if wanted[0].dtype == torch.bool:
        return
    weights = (1.0,) * drawn.results
    found, expected = (op_checks.gradients(function, given, weights=weights)
                       for function, given in ((op, args), (reference, wide)))  # fmt: skip
    pairs = {
        key: (torch.zeros_like(args[key]) if found[key] is None else found[key],
              torch.zeros_like(wide[key]) if want is None else want)
        for key, want in expected.items()
    }  # fmt: skip
    if draw.dtype in NARROW:  # a sum of large terms that nearly cancel has few digits: all gradients together
        flat = [
            torch.cat([gradient.double().flatten() for gradient in part]) for part in zip(*pairs.values(), strict=True)
        ]
        assert flat[0].isfinite().all()
        assert (flat[0] - flat[1]).norm() <= TOLERANCE[draw.dtype] * flat[1].norm().clamp_min(1)
        return
    for key, (gradient, want) in pairs.items():
        assert_close(gradient, want, draw.dtype, f"gradient of {key}")


@pytest.mark.parametrize("name", OPERATORS)
def test_drawn_calls_equal_the_reference(name: str) -> None:
    for number in range(CALLS):
        try:
            check_call(name, number)
        except Exception as error:
            error.add_note(f"{name}, call {number}")
            raise
