"""Attention that is not recognised: sites name its projections, on which LoRAs and bottlenecks act as they do where the
same mathematics is written in a form that is recognised."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import torchgraft
from grafted import reloaded
from oracle import difference
from scripts_here import run_here
from thinned import thinned

HIDDEN = 32


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(HIDDEN, HIDDEN) for _ in range(4))
        self.up, self.down = nn.Linear(HIDDEN, 64), nn.Linear(64, HIDDEN)
        self.first, self.second = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)

    def split(self, x: Tensor) -> Tensor:
        return x.view(x.size(0), x.size(1), 4, 8).transpose(1, 2)

    def weights(self, scores: Tensor) -> Tensor:
        return scores.softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        mixed = self.weights(q @ k.transpose(-1, -2) / 8**0.5) @ v
        x = self.first(x + self.out(mixed.transpose(1, 2).flatten(2)))
        return self.second(x + self.down(torch.relu(self.up(x))))


class _Odd(_Layer):
    """The same mathematics."""

    def weights(self, scores: Tensor) -> Tensor:
        return torch.cumsum(scores.softmax(-1), -1).diff(dim=-1, prepend=torch.zeros_like(scores[..., :1]))


class _Relu(_Layer):
    def weights(self, scores: Tensor) -> Tensor:
        return torch.relu(scores) / scores.size(-1)


class _PreNorm(_Odd):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        q, k, v = self.split(self.q(y)), self.split(self.k(y)), self.split(self.v(y))
        mixed = self.weights(q @ k.transpose(-1, -2) / 8**0.5) @ v
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(torch.relu(self.up(self.second(x))))


class _PlainPreNorm(_PreNorm):
    def weights(self, scores: Tensor) -> Tensor:
        return scores.softmax(-1)


class _Model(nn.Module):
    def __init__(self, *layers: type[nn.Module]) -> None:
        super().__init__()
        self.words = nn.Embedding(20, HIDDEN)
        self.layers = nn.ModuleList([layer() for layer in layers])

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        for layer in self.layers:
            x = layer(x)
        return x


def ids() -> Tensor:
    return torch.randint(20, (3, 6), generator=torch.Generator().manual_seed(1))


def model_of(*layers: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return _Model(*layers).double().eval()


def base_of(form: str, *layers: type[nn.Module]) -> torch.jit.ScriptModule:
    model = model_of(*layers)
    return torch.jit.script(model) if form == "scripted" else torch.jit.trace(model, ids())


def entry(layer: int, **more: object) -> dict[str, object]:
    """As a user writes it."""
    paths = {"query": "q", "key": "k", "value": "v", "output": "out"}
    return {"index": None, "layer": layer} | {
        role: {"path": f"layers.{layer}.{name}"} for role, name in paths.items()
    } | more  # fmt: skip


SITES = {"layers": [entry(0), entry(1)]}
FORMS = ("scripted", "traced")
PAIRS = {"post": (_Layer, _Odd), "pre": (_PlainPreNorm, _PreNorm)}
CONFIGS = [
    "lora[attn_matrices=['q','k','v'], intermediate_lora=True]",
    "lora[r=2, use_gating=True]",
    "par_bn",
    "double_seq_bn",
    "seq_bn[use_gating=True]|lora[attn_output_lora=True]",
]


def drawn(module: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for key, bank in [*module.adapters.named_parameters(), *module.adapters.named_buffers()]:
            if bank.is_floating_point() and not key.endswith(("scaling", "prefix_length")):
                bank += torch.randn(bank.shape, generator=generator, dtype=bank.dtype) / 8
    return module


@pytest.mark.parametrize(
    ("order", "form"),
    thinned(
        [(order, form) for order in PAIRS for form in FORMS],
        lambda pair: pair in [("post", "scripted"), ("pre", "traced")],
    ),
)
@pytest.mark.parametrize("config", CONFIGS)
def test_adapters_are_those_of_the_form_that_is_recognised(config: str, order: str, form: str, tmp_path: Path) -> None:
    plain, odd = (base_of(form, layer, layer) for layer in PAIRS[order])
    assert len(torchgraft.inspect(plain)["layers"]) == 2
    with pytest.raises(torchgraft.GraftError, match="no attention was found"):
        torchgraft.graft(odd, config, "task")
    trained = drawn(torchgraft.graft(plain, config, "task"))
    torchgraft.save_adapter(trained, "task", tmp_path / "task")
    grafted = torchgraft.graft(odd, adapters={"task": tmp_path / "task"}, sites=SITES)
    with torch.no_grad():
        expected, of_base = trained(ids()), plain(ids())
        assert difference(expected, of_base) > 1e-3
        for module in (grafted, reloaded(grafted), torchgraft.lower(grafted)):
            assert difference(module(ids()), expected) <= 1e-10
            mixed = module(ids(), adapter_ids=torch.tensor([0, -1, 0]))
            assert difference(mixed, torch.stack([expected[0], of_base[1], expected[2]])) <= 1e-10
    torchgraft.save_adapter(grafted, "task", tmp_path / "again")
    again = torchgraft.graft(plain, adapters={"task": tmp_path / "again"})
    with torch.no_grad():
        assert difference(again(ids()), expected) <= 1e-10


@pytest.mark.parametrize("form", FORMS)
def test_a_lora_on_attention_without_a_softmax_is_the_formula_s(form: str) -> None:
    base = base_of(form, _Relu, _Relu)
    grafted = drawn(torchgraft.graft(base, "lora[r=2, alpha=6]", "task", sites=SITES))
    grafted = torchgraft.graft(grafted, "seq_bn", "other")  # which finds the sites that the file remembers
    eager = model_of(_Relu, _Relu)
    with torch.no_grad():
        for number, layer in enumerate(eager.layers):
            for name in "qv":
                slot = getattr(getattr(trained_layers(grafted), f"layer_{number}"), f"selfattn_lora_{name}")
                getattr(layer, name).weight += 3.0 * slot.lora_b[0] @ slot.lora_a[0]
        expected = eager(ids())
        grafted.activate("task")
        assert difference(grafted(ids()), expected) <= 1e-12
        merged = torchgraft.merge_adapter(torchgraft.remove_adapter(grafted, "other"), "task")
        assert difference(torchgraft.ungraft(merged)(ids()), expected) <= 1e-12
    assert torchgraft.verify(grafted) == []


def trained_layers(module: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    return module.adapters


def test_beside_attention_that_is_recognised() -> None:
    """The layer that is described stands between two others."""
    base = base_of("traced", _Layer, _Odd, _Layer)
    seen = torchgraft.inspect(base)
    first, last = seen["layers"]
    sites = {"layers": [first, entry(1), last | {"layer": 2}]}
    everywhere = base_of("traced", _Layer, _Layer, _Layer)
    config = "lora|double_seq_bn[leave_out=[0]]|prefix_tuning[leave_out=[1]]"
    trained = drawn(torchgraft.graft(everywhere, config, "task"))
    grafted = torchgraft.graft(base, config, "task", sites=sites)
    grafted.load_state_dict(trained.state_dict())
    with torch.no_grad():
        assert difference(grafted(ids()), trained(ids())) <= 1e-10
    shown = torchgraft.inspect(base, sites=sites)
    assert [layer["index"] for layer in shown["layers"]] == [0, None, 1]
    assert [("self_prefix" in layer["locations"]) for layer in shown["layers"]] == [True, False, True]
    assert torchgraft.inspect(base, sites=shown) == shown
    shown["layers"][1]["ffn_residual"] = False
    assert "output_adapter" not in torchgraft.inspect(base, sites=shown)["layers"][1]["locations"]


WRONG = {
    "no query": ([entry(0, query=None)], 'without an index of layer 0: expected "query"'),
    "no such map": ([entry(0, key={"path": "layers.0.kk"})], "no linear map 'layers.0.kk'; nearby are"),
    "twice": ([entry(0), entry(1, key={"path": "layers.0.k", "out_features": 99})], "has 32 inputs and 32 columns"),
    "an order": ([entry(1), entry(0)], 'entry 1 of "layers" runs before entry 0'),
    "a field that is found": ([entry(0, ffn_residual=False)], '"ffn_residual" is found where "index" is null'),
    "a kind": ([entry(0, kind="other")], 'expected "kind" to be one of self, encoder, cross'),
    "a layer": ([entry(0) | {"layer": -1}], 'expected "layer" of at least 0'),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_descriptions_are_named(case: str) -> None:
    layers, message = WRONG[case]
    with pytest.raises(torchgraft.GraftError, match=message):
        torchgraft.inspect(base_of("traced", _Relu, _Relu), sites={"layers": layers})


def test_prefixes_and_masks_of_gates_need_the_attention() -> None:
    base = base_of("traced", _Relu, _Relu)
    for config in ("prefix_tuning", "mam", "unipelt"):
        with pytest.raises(torchgraft.GraftError, match="no self_prefix in layers 0, 1.*was not recognised"):
            torchgraft.graft(base, config, "task", sites=SITES)
    with pytest.raises(torchgraft.GraftError, match="the attention of layer 0 was not recognised, so that its mask"):
        torchgraft.graft(base, "lora[use_gating=True]", "task", sites=SITES, gate_pooling="unpadded")
    with pytest.raises(torchgraft.GraftError, match="ReFT cannot act on layer 0: its attention was not recognised"):
        torchgraft.graft(base, "loreft", "task", sites=SITES)


def test_the_commands_take_described_attention(tmp_path: Path) -> None:
    base_of("traced", _Relu, _Relu).save(str(tmp_path / "base.pt"))
    (tmp_path / "sites.json").write_text(json.dumps(SITES))
    given = ["--sites", tmp_path / "sites.json"]
    shown = run_here("graft.py", "inspect", tmp_path / "base.pt", *given)
    assert shown.returncode == 0 and "sites name its projections" in shown.stdout and "output_adapter" in shown.stdout
    picture = run_here("graft.py", "inspect", tmp_path / "base.pt", *given, "--svg", tmp_path / "picture.svg")
    assert picture.returncode == 0 and "not recognised" in (tmp_path / "picture.svg").read_text()
    words = ["-o", tmp_path / "out.pt", "--config", "lora|seq_bn", "--name", "task"]
    added = run_here("graft.py", "add", tmp_path / "base.pt", *words, *given)
    assert added.returncode == 0, added.stderr
    assert run_here("graft.py", "verify", tmp_path / "out.pt").returncode == 0
