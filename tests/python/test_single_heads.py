"""Heads that a model computes one by one are no layers: they are named, and nothing is grafted onto them in silence."""

import pytest
import torch
from torch import Tensor, nn

import torchgraft
from oracle import difference

HIDDEN = 32


def _one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One head: q, k and v are [B, S, d]."""
    return torch.softmax(q @ k.transpose(-1, -2) / 8**0.5, -1) @ v


def _all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def heads(x: Tensor) -> Tensor:
        return x.view(x.size(0), x.size(1), 4, 8).transpose(1, 2)

    return _one(heads(q), heads(k), heads(v)).transpose(1, 2).flatten(2)


class Projections(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(HIDDEN, HIDDEN) for _ in range(4))


class Sliced(Projections):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        heads = []
        for h in range(4):
            part = slice(8 * h, 8 * h + 8)
            heads.append(_one(q[..., part], k[..., part], v[..., part]))
        return x + self.out(torch.cat(heads, -1))


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        heads = [_one(a, b, c) for a, b, c in zip(q.split(8, -1), k.split(8, -1), v.split(8, -1), strict=True)]
        return x + self.out(torch.stack(heads, 2).flatten(2))


class WrittenIntoPlace(Projections):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        mixed = torch.zeros_like(x)
        for h in range(4):
            part = slice(8 * h, 8 * h + 8)
            mixed[..., part] = _one(q[..., part], k[..., part], v[..., part])
        return x + self.out(mixed)


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(HIDDEN, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return _one(self.q(x), self.k(x), self.v(x))


class ListOfHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads, self.out = nn.ModuleList(Head() for _ in range(4)), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(torch.cat([head(x) for head in self.heads], -1))


class Whole(Projections):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(_all(self.q(x), self.k(x), self.v(x)))


class SideBySide(nn.Module):
    """Two attentions with output projections of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Projections(), Projections()

    def forward(self, x: Tensor) -> Tensor:
        a = self.first.out(_all(self.first.q(x), self.first.k(x), self.first.v(x)))
        b = self.second.out(_all(self.second.q(x), self.second.k(x), self.second.v(x)))
        return x + a + b


def traced(model: type[nn.Module]) -> torch.jit.ScriptModule:
    torch.manual_seed(0)
    with torch.no_grad():
        return torch.jit.trace(model().double().eval(), inputs())


def inputs() -> Tensor:
    return torch.randn(2, 6, HIDDEN, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize("config", ["lora", "prefix_tuning", "lora|seq_bn"])
@pytest.mark.parametrize("model", [Sliced, Packed, WrittenIntoPlace, ListOfHeads])
def test_heads_one_by_one_are_refused(model: type[nn.Module], config: str) -> None:
    with pytest.raises(torchgraft.GraftError, match="4 attentions were left out: .* they are heads of one attention"):
        torchgraft.graft(traced(model), config, "task")


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Whole(), ListOfHeads()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def test_beside_whole_attention_they_need_allow_partial() -> None:
    base = traced(TwoLayers)
    assert len(torchgraft.inspect(base)["layers"]) == 1
    with pytest.raises(torchgraft.GraftError, match="(?s)others are not and get no adapter:.*heads of one attention"):
        torchgraft.graft(base, "lora", "task")
    with pytest.warns(UserWarning, match="heads of one attention"):
        grafted = torchgraft.graft(base, "lora", "task", allow_partial=True)
    assert difference(grafted(inputs()), base(inputs())) <= 1e-12


def test_a_directory_of_whole_attention_is_refused_for_heads_one_by_one(tmp_path) -> None:
    """The directory of one layer of four heads has as many numbers as that of four layers of one head."""
    for config in ("lora", "prefix_tuning"):
        directory = tmp_path / config
        torchgraft.save_adapter(torchgraft.graft(traced(Whole), config, "task"), "task", directory)
        torchgraft.graft(traced(Whole), adapters={"task": directory})
        for model in (Sliced, ListOfHeads):
            with pytest.raises(torchgraft.GraftError, match="heads of one attention"):
                torchgraft.graft(traced(model), adapters={"task": directory})


@pytest.mark.parametrize("model", [Whole, SideBySide])
def test_whole_attentions_stay_layers(model: type[nn.Module]) -> None:
    found = torchgraft.inspect(traced(model))
    assert [layer["num_heads"] for layer in found["layers"]] == [4] * len(found["layers"])
    assert len(found["layers"]) == (1 if model is Whole else 2) and not found["near_misses"]
