"""quantize(): the numbers of torch.ao.quantization.quantize_dynamic on the eager model, without its code."""

import functools
import warnings

import pytest
import torch
import torch.ao.nn.quantized.dynamic
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import torchgraft
from all_cases import CASES, base, methods
from case import Case
from grafted import reloaded
from int8_reference import packed_products, quantised
from oracle import difference
from oracle_reference import _prepared

_NAMES = ["bert_sdpa", "gpt2_sdpa", "vit_eager", "t5_eager", "albert_sdpa", "llama_sdpa", "deberta_v2_eager"]
_EACH = [pytest.param(name, marks=[pytest.mark.quick] * (name in ("bert_sdpa", "gpt2_sdpa"))) for name in _NAMES]
_SEEDS = (0, 1, 2)


@functools.cache
def _module(name: str) -> torch.jit.ScriptModule:
    return torchgraft.quantize(base(name, "traced", torch.float32))


def _eager(case: Case) -> nn.Module:
    """The eager model, quantised by torch. GPT-2's Conv1D, which torch leaves alone, is a linear map first."""
    model = case.make(torch.float32)
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            linear = nn.Linear(*module.weight.shape)
            linear.weight.data, linear.bias.data = module.weight.data.t().contiguous(), module.bias.data
            model.set_submodule(name, linear)
    return quantised(model, "per_channel")


def _packed(module: nn.Module) -> dict[str, tuple[Tensor, Tensor | None]]:
    """(weight, bias) of each packed linear map, by path."""
    found = {}
    for name, part in module.named_modules():
        if isinstance(part, torch.ao.nn.quantized.dynamic.Linear):
            found[name] = torch.ops.quantized.linear_unpack(part._packed_params._packed_params)
        elif isinstance(part, torch.jit.ScriptModule) and hasattr(part, "_packed_params"):
            found[name] = torch.ops.quantized.linear_unpack(part._packed_params)
    return found


@pytest.mark.parametrize("name", _EACH)
def test_weights_are_torchs_bit_for_bit(name: str) -> None:
    expected = _packed(_eager(CASES[name]))
    actual = _packed(reloaded(_module(name)))
    # What forward does not run, such as a pooler whose result it drops, is not in the file.
    assert set(actual) <= set(expected) and len(actual) >= 6
    for path, (weight, bias) in actual.items():
        wanted, wanted_bias = expected[path]
        assert torch.equal(weight.int_repr(), wanted.int_repr()), path
        assert torch.equal(weight.q_per_channel_scales(), wanted.q_per_channel_scales()), path
        assert (bias is None) == (wanted_bias is None) and (bias is None or torch.equal(bias, wanted_bias)), path


@pytest.mark.parametrize("name", _EACH)
def test_results_are_torchs(name: str) -> None:
    """But where an activation lies between two steps of int8: see test_int8.py."""
    case = CASES[name]
    module = reloaded(_module(name))
    eager = _eager(case)
    distances = []
    for seed in _SEEDS:
        arguments = case.arguments(torch.float32, seed)
        with torch.no_grad():
            expected = case.hidden(eager(*arguments))
            distances.append(difference(case.hidden(module(*arguments)), expected))
            assert difference(case.hidden(base(name, "traced", torch.float32)(*arguments)), expected) > 1e-3
    assert sorted(distances)[len(distances) // 2] <= 2e-5 and max(distances) < 0.2, distances


@pytest.mark.parametrize("name", _EACH)
def test_layers_and_paths_stay(name: str) -> None:
    assert torchgraft.inspect(_module(name)) == torchgraft.inspect(base(name, "traced", torch.float32))


@pytest.mark.parametrize("name", ["bert_sdpa", "llama_sdpa"])
def test_a_grafted_module_keeps_its_adapters(name: str) -> None:
    case = CASES[name]
    wanted = methods(name)
    grafted = case.reference.graft(base(name, "traced", torch.float32), wanted, torch.float32)
    made = reloaded(torchgraft.quantize(grafted))
    assert made.adapter_names() == grafted.adapter_names() and made.active_adapter() == grafted.active_adapter()
    before, after = (dict(module.adapters.named_buffers()) for module in (grafted, made))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    library = _prepared(case.reference, torch.float32)
    for method in wanted:
        made.activate(method)
        distances = []
        for seed in _SEEDS:
            arguments = case.arguments(torch.float32, seed)
            with packed_products(library._positional, case.make(torch.float32), "per_channel"):
                expected, _ = case.reference.expected(method, torch.float32, arguments)
            with torch.no_grad():
                distances.append(difference(case.hidden(made(*arguments)), expected))
        assert sorted(distances)[1] <= 1e-5 and max(distances) < 0.2, (method, distances)


@pytest.mark.parametrize("name", ["bert_sdpa", "gpt2_sdpa", "vit_eager"])
def test_the_reported_error_is_that_of_each_product(name: str) -> None:
    """Measured with hooks on the eager model in float32."""
    case = CASES[name]
    arguments = case.arguments(torch.float32, 1)
    quantised_maps = {
        path: part for path, part in _eager(case).named_modules()
        if isinstance(part, torch.ao.nn.quantized.dynamic.Linear)
    }  # fmt: skip
    expected = {}
    model = case.make(torch.float32)
    for path, part in quantised_maps.items():

        def measure(_, inputs, output, path=path, part=part):
            error = torch.linalg.vector_norm(part(inputs[0]) - output) / torch.linalg.vector_norm(output)
            expected[path] = error.item()

        model.get_submodule(path).register_forward_hook(measure)
    with torch.no_grad():
        model(*arguments)
    reported = torchgraft.quantization_error(base(name, "traced", torch.float32), arguments)
    assert {entry.path for entry in reported} <= set(expected)
    for entry in reported:
        assert entry.error == pytest.approx(expected[entry.path], rel=0.02), entry.path
        assert 0 < entry.error < 0.1


def _encoder() -> nn.TransformerEncoder:
    torch.manual_seed(3)
    layer = nn.TransformerEncoderLayer(48, 4, 80, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


def test_torch_nn_scripted() -> None:
    """torch quantises the feed-forward blocks of its own encoder layers only, and cannot run or script the result on
    their fast path."""
    encoder = _encoder()
    scripted = torch.jit.script(encoder)
    x = torch.randn(3, 7, 48)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            expected = quantised(encoder, "per_channel")(x)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    made = reloaded(torchgraft.quantize(scripted, skip=["query", "key", "value", "output"]))
    with torch.no_grad():
        assert difference(made(x), expected) < 0.05 < 20 * difference(encoder(x), expected)
        whole = reloaded(torchgraft.quantize(scripted))(x)
        assert 1e-4 < difference(whole, encoder(x)) < 0.1
    paths = {entry.path for entry in torchgraft.linear_maps(scripted) if not entry.kept}
    assert {"layers.0.self_attn.in_proj", "layers.1.linear2"} <= paths


def test_skip_by_role_path_and_module() -> None:
    module = base("bert_sdpa", "traced", torch.float32)

    def kept(skip: list[str]) -> set[str]:
        return {entry.path for entry in torchgraft.linear_maps(module, skip=skip) if entry.kept == "skip names it"}

    layer = "model.encoder.layer.0"
    assert kept([]) == set()
    assert kept(["query"]) == {f"model.encoder.layer.{i}.attention.self.query" for i in range(2)}
    assert kept([f"{layer}.output.dense"]) == {f"{layer}.output.dense"}
    assert len(kept([layer])) == 6 and len(kept([f"{layer}.attention", "ffn_out"])) == 4 + 2
    for wrong in ("model.encoder.layer.0.attention.self.quer", "attention"):
        with pytest.raises(
            torchgraft.GraftError, match=f"quantize: skip names '{wrong}', which is no linear map's path"
        ):
            torchgraft.quantize(module, skip=[wrong])


def test_a_weight_that_something_else_reads_stays_beside_its_int8() -> None:
    """T5's and others' output projection is the embedding."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(32, 48)
            self.encoder = _encoder()

        def forward(self, ids: Tensor) -> Tensor:
            return nn.functional.linear(self.encoder(self.embedding(ids)), self.embedding.weight)

    torch.manual_seed(0)
    model = torch.jit.script(Tied().eval())
    made = reloaded(torchgraft.quantize(model))
    assert [name for name, _ in made.embedding.named_parameters()] == ["weight"]
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        assert 0 < difference(made(ids), model(ids)) < 0.2


def test_layers_that_share_weights_share_their_int8() -> None:
    maps = torchgraft.linear_maps(base("albert_sdpa", "traced", torch.float32))
    paths = {entry.path for entry in maps if not entry.kept}
    assert set(_packed(_module("albert_sdpa"))) == paths and len(paths) < len(maps)


def test_what_cannot_be_quantised_is_refused() -> None:
    module = base("bert_sdpa", "traced", torch.float32)
    with pytest.raises(torchgraft.GraftError, match="(?s)none of the .* linear maps .*Double on cpu, not float32"):
        torchgraft.quantize(base("bert_sdpa", "traced", torch.float64))
    with pytest.raises(torchgraft.GraftError, match="(?s)maps: it is packed already"):
        torchgraft.quantize(_module("bert_sdpa"))
    with pytest.raises(torchgraft.GraftError, match="'task' is trainable; train it before the base is quantised"):
        torchgraft.quantize(torchgraft.graft(module, config="lora", name="task", trainable=True))
    with pytest.raises(TypeError):
        torchgraft.quantize(nn.Linear(2, 2))


def test_the_module_itself_stays_as_it_is() -> None:
    case = CASES["bert_sdpa"]
    module = reloaded(base("bert_sdpa", "traced", torch.float32))
    arguments = case.arguments(torch.float32, 1)
    before, size = module(*arguments), len(list(module.parameters()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torchgraft.quantize(module)
    assert torch.equal(case.hidden(module(*arguments)), case.hidden(before))
    assert len(list(module.parameters())) == size


@pytest.mark.parametrize("form", [torch.jit.freeze, torch.jit.optimize_for_inference])
def test_a_frozen_module(form) -> None:
    """Its weights are constants without paths."""
    case = CASES["bert_sdpa"]
    module = reloaded(torchgraft.quantize(form(reloaded(base("bert_sdpa", "traced", torch.float32)).eval())))
    arguments = case.arguments(torch.float32, 1)
    with torch.no_grad():
        expected = case.hidden(_module("bert_sdpa")(*arguments))
        assert difference(case.hidden(module(*arguments)), expected) < 0.05
        assert difference(case.hidden(base("bert_sdpa", "traced", torch.float32)(*arguments)), expected) > 1e-3
