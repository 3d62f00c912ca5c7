"""What many adapters in one batch cost: 64 distinct ones against one, and one against the bare base model.

    .venv/bin/python benchmarks/mixed_batch.py

MiniLM's size, UniPELT, 64 rows. Every variant runs once in each round, so that a busy moment of the machine meets all
of them; printed are ratios of medians, with the quartiles of the rounds' own ratios. The grafted module is as
AdapterPool serves it: on a frozen base, not frozen itself, for its rows change.
"""

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import models  # puts python/ on the path
import torchgraft
from this_machine import silence

ADAPTERS = 64
SIZES = models.MODELS["MiniLM"]


def make_variants(rows: int) -> dict[str, object]:
    base = torch.jit.freeze(models.traced(models.Positional(models.hugging_face(SIZES)).eval()))
    one = torchgraft.graft(base, "unipelt", "task_0", verify=False)
    many = one
    for index in range(1, ADAPTERS):
        many = torchgraft.graft(many, "unipelt", f"task_{index}", verify=False)
    distinct = torch.arange(rows) % ADAPTERS
    same = torch.zeros(rows, dtype=torch.int64)
    return {
        "base": base,
        "one adapter": lambda *batch: one(*batch, adapter_ids=same),
        "one of 64": lambda *batch: many(*batch, adapter_ids=same),
        "64 distinct": lambda *batch: many(*batch, adapter_ids=distinct),
    }


def ratio(values: list[float], to: list[float]) -> str:
    rounds = [value / other for value, other in zip(values, to, strict=True)]
    first, _, third = statistics.quantiles(rounds, n=4)
    return f"{statistics.median(values) / statistics.median(to):.2f} [{first:.2f}, {third:.2f}]"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["64x32", "64x64"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=40)
    arguments = parser.parse_args()
    if "MALLOC_TRIM_THRESHOLD_" not in os.environ:  # glibc reads it when a process starts
        command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:]]
        return subprocess.run(command, env=os.environ | models.ALLOCATOR, check=False).returncode
    silence()
    table = Table("rows x tokens", "threads", "variant", "ms", "to the base", "to one adapter")
    for shape in arguments.shapes:
        variants = make_variants(int(shape.split("x")[0]))
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            seconds = models.measured(variants, models.batch_of(shape), arguments.rounds, backward=False)
            for name, values in seconds.items():
                milliseconds = f"{1e3 * statistics.median(values):.1f}"
                to_one = ratio(values, seconds["one adapter"])
                table.add_row(shape, str(threads), name, milliseconds, ratio(values, seconds["base"]), to_one)
    Console(width=None if sys.stdout.isatty() else 110, emoji=False).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
