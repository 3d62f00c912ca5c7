"""LoRAs of PEFT that would act at other places than in PEFT are refused."""

import json
import warnings
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

import torchgraft


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (each(x).unflatten(-1, [2, 8]).transpose(1, 2) for each in (self.q, self.k, self.v))
        attended = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.o(attended.transpose(1, 2).flatten(2))


class _Scripted(_Layer):
    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, [2, 8]).transpose(1, 2)
        k = self.k(x).unflatten(-1, [2, 8]).transpose(1, 2)
        v = self.v(x).unflatten(-1, [2, 8]).transpose(1, 2)
        attended = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.o(attended.transpose(1, 2).flatten(2))


class _Layers(nn.Module):
    """Runs `order` of its three layers, and uses the values' map of the first once more if `twice`."""

    def __init__(self, order: tuple[int, ...] = (0, 1, 2), twice: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer() for _ in range(3))
        self.order, self.twice = order, twice

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for index in self.order:
            y = self.layers[index](y)
        return y + torch.tanh(self.layers[0].v(x.flip(1))) if self.twice else y


class _Again(nn.Module):
    """Runs its first layer once more, in a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Scripted() for _ in range(2))

    def forward(self, x: Tensor, again: bool = True) -> Tensor:
        y = x
        for layer in self.layers:
            y = layer(y)
        if again:
            y = self.layers[0](y)
        return y


class _Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.text, self.vision = _Layers(), _Layers()

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.text(x), self.vision(y)


def _save(model: nn.Module, folder: Path, **options: object) -> None:
    torch.manual_seed(1)
    config = peft.LoraConfig(**{"r": 2, "lora_alpha": 4, "init_lora_weights": False} | options)
    peft.get_peft_model(model, config).save_pretrained(str(folder))


def _traced(model: nn.Module, *arguments: Tensor) -> torch.jit.ScriptModule:
    return torch.jit.trace(model.eval(), arguments, check_trace=False)


@pytest.mark.parametrize("projection", ["v", "q"])
def test_a_map_that_runs_elsewhere_too(projection: str, tmp_path: Path) -> None:
    x = torch.randn(2, 5, 16)
    base = _traced(_Layers(twice=True), x)
    _save(_Layers(twice=True), tmp_path, target_modules=[projection])
    if projection == "q":
        torchgraft.load_adapter(base, tmp_path)
        return
    with pytest.raises(torchgraft.GraftError, match=r"selfattn_lora_v of layer 0, on a linear map whose weight.*other"):
        torchgraft.load_adapter(base, tmp_path)
    pool = torchgraft.AdapterPool(base, 2, ["lora[r=2,attn_matrices=['v']]"])
    with pytest.raises(torchgraft.GraftError, match="AdapterPool: .*whose weight the model applies in other places"):
        pool.insert("task", tmp_path)
    torchgraft.graft(base, "lora[r=2,attn_matrices=['v']]", "fresh")  # acts in the layer alone


def test_a_layer_that_runs_again_in_a_branch(tmp_path: Path) -> None:
    base = torch.jit.script(_Again().eval())
    _save(_Again(), tmp_path, target_modules=["q"])
    with pytest.raises(torchgraft.GraftError, match="whose weight the model applies in other places"):
        torchgraft.load_adapter(base, tmp_path)


@pytest.mark.parametrize("tower", ["text", "vision"])
def test_one_tower_of_a_frozen_module(tower: str, tmp_path: Path) -> None:
    frozen = torch.jit.freeze(_traced(_Towers(), torch.randn(2, 5, 16), torch.randn(2, 4, 16)))
    _save(_Towers(), tmp_path, target_modules=rf"{tower}\..*\.(q|v)")
    with pytest.raises(torchgraft.GraftError, match=rf"{tower}\.layers.*several stacks of layers.*before it is frozen"):
        torchgraft.load_adapter(frozen, tmp_path)


def test_layers_of_a_frozen_module_are_those_that_run(tmp_path: Path) -> None:
    x = torch.randn(2, 5, 16)
    frozen = torch.jit.freeze(_traced(_Layers(order=(2, 1, 0)), x))
    _save(_Layers(order=(2, 1, 0)), tmp_path, target_modules=["q"])
    with pytest.warns(UserWarning, match="layers of the adapter are taken in the order in which they run"):
        torchgraft.load_adapter(frozen, tmp_path)
    traced = _traced(_Layers(), x)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        torchgraft.load_adapter(traced, tmp_path)
        torchgraft.graft(frozen, "lora[r=2]", "fresh")


@pytest.mark.parametrize(
    "change",
    [{"layers_to_transform": [1]}, {"target_modules": ["q"]}, {"exclude_modules": ["layers.2.v"]}],
    ids=["layers_to_transform", "target_modules", "exclude_modules"],
)
def test_updates_that_the_configuration_does_not_select(change: dict, tmp_path: Path) -> None:
    base = _traced(_Layers(), torch.randn(2, 5, 16))
    _save(_Layers(), tmp_path, target_modules=["q", "v"])
    torchgraft.load_adapter(base, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(
        torchgraft.GraftError, match=r"update of layers\.\d\.[qv], which target_modules.* do not select"
    ):
        torchgraft.load_adapter(base, tmp_path)
