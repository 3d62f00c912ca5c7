"""Scores that a learned temperature scales, and attention without a softmax."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import torchgraft
from odd_layers import HEADS, SIZE, Plain, batch

SCALE = 2.8284271247461903


class Warm(Plain):
    """A temperature of shape `sizes`, applied in one of several ways, before the mask."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.t = nn.Parameter(torch.rand(sizes) + 0.5)

    def warmed(self, scores: Tensor) -> Tensor:
        return scores / self.t

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = self.warmed(torch.matmul(q, k.transpose(-1, -2)) / 2.8284271247461903)
        scores = scores.masked_fill(mask[:, None, None, :] == 0, -1e9)
        return torch.matmul(torch.softmax(scores, -1), v)


class Multiplied(Warm):
    def warmed(self, scores: Tensor) -> Tensor:
        return scores * self.t


class FromTheLeft(Warm):
    def warmed(self, scores: Tensor) -> Tensor:
        return self.t * scores


class Exponent(Warm):
    def warmed(self, scores: Tensor) -> Tensor:
        return scores * self.t.exp()


class Clamped(Warm):
    def warmed(self, scores: Tensor) -> Tensor:
        return scores * self.t.clamp(max=0.9).exp() + 0.1


WAYS: dict[type[Warm], Callable[[Tensor], Tensor]] = {
    Warm: lambda t: 1 / t,
    Multiplied: lambda t: t,
    FromTheLeft: lambda t: t,
    Exponent: torch.exp,
    Clamped: lambda t: t.clamp(max=0.9).exp(),
}
SHAPES = [(), (1,), (1, 1, 1), (HEADS, 1, 1), (1, HEADS, 1, 1)]


def base_of(model: nn.Module, form: str) -> torch.jit.ScriptModule:
    if form == "trace":
        return torch.jit.trace(model, batch(), check_trace=False)
    module = torch.jit.script(model)
    return torch.jit.freeze(module) if form == "freeze" else module


def with_prefix(model: Warm, factor: Tensor, key: Tensor, value: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    """The layer with keys and values [heads, length, size] before its own: the definition of a prefix."""
    rows = x.size(0)
    keys = torch.cat([key.expand(rows, -1, -1, -1), model.heads(model.key(x))], 2)
    values = torch.cat([value.expand(rows, -1, -1, -1), model.heads(model.value(x))], 2)
    scores = torch.matmul(model.heads(model.query(x)), keys.transpose(-1, -2)) / SCALE * factor
    seen = torch.cat([mask.new_ones(rows, key.size(1)), mask], 1)
    scores = scores.masked_fill(seen[:, None, None, :] == 0, -torch.inf)
    return model.finish(x, torch.matmul(torch.softmax(scores, -1), values))


@pytest.mark.quick
@pytest.mark.parametrize("sizes", SHAPES)
@pytest.mark.parametrize("kind", WAYS)
def test_a_learned_temperature_scales_prefixes_alike(kind: type[Warm], sizes: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = kind(sizes).eval().double()
    x, mask = batch()
    x = x.double()
    for form in ("script", "trace", "freeze") if kind is Exponent else ("script",):
        module = base_of(model, form) if form != "trace" else torch.jit.trace(model, (x, mask), check_trace=False)
        grafted = torchgraft.graft(module, "prefix_tuning[prefix_length=3]", "task")
        with torch.no_grad():
            same = grafted(x, mask, adapter_ids=torch.full((3,), -1))
            torch.testing.assert_close(same, model(x, mask), rtol=0, atol=1e-12)
            slot = grafted.adapters.layer_0.self_prefix
            expected = with_prefix(model, WAYS[kind](model.t), slot.prefix_key[0], slot.prefix_value[0], x, mask)
            if kind is Clamped:  # what is added to the scores of the tokens is not added to the prefix's
                continue
            torch.testing.assert_close(grafted(x, mask), expected, rtol=0, atol=1e-12)


def test_in_bfloat16_a_temperature_keeps_the_dtype() -> None:
    model = Warm((HEADS, 1, 1)).eval().bfloat16()
    x, mask = batch()
    grafted = torchgraft.graft(torch.jit.script(model), "prefix_tuning", "task")
    assert grafted(x.bfloat16(), mask).dtype == torch.bfloat16


@pytest.mark.parametrize("sizes", [(7,), (7, 7), (HEADS, 1, 7), (7, 1)])
def test_a_factor_that_differs_by_key_or_query_is_refused(sizes: tuple[int, ...]) -> None:
    module = torch.jit.script(Warm(sizes).eval())
    assert torchgraft.inspect(module)["layers"] == []
    with pytest.raises(torchgraft.GraftError, match="its scale or mask is not understood"):
        torchgraft.graft(module, "prefix_tuning", "task")


class Rectified(Plain):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = torch.relu(torch.matmul(q, k.transpose(-1, -2)) / 2.8284271247461903)
        scores = scores.masked_fill(mask[:, None, None, :] == 0, 0.0)
        return torch.matmul(scores / mask.sum(1)[:, None, None, None], v)


@pytest.mark.parametrize("form", ["script", "trace"])
def test_attention_without_a_softmax_is_named(form: str) -> None:
    (miss,) = torchgraft.inspect(base_of(Rectified().eval(), form))["near_misses"]
    assert "its scores go through aten::relu" in miss and "no softmax" in miss
    with pytest.raises(torchgraft.GraftError, match="aten::relu"):
        torchgraft.graft(base_of(Rectified().eval(), form), "lora", "task")


def test_sizes_are_those_of_the_layer() -> None:
    layer = torchgraft.inspect(torch.jit.script(Warm((HEADS, 1, 1)).eval()))["layers"][0]
    assert (layer["num_heads"], layer["head_dim"]) == (HEADS, SIZE)
