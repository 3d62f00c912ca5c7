#!/usr/bin/env python3
"""MAD-X (Pfeiffer et al. 2020): two domains stacked on one "language".

    .venv/bin/python examples/sentiment/mad_x.py                     # some minutes

1. Trains an adapter with an invertible block, `seq_bn_inv`, to fill in masked words of reviews: the language.
2. Freezes it. Trains an adapter for each of two domains on labelled sentences where it stands on the language:
   Stack("reviews", "movie_reviews"), Stack("reviews", "amazon_reviews").
3. Serves both, the bare language and the base from one file, in one batch.

Prints the loss at masked words, and the accuracy of each domain with the language below it and without.
"""

from __future__ import annotations

import argparse
import sys
import tarfile
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "python"))
warnings.filterwarnings("ignore")  # torch warns dozens of times that torch.jit is deprecated

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn.functional import cross_entropy, linear  # noqa: E402

import torchgraft  # noqa: E402
from data import LABELS, DataError  # noqa: E402
from experiment import Split, first, fresh_model  # noqa: E402
from fusion import Budget, splits  # noqa: E402
from torchgraft.training import EncodedExamples, Trainer, score  # noqa: E402
from torchgraft.training.batches import collate, training_batches  # noqa: E402
from traced_encoder import tokenizer, traced_encoder  # noqa: E402

LANGUAGE = "reviews"
DOMAINS = ["movie_reviews", "amazon_reviews"]
MASKED = 0.15  # of the words
CPU = torch.device("cpu")


class MaskedWords:
    """The task of the language: what stood at the masked places? The word embeddings of the base are the output's."""

    def __init__(self, base: torch.jit.ScriptModule):
        state = base.state_dict()
        self._embeddings = next(value for key, value in state.items() if key.endswith("word_embeddings.weight"))
        self._mask_id = tokenizer().token_to_id("[MASK]")

    def loss(self, module: torch.jit.ScriptModule, examples: EncodedExamples, generator: torch.Generator) -> Tensor:
        batch = collate(examples, range(len(examples)), slice(None), CPU).values
        ids, mask = batch["ids"], batch["mask"]
        inner = mask.bool() & (torch.arange(ids.size(1)) > 0)
        chosen = (torch.rand(ids.shape, generator=generator) < MASKED) & inner
        hidden = module(ids.masked_fill(chosen, self._mask_id), mask)
        return cross_entropy(linear(hidden[chosen], self._embeddings), ids[chosen])


def train_language(base: torch.jit.ScriptModule, texts: EncodedExamples, steps: int) -> torch.jit.ScriptModule:
    """The base with the frozen language."""
    torch.manual_seed(0)
    module = torchgraft.graft(base, "seq_bn_inv[reduction_factor=2]", LANGUAGE, trainable=True)
    task, generator = MaskedWords(base), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(torchgraft.trainable_parameters(module, LANGUAGE).values(), lr=2e-3)
    batches = [indices for epoch in range(100) for indices in training_batches(texts.lengths(), 16, 0, epoch)]
    module.train()
    for indices in batches[:steps]:
        optimizer.zero_grad()
        task.loss(module, texts.chosen(indices), generator).backward()
        optimizer.step()
    return torchgraft.freeze_adapter(module.eval(), LANGUAGE)


def masked_loss(module: torch.jit.ScriptModule, name: str | None, texts: EncodedExamples) -> float:
    module.activate(name) if name else module.deactivate()
    with torch.no_grad():
        return MaskedWords(module).loss(module, texts, torch.Generator().manual_seed(1)).item()


def with_domain(module: torch.jit.ScriptModule, domain: str, on: str | None) -> torch.jit.ScriptModule:
    """A trainable adapter of the domain, with a head; `on` the language, a composition "<domain>_on_<language>"."""
    module = fresh_model(module, "seq_bn", domain, 0)
    return torchgraft.compose(module, f"{domain}_on_{on}", torchgraft.Stack(on, domain)) if on else module


def trained_domains(module: torch.jit.ScriptModule, data: dict[str, Split], budget: Budget, on: str | None):
    """The module with the domains, frozen, and the accuracy of each."""
    found = {}
    for domain, split in data.items():
        module = with_domain(module, domain, on)
        name = f"{domain}_on_{on}" if on else domain
        chosen = first(split.training, budget.sentences, 0)
        Trainer(module, name, chosen, None, len(LABELS), budget.options(0)).run()
        module = torchgraft.freeze_adapter(module, domain)
        module.activate(name)
        found[domain] = score(module, first(split.test, budget.test, 0), len(LABELS)).accuracy
    return module, found


def run(arguments: argparse.Namespace) -> None:
    data, base = splits(DOMAINS), traced_encoder()
    budget = Budget(arguments.sentences, arguments.epochs, arguments.test)
    texts = data["movie_reviews"].training
    module = train_language(base, texts, arguments.steps)
    held_out = first(data["movie_reviews"].validation, 200, 0)
    before, after = (masked_loss(module, name, held_out) for name in (None, LANGUAGE))
    print(f"loss at masked words: {before:.3f} of the base, {after:.3f} of the language", flush=True)
    module, stacked = trained_domains(module, data, budget, LANGUAGE)
    _, alone = trained_domains(base, data, budget, None)
    for domain in DOMAINS:
        print(f"{domain:16} {stacked[domain]:.3f} on the language, {alone[domain]:.3f} on the base")
    arguments.output.mkdir(parents=True, exist_ok=True)
    module.save(str(arguments.output / "mad_x.pt"))
    names = module.adapter_names()
    ids = torch.tensor([names.index(f"{domain}_on_{LANGUAGE}") for domain in DOMAINS])
    rows = first(data["movie_reviews"].test, 2, 0)
    batch = collate(rows, range(2), slice(None), CPU).values
    with torch.no_grad():
        logits = module.forward_with_head(batch["ids"], batch["mask"], adapter_ids=ids)
    said = ", ".join(LABELS[index] for index in logits.argmax(-1).tolist())
    print(f"{arguments.output / 'mad_x.pt'}: {', '.join(names)}; two rows of one batch, each on its stack: {said}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="of the language (default: 100)")
    parser.add_argument("--sentences", type=int, default=500, help="of each domain (default: 500)")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--test", type=int, default=500, help="test sentences (default: 500)")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "sentiment" / "mad_x")
    try:
        run(parser.parse_args())
        return 0
    except (DataError, OSError, tarfile.TarError, torchgraft.GraftError) as error:
        print("mad_x: error:", " ".join(str(error).split()), file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
