"""Decoders that take keys and values of earlier passes and give those of all passes back, with the caches that they
begin with, and what calls them step by step."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers as hf
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, StaticCache

from hugging_face_models import FAMILIES, Family
from models import HEADS, HIDDEN, VOCABULARY

_SIZES = dict(vocab_size=VOCABULARY, hidden_size=HIDDEN, num_attention_heads=HEADS, num_hidden_layers=2)
_BOUNDS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
# Decoders with one linear map for queries, keys and values, which the library does not know.
_PACKED = {
    "gpt_neox": Family(hf.GPTNeoXConfig, hf.GPTNeoXModel, _SIZES | dict(intermediate_size=80)),
    "phi3": Family(hf.Phi3Config, hf.Phi3Model, _SIZES | _BOUNDS | dict(intermediate_size=80, num_key_value_heads=2)),
    "falcon": Family(hf.FalconConfig, hf.FalconModel, _SIZES | dict(ffn_hidden_size=80)),
}
HEAD_DIM = HIDDEN // HEADS
PROMPT, STEPS = 5, 32
PADDING = (0, 2, 1, 3)  # tokens on the left of each row's prompt


class CachedModel(nn.Module):
    """A Hugging Face decoder. `past`: (keys, values) of each layer, as tuples."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor, positions: Tensor, past: tuple) -> tuple:
        cache = DynamicCache.from_legacy_cache(past)
        hidden = self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )[0]
        return hidden, cache.to_legacy_cache()


class FlatCache(CachedModel):
    """Each tensor of two layers' cache is an argument."""

    def forward(self, ids, mask, positions, key_0, value_0, key_1, value_1) -> tuple:
        hidden, cache = super().forward(ids, mask, positions, ((key_0, value_0), (key_1, value_1)))
        return (hidden, *sum(cache, ()))


class StaticModel(nn.Module):
    """A Hugging Face decoder of two layers with a StaticCache: tensors of `length` tokens, written in place."""

    def __init__(self, model: nn.Module, length: int):
        super().__init__()
        self.model, self.length = model, length

    def forward(self, ids, mask, positions, places, key_0, value_0, key_1, value_1) -> tuple:
        cache = StaticCache(config=self.model.config, max_cache_len=self.length)
        cache.early_initialization(key_0.size(0), key_0.size(1), key_0.size(3), key_0.dtype, key_0.device)
        for layer, (keys, values) in zip(cache.layers, ((key_0, value_0), (key_1, value_1)), strict=True):
            layer.keys, layer.values = keys, values
        hidden = self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
            cache_position=places,
        )[0]  # fmt: skip
        return hidden, tuple((layer.keys, layer.values) for layer in cache.layers)


@dataclass(frozen=True, eq=False)
class CachedDecoder:
    """trace() gives the base. to_input and to_tuples change between tuples of (keys, values) and what the base takes
    and gives. make(attention): the model alone, which the library knows, or None."""

    name: str
    trace: Callable[[], torch.jit.ScriptModule]
    kv_heads: int
    layers: int = 2
    make: Callable[[str], nn.Module] | None = None
    to_input: Callable[[tuple], tuple] = lambda past: (past,)
    to_tuples: Callable[[tuple], tuple] = lambda caches: caches[0]

    def empty(self, rows: int) -> tuple:
        """The cache before the first token."""
        nothing = torch.zeros(rows, self.kv_heads, 0, HEAD_DIM)
        return tuple((nothing, nothing) for _ in range(self.layers))

    def call(self, module: torch.jit.ScriptModule, real: Tensor, ids: Tensor, past: tuple, **named: Tensor) -> tuple:
        """The hidden states of the new tokens, and the new cache. real: bool [B, P + S]."""
        result = module(ids, *masks_and_positions(real, ids.size(1)), *self.to_input(past), **named)
        return result[0], self.to_tuples(result[1:])


def masks_and_positions(real: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """The additive mask [B, 1, S, P + S] and the positions [B, S] of the last `tokens` of [B, P + S]."""
    total = real.size(1)
    causal = torch.ones(total, total, dtype=torch.bool).tril()[-tokens:]
    seen = causal & real[:, None, None, :]
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    return mask, (real.long().cumsum(1) - 1).clamp(min=0)[:, -tokens:]


def tokens_of(rows: int = len(PADDING), seed: int = 1) -> tuple[Tensor, Tensor]:
    """ids [B, PROMPT + STEPS], and which of them are real."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCABULARY, (rows, PROMPT + STEPS), generator=generator)
    padding = torch.tensor([PADDING[row % len(PADDING)] for row in range(rows)])
    return ids, torch.arange(PROMPT + STEPS)[None, :] >= padding[:, None]


def run_steps(decoder: CachedDecoder, module: torch.jit.ScriptModule, ids: Tensor, real: Tensor, **named: Tensor):
    """The hidden states [B, PROMPT + STEPS, H] and the last cache: the prompt in one pass, then token by token."""
    past = decoder.empty(ids.size(0))
    hidden = []
    for begin, end in [(0, PROMPT), *((i, i + 1) for i in range(PROMPT, ids.size(1)))]:
        part, past = decoder.call(module, real[:, :end], ids[:, begin:end], past, **named)
        hidden.append(part)
    return torch.cat(hidden, 1), past


def _example(decoder_layers: int, kv_heads: int) -> tuple:
    ids, real = tokens_of(2)
    past = tuple((torch.randn(2, kv_heads, 4, HEAD_DIM),) * 2 for _ in range(decoder_layers))
    return ids[:, :3], *masks_and_positions(real[:, :7], 3), past


def _traced(family: str, attention: str, kv_heads: int, flat: bool = False, frozen: bool = False) -> CachedDecoder:
    def make(implementation: str) -> nn.Module:
        return (FAMILIES | _PACKED)[family].make(implementation, torch.float32).model

    @functools.cache
    def trace() -> torch.jit.ScriptModule:
        model = (FlatCache if flat else CachedModel)(make(attention)).eval()
        *others, past = _example(2, kv_heads)
        example = (*others, *sum(past, ())) if flat else (*others, past)
        base = torch.jit.trace(model, example, check_trace=False, strict=False)
        return torch.jit.freeze(base) if frozen else base

    name = f"{family}_{attention}" + "_flat" * flat + "_frozen" * frozen
    if not flat:
        return CachedDecoder(name, trace, kv_heads, make=make)
    to_tuples = lambda caches: (tuple(caches[:2]), tuple(caches[2:]))  # noqa: E731
    return CachedDecoder(name, trace, kv_heads, make=make, to_input=lambda past: sum(past, ()), to_tuples=to_tuples)


TRACED = [
    _traced(family, attention, kv_heads)
    for family, kv_heads in (("gpt2", HEADS), ("gptj", HEADS), ("llama", 2), ("mistral", 2))
    for attention in (("eager",) if family == "gptj" else ("eager", "sdpa"))
] + [_traced("llama", "sdpa", 2, flat=True), _traced("gpt2", "eager", HEADS, frozen=True)]

PACKED = [
    _traced(family, attention, kv_heads)
    for family, kv_heads in (("gpt_neox", HEADS), ("phi3", 2), ("falcon", 1))
    for attention in ("eager", "sdpa")
]
