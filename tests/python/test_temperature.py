"""Scores that a learned temperature scales, and attention without a softmax."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import torchgraft
from odd_layers import HEADS, HIDDEN, SIZE, Plain, batch

SCALE = 2.8284271247461903


class Warm(Plain):
    """A temperature of shape `sizes`, applied in one of several ways, before the mask."""

    added = 0.0

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
    added = 0.1

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
    """The layer with keys and values [heads, length, size] before its own: the definition of a prefix.

    A number that is added to all scores is added to a prefix's, too, whose keys stand before the tokens'.
    """
    rows = x.size(0)
    keys = torch.cat([key.expand(rows, -1, -1, -1), model.heads(model.key(x))], 2)
    values = torch.cat([value.expand(rows, -1, -1, -1), model.heads(model.value(x))], 2)
    scores = torch.matmul(model.heads(model.query(x)), keys.transpose(-1, -2)) / SCALE * factor
    scores = scores + model.added
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


class OneMore(Plain):
    """A softmax with one more token, which nobody attends to: its sum is 1 + sum."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = torch.matmul(q, k.transpose(-1, -2)) / 2.8284271247461903
        e = scores.masked_fill(mask[:, None, None, :] == 0, -1e4).exp()
        return torch.matmul(e / (1 + e.sum(-1, keepdim=True)), v)


class NotQuite(Plain):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        e = torch.exp(torch.matmul(q, k.transpose(-1, -2)) / 2.8284271247461903)
        return torch.matmul(e / (e.sum(-1, keepdim=True) + 1e-6), v)


@pytest.mark.parametrize("form", ["script", "trace"])
@pytest.mark.parametrize(("model", "name"), [(Rectified, "relu"), (OneMore, "exp"), (NotQuite, "exp")])
def test_attention_without_a_softmax_is_named(model: type[Plain], name: str, form: str) -> None:
    misses = torchgraft.inspect(base_of(model().eval(), form))["near_misses"]
    assert any(f"its scores go through aten::{name}" in miss and "no softmax" in miss for miss in misses)
    with pytest.raises(torchgraft.GraftError, match=f"aten::{name}"):
        torchgraft.graft(base_of(model().eval(), form), "lora", "task")


def test_sizes_are_those_of_the_layer() -> None:
    layer = torchgraft.inspect(torch.jit.script(Warm((HEADS, 1, 1)).eval()))["layers"][0]
    assert (layer["num_heads"], layer["head_dim"]) == (HEADS, SIZE)


class HeadsFirst(Plain):
    """Scores [h, B, S, S], and a factor [h, 1, 1, 1], which broadcasts against [B, h, S, S] where B is h."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.t = nn.Parameter(torch.rand(sizes) + 0.5)

    def rows(self, x: Tensor) -> Tensor:
        return self.heads(x).reshape(-1, x.size(1), 8)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.rows(self.query(x)), self.rows(self.key(x)), self.rows(self.value(x))
        scores = torch.bmm(q, k.transpose(1, 2)).view(4, -1, x.size(1), x.size(1)) * self.t
        mixed = torch.bmm(torch.softmax(scores, -1).view(-1, x.size(1), x.size(1)), v)
        return self.finish(x, mixed.view(x.size(0), 4, x.size(1), 8))


@pytest.mark.parametrize("sizes", [(HEADS, 1, 1, 1), (HEADS, 7, 1, 1), (3, 1, 1)])
@pytest.mark.parametrize("kind", [Warm, HeadsFirst])
def test_a_factor_for_each_row_is_refused(kind: type[nn.Module], sizes: tuple[int, ...]) -> None:
    with pytest.raises(torchgraft.GraftError, match="its scale or mask is not understood"):
        torchgraft.graft(torch.jit.script(kind(sizes).eval()), "prefix_tuning", "task", verify=False)


class Relative(Warm):
    """A bias of relative positions, a product with a parameter, before that of queries and keys."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        super().__init__(sizes)
        self.positions = nn.Parameter(torch.randn(1, HEADS, SIZE, 7))

    def summed(self, relative: Tensor, scores: Tensor) -> Tensor:
        return relative * self.t + scores

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = self.summed(torch.matmul(q, self.positions), torch.matmul(q, k.transpose(-1, -2)))
        return torch.matmul(torch.softmax(scores.masked_fill(mask[:, None, None, :] == 0, -1e9), -1), v)


class Unscaled(Relative):
    def summed(self, relative: Tensor, scores: Tensor) -> Tensor:
        return relative + scores


class Behind(Relative):
    def summed(self, relative: Tensor, scores: Tensor) -> Tensor:
        return scores + relative / self.t


BIASES: dict[type[Relative], Callable[[Tensor], Tensor]] = {
    Relative: lambda t: t,
    Unscaled: torch.ones_like,
    Behind: lambda t: 1 / t,
}


@pytest.mark.parametrize("kind", BIASES)
@pytest.mark.parametrize("form", ["script", "freeze"])
def test_prefixes_come_beside_the_keys_and_not_beside_positions(kind: type[Relative], form: str) -> None:
    torch.manual_seed(0)
    model = kind((HEADS, 1, 1)).eval().double()
    x, mask = batch()
    x = x.double()
    grafted = torchgraft.graft(base_of(model, form), "prefix_tuning[prefix_length=3]", "task")
    slot = grafted.adapters.layer_0.self_prefix
    with torch.no_grad():
        q, k, v = (model.heads(each(x)) for each in (model.query, model.key, model.value))
        before = q @ slot.prefix_key[0].expand(3, -1, -1, -1).transpose(-1, -2)
        scores = q @ k.transpose(-1, -2) + q @ model.positions * BIASES[kind](model.t)
        scores = scores.masked_fill(mask[:, None, None, :] == 0, -torch.inf)
        values = torch.cat([slot.prefix_value[0].expand(3, -1, -1, -1), v], 2)
        expected = model.finish(x, torch.softmax(torch.cat([before, scores], -1), -1) @ values)
        torch.testing.assert_close(grafted(x, mask), expected, rtol=0, atol=1e-12)


class TwoKeys(Plain):
    """Two products of tokens: a prefix of which would be meant is not known."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, other = self.heads(self.query(x)), self.heads(self.key(x)), self.heads(self.other(x))
        scores = torch.matmul(q, k.transpose(-1, -2)) + torch.matmul(q, other.transpose(-1, -2)) * 0.5
        return self.finish(x, torch.matmul(torch.softmax(scores, -1), self.heads(self.value(x))))


class PositionsLast(Plain):
    """baddbmm, whose own product is that of the positions."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(3 * HEADS, SIZE, 7))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (self.heads(each).reshape(-1, 7, 8) for each in (self.query(x), self.key(x), self.value(x)))
        scores = torch.baddbmm(torch.bmm(q, k.transpose(1, 2)), q, self.positions)
        return self.finish(x, torch.bmm(torch.softmax(scores, -1), v).view(x.size(0), 4, x.size(1), 8))


@pytest.mark.parametrize("kind", [TwoKeys, PositionsLast])
def test_a_sum_of_which_the_keys_are_not_clear_is_refused(kind: type[nn.Module]) -> None:
    module = torch.jit.script(kind().eval())
    message = {TwoKeys: "adds two products, and which one is of", PositionsLast: "not come from a product of queries"}
    with pytest.raises(torchgraft.GraftError, match=message[kind]):
        torchgraft.graft(module, "prefix_tuning", "task", verify=False)


class Experts(Plain):
    """A layer with one of four experts for each text behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, 4)
        self.first, self.second = nn.Parameter(torch.randn(4, HIDDEN, 24)), nn.Parameter(torch.randn(4, 24, HIDDEN))

    def weights(self, routed: Tensor) -> tuple[Tensor, Tensor]:
        chosen = routed.argmax(-1)
        return self.first.index_select(0, chosen), self.second.index_select(0, chosen)

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        y = self.norm(x + self.output(mixed.transpose(1, 2).reshape(x.size(0), x.size(1), 32)))
        first, second = self.weights(self.router(y.mean(1)))
        return y + torch.bmm(torch.relu(torch.bmm(y, first)), second)


class Indexed(Experts):
    def weights(self, routed: Tensor) -> tuple[Tensor, Tensor]:
        chosen = routed.argmax(-1)
        return self.first[chosen], self.second[chosen]


class Gathered(Experts):
    def weights(self, routed: Tensor) -> tuple[Tensor, Tensor]:
        chosen = routed.argmax(-1).view(-1, 1, 1)
        first, second = chosen.expand(-1, 32, 24), chosen.expand(-1, 24, 32)
        return torch.gather(self.first, 0, first), torch.gather(self.second, 0, second)


class Mixed(Experts):
    def weights(self, routed: Tensor) -> tuple[Tensor, Tensor]:
        shares = torch.softmax(routed, -1)
        first = torch.matmul(shares, self.first.view(4, -1)).view(-1, 32, 24)
        return first, torch.matmul(shares, self.second.view(4, -1)).view(-1, 24, 32)


@pytest.mark.parametrize("kind", [Experts, Indexed, Gathered, Mixed])
@pytest.mark.parametrize("form", ["script", "trace"])
def test_experts_are_no_attention(kind: type[Experts], form: str) -> None:
    module = base_of(kind().eval(), form)
    assert not any("aten::relu" in miss for miss in torchgraft.inspect(module)["near_misses"])
    assert len(torchgraft.inspect(torchgraft.graft(module, "lora", "task"))["layers"]) == 1
