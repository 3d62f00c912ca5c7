"""Compares the fused kernels' product with MKL's: the operator `linear`, and ATen's, in turns.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/products.py

Prints GFLOP/s from medians, in float32, by sizes of the weight (inputs to outputs) and tokens; then the ratio of the
times. With --cold a measurement goes through 40 MB of weights, as a pass of a model does: none of them is in a cache.
"""

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "python"), str(Path(__file__).resolve().parent)]

import torch  # noqa: E402
from rich.table import Table  # noqa: E402

import torchgraft  # noqa: E402
from table_console import table_console  # noqa: E402
from this_machine import processor  # noqa: E402
from turns import in_turns, seconds_of  # noqa: E402

SIZES = ["384x384", "384x1536", "1536x384", "768x768", "3072x768"]
TOKENS = [16, 32, 128, 1024]
COLD_BYTES = 40_000_000


def medians(cases: dict[str, Callable], turns: int) -> dict[str, float]:
    """Returns the median seconds of each case. The first turn warms up."""
    seconds = in_turns({name: partial(seconds_of, run) for name, run in cases.items()}, turns - 1, warm_up=1)
    return {name: statistics.median(values) for name, values in seconds.items()}


def cases_of(tokens: int, inputs: int, outputs: int, count: int) -> dict[str, Callable]:
    """Returns functions that multiply x with `count` weights of one size."""
    x, bias = torch.randn(1, tokens, inputs), torch.randn(outputs)
    weights = [torch.randn(outputs, inputs) for _ in range(count)]
    return {
        "library": lambda: [torch.nn.functional.linear(x, weight, bias) for weight in weights],
        "fused": lambda: [torch.ops.torchgraft.linear(x, weight, bias) for weight in weights],
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=SIZES, help="inputs x outputs: 768x3072")
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--turns", type=int, help="turns of each measurement; default: by size, 8 to 300")
    parser.add_argument("--cold", action="store_true", help="40 MB of weights in turns instead of one weight")
    arguments = parser.parse_args(argv)
    torchgraft._libraries.patcher().set_kernel_mode(torchgraft._libraries.patcher().KernelMode.FUSED)
    table = Table(title=f"{processor()}, {torch.backends.cpu.get_cpu_capability()}, threads: {torch.get_num_threads()}")
    for name in ("weight", "tokens", "library GFLOP/s", "fused", "time, fused / library"):
        table.add_column(name, justify="right")
    with torch.inference_mode():
        for size, tokens in itertools.product(arguments.sizes, arguments.tokens):
            inputs, outputs = map(int, size.split("x"))
            count = max(1, COLD_BYTES // (4 * inputs * outputs)) if arguments.cold else 1
            work = tokens * inputs * outputs * count
            turns = arguments.turns or max(8, min(300, int(2e9 / work)))
            found = medians(cases_of(tokens, inputs, outputs, count), turns)
            rates = [f"{2e-9 * work / seconds:.0f}" for seconds in found.values()]
            table.add_row(size, str(tokens), *rates, f"{found['fused'] / found['library']:.2f}")
    table_console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
