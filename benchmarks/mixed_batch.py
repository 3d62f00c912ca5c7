"""Measures what many adapters in one batch cost, beside one adapter and beside the base model without any.

    .venv/bin/python benchmarks/mixed_batch.py
    .venv/bin/python benchmarks/mixed_batch.py --int8        # base and linear maps by torchgraft.quantize()

The model has MiniLM's size, the adapters are UniPELT, a batch has 64 rows. All variants run in turns. The script prints
ratios of medians, with the quartiles of the rounds' own ratios. The base went through torch.jit.freeze; the grafted
module did not, as in an AdapterPool, which changes its rows.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from rich.table import Table

import models  # puts python/ on the path
import torchgraft
from table_console import table_console
from this_machine import silence
from turns import ratio

ADAPTERS = 64
SIZES = models.MODELS["MiniLM"]


def make_variants(rows: int, int8: bool = False) -> dict[str, object]:
    base = torch.jit.freeze(models.traced(models.Positional(models.hugging_face(SIZES)).eval()))
    one = torchgraft.graft(base, "unipelt", "task_0", verify=False)
    many = one
    for index in range(1, ADAPTERS):
        many = torchgraft.graft(many, "unipelt", f"task_{index}", verify=False)
    if int8:
        base, one, many = (torchgraft.quantize(module) for module in (base, one, many))
    distinct = torch.arange(rows) % ADAPTERS
    same = torch.zeros(rows, dtype=torch.int64)
    return {
        "base": base,
        "one adapter": lambda *batch: one(*batch, adapter_ids=same),
        "one of 64": lambda *batch: many(*batch, adapter_ids=same),
        "64 distinct": lambda *batch: many(*batch, adapter_ids=distinct),
    }


def cell(values: Sequence[float], to: Sequence[float]) -> str:
    found = ratio(values, to)
    return f"{found.value:.2f} [{found.quartiles[0]:.2f}, {found.quartiles[1]:.2f}]"


def measured_rows(
    variants: Mapping[str, object],
    shape: str,
    arguments: argparse.Namespace,
    second: str,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[tuple[str, ...]]:
    """Shape, threads, variant, milliseconds, and the ratios to the variants "base" and `second`, line by line."""
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        seconds = models.measured(variants, models.batch_of(shape), arguments.rounds, False, clock)
        for name, values in seconds.items():
            milliseconds = f"{1e3 * statistics.median(values):.1f}"
            yield shape, str(threads), name, milliseconds, cell(values, seconds["base"]), cell(values, seconds[second])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["64x32", "64x64"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--int8", action="store_true", help="quantise all of them")
    parser.add_argument("--engine", choices=torch.backends.quantized.supported_engines, help="that packs int8 weights")
    parser.add_argument("--processor-time", action="store_true", help="of all threads, instead of seconds that passed")
    arguments = parser.parse_args()
    clock = time.process_time if arguments.processor_time else time.perf_counter
    status = models.run_with_allocator(__file__, sys.argv[1:])
    if status is not None:
        return status
    silence()
    if arguments.engine:
        torch.backends.quantized.engine = arguments.engine
    table = Table("rows x tokens", "threads", "variant", "ms", "to the base", "to one adapter")
    for shape in arguments.shapes:
        variants = make_variants(int(shape.split("x")[0]), arguments.int8)
        for row in measured_rows(variants, shape, arguments, "one adapter", clock):
            table.add_row(*row)
    table_console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
