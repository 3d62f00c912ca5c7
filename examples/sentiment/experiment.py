"""The runs of the experiment, and what each measures."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import torchgraft
from data import DOMAINS, LABELS
from probe import best_probe, features
from torchgraft._files import write_whole
from torchgraft.gates import AdapterGates
from torchgraft.training import (
    EncodedExamples,
    Trainer,
    TrainingOptions,
    encode_examples,
    read_examples,
    score,
)
from torchgraft.training.batches import collate, scoring_batches
from torchgraft.training.examples import check_every_class
from torchgraft.training.metrics import confusion_matrix, scores_of
from torchgraft.training.options import DEFAULT_RATES
from traced_encoder import tokenizer, traced_encoder

PROBE = "linear probe"
# Their names in the report, and their configurations.
METHODS = {"UniPELT": "unipelt", "MAM": "mam", "LoRA": "lora", "SeqBn": "seq_bn", "prefix tuning": "prefix_tuning"}
OPTIONS = TrainingOptions(batch_size=16)  # the rates of each part are the defaults
COMPARED_ON = "movie_reviews"  # where all methods run
CURVE_METHODS = ("UniPELT", PROBE)


@dataclass(frozen=True)
class Size:
    """How much one training does. sentences: at most so many; None: all of the domain's. steps: at least so many of the
    optimizer: few sentences mean more epochs. test: at most so many test sentences."""

    sentences: int | None
    steps: int
    test: int


@dataclass(frozen=True)
class Job:
    """One training. sentences: None for all."""

    domain: str
    method: str
    sentences: int | None
    seed: int


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        compared, seeds: of UniPELT and the probe on COMPARED_ON.
        other, other_seeds: of both on the other domains, of other methods on COMPARED_ON, and of the learning curve;
            `other_seeds` are among `seeds`.
        curve: numbers of training sentences; None: all.
        validation: at most so many sentences choose the probe's penalty.
    """

    compared: Size
    seeds: list[int]
    other: Size
    other_seeds: list[int]
    curve: list[int | None]
    validation: int

    def sentences(self, domain: str) -> int | None:
        """How many train UniPELT and the probe on `domain`, outside the curve."""
        return (self.compared if domain == COMPARED_ON else self.other).sentences

    def size(self, job: Job) -> Size:
        compared = (job.domain, job.sentences) == (COMPARED_ON, self.compared.sentences) and job.method in CURVE_METHODS
        return self.compared if compared else self.other


def jobs_of(plan: Plan) -> list[Job]:
    """Every run once, in order of seeds, so that an early report lacks seeds rather than methods."""
    jobs = []
    for seed in plan.seeds:
        jobs += [Job(COMPARED_ON, method, plan.compared.sentences, seed) for method in CURVE_METHODS]
        if seed in plan.other_seeds:
            jobs += [
                Job(domain, method, plan.other.sentences, seed)
                for domain in DOMAINS
                if domain != COMPARED_ON
                for method in CURVE_METHODS
            ]
            jobs += [Job(COMPARED_ON, method, plan.other.sentences, seed) for method in METHODS if method != "UniPELT"]
            jobs += [Job(COMPARED_ON, method, size, seed) for size in plan.curve for method in CURVE_METHODS]
    return list(dict.fromkeys(jobs))


@dataclass(frozen=True)
class Outcome:
    """What one run measured on the test sentences. seconds_per_epoch: of all cores together, so that other programs
    on the machine change it little. majority: the share of the largest class among the test sentences."""

    accuracy: float
    macro_f1: float
    parameters: int
    epochs: int
    steps: int
    training_sentences: int
    test_sentences: int
    seconds_per_epoch: float
    majority: float


@dataclass(frozen=True)
class Split:
    training: EncodedExamples
    validation: EncodedExamples
    test: EncodedExamples


def first(examples: EncodedExamples, count: int | None, seed: int) -> EncodedExamples:
    """`count` of them, drawn by `seed`. A larger draw contains the smaller ones of its seed."""
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    return examples.chosen(order[:count])


def fresh_model(
    base: torch.jit.ScriptModule, config: str, name: str, seed: int, *, dropout: float = 0.1,
    gate_pooling: str | None = None,
) -> torch.jit.ScriptModule:  # fmt: skip
    """`base` with a trainable adapter, and a linear head on the masked mean of the hidden states."""
    torch.manual_seed(seed)
    model = torchgraft.graft(base, config, name, gate_pooling=gate_pooling, trainable=True)
    head = torchgraft.HeadConfig(num_labels=len(LABELS), labels=LABELS, pooling="mean", layers=1, dropout_prob=dropout)
    return torchgraft.add_head(model, name, head)


class Experiment:
    """The base, the data, and runs on them."""

    def __init__(self, paths: dict[str, dict[str, Path]], plan: Plan, folder: Path):
        self._plan, self._folder = plan, folder
        self._base, encode = traced_encoder(), tokenizer()
        self._domains = {}
        for domain, parts in paths.items():
            sets = {part: encode_examples(encode, read_examples(path), LABELS) for part, path in parts.items()}
            self._domains[domain] = Split(sets["train"], sets["validation"], sets["test"])
        self._features: dict[tuple[str, str], Tensor] = {}

    def run(self, job: Job) -> Outcome:
        domain, size = self._domains[job.domain], self._plan.size(job)
        chosen = Split(
            first(domain.training, job.sentences, job.seed),
            first(domain.validation, self._plan.validation, 0),
            first(domain.test, size.test, 0),
        )
        check_every_class(chosen.training.labels, LABELS)
        counts = torch.bincount(chosen.test.labels, minlength=len(LABELS))
        outcome = self._probe(job, chosen) if job.method == PROBE else self._train(job, chosen, size.steps)
        return replace(
            outcome,
            training_sentences=len(chosen.training),
            test_sentences=len(chosen.test),
            majority=(counts.max() / counts.sum()).item(),
        )

    def _train(self, job: Job, chosen: Split, steps: int) -> Outcome:
        module = fresh_model(self._base, METHODS[job.method], job.domain, job.seed)
        per_epoch = math.ceil(len(chosen.training) / OPTIONS.batch_size)
        options = replace(OPTIONS, seed=job.seed, epochs=math.ceil(steps / per_epoch))
        started = time.process_time()
        result = Trainer(module, job.domain, chosen.training, None, len(LABELS), options).run()
        seconds = time.process_time() - started
        scores = score(module, chosen.test, len(LABELS))
        if (job.method, job.sentences, job.seed) == ("UniPELT", self._plan.sentences(job.domain), self._plan.seeds[0]):
            self._keep(module, job.domain, chosen.test)
        parameters = sum(value.numel() for value in torchgraft.trainable_parameters(module, job.domain).values())
        return Outcome(scores.accuracy, scores.macro_f1, parameters, options.epochs, result.steps, 0, 0,
                       seconds / options.epochs, 0.0)  # fmt: skip

    def _keep(self, module: torch.jit.ScriptModule, domain: str, test: EncodedExamples) -> None:
        """The adapter, for load_adapter() here and in AdapterHub, and a picture of its gates."""
        torchgraft.save_adapter(module, domain, self._folder / "adapters" / domain)
        title = f"UniPELT on {domain}: mean gates over test sentences"
        gates = _gates_of(module, domain, test.chosen(range(min(256, len(test)))))
        torchgraft.plot_gates(gates, self._folder / f"gates_{domain}.png", title=title)

    def _probe(self, job: Job, chosen: Split) -> Outcome:
        x, validation, test = (
            self._known_features(job.domain, part) for part in (chosen.training, chosen.validation, chosen.test)
        )
        fitted = best_probe(x, chosen.training.labels, validation, chosen.validation.labels, len(LABELS))
        with torch.no_grad():
            predicted = fitted.logits(test).argmax(-1)
        scores = scores_of(confusion_matrix(predicted, chosen.test.labels, len(LABELS)), 0.0)
        return Outcome(scores.accuracy, scores.macro_f1, fitted.parameters(), 0, 0, 0, 0, 0.0, 0.0)

    def _known_features(self, domain: str, examples: EncodedExamples) -> Tensor:
        """[N, H]. The base is frozen, so all runs share the features of a sentence."""
        keys = [(domain, place) for place in examples.where]
        missing = [index for index, key in enumerate(keys) if key not in self._features]
        if missing:
            for index, row in zip(missing, features(self._base, examples.chosen(missing)), strict=True):
                self._features[keys[index]] = row
        return torch.stack([self._features[key] for key in keys])


def _gates_of(module: torch.jit.ScriptModule, name: str, examples: EncodedExamples) -> list[AdapterGates]:
    """The gates of the adapter `name`, batch by batch."""
    found = []
    with torch.no_grad():
        for indices in scoring_batches(examples.lengths(), 64):
            values = collate(examples, indices, slice(None), torch.device("cpu")).values
            found.append(module.forward_with_gates(values["ids"], values["mask"])[1][name])
    return found


def settings_of(plan: Plan) -> dict[str, Any]:
    """What the outcomes of two runs share that go into one report."""
    return {**asdict(plan), "options": OPTIONS.as_dict(), "rates": DEFAULT_RATES}


class Results:
    """Outcomes by job. A file keeps them after each run, so that the same command goes on after a stop."""

    def __init__(self, path: Path, settings: dict[str, Any]):
        self._path, self._settings = path, settings
        self.outcomes: dict[Job, Outcome] = {}
        if path.is_file():
            content = json.loads(path.read_text())
            if content["settings"] == json.loads(json.dumps(settings)):
                self.outcomes = {Job(**one["job"]): Outcome(**one["outcome"]) for one in content["runs"]}

    def add(self, job: Job, outcome: Outcome) -> None:
        self.outcomes[job] = outcome
        runs = [{"job": asdict(job), "outcome": asdict(outcome)} for job, outcome in self.outcomes.items()]
        write_whole(json.dumps({"settings": self._settings, "runs": runs}, indent=1).encode(), self._path)
