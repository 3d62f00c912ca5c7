"""The part of scripts/demo.py with trained adapters: sentiment in three domains, on one base."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

import torchgraft
from demo_models import DemoError, load_tokenizer
from demo_report import print_mean_gates, print_sentiment

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "sentiment" / "adapters"
DOMAINS = ("tweets", "movie_reviews", "amazon_reviews")  # README.md beside them says how they were trained
SENTENCES = [
    "Wonderful acting, a moving story, and a score that stays with you for days.",
    "This film is a complete waste of two hours.",
    "The battery died after a week and nobody answers my mails.",
    "Works exactly as described, I would buy it again.",
    "omg best day everrr :)",
    "stuck in traffic again, great, just great",
    "The parcel was delivered on Tuesday.",
]
LIMIT = 1e-5


def show_sentiment(console: Console, base: torch.jit.ScriptModule, file: Path) -> None:
    """Grafts the three adapters with their heads into one file, and shows what each says of each sentence, where their
    gates differ, and that one batch may mix them.

    Args:
        base: the encoder of sentences, forward(input_ids, attention_mask).
        file: where the grafted module goes.

    Raises:
        DemoError: a row of the mixed batch differs from the same row alone.
    """
    with console.status("grafting the trained adapters"):
        model = torchgraft.graft(base, adapters={name: FOLDER / name for name in DOMAINS})
        model.save(str(file))
    encoded = load_tokenizer()(SENTENCES, padding=True, return_tensors="pt")
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    said = {name: _logits(model, ids, mask, number) for number, name in enumerate(DOMAINS)}
    labels = torchgraft.head_config(model, DOMAINS[0]).labels
    print_sentiment(console, SENTENCES, {name: logits.softmax(-1) for name, logits in said.items()}, labels)
    gates = {name: _gates(model, ids, mask, number)[name] for number, name in enumerate(DOMAINS)}
    print_mean_gates(console, {name: gate for name, gate in gates.items() if gate})

    rows = torch.arange(len(SENTENCES)) % len(DOMAINS)
    mixed = model.forward_with_head(ids, mask, adapter_ids=rows)
    alone = torch.stack([said[DOMAINS[number]][row] for row, number in enumerate(rows.tolist())])
    difference = (mixed - alone).abs().max().item()
    if not difference <= LIMIT:
        raise DemoError(f"a row of a mixed batch differs by {difference:.1e} from the row alone")
    console.print(
        f"One batch of {len(SENTENCES)} sentences, the adapters in turn: equal to each alone within {difference:.1e}",
        highlight=False,
    )


def _logits(model: torch.jit.ScriptModule, ids: Tensor, mask: Tensor, number: int) -> Tensor:
    """[B, L] of the adapter with this number, in all rows."""
    return model.forward_with_head(ids, mask, adapter_ids=torch.full((ids.size(0),), number))


def _gates(model: torch.jit.ScriptModule, ids: Tensor, mask: Tensor, number: int):
    return model.forward_with_gates(ids, mask, adapter_ids=torch.full((ids.size(0),), number))[1]
