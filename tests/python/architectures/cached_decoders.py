"""Decoders that take keys and values of earlier passes and give those of all passes back, with the caches that they
begin with, and what calls them step by step."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from hugging_face_models import FAMILIES
from models import HEADS, HIDDEN, VOCABULARY

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
        return FAMILIES[family].make(implementation, torch.float32).model

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
