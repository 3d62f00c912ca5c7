"""Layers in branches get adapters there: where the branch runs, the result and the gates are those of the model without
the branch; where it does not, those of the model without the layer."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import torchgraft
from grafted import reloaded
from odd_layers import HIDDEN, Plain, batch
from thinned import thinned

CONFIGS = {
    "lora": "lora[r=4,use_gating=True,intermediate_lora=True,output_lora=True,attn_output_lora=True]",
    "mam": "mam",
    "unipelt": "unipelt",
    "double_seq_bn": "double_seq_bn[use_gating=True]",
    "stream": "seq_bn[original_ln_after=False,use_gating=True]",
}
pytestmark = pytest.mark.quick


class PostNorm(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.last = nn.Linear(HIDDEN, 48), nn.Linear(48, HIDDEN), nn.LayerNorm(HIDDEN)

    def attention(self, x: Tensor, mask: Tensor) -> Tensor:
        mixed = self.attend(self.heads(self.query(x)), self.heads(self.key(x)), self.heads(self.value(x)), mask)
        return self.output(mixed.transpose(1, 2).reshape(x.size(0), x.size(1), 32))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.norm(x + self.attention(x, mask))
        return self.last(x + self.down(torch.relu(self.up(x))))


class PreNorm(PostNorm):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x), mask)
        return x + self.down(torch.relu(self.up(self.last(x))))


class Straight(nn.Module):
    def __init__(self, layer: type[nn.Module], count: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer() for _ in range(count))

    def forward(self, x: Tensor, mask: Tensor, chosen: int = 0) -> Tensor:
        for layer in self.layers:
            x = layer(x, mask)
        return x


class OptionalLast(Straight):
    def forward(self, x: Tensor, mask: Tensor, chosen: int = 0) -> Tensor:
        x = self.layers[1](self.layers[0](x, mask), mask)
        if chosen > 0:
            x = self.layers[2](x, mask)
        return x


class ExitsEarly(Straight):
    def forward(self, x: Tensor, mask: Tensor, chosen: int = 0) -> Tensor:
        x = self.layers[0](x, mask)
        if bool(x.mean() > 100.0) or chosen == 1:
            return x
        x = self.layers[1](x, mask)
        if chosen == 2:
            return x
        return self.layers[2](x, mask)


class EitherOf(Straight):
    def forward(self, x: Tensor, mask: Tensor, chosen: int = 0) -> Tensor:
        x = self.layers[0](x, mask)
        return self.layers[1](x, mask) if chosen == 1 else self.layers[2](x, mask)


# The model with branches, and which layers run with the number.
CASES: dict[str, tuple[type[nn.Module], dict[int, tuple[int, ...]]]] = {
    "optional_last": (OptionalLast, {0: (0, 1), 1: (0, 1, 2)}),
    "exits_early": (ExitsEarly, {1: (0,), 2: (0, 1), 3: (0, 1, 2)}),
    "either_of": (EitherOf, {1: (0, 1), 2: (0, 2)}),
}


def _grafted(base: nn.Module, config: str, pooling: str) -> torch.jit.ScriptModule:
    """With two adapters, drawn. Banks of one size have no padding."""
    module = torch.jit.script(base.eval())
    for name in ("a", "b"):
        module = torchgraft.graft(module, CONFIGS[config], name, gate_pooling=pooling)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, bank in sorted(module.adapters.named_parameters()):
            bank.add_(torch.randn(bank.shape, generator=generator) * 0.1)
    return module


def _with_banks_of(base: nn.Module, config: str, pooling: str, source: torch.jit.ScriptModule, order: tuple) -> object:
    """A straight model's layers are numbered as they run."""
    module = _grafted(base, config, pooling)
    banks = dict(source.adapters.named_parameters())
    with torch.no_grad():
        for name, bank in module.adapters.named_parameters():
            number, rest = name.removeprefix("layer_").split(".", 1)
            bank.copy_(banks[f"layer_{order[int(number)]}.{rest}"])
    return module


def _check_gates(found: dict, expected: dict, order: tuple[int, ...]) -> None:
    assert found.keys() == expected.keys()
    for adapter, layers in expected.items():
        assert sorted(found[adapter]) == [order[number] for number in sorted(layers)]
        for number, locations in layers.items():
            assert found[adapter][order[number]].keys() == locations.keys()
            for location, gate in locations.items():
                torch.testing.assert_close(found[adapter][order[number]][location], gate, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layer", [PostNorm, PreNorm])
@pytest.mark.parametrize(
    ("config", "pooling"),
    thinned(
        itertools.product(CONFIGS, ("all", "unpadded")),
        lambda each: each in (("unipelt", "unpadded"), ("stream", "all")),
    ),
)
@pytest.mark.parametrize("name", CASES)
def test_adapters_act_where_the_branch_runs(name: str, config: str, layer: type[nn.Module], pooling: str) -> None:
    model, runs = CASES[name]
    whole = model(layer)
    module = reloaded(_grafted(whole, config, pooling))
    x, mask = batch()
    for chosen, order in runs.items():
        straight = Straight(layer, len(order))
        for number, index in enumerate(order):
            straight.layers[number].load_state_dict(whole.layers[index].state_dict())
        wanted = _with_banks_of(straight, config, pooling, module, order)
        for ids in (None, torch.tensor([1, -1, 0])):
            with torch.no_grad():
                found, gates = module.forward_with_gates(x, mask, chosen, ids)
                expected, expected_gates = wanted.forward_with_gates(x, mask, chosen, ids)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            _check_gates(gates, expected_gates, order)
        assert (found[1] - whole(x, mask, chosen)[1]).abs().max() <= 1e-5
        assert (found[0] - whole(x, mask, chosen)[0]).abs().max() > 0.01


CHANGES: dict[str, Callable] = {
    "lower": torchgraft.lower,
    "optimize": torchgraft.optimize,
    "freeze": lambda module: torch.jit.freeze(module),
    "save": lambda module: torchgraft.rename_adapter(reloaded(module), "a", "z"),
    "remove": lambda module: torchgraft.remove_adapter(torchgraft.graft(module, "seq_bn", "c", active="a"), "c"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_made_of_such_a_module_gives_the_same(change: str) -> None:
    module = _grafted(ExitsEarly(PreNorm), "unipelt", "all")
    module.activate("a")
    changed = CHANGES[change](module)
    for chosen in CASES["exits_early"][1]:
        for ids in (None, torch.tensor([1, -1, 0])):
            with torch.no_grad():
                result, expected = (each(*batch(), chosen, ids) for each in (changed, module))
            torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


def test_an_adapter_of_a_straight_model_loads_and_trains(tmp_path: Path) -> None:
    straight, model = Straight(PreNorm), OptionalLast(PreNorm)
    model.load_state_dict(straight.state_dict())
    source = _grafted(straight, "unipelt", "all")
    source.activate("a")
    torchgraft.save_adapter(source, "a", tmp_path)
    module = torchgraft.load_adapter(torch.jit.script(model.eval()), tmp_path, trainable=True)
    with torch.no_grad():
        torch.testing.assert_close(module(*batch(), 1), source(*batch()), rtol=1e-5, atol=1e-5)
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    for chosen in (0, 1):
        module.zero_grad()
        module(*batch(), chosen).square().sum().backward()
        of_last = [parameter.grad for name, parameter in trained.items() if "layer_2" in name]
        assert of_last and any(grad is not None and grad.abs().max() > 0 for grad in of_last) == bool(chosen)


def test_a_program_has_the_branch_of_its_example() -> None:
    module = _grafted(OptionalLast(PreNorm), "unipelt", "all")
    ids = torch.tensor([1, -1, 0])
    for chosen in (0, 1):
        program = torchgraft.export(module, (*batch(), chosen), gates=True).module()
        with torch.no_grad():
            found, gates = program(*batch(), chosen, ids)
            torch.testing.assert_close(found, module(*batch(), chosen, ids), rtol=1e-5, atol=1e-6)
        assert gates["layer_2.selfattn_lora"].shape == gates["layer_1.selfattn_lora"].shape == (3, 2)
        assert gates["layer_2.selfattn_lora"].isnan().all() == (chosen == 0)


def test_what_cannot_be_in_such_a_module_is_refused() -> None:
    module = _grafted(OptionalLast(PreNorm), "lora", "all")
    where = r"layer 2 \(layers.2.query\) stands in a branch of the module"
    with pytest.raises(torchgraft.GraftError, match=f"compose: no composition can be in this module: {where}"):
        torchgraft.compose(module, "c", torchgraft.Stack("a", "b"))
    with pytest.raises(torchgraft.GraftError, match="ReFT cannot act on layer 2: its attention stands in a branch"):
        torchgraft.graft(module, "loreft", "r")


class HalfInABranch(Straight):
    """The feed-forward block of the last layer stands outside."""

    def forward(self, x: Tensor, mask: Tensor, chosen: int = 0) -> Tensor:
        last = self.layers[2]
        x = self.layers[1](self.layers[0](x, mask), mask)
        if chosen > 0:
            x = x + last.attention(last.norm(x), mask)
        return x + last.down(torch.relu(last.up(last.last(x))))


def test_half_of_a_layer_in_a_branch_is_named() -> None:
    message = "at layers.2.query: attention was left out: it is inside a branch, and no whole layer is"
    with pytest.raises(torchgraft.GraftError, match=message):
        torchgraft.graft(torch.jit.script(HalfInABranch(PreNorm).eval()), "lora", "task")
