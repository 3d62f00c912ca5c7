"""The base models of the tests: small random ones, as TorchScript, each with the Hugging Face model it equals.

A Variant says how a base is built, called and compared. Sizes are chosen so that no two mean the same number: hidden
48, heads 4, head width 12, feed-forward 80, layers 3.
"""

import functools
from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    RobertaConfig,
    RobertaModel,
    ViTConfig,
    ViTModel,
)

from own_models import copy_linear, own_encoder

HIDDEN, HEADS, FFN, LAYERS, VOCABULARY, POSITIONS = 48, 4, 80, 3, 97, 64
DROPOUT = 0.1  # of the hand-written models; the others are traced or built for inference

# Hugging Face families: name -> (config class, model class, overrides).
_SIZES = dict(hidden_size=HIDDEN, num_attention_heads=HEADS, num_hidden_layers=LAYERS, intermediate_size=FFN)
_TEXT = dict(vocab_size=VOCABULARY, max_position_embeddings=POSITIONS)
_DISTIL = dict(dim=HIDDEN, n_heads=HEADS, n_layers=LAYERS, hidden_dim=FFN)
_FAMILIES = {
    "bert": (BertConfig, BertModel, _SIZES | _TEXT),
    "bert_relu": (BertConfig, BertModel, _SIZES | _TEXT | dict(hidden_act="relu")),
    "roberta": (RobertaConfig, RobertaModel, _SIZES | _TEXT),
    "distilbert": (DistilBertConfig, DistilBertModel, _DISTIL | _TEXT),
    "vit": (ViTConfig, ViTModel, _SIZES | dict(image_size=8, patch_size=4)),
}


@dataclass(frozen=True)
class Batch:
    """ids and mask [B, S] int64 (mask 1 = real), embeddings [B, S, H] for bases that take those."""

    ids: Tensor
    mask: Tensor
    embeddings: Tensor

    @property
    def rows(self) -> int:
        return self.ids.size(0)

    def row(self, index: int) -> "Batch":
        part = slice(index, index + 1)
        return Batch(self.ids[part], self.mask[part], self.embeddings[part])

    def padded(self, extra: int) -> "Batch":
        """`extra` more padding tokens on the right of every row; their ids and embeddings are arbitrary, not zero."""
        ids = torch.cat([self.ids, torch.full((self.rows, extra), 5)], dim=1)
        mask = torch.cat([self.mask, torch.zeros(self.rows, extra, dtype=torch.int64)], dim=1)
        filler = torch.full((self.rows, extra, self.embeddings.size(2)), 0.7, dtype=self.embeddings.dtype)
        return Batch(ids, mask, torch.cat([self.embeddings, filler], dim=1))


def make_batch(lengths: list[int], width: int, dtype: torch.dtype, seed: int = 0) -> Batch:
    """One row per entry of `lengths`, each padded on the right to `width`."""
    generator = torch.Generator().manual_seed(1000 + seed)
    rows = len(lengths)
    ids = torch.randint(2, VOCABULARY, (rows, width), generator=generator)
    mask = (torch.arange(width)[None, :] < torch.tensor(lengths)[:, None]).to(torch.int64)
    embeddings = torch.randn(rows, width, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    # 1 is RoBERTa's padding id, for which it also counts no position; the other families treat every id alike.
    return Batch(torch.where(mask == 1, ids, 1), mask, embeddings)


def hugging_face(family: str, attention: str, dtype: torch.dtype) -> nn.Module:
    """A fresh copy of a random model: the same values for every call, attention and dtype (up to rounding)."""
    config_class, model_class, overrides = _FAMILIES[family]
    config = config_class(**overrides, return_dict=False)
    config._attn_implementation = attention
    model = model_class(config).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.dim() == 1:  # biases and norm weights; the latter stay near 1
                value = value * 0.1 + (1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0)
            elif "embeddings" not in name:
                # Large enough that attention is far from uniform, so that a lost mask or prefix is seen.
                value = value * 1.3 / parameter.size(1) ** 0.5
            parameter.copy_(value)
        return model.to(dtype)


@dataclass(frozen=True)
class Variant:
    """One way of writing a model.

    inputs: "ids" or "embeddings"; mask: the convention of the base's second argument: "real" ([B, S] int64, 1 = real),
    "padding" ([B, S] bool, True = padding) or "" (no such argument).
    """

    name: str
    family: str
    attention: str = "sdpa"  # of the Hugging Face model, in the base and in the oracle
    inputs: str = "embeddings"
    mask: str = ""
    batch_first: bool = True
    # Nested tensors zero the padded positions of the base's result: compare real tokens only.
    zeroes_padding: bool = False
    own: Optional[tuple] = None  # (core, packed, kind)
    encoder: Optional[str] = None  # torch.nn.TransformerEncoder: "script", "trace_fast" or "trace_slow"

    @property
    def post_norm(self) -> bool:
        return self.family != "vit"

    @property
    def masked(self) -> bool:
        return self.mask != ""

    def arguments(self, batch: Batch) -> tuple:
        """The positional arguments of the base's forward."""
        first = batch.ids if self.inputs == "ids" else batch.embeddings
        if not self.batch_first:
            first = first.transpose(0, 1)
        mask = {"": None, "real": batch.mask, "padding": batch.mask == 0}[self.mask]
        if self.encoder == "script":
            return (first, None, mask)  # src, mask, src_key_padding_mask
        return (first,) if mask is None else (first, mask)

    def hidden(self, result) -> Tensor:
        """The last hidden states [B, S, H] in the base's result."""
        hidden = result[0] if isinstance(result, tuple) else result
        return hidden if self.batch_first else hidden.transpose(0, 1)

    def compared(self, hidden: Tensor, batch: Batch) -> Tensor:
        """The part of [B, S, H] that has a defined value: everything, or the real tokens as [tokens, H]."""
        return hidden[batch.mask == 1] if self.zeroes_padding else hidden


HUGGING_FACE = [
    Variant("bert_sdpa", "bert", "sdpa", "ids", "real"),
    Variant("bert_eager", "bert", "eager", "ids", "real"),
    Variant("roberta_sdpa", "roberta", "sdpa", "ids", "real"),
    Variant("roberta_eager", "roberta", "eager", "ids", "real"),
    Variant("distilbert_sdpa", "distilbert", "sdpa", "ids", "real"),
    Variant("distilbert_eager", "distilbert", "eager", "ids", "real"),
]

OWN = [
    Variant("own_post_ids_matmul", "bert", "eager", "ids", "real", own=("matmul", False, "ids")),
    Variant("own_post_sdpa", "bert", mask="real", own=("sdpa", False, "embeddings")),
    Variant("own_post_packed_matmul", "bert", mask="real", own=("matmul", True, "embeddings")),
    Variant("own_post_scaled_query", "bert", mask="real", own=("scaled_query", False, "embeddings")),
    Variant("own_post_unmasked_packed_sdpa", "bert", own=("sdpa", True, "unmasked")),
    Variant("own_pre_matmul", "vit", mask="real", own=("matmul", False, "embeddings")),
    Variant("own_pre_sdpa_bool", "vit", mask="real", own=("sdpa_bool", False, "embeddings")),
    Variant("own_pre_unmasked_matmul", "vit", own=("matmul", False, "unmasked")),
    Variant("own_pre_unmasked_packed_sdpa", "vit", own=("sdpa", True, "unmasked")),
]

_PADDED = dict(mask="padding")
ENCODERS = [
    Variant("encoder_script_post", "bert", encoder="script", zeroes_padding=True, **_PADDED),
    Variant("encoder_script_relu_seq_first", "bert_relu", encoder="script", batch_first=False, **_PADDED),
    Variant("encoder_script_pre", "vit", encoder="script"),
    Variant("encoder_fast_post", "bert", encoder="trace_fast"),
    Variant("encoder_fast_post_nested", "bert", encoder="trace_fast", zeroes_padding=True, **_PADDED),
    Variant("encoder_fast_relu", "bert_relu", encoder="trace_fast"),
    Variant("encoder_fast_pre", "vit", encoder="trace_fast"),
    Variant("encoder_slow_post", "bert", encoder="trace_slow", **_PADDED),
    Variant("encoder_slow_post_seq_first", "bert", encoder="trace_slow", batch_first=False, **_PADDED),
    Variant("encoder_slow_pre", "vit", encoder="trace_slow"),
    Variant("encoder_slow_pre_seq_first", "vit", encoder="trace_slow", batch_first=False),
]

VARIANTS = {variant.name: variant for variant in HUGGING_FACE + OWN + ENCODERS}


def torch_encoder(source: nn.Module, variant: Variant) -> nn.TransformerEncoder:
    """torch.nn.TransformerEncoder with the weights of `source`'s encoder (BertModel or ViTModel)."""
    config = source.config
    layer = nn.TransformerEncoderLayer(
        HIDDEN,
        HEADS,
        FFN,
        dropout=0.0,
        activation=config.hidden_act,
        layer_norm_eps=config.layer_norm_eps,
        batch_first=variant.batch_first,
        norm_first=not variant.post_norm,
    )
    encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=variant.zeroes_padding)
    for target, given in zip(encoder.layers, source.encoder.layer, strict=True):
        inner = given.attention.self if variant.post_norm else given.attention.attention
        with torch.no_grad():
            target.self_attn.in_proj_weight.copy_(torch.cat([inner.query.weight, inner.key.weight, inner.value.weight]))
            target.self_attn.in_proj_bias.copy_(torch.cat([inner.query.bias, inner.key.bias, inner.value.bias]))
        copy_linear(target.self_attn.out_proj, given.attention.output.dense)
        copy_linear(target.linear1, given.intermediate.dense)
        copy_linear(target.linear2, given.output.dense)
        copy_linear(target.norm1, given.attention.output.LayerNorm if variant.post_norm else given.layernorm_before)
        copy_linear(target.norm2, given.output.LayerNorm if variant.post_norm else given.layernorm_after)
    return encoder


class _PaddedEncoder(nn.Module):
    """Gives tracing the signature (src, src_key_padding_mask)."""

    def __init__(self, encoder: nn.TransformerEncoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, src: Tensor, padding: Tensor) -> Tensor:
        return self.encoder(src, src_key_padding_mask=padding)


def build(name: str, dtype: torch.dtype) -> torch.jit.ScriptModule:
    """A fresh TorchScript base for the variant, in eval mode."""
    variant = VARIANTS[name]
    source = hugging_face(variant.family, variant.attention, dtype)
    example = variant.arguments(make_batch([9, 6], 9, dtype, seed=99))
    if variant.own is not None:
        core, packed, kind = variant.own
        module = own_encoder(source, post_norm=variant.post_norm, core=core, packed=packed, kind=kind, dropout=DROPOUT)
        return torch.jit.script(module.to(dtype).eval())
    if variant.encoder is None:
        return torch.jit.trace(source, example, check_trace=False)
    module = torch_encoder(source, variant).to(dtype).eval()
    if variant.encoder == "script":
        return torch.jit.script(module)
    if variant.masked:
        module = _PaddedEncoder(module).eval()
    # Without grad mode torch records its fused layer; with it, the layer's single operations.
    with torch.set_grad_enabled(variant.encoder == "trace_slow"):
        return torch.jit.trace(module, example, check_trace=False)


@functools.cache
def base(name: str, dtype: torch.dtype) -> torch.jit.ScriptModule:
    """The base of the variant, built once a session. Never modify it."""
    return build(name, dtype)
