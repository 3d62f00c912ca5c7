#!/usr/bin/env python3
"""AdapterFusion over three domains: does it beat the best of their adapters?

    .venv/bin/python examples/sentiment/fusion.py                   # some minutes
    .venv/bin/python examples/sentiment/fusion.py --seeds 3

Trains a bottleneck adapter on sentences of each of three domains. Then freezes them, and trains AdapterFusion layers
over all three, with a head, on the sentences of one domain, as its own adapter was. Prints the accuracy of each on test
sentences of that domain.
"""

from __future__ import annotations

import argparse
import sys
import tarfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "python"))
warnings.filterwarnings("ignore")  # torch warns dozens of times that torch.jit is deprecated

import torch  # noqa: E402

import torchgraft  # noqa: E402
from data import LABELS, DataError, prepare  # noqa: E402
from experiment import Split, first, fresh_model  # noqa: E402
from torchgraft.training import Trainer, TrainingOptions, encode_examples, read_examples, score  # noqa: E402
from traced_encoder import tokenizer, traced_encoder  # noqa: E402

DOMAINS = ["tweets", "movie_reviews", "amazon_reviews"]
TARGET = "movie_reviews"
HEAD = torchgraft.HeadConfig(num_labels=len(LABELS), labels=LABELS, pooling="mean", layers=1, dropout_prob=0.1)


@dataclass(frozen=True)
class Budget:
    sentences: int
    epochs: int
    test: int

    def options(self, seed: int) -> TrainingOptions:
        return TrainingOptions(epochs=self.epochs, batch_size=16, seed=seed)


def splits(domains: list[str]) -> dict[str, Split]:
    paths, encode = prepare(ROOT / "build" / "sentiment" / "data"), tokenizer()
    result = {}
    for domain in domains:
        parts = {part: encode_examples(encode, read_examples(path), LABELS) for part, path in paths[domain].items()}
        result[domain] = Split(parts["train"], parts["validation"], parts["test"])
    return result


def trained_adapters(data: dict[str, Split], budget: Budget, seed: int) -> torch.jit.ScriptModule:
    """The base with a frozen adapter for each domain, each with its head."""
    module = traced_encoder()
    for domain, split in data.items():
        module = fresh_model(module, "seq_bn", domain, seed)
        chosen = first(split.training, budget.sentences, seed)
        Trainer(module, domain, chosen, None, len(LABELS), budget.options(seed)).run()
        module = torchgraft.freeze_adapter(module, domain)
    return module


def with_fusion(module: torch.jit.ScriptModule, seed: int) -> torch.jit.ScriptModule:
    """The same with "fused", whose AdapterFusion layers are to be trained."""
    torch.manual_seed(seed)
    module = torchgraft.add_adapter_fusion(module, DOMAINS, "dynamic", trainable=True)
    module = torchgraft.compose(module, "fused", torchgraft.Fuse(*DOMAINS))
    return torchgraft.add_head(module, "fused", HEAD)


def accuracies(data: dict[str, Split], budget: Budget, seed: int, output: Path) -> dict[str, float]:
    module = with_fusion(trained_adapters(data, budget, seed), seed)
    own = data[TARGET]
    chosen = first(own.training, budget.sentences, seed)
    Trainer(module, "fused", chosen, None, len(LABELS), budget.options(seed)).run()
    module = torchgraft.freeze_adapter(module, "fused")
    torchgraft.save_adapter_setup(module, "fused", output / f"fused_{seed}", overwrite=True)
    test = first(own.test, budget.test, 0)
    result = {}
    for name in [*DOMAINS, "fused"]:
        module.activate(name)
        result[name] = score(module, test, len(LABELS)).accuracy
    return result


def report(found: list[dict[str, float]]) -> str:
    means = {name: mean(one[name] for one in found) for name in found[0]}
    best = max(DOMAINS, key=means.__getitem__)
    lines = [f"{name:16} {value:.3f}   " + " ".join(f"{one[name]:.3f}" for one in found)
             for name, value in means.items()]  # fmt: skip
    gain = means["fused"] - means[best]
    verdict = "beats" if gain > 0 else "does not beat"
    return "\n".join([*lines, f"The fusion {verdict} the best single adapter, {best}: {gain:+.3f}."])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sentences", type=int, default=500, help="for each training (default: 500)")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--test", type=int, default=1000, help="test sentences (default: 1000)")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "sentiment" / "fusion")
    arguments = parser.parse_args()
    budget = Budget(arguments.sentences, arguments.epochs, arguments.test)
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
        data = splits(DOMAINS)
        found = [accuracies(data, budget, seed, arguments.output) for seed in range(arguments.seeds)]
        print(f"Accuracy on {budget.test} test sentences of {TARGET}, mean and by seed")
        print(report(found))
        return 0
    except (DataError, OSError, tarfile.TarError, torchgraft.GraftError) as error:
        print("fusion: error:", " ".join(str(error).split()), file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
