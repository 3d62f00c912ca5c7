"""The restated references: the definition where the library can be asked, and models that are what they restate."""

import functools

import pytest
import torch

import hugging_face_cases
from all_cases import CASES, FORMS, METHODS, base, methods, tolerance
from oracle import assert_gates_close, difference
from restated_cases import post_norm, pre_norm
from restated_reference import Attention, FeedForward, Layer, RestatedReference, slots_of

_RESTATED = [(name, form) for name, form in FORMS if isinstance(CASES[name].reference, RestatedReference)]
# Softmax over keys that are all masked: sdpa gives zeros, the model's own softmax gives nan or a mean over padding.
_MASKED_ROWS = {("modernbert_eager", "traced")}
# With grad mode off torch.nn packs real tokens together and gives zeros at padding; a trace with grad mode on does not.
_OTHERWISE_EAGER = {("torch_encoder_post_padding", "traced")}


def _bert(number: int) -> Layer:
    parts = post_norm(
        f"model.encoder.layer.{number}",
        ("attention.self.query", "attention.self.key", "attention.self.value"),
        ("attention.output.dense", "output.dense"),
        ("attention.output.LayerNorm", "output.LayerNorm"),
        ("intermediate.dense", "output.dense"),
    )
    return Layer(number, **parts)


def _vit(number: int) -> Layer:
    parts = pre_norm(
        f"model.encoder.layer.{number}",
        "attention.attention",
        ("query", "key", "value"),
        ("attention.output.dense", "output.dense"),
        ("layernorm_before", "layernorm_after"),
        ("intermediate.dense", "output.dense"),
    )
    return Layer(number, **parts)


def _bart_attention(path: str, name: str, kind: str) -> Attention:
    return Attention(
        *(f"{path}.{name}.{matrix}_proj" for matrix in "qkv"),
        branch=f"{path}.{name}.out_proj",
        residual=f"{path}.{name}.q_proj",
        norm=f"{path}.{name}_layer_norm",
        kind=kind,
    )


def _bart(number: int, stage: str, index: int) -> Layer:
    path = f"model.{stage}.layers.{index}"
    attentions = [_bart_attention(path, "self_attn", "self" if stage == "decoder" else "encoder")]
    if stage == "decoder":
        attentions.append(_bart_attention(path, "encoder_attn", "cross"))
    block = FeedForward(f"{path}.fc1", f"{path}.fc2", f"{path}.fc2", f"{path}.fc1", f"{path}.final_layer_norm")
    return Layer(number, tuple(attentions), block)


def _numbered(layer, model) -> list[Layer]:
    return [layer(number) for number in range(model.model.config.num_hidden_layers)]


def _bart_layers(model) -> list[Layer]:
    encoders, decoders = len(model.model.encoder.layers), len(model.model.decoder.layers)
    return [_bart(i, "encoder", i) for i in range(encoders)] + [
        _bart(encoders + i, "decoder", i) for i in range(decoders)
    ]


_KNOWN = {
    "bert_sdpa": functools.partial(_numbered, _bert),
    "vit_sdpa": functools.partial(_numbered, _vit),
    "bart_sdpa": _bart_layers,
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", _KNOWN)
def test_the_restatement_is_the_librarys(name: str, method: str) -> None:
    """The same parameters, the same results and gates, where the library supports the model."""
    case, dtype = hugging_face_cases.CASES[name], torch.float64
    grafted = case.reference.graft(base(name, "traced", dtype), [method], dtype)
    restated = RestatedReference(case.make, _KNOWN[name])
    for seed in (1, 2):
        arguments = case.arguments(dtype, seed)
        expected, expected_gates = case.reference.expected(method, dtype, arguments)
        result, gates = restated.restate(slots_of(grafted), method, dtype, arguments)
        assert difference(result, expected) <= tolerance(name, "traced", dtype)
        assert_gates_close(gates, expected_gates, tolerance(name, "traced", dtype))


@pytest.mark.parametrize(("name", "form"), _RESTATED, ids=["-".join(each) for each in _RESTATED])
def test_the_base_computes_what_its_restatement_does(name: str, form: str) -> None:
    case, dtype = CASES[name], torch.float64
    script, model = base(name, form, dtype), case.make(dtype)
    for seed in (0, 1, 2):
        arguments = case.arguments(dtype, seed)
        restated, _ = case.reference.restate({}, None, dtype, arguments)
        with torch.no_grad():
            result, eager = case.hidden(script(*arguments)), case.hidden(model(*arguments))
        if (name, form) not in _MASKED_ROWS:
            assert difference(result, restated) <= max(tolerance(name, form, dtype), 1e-6)
        if (name, form) not in _MASKED_ROWS | _OTHERWISE_EAGER:
            assert difference(result, eager) <= max(tolerance(name, form, dtype), 1e-6)


@pytest.mark.parametrize("name", sorted({name for name, _ in _RESTATED}))
def test_every_method_moves_the_result_and_its_gates(name: str) -> None:
    case, dtype = CASES[name], torch.float32
    arguments = case.arguments(dtype, 1)
    plain, _ = case.reference.restate({}, None, dtype, arguments)
    grafted = case.reference.graft(base(name, case.forms[0], dtype), methods(name), dtype)
    for method in methods(name):
        result, gates = case.reference.run(grafted, method, arguments)
        assert difference(result, plain) > 0.05
        for gate in (gate for locations in gates.values() for gate in locations.values()):
            assert gate.size(0) == arguments[0].size(0) or name.startswith("torch_")  # tokens come first in some
            assert (gate - 0.5).abs().max() > 0.02
