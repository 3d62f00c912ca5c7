"""Weights that a model uses in several places: a merged LoRA gives what the grafted module gives, or is refused with
the name of the other use."""

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchgraft
from oracle import difference

HIDDEN = 32


def heads_of(x: Tensor) -> Tensor:
    return x.view(x.size(0), x.size(1), 4, 8).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mixed = nn.functional.scaled_dot_product_attention(heads_of(q), heads_of(k), heads_of(v))
    return mixed.transpose(1, 2).flatten(2)


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(HIDDEN, HIDDEN) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(attend(self.q(x), self.k(x), self.v(x)))


class AppliedBeside(_Model):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(attend(self.q(x), self.k(x), self.v(x))) + torch.tanh(self.v(x.flip(1)))


class ReadBeside(_Model):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(attend(self.q(x), self.k(x), self.v(x))) + x @ self.v.weight.t()


class SummedBeside(_Model):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(attend(self.q(x), self.k(x), self.v(x))) * self.v.weight.sum()


class AppliedToHalves(_Model):
    """The value projection runs once more on each half of the tokens."""

    def forward(self, x: Tensor) -> Tensor:
        half = x.size(1) // 2
        beside = torch.cat([self.v(x[:, :half]), self.v(x[:, half:]) * 2.0], dim=1)
        return x + self.out(attend(self.q(x), self.k(x), self.v(x))) + beside


class InALoop(_Model):
    def forward(self, x: Tensor) -> Tensor:
        beside = x
        for _ in range(x.size(1)):
            beside = torch.tanh(self.v(beside))
        return x + self.out(attend(self.q(x), self.k(x), self.v(x))) + beside


class TiedKeysAndValues(_Model):
    def __init__(self) -> None:
        super().__init__()
        self.k.weight = self.v.weight


class View(_Model):
    """Another module applies a view of the weight's memory."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(HIDDEN, HIDDEN // 2, bias=False)
        self.other.weight = nn.Parameter(self.v.weight.detach()[: HIDDEN // 2])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(attend(self.q(x), self.k(x), self.v(x))) + self.other(x).repeat(1, 1, 2)


class OtherMethod(_Model):
    @torch.jit.export
    def encode(self, x: Tensor) -> Tensor:
        return self.v(x)


class OtherMethodRunsForward(_Model):
    @torch.jit.export
    def encode(self, x: Tensor) -> Tensor:
        return self.forward(x) * self.v.weight.size(0)


class OneMapForQueriesAndKeys(_Model):
    def forward(self, x: Tensor) -> Tensor:
        both = self.q(x)
        return x + self.out(attend(both, both, self.v(x)))


class UsedAfterwards(_Model):
    """What the value projection gives is used a second time: the LoRA has changed it."""

    def forward(self, x: Tensor) -> Tensor:
        v = self.v(x)
        return x + self.out(attend(self.q(x), self.k(x), v)) + torch.tanh(v)


class SharedLayers(_Model):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + self.out(attend(self.q(x), self.k(x), self.v(x)))
        return x


class SharedValues(nn.Module):
    """Two layers whose value projections are one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = _Model(), _Model()
        self.second.v = self.first.v

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


EXACT = (UsedAfterwards, SharedLayers, OneMapForQueriesAndKeys, View, OtherMethodRunsForward)
REFUSED = (AppliedBeside, ReadBeside, SummedBeside, AppliedToHalves, InALoop, TiedKeysAndValues, SharedValues,
           OtherMethod)  # fmt: skip
FORMS = ("scripted", "traced")


def saved_and_loaded(module: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    buffer = io.BytesIO()
    torch.jit.save(module, buffer)
    buffer.seek(0)
    return torch.jit.load(buffer)


def inputs() -> Tensor:
    return torch.randn(2, 6, HIDDEN, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def module_of(model: type[nn.Module], form: str) -> torch.jit.ScriptModule:
    torch.manual_seed(0)
    eager = model().double().eval()
    with torch.no_grad():
        return torch.jit.script(eager) if form == "scripted" else torch.jit.trace(eager, inputs())


def with_lora(base: torch.jit.ScriptModule, config: str = "lora[r=4]", **options) -> torch.jit.ScriptModule:
    """The base with the LoRA "task" of drawn weights."""
    grafted = torchgraft.graft(base, config, "task", **options)
    generator = torch.Generator().manual_seed(1)
    for key, parameter in grafted.adapters.named_parameters():
        if key.endswith((".lora_a", ".lora_b")):
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 4
    return grafted


def _forms(*models: type[nn.Module]) -> list[Any]:
    """Each model in each form. A trace has no other methods."""
    pairs = [(model, form) for model in models for form in FORMS]
    return [pair for pair in pairs if not (hasattr(pair[0], "encode") and pair[1] == "traced")]


@pytest.mark.parametrize(("model", "form"), _forms(*EXACT))
def test_a_merged_weight_acts_where_the_adapter_does(model: type[nn.Module], form: str) -> None:
    base = module_of(model, form)
    grafted = with_lora(saved_and_loaded(base))
    merged = torchgraft.merge_adapter(saved_and_loaded(grafted), "task")
    restored = torchgraft.unmerge_adapter(saved_and_loaded(merged), "task")
    with torch.no_grad():
        plain, expected = base(inputs()), grafted(inputs())
        assert difference(plain, expected) > 1e-2
        for result in (merged, saved_and_loaded(merged), torchgraft.ungraft(merged), restored):
            assert difference(result(inputs()), expected) <= 1e-12
        assert difference(torchgraft.ungraft(restored)(inputs()), plain) <= 1e-12
        if hasattr(merged, "encode"):
            assert difference(merged.encode(inputs()), grafted.encode(inputs())) <= 1e-12


@pytest.mark.parametrize(("model", "form"), _forms(*REFUSED))
def test_a_weight_with_another_use_is_not_merged(model: type[nn.Module], form: str) -> None:
    grafted = with_lora(module_of(model, form))
    with torch.no_grad():
        expected = grafted(inputs())
    for module in (grafted, saved_and_loaded(grafted)):
        with pytest.raises(torchgraft.GraftError, match="is used where 'task' does not act in the same way") as error:
            torchgraft.merge_adapter(module, "task")
        assert "v.weight" in str(error.value) or (model is TiedKeysAndValues and "k.weight" in str(error.value))
        assert ("the method 'encode'" if model is OtherMethod else "aten::") in str(error.value)
    with torch.no_grad():
        assert torch.equal(grafted(inputs()), expected)


@pytest.mark.parametrize("form", FORMS)
def test_the_uses_of_a_weight_that_the_adapter_leaves_alone_do_not_matter(form: str) -> None:
    grafted = with_lora(module_of(AppliedBeside, form), "lora[r=4, attn_matrices=['q', 'k']]")
    merged = torchgraft.merge_adapter(grafted, "task")
    with torch.no_grad():
        assert difference(merged(inputs()), grafted(inputs())) <= 1e-12


@pytest.mark.parametrize("form", FORMS)
def test_two_loras_on_one_weight_are_not_merged(form: str) -> None:
    """Keys and values share their weight, and have a LoRA each: their sum acts on neither."""
    grafted = with_lora(module_of(TiedKeysAndValues, form), "lora[r=4, attn_matrices=['k', 'v']]")
    with pytest.raises(torchgraft.GraftError, match="does not act in the same way"):
        torchgraft.merge_adapter(grafted, "task")


@pytest.mark.parametrize("form", FORMS)
def test_inspect_names_a_map_that_gives_queries_and_keys(form: str) -> None:
    (layer,) = torchgraft.inspect(module_of(OneMapForQueriesAndKeys, form))["layers"]
    assert any(note.startswith("its queries and keys are one linear map, q") for note in layer["notes"])
    (layer,) = torchgraft.inspect(module_of(AppliedBeside, form))["layers"]
    assert not any("one linear map" in note for note in layer["notes"])
