"""Directories of `adapters==1.3.0`, unrepaired, on both towers of a CLIP, there and back: it counts the text's layers
first, and has an MLP of prefixes for each tower."""

import functools
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import adapters
import oracle
import torchgraft
from whole_clip import CLIP, TEXT_LAYERS, VISION_LAYERS

_CONFIGS = {name: oracle.CONFIGS[name] for name in (
    "unipelt", "mam", "double_seq_bn_gated", "ia3_gated", "lora_k_leave_out", "prefix_leave_out", "prefix_flat_gated",
    "seq_bn_map")}  # fmt: skip
_NO_TOWERS = "numbers the layers of the text tower first.*do not show two towers"
_DEPTH = TEXT_LAYERS + VISION_LAYERS


@functools.cache
def _library() -> nn.Module:
    model = CLIP.make("eager", torch.float32)
    adapters.init(model.model)
    return model


@functools.cache
def _base() -> torch.jit.ScriptModule:
    return torch.jit.trace(CLIP.make("eager", torch.float32), _arguments(0), check_trace=False, strict=False)


def _arguments(seed: int) -> tuple[Tensor, ...]:
    return CLIP.arguments(torch.float32, seed)


def _write(config: adapters.AdapterConfig, folder: Path) -> Tensor:
    """Saves a random adapter of the library. Returns what the library gives for the arguments of seed 1."""
    oracle.make_oracle_adapter(_library().model, config, "task", 3)
    _library().model.eval().save_adapter(str(folder), "task")
    return _result_of_library()


def _read_by_library(folder: Path) -> Tensor:
    _library().model.load_adapter(str(folder), use_safetensors=True)
    return _result_of_library()


def _result_of_library() -> Tensor:
    """Of the adapter "task", which is gone afterwards."""
    library = _library().eval()
    try:
        library.model.set_active_adapters("task")
        with torch.no_grad():
            result = library(*_arguments(1))
            library.model.set_active_adapters(None)
            assert oracle.difference(library(*_arguments(1)), result) > 0.01
        return result
    finally:
        library.model.delete_adapter("task")


def _result(module: torch.jit.ScriptModule, name: str = "task") -> Tensor:
    module.activate(name)
    with torch.no_grad():
        return module(*_arguments(1))


def _library_numbers() -> list[int]:
    """By the number that inspect() shows: that of the library."""
    paths = [layer["query"]["path"] for layer in torchgraft.inspect(_base())["layers"]]
    return [int(path.split(".")[-3]) + TEXT_LAYERS * ("vision_model" in path) for path in paths]


def test_pictures_run_first() -> None:
    assert _library_numbers() == [2, 3, 4, 0, 1]


@pytest.mark.parametrize("config", _CONFIGS)
def test_there_and_back(config: str, tmp_path: Path) -> None:
    expected = _write(_CONFIGS[config], tmp_path / "library")
    grafted = torchgraft.load_adapter(_base(), tmp_path / "library")
    assert oracle.difference(_result(grafted), expected) <= 1e-5
    torchgraft.save_adapter(grafted, "task", tmp_path / "ours")
    assert oracle.difference(_read_by_library(tmp_path / "ours"), expected) <= 1e-5
    again = torchgraft.load_adapter(grafted, tmp_path / "ours", name="again")
    assert oracle.difference(_result(again, "again"), expected) <= 1e-5
    first, second = (info.config for info in torchgraft.list_adapters(again))
    assert "model_type" not in first
    if not any(word in config for word in ("unipelt", "mam", "prefix")):  # whose prefixes have become flat
        assert first == second


@pytest.mark.parametrize("config", ["lora[leave_out=[1, 3]]", "mam[leave_out=[0, 4]]", "unipelt[leave_out=[3]]"])
def test_what_is_grafted_is_saved_in_the_librarys_numbers(config: str, tmp_path: Path) -> None:
    grafted = torchgraft.graft(_base(), config, "task", trainable="mam" in config)
    numbers = _library_numbers()
    grafted = _drawn(grafted)
    torchgraft.save_adapter(grafted, "task", tmp_path)
    expected = _result(grafted)
    assert oracle.difference(_read_by_library(tmp_path), expected) <= 1e-5
    assert oracle.difference(_result(torchgraft.load_adapter(_base(), tmp_path)), expected) <= 1e-6
    ours = _left_out(json.loads(torchgraft.list_adapters(grafted)[0].config))
    saved = _left_out(json.loads((tmp_path / "adapter_config.json").read_text())["config"])
    assert ours and [numbers[layer] for layer in ours] == saved


def _left_out(config: dict) -> list[int]:
    return config["configs"][0]["leave_out"] if "configs" in config else config["leave_out"]


def _drawn(module: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    """With weights that are not zero."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, tensor in module.adapters.state_dict().items():
            if name.endswith(("lora_b", "up_weight")) and not tensor.any():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
    return module


def test_match_names_the_layers(tmp_path: Path) -> None:
    _write(oracle.CONFIGS["prefix_leave_out"], tmp_path)
    found = dict(torchgraft.match_adapter(_base(), tmp_path))
    numbers = _library_numbers()
    gates = {key: place for key, place in found.items() if key.endswith("prefix_gates.task.weight")}
    assert len(gates) == _DEPTH - 1
    for key, place in gates.items():
        layer = int(key.split(".layers.")[1].split(".")[0]) + TEXT_LAYERS * ("vision_model" in key)
        assert place == f"layer {numbers.index(layer)}, self_prefix: gate_weight"
    pools = {place for key, place in found.items() if key.endswith("control_trans.2.weight")}
    assert pools == {f"the prefixes of clip_{tower}_model_self_prefix: up_weight" for tower in ("text", "vision")}


def test_a_pool_takes_the_librarys_numbers(tmp_path: Path) -> None:
    expected = _write(oracle.CONFIGS["prefix_leave_out"], tmp_path)
    pool = torchgraft.AdapterPool(_base(), 2, [tmp_path])
    pool.insert("task", tmp_path)
    assert pool.stats()["rebuilds"] == 0
    with pool.acquire(["task"] * _arguments(1)[0].size(0)) as lease, torch.no_grad():
        assert oracle.difference(lease.module(*_arguments(1), adapter_ids=lease.ids), expected) <= 1e-5


def test_an_invertible_adapter_is_saved_with_a_warning(tmp_path: Path) -> None:
    """The library has it behind the texts' embeddings, and the pictures' are first."""
    grafted = _drawn(torchgraft.graft(_base(), "seq_bn_inv[leave_out=[4]]", "task"))
    with pytest.warns(UserWarning, match="it gives other results with this directory"):
        torchgraft.save_adapter(grafted, "task", tmp_path)
    again = torchgraft.load_adapter(_base(), tmp_path)
    assert oracle.difference(_result(again), _result(grafted)) <= 1e-6


class _Shortened(nn.Module):
    """Without the last layer of the texts."""

    def __init__(self) -> None:
        super().__init__()
        self.model = CLIP.make("eager", torch.float32).model

    def forward(self, ids: Tensor, mask: Tensor, pixels: Tensor) -> Tensor:
        texts = self.model.text_model(ids, mask, output_hidden_states=True).hidden_states[-2]
        return torch.cat([texts.mean(1), self.model.vision_model(pixels)[0].mean(1)], 1)


def test_numbers_are_not_saved_where_a_layer_does_not_run(tmp_path: Path) -> None:
    base = torch.jit.trace(_Shortened(), _arguments(0), check_trace=False, strict=False)
    assert len(torchgraft.inspect(base)["layers"]) == _DEPTH - 1
    torchgraft.save_adapter(torchgraft.graft(base, "lora", "task"), "task", tmp_path / "lora")
    grafted = torchgraft.graft(base, "lora[leave_out=[1]]", "task")
    with pytest.raises(torchgraft.GraftError, match="has 2 layers, and forward runs 1: the adapters library counts"):
        torchgraft.save_adapter(grafted, "task", tmp_path / "leave_out")


def test_what_shows_no_towers_is_refused(tmp_path: Path) -> None:
    _write(oracle.CONFIGS["lora_k_leave_out"], tmp_path)
    frozen = torch.jit.freeze(_base().eval())
    text = torch.jit.trace(CLIP.make("eager", torch.float32).model.text_model, _arguments(0)[:2], strict=False)
    for base in (frozen, text):
        with pytest.raises(torchgraft.GraftError, match=_NO_TOWERS):
            torchgraft.load_adapter(base, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"leave_out": [\n      1', '"leave_out": [\n      5'))
    with pytest.raises(torchgraft.GraftError, match="names layer 5, and this CLIP has layers 0 to 4"):
        torchgraft.load_adapter(_base(), tmp_path)


def test_prefixes_of_two_sizes_are_refused_where_no_tower_is_known() -> None:
    with pytest.raises(torchgraft.GraftError, match="one MLP makes the prefixes of all layers"):
        torchgraft.graft(torch.jit.freeze(_base().eval()), "prefix_tuning", "task")


@pytest.mark.parametrize("layers", [[VISION_LAYERS - 1], [_DEPTH - 1], "all"], ids=str)
def test_loreft_on_both_towers_is_refused_with_the_reason(layers: list[int] | str) -> None:
    """Layer VISION_LAYERS - 1 is the last of the tower that runs first: the next layer is no reader of it."""
    reason = r"ReFT cannot act on layer \d: the model has several stacks of layers .*trace the tower"
    with pytest.raises(torchgraft.GraftError, match=reason):
        torchgraft.graft(_base(), torchgraft.LoReftConfig(layers=layers), "task")
