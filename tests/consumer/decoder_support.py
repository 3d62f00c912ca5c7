"""Small decoders with caches, and what they write, computed in Python."""

import functools
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchgraft
from torchgraft.composition import adapters_of, composition_to_json, is_composition_text

WORDS, HIDDEN, HEADS, POSITIONS = 31, 16, 2, 24
NORMAL = 20  # FaultyDecoder writes no token from here on, but what its faults say
WRITES_DOUBLE, WRITES_SHORT, WRITES_ERROR, WRITES_NAN = 20, 21, 22, 23  # behind these come those that make the fault
GIVES_DOUBLE, GIVES_SHORT, RAISES, GIVES_NAN = 26, 27, 28, 29
# Of every kind, so that one batch mixes methods, ranks and prefix lengths. UNGATED: steps and one pass agree.
CONFIGS = {
    "unipelt": "unipelt",
    "lora": "lora[r=4]",
    "mam": "mam",
    "prefixes": "prefix_tuning[prefix_length=3]",
    "bottleneck": "seq_bn[reduction_factor=4]",
    "wide": "lora[r=2,attn_matrices=['q','k','v']]",
}
UNGATED = [name for name in CONFIGS if name != "unipelt"]


class Decoder(nn.Module):
    """One pre-norm layer with learned positions."""

    def __init__(self, positions: int = POSITIONS) -> None:
        super().__init__()
        self.heads = HEADS  # torch.jit.script reads no globals
        self.words, self.places = nn.Embedding(WORDS, HIDDEN), nn.Embedding(positions, HIDDEN)
        self.norm, self.ffn_norm = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.q, self.k, self.v, self.o = (nn.Linear(HIDDEN, HIDDEN) for _ in range(4))
        self.up, self.down, self.head = nn.Linear(HIDDEN, 32), nn.Linear(32, HIDDEN), nn.Linear(HIDDEN, WORDS)

    def split(self, x: Tensor) -> Tensor:
        return x.view(x.size(0), x.size(1), self.heads, -1).transpose(1, 2)

    def forward(
        self, ids: Tensor, mask: Tensor, positions: Tensor, past: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        return self.decode(ids, mask, positions, past)

    def decode(
        self, ids: Tensor, mask: Tensor, positions: Tensor, past: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        x = self.words(ids) + self.places(positions)
        n = self.norm(x)
        k = torch.cat([past[0], self.split(self.k(n))], 2)
        v = torch.cat([past[1], self.split(self.v(n))], 2)
        y = F.scaled_dot_product_attention(self.split(self.q(n)), k, v, attn_mask=mask)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(self.ffn_norm(x))))
        return self.head(x), (k, v)


class CountingDecoder(Decoder):
    """Takes no positions: it counts the tokens of its cache, padding included."""

    def forward(self, ids: Tensor, mask: Tensor, past: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        first = past[0].size(2)
        positions = torch.arange(first, first + ids.size(1)).unsqueeze(0)
        return self.decode(ids, mask, positions, past)


class FlatDecoder(Decoder):
    """Its cache is one list: keys, then values."""

    def forward(self, ids: Tensor, mask: Tensor, positions: Tensor, past: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        logits, present = self.decode(ids, mask, positions, (past[0], past[1]))
        return logits, [present[0], present[1]]


class FaultyDecoder(Decoder):
    """A cache of another dtype, one that is not longer, an error, or logits that are not numbers, when it reads one of
    four tokens; and four tokens behind which it writes those. Its graph does not show how many positions it has."""

    def forward(
        self, ids: Tensor, mask: Tensor, positions: Tensor, past: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        logits, present = self.decode(ids, mask, positions * 1, past)
        normal = torch.arange(logits.size(2)) < 20
        logits = logits.masked_fill(normal.logical_not(), -1e4)
        follows = (torch.arange(logits.size(2)) - 6) == ids.unsqueeze(2)
        causes = (ids >= 20) & (ids < 24)
        logits = torch.where(causes.unsqueeze(2), follows.to(logits.dtype), logits)
        logits = logits.masked_fill((ids == 29).unsqueeze(2), float("nan"))
        if bool((ids == 28).any()):
            raise RuntimeError("token 28")
        if bool((ids == 26).any()):
            return logits, (present[0].double(), present[1])
        if bool((ids == 27).any()):
            return logits, past
        return logits, present


def save_random_adapter(base: torch.jit.ScriptModule, directory: Path, config: str, seed: int) -> None:
    """An adapter that makes a difference, as AdapterHub keeps it: its gates are means over all tokens of a pass."""
    model = torchgraft.graft(base, config, "task")
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.adapters.parameters():
            if parameter.is_floating_point() and parameter.dim() > 1 and parameter.isfinite().all():
                parameter.add_(torch.randn_like(parameter))
    torchgraft.save_adapter(model, "task", directory)


def save_models(folder: Path, decoder: nn.Module) -> None:
    """base.pt, and an adapter of each kind below adapters/."""
    base = torch.jit.script(decoder.eval())
    base.save(folder / "base.pt")
    for seed, (name, config) in enumerate(CONFIGS.items()):
        save_random_adapter(base, folder / "adapters" / name, config, seed)


class Written:
    """What each adapter or composition writes behind a prompt, alone and greedily: a module of its own for each,
    without padding."""

    def __init__(self, folder: Path, positions: bool = True) -> None:
        self._folder = folder
        self._positions = positions  # whether forward takes some
        self._base = torch.jit.load(folder / "base.pt")
        self._known: dict[tuple, list[int]] = {}

    @functools.cache  # noqa: B019
    def module(self, adapter: str | None) -> torch.jit.ScriptModule:
        if adapter is None:
            return self._base
        if not is_composition_text(adapter):
            return torchgraft.graft(self._base, adapters={"alone": self._folder / "adapters" / adapter})
        names = adapters_of(json.loads(composition_to_json(adapter)))
        module = torchgraft.graft(self._base, adapters={name: self._folder / "adapters" / name for name in names})
        module = torchgraft.compose(module, "alone", adapter, verify=False)
        module.activate("alone")
        return module

    def __call__(self, adapter: str | None, prompt: list[int], count: int) -> list[int]:
        """The prompt in one pass, then token by token."""
        key = (adapter, tuple(prompt))
        if len(self._known.get(key, ())) < count:
            self._known[key] = self._steps(self.module(adapter), prompt, count)
        return self._known[key][:count]

    @torch.inference_mode()
    def _steps(self, module: torch.jit.ScriptModule, prompt: list[int], count: int) -> list[int]:
        past = (torch.zeros(1, HEADS, 0, HIDDEN // HEADS),) * 2
        ids, tokens = torch.tensor([prompt]), []
        for _ in range(count):
            size, total = ids.size(1), past[0].size(2) + ids.size(1)
            mask = torch.full((size, total), -1e30).triu(1 + total - size)[None, None]
            positions = (torch.arange(total - size, total)[None],) if self._positions else ()
            logits, past = module(ids, mask, *positions, past)
            tokens.append(int(logits[0, -1].argmax()))
            ids = torch.tensor([tokens[-1:]])
        return tokens

    @torch.inference_mode()
    def full_pass(self, adapter: str | None, prompt: list[int], tokens: list[int]) -> list[int]:
        """The likeliest token behind the prompt and behind each of `tokens` but the last: one pass over all of them."""
        ids = torch.tensor([prompt + tokens[:-1]])
        total = ids.size(1)
        mask = torch.full((total, total), -1e30).triu(1)[None, None]
        nothing = (torch.zeros(1, HEADS, 0, HIDDEN // HEADS),) * 2
        logits = self.module(adapter)(ids, mask, torch.arange(total)[None], nothing)[0]
        return logits[0, len(prompt) - 1 :].argmax(-1).tolist()
