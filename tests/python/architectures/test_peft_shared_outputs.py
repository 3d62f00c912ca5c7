"""PEFT's LoRAs on maps of which two projections read the same outputs, and on attention that is not recognised."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import torchgraft
from peft_support import save_random_lora


def _heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, [2, 8]).transpose(1, 2)


class _Packed(nn.Module):
    """`read` takes queries, keys and values [B, S, 16] from the packed map's outputs, [B, S, 48]."""

    def __init__(self, read: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"qkv": nn.Linear(16, 48), "out": nn.Linear(16, 16)})])
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = map(_heads, self.read(self.layers[0]["qkv"](x)))
        attended = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.layers[0]["out"](attended.transpose(1, 2).flatten(2))


def _traced(model: nn.Module) -> torch.jit.ScriptModule:
    return torch.jit.trace(copy.deepcopy(model), torch.randn(2, 5, 16, dtype=torch.float64))


@pytest.mark.parametrize(
    "read",
    [
        lambda w: (w[..., :16], w[..., 8:24], w[..., 32:]),
        lambda w: (w[..., :16], w[..., 16:32], w[..., 16:32]),
        lambda w: (w[..., :16], w[..., :16], w[..., 32:]),
    ],
    ids=["overlap", "keys are values", "queries are keys"],
)
def test_outputs_that_two_projections_read_are_refused(read: Callable, tmp_path: Path) -> None:
    model = _Packed(read).double().eval()
    traced = _traced(model)
    save_random_lora(model, {"target_modules": ["qkv"]}, tmp_path)
    with pytest.raises(torchgraft.GraftError, match=r"layers\.0\.qkv.* two projections of one layer have in common"):
        torchgraft.load_adapter(traced, tmp_path)


def test_heads_that_lie_in_no_known_order_are_refused(tmp_path: Path) -> None:
    """[3, head size, heads]: neither in a row nor head by head."""

    def read(w: Tensor) -> tuple[Tensor, ...]:
        return tuple(part.flatten(2) for part in w.unflatten(-1, [3, 8, 2]).transpose(-1, -2).unbind(2))

    model = _Packed(read).double().eval()
    traced = _traced(model)
    save_random_lora(model, {"target_modules": ["qkv"]}, tmp_path)
    message = "reads columns of layers.0.qkv that lie neither in a row nor head by head"
    assert any(message in text for text in torchgraft.inspect(traced)["layers"][0]["notes"])
    with pytest.raises(torchgraft.GraftError, match=r"layers\.0\.qkv, which is in no layer that was recognised"):
        torchgraft.load_adapter(traced, tmp_path)


class _Capped(nn.Module):
    """Its scores are soft-capped: no attention that is recognised."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({name: nn.Linear(16, 16) for name in "qkv"})])

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (_heads(self.layers[0][name](x)) for name in "qkv")
        scores = 5 * torch.tanh(q @ k.transpose(-1, -2) / 5)
        return x + (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def test_attention_that_is_not_recognised_is_the_reason(tmp_path: Path) -> None:
    model = _Capped().double().eval()
    traced = _traced(model)
    save_random_lora(model, {"target_modules": ["q"]}, tmp_path)
    with pytest.raises(torchgraft.GraftError, match=r"layers\.0\.q") as caught:
        torchgraft.load_adapter(traced, tmp_path)
    assert "frozen" not in str(caught.value) and "in no layer that was recognised" in str(caught.value)


class _Latents(nn.Module):
    """Two attentions in a row whose queries come from other tokens than the keys."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({name: nn.Linear(16, 16) for name in "qkvo"}) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            q, k, v = (_heads(layer[name](x[:, :1] if name == "q" else x)) for name in "qkv")
            attended = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            x = torch.cat([x[:, :1] + layer["o"](attended.transpose(1, 2).flatten(2)), x[:, 1:]], 1)
        return x


def test_cross_attentions_in_a_row_are_layers_of_their_own(tmp_path: Path) -> None:
    model = _Latents().double().eval()
    traced = _traced(model)
    save_random_lora(model, {"target_modules": ["q", "v"]}, tmp_path)
    grafted = torchgraft.load_adapter(traced, tmp_path)
    x = torch.randn(3, 7, 16, dtype=torch.float64)
    torch.testing.assert_close(grafted(x), model(x), atol=1e-5, rtol=0)
    assert [layer["layer"] for layer in torchgraft.inspect(traced)["layers"]] == [0, 1]


@pytest.mark.parametrize("field", ["layers_to_transform", "layers_pattern"])
def test_layers_beside_a_regular_expression_are_refused_as_by_peft(field: str, tmp_path: Path) -> None:
    model = _Latents().double().eval()
    traced = _traced(model)
    save_random_lora(model, {"target_modules": r".*\.q"}, tmp_path)
    path = tmp_path / "adapter_config.json"
    value = [0] if field == "layers_to_transform" else "layers"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(torchgraft.GraftError, match=f"a regular expression, beside which PEFT takes no {field}"):
        torchgraft.load_adapter(traced, tmp_path)


class _Gated(nn.Module):
    """A gated feed-forward block whose maps have numbers for names."""

    def __init__(self) -> None:
        super().__init__()
        names = {"q": 16, "k": 16, "v": 16, "o": 16, "fc1": 24, "fc2": 24}
        layer = {name: nn.Linear(16, size) for name, size in names.items()} | {"fc3": nn.Linear(24, 16)}
        self.layers = nn.ModuleList([nn.ModuleDict(layer)])

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layers[0]
        q, k, v = (_heads(layer[name](x)) for name in "qkv")
        attended = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + layer["o"](attended.transpose(1, 2).flatten(2))
        return x + layer["fc3"](torch.nn.functional.silu(layer["fc1"](x)) * layer["fc2"](x))


@pytest.mark.parametrize("name", ["fc1", "fc2"])
def test_numbered_maps_beside_a_gate_have_no_place_in_a_frozen_module(name: str, tmp_path: Path) -> None:
    model = _Gated().double().eval()
    traced = _traced(model)
    save_random_lora(model, {"target_modules": [name]}, tmp_path)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    torch.testing.assert_close(torchgraft.load_adapter(traced, tmp_path)(x), model(x), atol=1e-5, rtol=0)
    with pytest.raises(torchgraft.GraftError, match=rf"layers\.0\.{name} has no place in the module, which is frozen"):
        torchgraft.load_adapter(torch.jit.freeze(traced), tmp_path)


class _TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = _Latents(), _Latents()

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x.flip(1))


def test_two_towers_of_like_paths_are_saved_apart(tmp_path: Path) -> None:
    model = _TwoTowers().double().eval()
    traced = _traced(model)
    save_random_lora(model, {"target_modules": ["q", "v"]}, tmp_path / "peft")
    grafted = torchgraft.load_adapter(traced, tmp_path / "peft", name="task")
    torchgraft.save_adapter(grafted, "task", tmp_path / "saved")
    again = torchgraft.load_adapter(traced, tmp_path / "saved")
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    torch.testing.assert_close(grafted(x), model(x), atol=1e-5, rtol=0)
    torch.testing.assert_close(again(x), grafted(x), atol=1e-6, rtol=0)


class _Staged(nn.Module):
    """A layer without a feed-forward block before one with it."""

    def __init__(self) -> None:
        super().__init__()
        maps = {name: nn.Linear(16, 16) for name in "qkvo"}
        more = {name: nn.Linear(16, 16) for name in "qkvo"} | {"up": nn.Linear(16, 24), "down": nn.Linear(24, 16)}
        self.layers = nn.ModuleList([nn.ModuleDict(maps), nn.ModuleDict(more)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            q, k, v = (_heads(layer[name](x)) for name in "qkv")
            attended = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            x = x + layer["o"](attended.transpose(1, 2).flatten(2))
        return x + self.layers[1]["down"](torch.relu(self.layers[1]["up"](x)))


def test_a_layer_without_the_block_of_others_is_named(tmp_path: Path) -> None:
    model = _Staged().double().eval()
    traced = _traced(model)
    save_random_lora(model, {"target_modules": ["q", "up"]}, tmp_path)
    with pytest.raises(torchgraft.GraftError, match=r"the layers 0 have an update and no ffn_in of their own"):
        torchgraft.load_adapter(traced, tmp_path)


def test_a_frozen_module_that_has_an_adapter_takes_another_one(tmp_path: Path) -> None:
    model = _Staged().double().eval()
    traced = torch.jit.freeze(_traced(model))
    save_random_lora(model, {"target_modules": ["q", "v"]}, tmp_path)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    grafted = torchgraft.graft(traced, "lora[r=2]", "fresh")
    first, second = torchgraft.load_adapter(traced, tmp_path), torchgraft.load_adapter(grafted, tmp_path, "task")
    second.activate("task")
    torch.testing.assert_close(first(x), model(x), atol=1e-5, rtol=0)
    torch.testing.assert_close(second(x), model(x), atol=1e-5, rtol=0)


class _Shifted(_Capped):
    """Scores to which `added` is added."""

    def __init__(self, added: float | Tensor) -> None:
        super().__init__()
        self.added = nn.Parameter(added) if isinstance(added, Tensor) else added

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (_heads(self.layers[0][name](x)) for name in "qkv")
        scores = q @ k.transpose(-1, -2) / 3 + self.added
        return x + (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def test_a_number_on_all_scores_is_one_of_a_prefix_too() -> None:
    shifted = torchgraft.graft(_traced(_Shifted(0.7).double().eval()), "prefix_tuning_flat[prefix_length=3]", "task")
    plain_model = _Shifted(0.0).double().eval()
    plain_model.load_state_dict({key: value for key, value in shifted.state_dict().items() if "adapters" not in key})
    plain = torchgraft.graft(_traced(plain_model), "prefix_tuning_flat[prefix_length=3]", "task")
    for bank, other in zip(shifted.adapters.parameters(), plain.adapters.parameters(), strict=True):
        bank.data.normal_()
        other.data.copy_(bank)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    torch.testing.assert_close(shifted(x), plain(x), atol=1e-9, rtol=0)


@pytest.mark.parametrize("added", [1000.0, torch.tensor(9.0), torch.randn(2, 1, 1)], ids=["large", "one", "heads"])
def test_what_rounds_scores_or_is_learned_is_no_mask(added: float | Tensor) -> None:
    with pytest.raises(torchgraft.GraftError, match="not recognised|no attention"):
        torchgraft.graft(_traced(_Shifted(added).eval().double()), "prefix_tuning_flat[prefix_length=3]", "task")
