"""The report: tables, pictures, Markdown, and HTML made of that."""

from __future__ import annotations

import io
import os
import platform
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import markdown
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from data import DOMAINS, THRESHOLD
from experiment import COMPARED_ON, CURVE_METHODS, METHODS, OPTIONS, PROBE, Job, Outcome, Plan
from torchgraft._files import write_whole
from torchgraft.training.options import DEFAULT_RATES

_TEMPLATES = Path(__file__).resolve().parent / "templates"

Outcomes = Mapping[Job, Outcome]


@dataclass(frozen=True)
class Spread:
    """Over seeds: the mean, the sample standard deviation (0 of one value), and the smallest and largest."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float:
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0

    @property
    def range(self) -> float:
        return max(self.values) - min(self.values)

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + (f" ± {self.deviation:.3f}" if len(self.values) > 1 else "")


@dataclass(frozen=True)
class Row:
    """A method on a domain with one number of sentences, over seeds."""

    domain: str
    method: str
    seeds: int
    accuracy: Spread
    macro_f1: Spread
    outcome: Outcome  # of the first seed: what does not depend on it
    seconds_per_epoch: float


def row_of(outcomes: Outcomes, domain: str, method: str, sentences: int | None) -> Row | None:
    """None if nothing ran it."""
    found = [
        outcome
        for job, outcome in outcomes.items()
        if (job.domain, job.method, job.sentences) == (domain, method, sentences)
    ]
    if not found:
        return None
    return Row(
        domain,
        method,
        len(found),
        Spread(tuple(one.accuracy for one in found)),
        Spread(tuple(one.macro_f1 for one in found)),
        found[0],
        statistics.median(one.seconds_per_epoch for one in found),
    )


@dataclass(frozen=True)
class Comparison:
    """UniPELT against the probe, same sentences and seeds. margin: of mean accuracies; spread: the larger range."""

    margin: float
    spread: float

    @property
    def won(self) -> bool:
        return self.margin > self.spread


def compare(outcomes: Outcomes, domain: str, sentences: int | None) -> Comparison:
    unipelt, probe = (row_of(outcomes, domain, method, sentences) for method in ("UniPELT", PROBE))
    return Comparison(unipelt.accuracy.mean - probe.accuracy.mean, max(unipelt.accuracy.range, probe.accuracy.range))


def _present(rows: Iterable[Row | None]) -> list[Row]:
    return [row for row in rows if row is not None]


def _curve_rows(plan: Plan, outcomes: Outcomes) -> list[Row]:
    """By the number of sentences, then by method."""
    sizes = {*plan.curve, plan.compared.sentences}
    rows = [row_of(outcomes, COMPARED_ON, method, size) for method in CURVE_METHODS for size in sizes]
    return sorted(_present(rows), key=lambda row: row.outcome.training_sentences)


def _draw_curve(rows: list[Row], path: Path) -> None:
    """Accuracy and macro-F1 over the number of training sentences."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    counts = sorted({row.outcome.training_sentences for row in rows})
    for ax, name in zip(figure.subplots(1, 2), ("accuracy", "macro_f1"), strict=True):
        for method in CURVE_METHODS:
            points = [(row.outcome.training_sentences, getattr(row, name)) for row in rows if row.method == method]
            means, deviations = [spread.mean for _, spread in points], [spread.deviation for _, spread in points]
            ax.errorbar([count for count, _ in points], means, yerr=deviations, marker="o", capsize=3, label=method)
        ax.set_xscale("log")
        ax.set_xticks(counts, labels=map(str, counts))
        ax.minorticks_off()
        ax.set_xlabel("training sentences")
        ax.set_ylabel(name.replace("macro_f1", "macro-F1"))
        ax.grid(alpha=0.3)
        ax.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_whole(buffer.getvalue(), path)


def _machine() -> str:
    cores, threads = os.cpu_count(), torch.get_num_threads()
    return f"{platform.machine()} (cores: {cores}, threads: {threads}), torch {torch.__version__}"


def write_report(plan: Plan, outcomes: Outcomes, folder: Path, command: str) -> None:
    """report.md, report.html and curve.png in `folder`."""
    curve = _curve_rows(plan, outcomes)
    _draw_curve(curve, folder / "curve.png")
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    text = environment.get_template("report.md.j2").render(
        command=command,
        machine=_machine(),
        threshold=THRESHOLD,
        plan=plan,
        compared_on=COMPARED_ON,
        options=OPTIONS,
        rates={part: OPTIONS.rate_of(part) for part in DEFAULT_RATES},
        comparison=compare(outcomes, COMPARED_ON, plan.compared.sentences),
        curve=curve,
        domains=_present(
            row_of(outcomes, domain, method, plan.sentences(domain)) for domain in DOMAINS for method in CURVE_METHODS
        ),
        methods=_present(row_of(outcomes, COMPARED_ON, method, plan.other.sentences) for method in [*METHODS, PROBE]),
        gates=[domain for domain in DOMAINS if (folder / f"gates_{domain}.png").is_file()],
    )
    body = markdown.markdown(text, extensions=["tables"])
    page = environment.get_template("report.html.j2").render(title="Sentiment in four domains", body=body)
    write_whole(text.encode(), folder / "report.md")
    write_whole(page.encode(), folder / "report.html")
