#!/usr/bin/env python3
"""Trains adapters for sentiment in four domains, compares methods, and writes a report.

    .venv/bin/python examples/sentiment/run.py --quick      # 3.5 minutes on two idle cores (Zen 3)
    .venv/bin/python examples/sentiment/run.py              # half an hour on two cores

Three seeds of UniPELT and of a linear probe of the frozen base, for tweets, movie reviews, Amazon reviews and
editorials; on movie reviews also MAM, LoRA, SeqBn and prefix tuning. The output folder gets report.md, report.html,
pictures, the four adapters, and results.json, from which the same command goes on after a stop.
"""

from __future__ import annotations

import argparse
import sys
import tarfile
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "python"))
warnings.filterwarnings("ignore")  # torch warns dozens of times that torch.jit is deprecated

import torch  # noqa: E402
from rich.console import Console  # noqa: E402

import torchgraft  # noqa: E402
from data import DataError, prepare  # noqa: E402
from experiment import Experiment, Plan, Results, Size, jobs_of, settings_of  # noqa: E402

try:
    from report import write_report
except ModuleNotFoundError as error:  # Jinja2, Markdown
    sys.exit(f"run.py: error: {error}; run scripts/setup --train")

FULL = Plan(
    compared=Size(2000, 125, test=1000),
    seeds=[0, 1, 2],
    other=Size(2000, 125, test=1000),
    other_seeds=[0, 1, 2],
    curve=[100, 500, 1000, None],
    validation=500,
)
# The comparison is that of the full run; all else is there to be seen working.
QUICK = Plan(
    compared=Size(2000, 125, test=1000),
    seeds=[0, 1, 2],
    other=Size(200, 13, test=200),
    other_seeds=[0],
    curve=[200],
    validation=500,
)


def run(arguments: argparse.Namespace, console: Console) -> None:
    plan, folder = QUICK if arguments.quick else FULL, arguments.output
    folder.mkdir(parents=True, exist_ok=True)
    results = Results(folder / "results.json", settings_of(plan))
    jobs = [] if arguments.report else [job for job in jobs_of(plan) if job not in results.outcomes]
    if jobs:
        experiment = Experiment(prepare(folder / "data"), plan, folder)
    for index, job in enumerate(jobs, 1):
        started = time.perf_counter()
        outcome = experiment.run(job)
        results.add(job, outcome)
        console.print(
            f"[{index}/{len(jobs)}] {job.domain}, {job.method}, {outcome.training_sentences} sentences, seed "
            f"{job.seed}: accuracy {outcome.accuracy:.3f}, macro-F1 {outcome.macro_f1:.3f}, "
            f"{time.perf_counter() - started:.0f} s",
            soft_wrap=True,
        )
    command = "examples/sentiment/run.py" + (" --quick" if arguments.quick else "")
    write_report(plan, results.outcomes, folder, command)
    console.print(f"{folder / 'report.html'}, {folder / 'report.md'}: written", soft_wrap=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer sentences and seeds: what the tests run")
    parser.add_argument("--report", action="store_true", help="run nothing; report what has run so far")
    parser.add_argument("--output", type=Path, help="default: build/sentiment/full, or quick")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default: 2)")
    arguments = parser.parse_args()
    arguments.output = arguments.output or ROOT / "build" / "sentiment" / ("quick" if arguments.quick else "full")
    torch.set_num_threads(arguments.threads)
    try:
        run(arguments, Console(stderr=True, markup=False, highlight=False))
        return 0
    except (DataError, OSError, tarfile.TarError, torchgraft.GraftError) as error:
        print("run: error:", " ".join(str(error).split()), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("run: error: interrupted; the same command goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
