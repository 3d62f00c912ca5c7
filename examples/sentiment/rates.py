#!/usr/bin/env python3
"""How one method learns with given rates: accuracy on 500 validation sentences of movie reviews, seed by seed.

    .venv/bin/python examples/sentiment/rates.py --config mam
    .venv/bin/python examples/sentiment/rates.py --config mam --learning-rate 3e-3 --prefix-learning-rate 1e-3
    .venv/bin/python examples/sentiment/rates.py --config mam ... --library --sentences 800 --seeds 0

With --library, the `adapters` library trains the same adapter from the same weights on the same batches, too.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "python"))
warnings.filterwarnings("ignore")  # torch warns dozens of times that torch.jit is deprecated

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import torchgraft  # noqa: E402
from data import LABELS, prepare  # noqa: E402
from experiment import first, fresh_model  # noqa: E402
from torchgraft.training import (  # noqa: E402
    EncodedExamples,
    Listener,
    Trainer,
    TrainingOptions,
    encode_examples,
    read_examples,
    score,
)
from torchgraft.training.batches import collate, training_batches  # noqa: E402
from torchgraft.training.schedule import learning_rate_factor  # noqa: E402
from traced_encoder import encoder_folder, tokenizer, traced_encoder  # noqa: E402

DOMAIN, VALIDATION, NAME = "movie_reviews", 500, "rates"


class Losses(Listener):
    def __init__(self) -> None:
        self.values: list[float] = []

    def stepped(self, step: int, loss: float, learning_rate: float, gradient_norm: float) -> None:
        self.values.append(loss)


@dataclass(frozen=True)
class Outcome:
    """losses: of each step, on its batch."""

    accuracy: float
    losses: list[float]


def train(model: torch.jit.ScriptModule, examples: EncodedExamples, held: EncodedExamples, options: TrainingOptions):
    losses = Losses()
    Trainer(model, NAME, examples, None, len(LABELS), options, listeners=[losses]).run()
    return Outcome(score(model, held, len(LABELS)).accuracy, losses.values)


class LibraryModel(nn.Module):
    """The library's model with the adapter of `start`, and a linear head on the masked mean."""

    def __init__(self, start: torch.jit.ScriptModule):
        from transformers import BertModel

        import adapters

        super().__init__()
        logging.getLogger("adapters").setLevel(logging.ERROR)
        self.model = BertModel.from_pretrained(str(encoder_folder()), local_files_only=True)
        adapters.init(self.model)
        with tempfile.TemporaryDirectory() as folder:
            torchgraft.save_adapter(start, NAME, folder)
            self.model.load_adapter(folder, load_as=NAME, use_safetensors=True)
        self.model.train_adapter(NAME)
        self.head = nn.Linear(384, len(LABELS))
        ours = [value.detach() for key, value in torchgraft.trainable_parameters(start, NAME).items() if "heads" in key]
        with torch.no_grad():
            for mine in (self.head.weight, self.head.bias):
                mine.copy_(next(value for value in ours if value.shape == mine.shape))

    def forward(self, values: dict[str, Tensor]) -> Tensor:
        hidden = self.model(values["ids"], values["mask"]).last_hidden_state
        weights = values["mask"].unsqueeze(-1).to(hidden.dtype)
        return self.head((hidden * weights).sum(1) / weights.sum(1))

    def groups(self, options: TrainingOptions) -> list[dict]:
        from adapters.methods.modeling import ParallelAdapter

        parallel = {
            id(p) for module in self.modules() if isinstance(module, ParallelAdapter) for p in module.parameters()
        }
        parts: dict[str, list[Tensor]] = {}
        for key, value in self.named_parameters():
            if value.requires_grad:
                part = "head" if key.startswith("head.") else "prefix" if "prefix" in key else "adapter"
                parts.setdefault("parallel" if id(value) in parallel else part, []).append(value)
        return [{"params": values, "lr": options.rate_of(part)} for part, values in parts.items()]


def train_library(
    start: torch.jit.ScriptModule, examples: EncodedExamples, held: EncodedExamples, options: TrainingOptions
) -> Outcome:
    model = LibraryModel(start).eval()  # no dropout, as in `start`
    groups, cpu = model.groups(options), torch.device("cpu")
    optimizer = torch.optim.AdamW(groups, weight_decay=options.weight_decay)
    batches = training_batches(examples.lengths(), options.batch_size, options.seed, 0)
    factor = learning_rate_factor(options.schedule, round(options.warmup * len(batches)), len(batches))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    losses = []
    for indices in batches:
        batch = collate(examples, indices, slice(None), cpu)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(batch.values), batch.labels)
        loss.backward()
        nn.utils.clip_grad_norm_([value for group in groups for value in group["params"]], options.clip)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    right = 0
    with torch.no_grad():
        for at in range(0, len(held), 50):
            batch = collate(held, list(range(at, min(at + 50, len(held)))), slice(None), cpu)
            right += (model(batch.values).argmax(-1) == batch.labels).sum().item()
    return Outcome(right / len(held), losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="mam")
    for part in ("", "head-", "prefix-", "parallel-"):
        parser.add_argument(f"--{part}learning-rate", type=float, metavar="RATE")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sentences", type=int, default=2000)
    parser.add_argument("--library", action="store_true", help="train it with the adapters library, too; no dropout")
    arguments = parser.parse_args()
    paths, base, encode = prepare(ROOT / "build" / "sentiment" / "data")[DOMAIN], traced_encoder(), tokenizer()
    examples, held = (encode_examples(encode, read_examples(paths[part]), LABELS) for part in ("train", "validation"))
    held = first(held, VALIDATION, 0)
    for seed in arguments.seeds:
        chosen = first(examples, arguments.sentences, seed)
        options = TrainingOptions(
            epochs=1,
            batch_size=16,
            seed=seed,
            learning_rate=arguments.learning_rate,
            head_learning_rate=arguments.head_learning_rate or 1e-2,
            prefix_learning_rate=arguments.prefix_learning_rate,
            parallel_learning_rate=arguments.parallel_learning_rate,
        )
        dropout = 0.0 if arguments.library else 0.1
        model = fresh_model(base, arguments.config, NAME, seed, dropout=dropout)
        library = train_library(model, chosen, held, options) if arguments.library else None
        ours = train(model, chosen, held, options)
        line = f"{arguments.config}, seed {seed}: accuracy {ours.accuracy:.3f}"
        if library is not None:
            apart = max(abs(a - b) for a, b in zip(ours.losses[:10], library.losses[:10], strict=True))
            line += f", the library's {library.accuracy:.3f}; losses of the first 10 steps differ by {apart:.1e}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
