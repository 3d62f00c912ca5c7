"""torch.nn's own Transformers, scripted and traced, restated by plain_models.py."""

import functools
from dataclasses import dataclass, replace
from typing import Optional

import torch
from torch import Tensor, nn

from case import Case
from plain_models import PlainAttention, PlainLayer, PlainTransformer, Shape
from restated_reference import RestatedReference

# (rows, tokens, tokens of the memory), by seed. Seed 0 is traced.
_SIZES = ((2, 6, 9), (3, 8, 5), (1, 5, 7))


@dataclass(frozen=True)
class Spelling:
    """How a model is called. mask: None, "float" or "bool", causal; padding: None, "bool" or "float" key padding, of
    the memory where there is one. nested: torch.nn packs the real tokens together, and gives zeros at padding."""

    batch_first: bool = True
    mask: str | None = None
    padding: str | None = None
    need_weights: bool = False
    nested: bool = False


def _hidden(dtype: torch.dtype, seed: int, rows: int, width: int, features: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, features, generator=generator, dtype=torch.float64).to(dtype)


def _forbidden(mask: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """torch.nn's spelling of a mask that is true where attention is forbidden."""
    return mask if kind == "bool" else torch.zeros(mask.shape, dtype=dtype).masked_fill(mask, float("-inf"))


def _causal(width: int) -> Tensor:
    return torch.ones(width, width, dtype=torch.bool).triu(1)


def _padding(rows: int, width: int) -> Tensor:
    """[B, S], true at padding: every row but the first is shorter."""
    return torch.arange(width) >= width - torch.arange(rows)[:, None] % 3


def _copy_attention(target: nn.MultiheadAttention, source: PlainAttention) -> None:
    linears = (source.q, source.k, source.v)
    if target.in_proj_weight is None:
        for weight, linear in zip(
            (target.q_proj_weight, target.k_proj_weight, target.v_proj_weight), linears, strict=True
        ):
            weight.copy_(linear.weight)
    else:
        target.in_proj_weight.copy_(torch.cat([linear.weight for linear in linears]))
    if source.q.bias is not None:
        target.in_proj_bias.copy_(torch.cat([linear.bias for linear in linears]))
    target.out_proj.load_state_dict(source.o.state_dict())


def _copy_layer(target: nn.Module, source: PlainLayer) -> None:
    """Into a TransformerEncoderLayer or TransformerDecoderLayer."""
    _copy_attention(target.self_attn, source.attention)
    norms = [source.norm, source.ffn_norm]
    if source.shape.cross:
        _copy_attention(target.multihead_attn, source.cross)
        norms.insert(1, source.cross_norm)
    for index, norm in enumerate(norms, start=1):
        getattr(target, f"norm{index}").load_state_dict(norm.state_dict())
    target.linear1.load_state_dict(source.ffn.up.state_dict())
    target.linear2.load_state_dict(source.ffn.down.state_dict())


def _copy_stage(target: nn.Module, layers: nn.ModuleList, norm: nn.Module | None) -> None:
    """Into a TransformerEncoder or TransformerDecoder."""
    with torch.no_grad():
        for layer, source in zip(target.layers, layers, strict=True):
            _copy_layer(layer, source)
        if norm is not None:
            target.norm.load_state_dict(norm.state_dict())


def _final_norm(shape: Shape) -> nn.Module | None:
    return shape.norm() if shape.final_norm else None


def _layer_options(shape: Shape, batch_first: bool) -> dict:
    return dict(
        d_model=shape.hidden,
        nhead=shape.heads,
        dim_feedforward=shape.ffn,
        dropout=0.1,
        activation=shape.activation,
        batch_first=batch_first,
        norm_first=shape.norm_first,
        bias=shape.bias,
    )


class _Encoder(nn.Module):
    """(x, mask, padding): the last two where the spelling has them."""

    def __init__(self, plain: PlainTransformer, spelling: Spelling):
        super().__init__()
        layer = nn.TransformerEncoderLayer(**_layer_options(plain.shape, spelling.batch_first))
        self.encoder = nn.TransformerEncoder(layer, plain.shape.layers, _final_norm(plain.shape))
        _copy_stage(self.encoder, plain.layers, plain.final_norm)

    def forward(self, x: Tensor, mask: Optional[Tensor] = None, padding: Optional[Tensor] = None) -> Tensor:
        return self.encoder(x, mask=mask, src_key_padding_mask=padding)


class _Decoder(nn.Module):
    def __init__(self, plain: PlainTransformer, spelling: Spelling):
        super().__init__()
        layer = nn.TransformerDecoderLayer(**_layer_options(plain.shape, spelling.batch_first))
        self.decoder = nn.TransformerDecoder(layer, plain.shape.layers, _final_norm(plain.shape))
        _copy_stage(self.decoder, plain.layers, plain.final_norm)

    def forward(
        self, x: Tensor, memory: Tensor, mask: Optional[Tensor] = None, padding: Optional[Tensor] = None
    ) -> Tensor:
        """padding is the memory's."""
        return self.decoder(x, memory, tgt_mask=mask, memory_key_padding_mask=padding)


class _Transformer(nn.Module):
    """nn.Transformer, which has a norm behind the encoder and one behind the decoder."""

    def __init__(self, plain: PlainTransformer, spelling: Spelling):
        super().__init__()
        shape = plain.shape
        layers = dict(num_encoder_layers=shape.encoder_layers, num_decoder_layers=shape.layers)
        self.transformer = nn.Transformer(**_layer_options(shape, spelling.batch_first), **layers)
        _copy_stage(self.transformer.encoder, plain.encoder, plain.encoder_norm)
        _copy_stage(self.transformer.decoder, plain.layers, plain.final_norm)

    def forward(
        self, x: Tensor, memory: Tensor, mask: Optional[Tensor] = None, padding: Optional[Tensor] = None
    ) -> Tensor:
        """memory is what the encoder reads, padding is its."""
        return self.transformer(memory, x, tgt_mask=mask, src_key_padding_mask=padding, memory_key_padding_mask=padding)


class _StackLayer(nn.Module):
    """A bare nn.MultiheadAttention, with residual, norms and feed-forward around it written by a user."""

    def __init__(self, plain: PlainLayer, spelling: Spelling):
        super().__init__()
        shape = plain.shape
        self.norm_first, self.need_weights = shape.norm_first, spelling.need_weights
        self.attention = nn.MultiheadAttention(
            shape.hidden, shape.heads, dropout=0.1, bias=shape.bias, batch_first=spelling.batch_first
        )
        with torch.no_grad():
            _copy_attention(self.attention, plain.attention)
        self.norm, self.feed_norm = plain.norm, plain.ffn_norm
        self.feed = nn.Sequential(plain.ffn.up, nn.GELU(), plain.ffn.down)

    def attend(self, x: Tensor, mask: Optional[Tensor], padding: Optional[Tensor]) -> Tensor:
        return self.attention(x, x, x, key_padding_mask=padding, attn_mask=mask, need_weights=self.need_weights)[0]

    def forward(self, x: Tensor, mask: Optional[Tensor], padding: Optional[Tensor]) -> Tensor:
        if self.norm_first:
            x = x + self.attend(self.norm(x), mask, padding)
            return x + self.feed(self.feed_norm(x))
        x = self.norm(x + self.attend(x, mask, padding))
        return self.feed_norm(x + self.feed(x))


class _Stack(nn.Module):
    def __init__(self, plain: PlainTransformer, spelling: Spelling):
        super().__init__()
        self.layers = nn.ModuleList(_StackLayer(layer, spelling) for layer in plain.layers)

    def forward(self, x: Tensor, mask: Optional[Tensor] = None, padding: Optional[Tensor] = None) -> Tensor:
        for layer in self.layers:
            x = layer(x, mask, padding)
        return x


class _CrossLayer(nn.Module):
    """Self and cross attention; the memory is of a width of its own (kdim, vdim)."""

    def __init__(self, plain: PlainLayer, spelling: Spelling):
        super().__init__()
        shape = plain.shape
        options = dict(dropout=0.1, bias=shape.bias, batch_first=spelling.batch_first)
        widths = dict(kdim=shape.memory, vdim=shape.memory)
        self.attention = nn.MultiheadAttention(shape.hidden, shape.heads, **options)
        self.cross = nn.MultiheadAttention(shape.hidden, shape.heads, **options, **widths)
        with torch.no_grad():
            _copy_attention(self.attention, plain.attention)
            _copy_attention(self.cross, plain.cross)
        self.norms = nn.ModuleList([plain.norm, plain.cross_norm, plain.ffn_norm])
        self.feed = nn.Sequential(plain.ffn.up, nn.GELU(), plain.ffn.down)

    def forward(self, x: Tensor, memory: Tensor, mask: Optional[Tensor], padding: Optional[Tensor]) -> Tensor:
        x = self.norms[0](x + self.attention(x, x, x, attn_mask=mask, need_weights=False)[0])
        x = self.norms[1](x + self.cross(x, memory, memory, key_padding_mask=padding)[0])
        return self.norms[2](x + self.feed(x))


class _CrossStack(nn.Module):
    def __init__(self, plain: PlainTransformer, spelling: Spelling):
        super().__init__()
        self.layers = nn.ModuleList(_CrossLayer(layer, spelling) for layer in plain.layers)

    def forward(
        self, x: Tensor, memory: Tensor, mask: Optional[Tensor] = None, padding: Optional[Tensor] = None
    ) -> Tensor:
        for layer in self.layers:
            x = layer(x, memory, mask, padding)
        return x


class _PaddingOnly(nn.Module):
    """(x, padding)"""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.model(x, None, padding)


class _MemoryPaddingOnly(nn.Module):
    """(x, memory, padding)"""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, memory: Tensor, padding: Tensor) -> Tensor:
        return self.model(x, memory, None, padding)


def _make(shape: Shape, spelling: Spelling, kind: type, dtype: torch.dtype) -> nn.Module:
    model = kind(PlainTransformer(shape, dtype), spelling)
    if spelling.padding and not spelling.mask:
        model = (_MemoryPaddingOnly if _has_memory(shape) else _PaddingOnly)(model)
    return model.to(dtype).eval()


def _has_memory(shape: Shape) -> bool:
    return shape.cross


def _arguments(shape: Shape, spelling: Spelling, dtype: torch.dtype, seed: int) -> tuple:
    rows, width, memory_width = _SIZES[seed]
    arguments = [_hidden(dtype, seed, rows, width, shape.hidden)]
    if _has_memory(shape):
        arguments.append(_hidden(dtype, seed + 10, rows, memory_width, shape.memory))
    if not spelling.batch_first:
        arguments = [states.transpose(0, 1).contiguous() for states in arguments]
    if spelling.mask:
        arguments.append(_forbidden(_causal(width), spelling.mask, dtype))
    if spelling.padding:
        padded = _padding(rows, memory_width if _has_memory(shape) else width)
        arguments.append(_forbidden(padded, spelling.padding, dtype))
    return tuple(arguments)


def _seen(mask: Tensor) -> Tensor:
    """torch.nn's mask, of either dtype -> true where attention is allowed."""
    return ~mask if mask.dtype == torch.bool else mask == 0


class _Restated(nn.Module):
    """The plain model, called as the torch.nn model is."""

    def __init__(self, shape: Shape, spelling: Spelling, dtype: torch.dtype):
        super().__init__()
        self.plain, self.spelling = PlainTransformer(shape, dtype), spelling

    def forward(self, *arguments: Tensor) -> Tensor:
        given = list(arguments)
        states = [given.pop(0) for _ in range(2 if _has_memory(self.plain.shape) else 1)]
        if not self.spelling.batch_first:
            states = [each.transpose(0, 1) for each in states]
        causal = _seen(given.pop(0)) if self.spelling.mask else None
        padding = _seen(given.pop(0))[:, None, None, :] if self.spelling.padding else None
        if _has_memory(self.plain.shape):
            result = self.plain(states[0], causal, states[1], padding)
        else:
            masks = [mask for mask in (causal, padding) if mask is not None]
            result = self.plain(states[0], functools.reduce(torch.logical_and, masks) if masks else None)
        if self.spelling.nested:
            result = result * padding[:, 0, 0, :, None]
        return result if self.spelling.batch_first else result.transpose(0, 1)


def _case(name: str, kind: type, shape: Shape, spelling: Spelling, forms: tuple[str, ...]) -> Case:
    return Case(
        name=f"torch_{name}",
        make=functools.partial(_make, shape, spelling, kind),
        arguments=functools.partial(_arguments, shape, spelling),
        reference=RestatedReference(
            make=functools.partial(_Restated, shape, spelling), layers=lambda model: model.plain.described("plain.")
        ),
        forms=forms,
    )


_POST, _PRE = Shape(), Shape(norm_first=True, activation="relu", final_norm=True)
_BOTH = ("traced", "scripted")
_LIST = [
    _case("encoder_post", _Encoder, _POST, Spelling(), (*_BOTH, "fused")),
    _case("encoder_post_padding", _Encoder, _POST, Spelling(padding="bool"), ("traced",)),
    _case("encoder_post_nested", _Encoder, _POST, Spelling(padding="bool", nested=True), ("scripted", "fused")),
    _case("encoder_post_sequence_first", _Encoder, _POST, Spelling(False, "float", "float"), _BOTH),
    # Without biases torch cannot script its own encoder layer.
    _case("encoder_post_no_bias", _Encoder, Shape(bias=False), Spelling(mask="bool"), ("traced",)),
    _case("encoder_pre", _Encoder, _PRE, Spelling(mask="float"), (*_BOTH, "fused")),
    _case("encoder_pre_sequence_first", _Encoder, _PRE, Spelling(False, "bool", "bool"), _BOTH),
    _case("decoder_post", _Decoder, Shape(cross=True), Spelling(mask="float"), _BOTH),
    _case("decoder_post_padding", _Decoder, Shape(cross=True), Spelling(padding="bool"), _BOTH),
    _case("decoder_post_sequence_first", _Decoder, Shape(cross=True), Spelling(False, "bool", "bool"), _BOTH),
    _case("decoder_pre", _Decoder, replace(_PRE, cross=True), Spelling(mask="bool", padding="float"), _BOTH),
    _case("decoder_pre_sequence_first", _Decoder, replace(_PRE, cross=True), Spelling(False), _BOTH),
    _case("transformer", _Transformer, Shape(cross=True, encoder_layers=1, final_norm=True), Spelling(), _BOTH),
    _case(
        "transformer_pre_masks",
        _Transformer,
        replace(_PRE, cross=True, encoder_layers=2, layers=1),
        Spelling(False, "float", "float"),
        _BOTH,
    ),
    _case("cross_stack", _CrossStack, Shape(cross=True, memory=36), Spelling(mask="bool", padding="bool"), _BOTH),
    _case("cross_stack_sequence_first", _CrossStack, Shape(cross=True, memory=36), Spelling(False), _BOTH),
    _case("attention_stack_post", _Stack, _POST, Spelling(), _BOTH),
    _case("attention_stack_post_weights", _Stack, _POST, Spelling(False, "bool", "bool", need_weights=True), _BOTH),
    _case("attention_stack_pre", _Stack, Shape(norm_first=True), Spelling(False, "float"), _BOTH),
    _case("attention_stack_pre_padding", _Stack, Shape(norm_first=True), Spelling(padding="float"), _BOTH),
]

CASES: dict[str, Case] = {case.name: case for case in _LIST}
