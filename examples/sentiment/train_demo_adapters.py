#!/usr/bin/env python3
"""Trains the adapters that scripts/demo shows: sentiment in three domains, each on 2,000 rated sentences.

    .venv/bin/python examples/sentiment/train_demo_adapters.py      # six minutes on two idle cores

writes examples/sentiment/adapters/DOMAIN, as AdapterHub keeps adapters, and README.md beside them with what they
measure. The prefixes' MLPs are small, so that the files are: 32 features instead of 512 and 800.
"""

from __future__ import annotations

import sys
import tarfile
import warnings
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "python"))
warnings.filterwarnings("ignore")  # torch warns dozens of times that torch.jit is deprecated

import torch  # noqa: E402

import torchgraft  # noqa: E402
from data import LABELS, DataError, prepare  # noqa: E402
from experiment import first, fresh_model  # noqa: E402
from torchgraft._files import write_whole  # noqa: E402
from torchgraft.training import (  # noqa: E402
    EncodedExamples,
    Trainer,
    TrainingOptions,
    encode_examples,
    read_examples,
    score,
)
from traced_encoder import tokenizer, traced_encoder  # noqa: E402

ADAPTERS = Path(__file__).resolve().parent / "adapters"
CONFIGS = {
    "tweets": "unipelt[bottleneck_size=32]",
    "movie_reviews": "mam[bottleneck_size=32,reduction_factor=8]",
    "amazon_reviews": "unipelt[bottleneck_size=32]",
}
SENTENCES = 2000
OPTIONS = TrainingOptions(epochs=2, batch_size=16)  # the rates of each part are the defaults
README = """\
# Adapters for the demonstration

`examples/sentiment/train_demo_adapters.py` trained these on {sentences} rated sentences each (Hutto and Gilbert 2014;
MIT licence), for all-MiniLM-L6-v2. Each has a head with three classes on the mean of the hidden states. `scripts/demo`
shows what they say. Accuracy is on test sentences that no training saw:

| adapter | configuration | test sentences | accuracy | largest class |
|---|---|---|---|---|
{rows}
"""


@dataclass(frozen=True)
class Trained:
    test_sentences: int
    accuracy: float
    majority: float


def train(base: torch.jit.ScriptModule, domain: str, training: EncodedExamples, test: EncodedExamples) -> Trained:
    module = fresh_model(base, CONFIGS[domain], domain, 0, gate_pooling="unpadded")
    Trainer(module, domain, first(training, SENTENCES, 0), None, len(LABELS), OPTIONS).run()
    torchgraft.save_adapter(module, domain, ADAPTERS / domain)
    counts = torch.bincount(test.labels, minlength=len(LABELS))
    majority = (counts.max() / counts.sum()).item()
    return Trained(len(test), score(module, test, len(LABELS)).accuracy, majority)


def run() -> None:
    paths, base, encode = prepare(ROOT / "build" / "sentiment" / "data"), traced_encoder(), tokenizer()
    rows = []
    for domain, config in CONFIGS.items():
        sets = [encode_examples(encode, read_examples(paths[domain][part]), LABELS) for part in ("train", "test")]
        result = train(base, domain, *sets)
        rows.append(
            f"| {domain} | `{config}` | {result.test_sentences} | {result.accuracy:.3f} | {result.majority:.3f} |"
        )
        print(rows[-1], flush=True)
    write_whole(README.format(sentences=f"{SENTENCES:,}", rows="\n".join(rows)).encode(), ADAPTERS / "README.md")


def main() -> int:
    try:
        run()
        return 0
    except (DataError, OSError, tarfile.TarError, torchgraft.GraftError) as error:
        print("train_demo_adapters: error:", " ".join(str(error).split()), file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
