"""Adapters on bases that torch.ao.quantization.quantize_dynamic made: the float model's layers, the library's results.

Two correct results may differ in their last bits, and then an activation that lies between two steps of int8 may be
rounded to the other one: rarely, and seen in all that follows. So int8 is compared on several inputs, most of which
must agree to the last bits; the same graphs with float16 weights, whose activations are not rounded, must on all.
"""

import functools
import warnings

import pytest
import torch

import models
import torchgraft
from all_cases import CASES, base, methods, tolerance
from case import Case
from int8_reference import SCHEMES, linear_names, packed_products, quantised, trace
from models import VARIANTS, make_batch
from oracle import Saved, assert_gates_close, difference, oracle_for
from oracle_reference import _prepared
from own_models import own_encoder
from thinned import thinned

# Post-norm, pre-norm, a decoder with rotary positions, an encoder and decoder, shared layers, projections that are
# applied to positions too.
_NAMES = ["bert_sdpa", "vit_eager", "llama_sdpa", "bart_eager", "albert_sdpa", "t5_eager", "deberta_v2_eager"]
_SEEDS = (0, 1, 2)
_QUICK = {"bert_sdpa", "llama_sdpa"}
_PER_CHANNEL = {"bert_sdpa", "llama_sdpa", "t5_eager"}
_EACH = [pytest.param(name, marks=[pytest.mark.quick] * (name in _QUICK)) for name in _NAMES]
# float16 holds the values of every graph to the last bits; int8 takes other operators at the same places.
_RESULTS = [pytest.param(name, "float16", marks=[pytest.mark.quick] * (name in _QUICK)) for name in _NAMES] + thinned(
    [(name, "per_channel") for name in _NAMES], lambda each: each[0] in _PER_CHANNEL, seconds=3
)


@functools.cache
def _base(name: str, scheme: str, names: frozenset[str] | None = None) -> torch.jit.ScriptModule:
    return trace(CASES[name], scheme, names)


@pytest.mark.parametrize("name", _EACH)
def test_layers_paths_and_numbers_are_those_of_float32(name: str) -> None:
    expected = torchgraft.inspect(base(name, "traced", torch.float32))
    assert expected["layers"][0]["query"]["path"]
    for scheme in SCHEMES:
        assert torchgraft.inspect(_base(name, scheme)) == expected


def _assert_equal_to_the_library(case: Case, scheme: str, names: frozenset[str] | None, wanted: list[str]) -> None:
    grafted = case.reference.graft(_base(case.name, scheme, names), wanted, torch.float32)
    library = _prepared(case.reference, torch.float32)
    allowed = tolerance(case.name, "traced", torch.float32)
    for method in wanted:
        grafted.activate(method)
        distances = []
        for seed in _SEEDS:
            arguments = case.arguments(torch.float32, seed)
            in_float, _ = case.reference.expected(method, torch.float32, arguments)
            with packed_products(library._positional, case.make(torch.float32), scheme, names):
                expected, expected_gates = case.reference.expected(method, torch.float32, arguments)
            with torch.no_grad():
                result, gates = grafted.forward_with_gates(*arguments)
            distances.append(difference(case.hidden(result), expected))
            assert difference(in_float, expected) > 10 * allowed, "nothing was quantised"
            if distances[-1] <= allowed and expected_gates:
                assert_gates_close(gates[method], expected_gates, allowed)
        _assert_small(distances, scheme, allowed, method)


def _assert_small(distances: list[float], scheme: str, allowed: float, what: str) -> None:
    others = [distance for distance in distances if distance > allowed]
    assert len(others) <= (0 if scheme == "float16" else len(distances) // 3), (what, distances)
    assert max(distances) < 0.2, (what, distances)  # a step of few activations


@pytest.mark.parametrize(("name", "scheme"), _RESULTS)
def test_results_and_gates_equal_the_library(name: str, scheme: str) -> None:
    _assert_equal_to_the_library(CASES[name], scheme, None, methods(name))


def test_one_scale_for_all_of_a_weight() -> None:
    _assert_equal_to_the_library(CASES["bert_sdpa"], "per_tensor", None, methods("bert_sdpa"))


@pytest.mark.quick
@pytest.mark.parametrize("part", ["layer.1.", "query", "intermediate", "layer.0.output"])
def test_some_layers_in_int8(part: str) -> None:
    """Other layers keep their numbers."""
    case = CASES["bert_sdpa"]
    names = frozenset(name for name in linear_names(case.make(torch.float32)) if part in name)
    assert torchgraft.inspect(_base(case.name, "per_channel", names)) == torchgraft.inspect(
        base(case.name, "traced", torch.float32)
    )
    _assert_equal_to_the_library(case, "per_channel", names, ["unipelt", "lora_all"])


@functools.cache
def _scripted(name: str) -> torch.jit.ScriptModule:
    variant = VARIANTS[name]
    core, packed, kind = variant.own
    source = models.hugging_face(variant.family, variant.attention, torch.float32)
    model = own_encoder(source, post_norm=variant.post_norm, core=core, packed=packed, kind=kind, dropout=0.1)
    return torch.jit.script(quantised(model.eval(), "per_channel"))


def _adapter(name: str, config: str) -> Saved:
    return oracle_for(VARIANTS[name], torch.float32).adapter(config)


@pytest.mark.parametrize("config", ["unipelt", "mam", "lora_all_gated"])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("own_post_ids_matmul", marks=pytest.mark.quick),
        "own_post_packed_matmul",
        "own_post_scaled_query",
        "own_pre_sdpa_bool",
        "own_pre_unmasked_packed_sdpa",
    ],
)
def test_scripted_models_equal_the_library(name: str, config: str) -> None:
    """Their int8 layers choose between dtypes and versions in branches; packed projections are one int8 product."""
    variant = VARIANTS[name]
    saved = _adapter(name, config)
    grafted = torchgraft.graft(_scripted(name), adapters={"task": saved.directory})
    library = oracle_for(variant, torch.float32)
    source = models.hugging_face(variant.family, variant.attention, torch.float32)
    distances = []
    for seed in _SEEDS:
        batch = make_batch([9, 4, 7] if variant.masked else [9, 9, 9], 9, torch.float32, seed)
        with packed_products(library.model, source, "per_channel"):
            expected = library.run(variant, batch, saved)
        with torch.no_grad():
            result, gates = grafted.forward_with_gates(*variant.arguments(batch))
        distances.append(difference(variant.hidden(result), expected.hidden))
        if distances[-1] <= 1e-5 and expected.gates:
            assert_gates_close(gates["task"], expected.gates, 1e-5)
    _assert_small(distances, "per_channel", 1e-5, config)


@pytest.mark.parametrize("name", ["bert_sdpa", "albert_sdpa"])
def test_int8_embeddings(name: str) -> None:
    """They are read, too, to make inputs up."""
    case = CASES[name]
    model = quantised(case.make(torch.float32), "per_channel")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(
            model, {torch.nn.Embedding: torch.ao.quantization.float_qparams_weight_only_qconfig}
        )
    for module in model.modules():  # the kernel refuses the expanded token types that transformers makes
        if isinstance(module, torch.ao.nn.quantized.Embedding):
            module.forward = functools.partial(_forward_on_contiguous, module)
    module = torch.jit.trace(model, case.arguments(torch.float32, 0), check_trace=False, strict=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is left uncompared
        grafted = case.reference.graft(module, ["unipelt"], torch.float32)
    arguments = case.arguments(torch.float32, 1)
    expected = module(*arguments)
    result = grafted(*arguments)
    assert difference(case.hidden(result), case.hidden(expected)) > 1e-3
    grafted.deactivate()
    assert torch.equal(case.hidden(grafted(*arguments)), case.hidden(expected))


def _forward_on_contiguous(module: torch.ao.nn.quantized.Embedding, indices: torch.Tensor) -> torch.Tensor:
    return torch.ops.quantized.embedding_byte(module._packed_params._packed_weight, indices.contiguous(), False)
