"""Hand-written models (odd_models.py), scripted and traced, restated by plain_models.py."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import odd_models as odd
from case import Case
from plain_models import PlainTransformer, Shape
from restated_reference import Layer, RestatedReference

# Lengths of the rows, by seed. Seed 0 is traced.
_LENGTHS = ([9, 6], [4, 11, 8], [5])


def _states(dtype: torch.dtype, seed: int, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Embeddings [B, S, H] and mask [B, S] int64, 1 = real token."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(lengths), max(lengths), 48, generator=generator, dtype=torch.float64).to(dtype)
    return x, (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).to(torch.int64)


def _arguments(dtype: torch.dtype, seed: int) -> tuple:
    return _states(dtype, seed, _LENGTHS[seed])


def _pairs(dtype: torch.dtype, seed: int) -> tuple:
    """Two batches of the same rows and different widths."""
    return *_states(dtype, seed, _LENGTHS[seed]), *_states(dtype, seed + 10, [2 + n for n in _LENGTHS[seed]][::-1])


class _Restated(nn.Module):
    """The plain model on (embeddings, mask)."""

    def __init__(self, shape: Shape, causal: bool, dtype: torch.dtype):
        super().__init__()
        self.plain, self.causal = PlainTransformer(shape, dtype), causal

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        seen = mask[:, None, None, :].bool()
        if self.causal:
            seen = seen & torch.ones(x.size(1), x.size(1), dtype=torch.bool).tril()
        return self.plain(x, seen)


class _RestatedSiamese(_Restated):
    def forward(self, *arguments: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(*arguments[:2]), super().forward(*arguments[2:])


class _RestatedEnsemble(nn.Module):
    def __init__(self, shape: Shape, dtype: torch.dtype):
        super().__init__()
        self.first, self.second = PlainTransformer(shape, dtype, 1), PlainTransformer(shape, dtype, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        seen = mask[:, None, None, :].bool()
        return (self.first(x, seen) + self.second(x, seen)) / 2

    def described(self) -> list[Layer]:
        first, second = self.first.described("first."), self.second.described("second.")
        return first + [replace(layer, number=layer.number + len(first)) for layer in second]


_SHAPE = Shape()


def _case(
    name: str,
    make: Callable[[PlainTransformer], nn.Module],
    shape: Shape = _SHAPE,
    *,
    causal: bool = False,
    restated: type = _Restated,
    arguments: Callable = _arguments,
    hidden: Callable[[Any], Tensor] = lambda result: result,
) -> Case:
    return Case(
        name=f"own_{name}",
        make=lambda dtype: make(PlainTransformer(shape, dtype)).to(dtype).eval(),
        arguments=arguments,
        reference=RestatedReference(
            functools.partial(restated, shape, causal), lambda model: model.plain.described("plain."), hidden
        ),
        hidden=hidden,
        forms=("scripted", "traced"),
    )


def _encoder(attention: type, norm: type | None = None, ffn: type = odd.OddFeedForward) -> Callable:
    return functools.partial(odd.OddEncoder, attention=attention, norm=norm, ffn=ffn)


def _both_rows(result: tuple[Tensor, Tensor]) -> Tensor:
    """Both towers' hidden states as one tensor [B, S1 + S2, H]."""
    return torch.cat(tuple(result), dim=1)


_PRE = Shape(norm_first=True)
_LLAMA = Shape(norm_first=True, rms=True, rotary=True, kv_heads=2, gated=True, activation="silu", bias=False)

_LIST = [
    _case("helper", _encoder(odd.HelperAttention)),
    _case("helper_pre", _encoder(odd.HelperAttention), _PRE),
    _case("einsum", _encoder(odd.EinsumAttention), Shape(bias=False)),
    _case("einsum_pre", _encoder(odd.EinsumAttention), replace(_PRE, bias=False)),
    _case("einsum_scores", _encoder(odd.EinsumScoresAttention), Shape(kv_heads=4)),
    _case("packed", _encoder(odd.PackedAttention)),
    _case("packed_pre", _encoder(odd.PackedAttention), _PRE),
    _case("matrices", _encoder(odd.MatrixAttention, ffn=odd.MatrixFeedForward)),
    _case("hand_layer_norm", _encoder(odd.HelperAttention, odd.HandLayerNorm)),
    _case("hand_layer_norm_pre", _encoder(odd.PackedAttention, odd.HandLayerNorm), _PRE),
    _case("llama", _encoder(odd.RotaryAttention, odd.HandRmsNorm, odd.SwigluFeedForward), _LLAMA, causal=True),
    _case("parallel", _encoder(odd.HelperAttention), Shape(parallel=True)),
    _case("shared", odd.SharedEncoder, Shape(layers=1, order=(0, 0, 0))),
    _case("shared_pre", odd.SharedEncoder, Shape(layers=1, order=(0, 0, 0), norm_first=True)),
    _case("groups", odd.GroupsEncoder, Shape(order=(0, 0, 1, 1))),
    _case("siamese", odd.SiameseEncoder, restated=_RestatedSiamese, arguments=_pairs, hidden=_both_rows),
    Case(
        name="own_ensemble",
        make=lambda dtype: odd.Ensemble(PlainTransformer(_PRE, dtype, 1), PlainTransformer(_PRE, dtype, 2)).eval(),
        arguments=_arguments,
        reference=RestatedReference(functools.partial(_RestatedEnsemble, _PRE), _RestatedEnsemble.described),
        forms=("scripted", "traced"),
    ),
]

CASES: dict[str, Case] = {case.name: case for case in _LIST}
