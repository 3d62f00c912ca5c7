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
from data import DOMAINS, THRESHOLD
from experiment import COMPARED_ON, METHODS, PROBE, Job, Outcome, Plan
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure
from torchgraft._files import write_whole

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
    """A method on a domain with so many sentences, over seeds."""

    domain: str
    method: str
    seeds: int
    accuracy: Spread
    macro_f1: Spread
    outcome: Outcome  # of the first seed: what does not depend on it
    seconds_per_epoch: float


def row_of(outcomes: Outcomes, domain: str, method: str, sentences: int | None) -> Row | None:
    """None: it was not run."""
    found = [outcome for job, outcome in outcomes.items()
             if (job.domain, job.method, job.sentences) == (domain, method, sentences)]  # fmt: skip
    if not found:
        return None
    return Row(domain, method, len(found), Spread(tuple(one.accuracy for one in found)),
               Spread(tuple(one.macro_f1 for one in found)), found[0],
               statistics.median(one.seconds_per_epoch for one in found))  # fmt: skip


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


def _draw_curve(plan: Plan, outcomes: Outcomes, path: Path) -> bool:
    """Accuracy and macro-F1 over the number of training sentences. False: there are not two points to join."""
    sizes = {size or None for size in plan.curve} | {plan.sentences}
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2)
    points = 0
    for method in plan.curve_methods:
        rows = _present(row_of(outcomes, COMPARED_ON, method, size) for size in sizes)
        rows.sort(key=lambda row: row.outcome.training_sentences)
        points = max(points, len(rows))
        for ax, name in zip(axes, ("accuracy", "macro_f1"), strict=True):
            spreads = [getattr(row, name) for row in rows]
            counts = [row.outcome.training_sentences for row in rows]
            means = [spread.mean for spread in spreads]
            errors = [spread.deviation for spread in spreads]
            ax.errorbar(counts, means, yerr=errors, marker="o", capsize=3, label=method)
    for ax, name in zip(axes, ("accuracy", "macro-F1"), strict=True):
        ax.set_xscale("log")
        ax.set_xlabel("training sentences")
        ax.set_ylabel(name)
        ax.grid(alpha=0.3)
        ax.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_whole(buffer.getvalue(), path)
    return points > 1


def _machine() -> str:
    threads = f"{torch.get_num_threads()} threads"
    return f"{os.cpu_count()} cores ({platform.machine()}), {threads}, torch {torch.__version__}"


def write_report(plan: Plan, outcomes: Outcomes, folder: Path, command: str) -> None:
    """report.md, report.html and curve.png in `folder`."""
    compared = plan.method_sentences or plan.sentences
    has_curve = _draw_curve(plan, outcomes, folder / "curve.png")
    methods = ["UniPELT", *(method for method in METHODS if method != "UniPELT"), PROBE]
    sizes = sorted({size or None for size in plan.curve} | {plan.sentences}, key=lambda size: size or 10**9)
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    text = environment.get_template("report.md.j2").render(
        command=command, machine=_machine(), threshold=THRESHOLD, plan=plan, compared_on=COMPARED_ON, probe=PROBE,
        domains=_present(row_of(outcomes, domain, method, plan.sentences) for domain in DOMAINS
                         for method in ("UniPELT", PROBE)),
        methods=_present(row_of(outcomes, COMPARED_ON, method, compared) for method in methods),
        curve=_present(row_of(outcomes, COMPARED_ON, method, size) for size in sizes for method in plan.curve_methods),
        comparison=compare(outcomes, COMPARED_ON, plan.sentences), has_curve=has_curve,
        gates=[domain for domain in DOMAINS if (folder / f"gates_{domain}.png").is_file()],
    )  # fmt: skip
    body = markdown.markdown(text, extensions=["tables"])
    page = environment.get_template("report.html.j2").render(title="Sentiment in four domains", body=body)
    write_whole(text.encode(), folder / "report.md")
    write_whole(page.encode(), folder / "report.html")
