"""Which runs there are, and what one run measures."""

from __future__ import annotations

import json
import math
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torchgraft
from data import DOMAINS, LABELS
from encoder import tokenizer, traced_encoder
from probe import Probe, best_probe, features
from torch import Tensor
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

PROBE = "linear probe"
# As the report calls them: configuration, learning rate. Of 0.001, 0.003 and 0.01, what one seed did best with on validation
# sentences of movie reviews, after two epochs of 1,000 (LoRA and SeqBn: 0.003 and 0.01 were tried). What trains the MLP of a
# prefix ended in one class for everything at 0.003, UniPELT with another seed at 0.002 too; at 0.001 it needs some 100 steps.
METHODS = {
    "UniPELT": ("unipelt", 1e-3),
    "MAM": ("mam", 1e-3),
    "LoRA": ("lora", 1e-2),
    "SeqBn": ("seq_bn", 1e-2),
    "prefix tuning": ("prefix_tuning", 1e-3),
}
COMPARED_ON = "movie_reviews"  # where all methods run


@dataclass(frozen=True)
class Plan:
    """What is run.

    Attributes:
        sentences: training sentences of a run at most; None: all of the domain's.
        steps: of the optimizer, at least, whatever the number of sentences: few sentences are seen in more epochs.
        other_steps: the same of all runs but UniPELT's on COMPARED_ON with all its sentences.
        domain_seeds, method_seeds: of UniPELT and the probe on each domain, and of the other methods on COMPARED_ON.
        method_sentences: of those other methods; None: as `sentences`.
        curve: numbers of training sentences; 0: all.
        curve_methods: the methods of the learning curve.
        test, validation: sentences at most; None: all.
    """

    sentences: int | None
    steps: int
    other_steps: int
    domain_seeds: dict[str, list[int]]
    method_seeds: list[int]
    method_sentences: int | None
    curve: list[int]
    curve_methods: list[str]
    test: int | None
    validation: int | None


SEEDS = [0, 1, 2]


@dataclass(frozen=True)
class Job:
    """One training. sentences: None for all."""

    domain: str
    method: str
    sentences: int | None
    seed: int


def jobs_of(plan: Plan) -> list[Job]:
    """Every run once. The most telling come first, so that a report made early has them."""
    jobs = []
    for domain in DOMAINS:
        for seed in plan.domain_seeds[domain]:
            jobs += [Job(domain, method, plan.sentences, seed) for method in ("UniPELT", PROBE)]
    others = [method for method in METHODS if method != "UniPELT"]
    jobs += [Job(COMPARED_ON, method, plan.method_sentences or plan.sentences, seed)
             for seed in plan.method_seeds for method in others]  # fmt: skip
    jobs += [Job(COMPARED_ON, method, size or None, seed)
             for size in plan.curve for seed in plan.method_seeds for method in plan.curve_methods]  # fmt: skip
    return list(dict.fromkeys(jobs))


@dataclass(frozen=True)
class Outcome:
    """What one run has measured, on the test sentences; gates: of UniPELT, on some of them."""

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
class Domain:
    training: EncodedExamples
    validation: EncodedExamples
    test: EncodedExamples


def _first(examples: EncodedExamples, count: int | None, seed: int) -> EncodedExamples:
    """`count` of them, drawn by `seed`: of two counts, the larger draw contains the smaller."""
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    return examples.chosen(order[:count])


class Experiment:
    """The base, the data, and runs on them."""

    def __init__(self, paths: dict[str, dict[str, Path]], plan: Plan, folder: Path):
        self._plan, self._folder = plan, folder
        self._base, encode = traced_encoder(), tokenizer()
        self._domains = {}
        for domain, parts in paths.items():
            sets = {part: encode_examples(encode, read_examples(path), LABELS) for part, path in parts.items()}
            self._domains[domain] = Domain(sets["train"], _first(sets["validation"], plan.validation, 0),
                                           _first(sets["test"], plan.test, 0))  # fmt: skip
        self._features: dict[tuple[str, str], Tensor] = {}

    def run(self, job: Job) -> Outcome:
        domain = self._domains[job.domain]
        training = _first(domain.training, job.sentences, job.seed)
        check_every_class(training.labels, LABELS)
        counts = torch.bincount(domain.test.labels, minlength=len(LABELS))
        outcome = self._probe(job, domain, training) if job.method == PROBE else self._train(job, domain, training)
        return replace(outcome, training_sentences=len(training), test_sentences=len(domain.test),
                       majority=(counts.max() / counts.sum()).item())  # fmt: skip

    def _train(self, job: Job, domain: Domain, training: EncodedExamples) -> Outcome:
        torch.manual_seed(job.seed)
        config, learning_rate = METHODS[job.method]
        module = torchgraft.graft(self._base, config, job.domain, trainable=True)
        head = torchgraft.HeadConfig(num_labels=len(LABELS), labels=LABELS, pooling="mean", layers=1, dropout_prob=0.1)
        module = torchgraft.add_head(module, job.domain, head)
        compared = (job.domain, job.method, job.sentences) == (COMPARED_ON, "UniPELT", self._plan.sentences)
        steps = self._plan.steps if compared else self._plan.other_steps
        options = TrainingOptions(seed=job.seed, learning_rate=learning_rate)
        per_epoch = math.ceil(len(training) / options.batch_size)
        options = replace(options, epochs=math.ceil(steps / per_epoch))
        result = Trainer(module, job.domain, training, None, len(LABELS), options).run()
        scores = score(module, domain.test, len(LABELS))
        if job.method == "UniPELT" and job.seed == SEEDS[0] and job.sentences == self._plan.sentences:
            self._keep(module, job.domain)
        seconds = [record["seconds"] for record in result.history]
        parameters = sum(value.numel() for value in torchgraft.trainable_parameters(module, job.domain).values())
        return Outcome(scores.accuracy, scores.macro_f1, parameters, options.epochs, result.steps, 0, 0,
                       statistics.median(seconds), 0.0)  # fmt: skip

    def _keep(self, module: torch.jit.ScriptModule, domain: str) -> None:
        """The adapter, for load_adapter() here and in AdapterHub, and a picture of its gates."""
        torchgraft.save_adapter(module, domain, self._folder / "adapters" / domain)
        title = f"UniPELT on {domain}: mean gates over test sentences"
        torchgraft.plot_gates(self._gates(module, domain), self._folder / f"gates_{domain}.png", title=title)

    def _gates(self, module: torch.jit.ScriptModule, domain: str, count: int = 256) -> list[AdapterGates]:
        examples = _first(self._domains[domain].test, count, 0)
        found = []
        with torch.no_grad():
            for indices in scoring_batches(examples.lengths(), 64):
                values = collate(examples, indices, slice(None), torch.device("cpu")).values
                found.append(module.forward_with_gates(values["ids"], values["mask"])[1][domain])
        return found

    def _probe(self, job: Job, domain: Domain, training: EncodedExamples) -> Outcome:
        """Its time is that of the fits, without the features."""
        parts = (training, domain.validation, domain.test)
        x, validation, test = (self._known_features(job.domain, part) for part in parts)
        started = time.perf_counter()
        fitted = best_probe(x, training.labels, validation, domain.validation.labels, len(LABELS))
        return self._probe_outcome(fitted, test, domain.test.labels, time.perf_counter() - started)

    def _known_features(self, domain: str, examples: EncodedExamples) -> Tensor:
        """[N, H]. The base is frozen: what it makes of a sentence is computed once for all runs."""
        keys = [(domain, place) for place in examples.where]
        missing = [index for index, key in enumerate(keys) if key not in self._features]
        if missing:
            for index, row in zip(missing, features(self._base, examples.chosen(missing)), strict=True):
                self._features[keys[index]] = row
        return torch.stack([self._features[key] for key in keys])

    @staticmethod
    def _probe_outcome(fitted: Probe, test: Tensor, labels: Tensor, seconds: float) -> Outcome:
        with torch.no_grad():
            predicted = fitted.logits(test).argmax(-1)
        scores = scores_of(confusion_matrix(predicted, labels, len(LABELS)), 0.0)
        return Outcome(scores.accuracy, scores.macro_f1, fitted.parameters(), 0, 0, 0, 0, seconds, 0.0)


class Results:
    """Outcomes by job, kept in a file after each run, so that a run that was stopped goes on."""

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
