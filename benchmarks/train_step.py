"""Measures how much time and memory a training step takes (forward, backward, AdamW).

    .venv/bin/python benchmarks/train_step.py --shapes 8x128 --json train_step.json

The model is a BERT-base with random weights and UniPELT. All variants run in turns in one process. Times are medians of
steps, with the quartiles of the rounds' ratios to the library:

    library        adapters==1.3.0, unchanged: trains the adapter, not the base
    torchgraft     graft(..., trainable=True): trains the same parameters
    floor          trains nothing; gradients pass through every layer of the base (no library can be much faster)
    fine-tuning    trains all of the base, without an adapter

For memory each variant runs in processes of its own. The number is the highest resident set (VmHWM) of six steps, minus
the resident set before the first one. TorchScript profiles the first steps; they count, too. There are two numbers:
"needed", with MALLOC_MMAP_THRESHOLD_=1048576, where glibc gives freed tensors back to the system at once; and "held",
with glibc's defaults, which also counts the holes that glibc keeps between tensors that live longer.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "python"), str(Path(__file__).resolve().parent)]

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

import adapters  # noqa: E402
import torchgraft  # noqa: E402
from models import MODELS, Positional, batch_of, hugging_face, library, machine, traced  # noqa: E402
from table_console import table_console  # noqa: E402
from this_machine import memory, reset_peak, silence  # noqa: E402
from turns import in_turns, ratio  # noqa: E402

MIB = 2**20
VARIANTS = ("library", "torchgraft", "floor", "fine-tuning")
STEPS_FOR_MEMORY = 6
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}


@dataclass
class Row:
    """ratio: the median's ratio to the library's; quartiles: of the rounds' own ratios; needed, held: MiB beyond the
    model."""

    model: str
    shape: str
    threads: int
    variant: str
    parameters: int
    milliseconds: float
    ratio: float
    quartiles: tuple[float, float]
    needed: float
    needed_ratio: float
    held: float
    held_ratio: float


class Steps:
    """Training steps of a model in eval mode; dropout would cost all variants the same."""

    def __init__(self, model: str, variant: str, shape: str):
        self.batch = batch_of(shape)
        self.module, self.parameters = trainable(MODELS[model], variant)
        # The floor has no parameters to train.
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4) if self.parameters else None

    def __call__(self) -> float:
        start = time.perf_counter()
        if self.optimizer:
            self.optimizer.zero_grad()
        self.module(*self.batch).square().mean().backward()
        if self.optimizer:
            self.optimizer.step()
        return time.perf_counter() - start


def trainable(sizes: dict, variant: str) -> tuple[torch.nn.Module, list[torch.nn.Parameter]]:
    if variant == "torchgraft":
        base = traced(Positional(hugging_face(sizes)).eval())
        module = torchgraft.graft(base, adapters.UniPELTConfig(), "task", verify=False, trainable=True)
        return module, list(torchgraft.trainable_parameters(module, "task").values())
    if variant == "library":
        module = library(sizes, adapters.UniPELTConfig(), ejected=False)
    else:
        module = Positional(hugging_face(sizes)).eval()
    if variant == "floor":
        module.requires_grad_(False)
        # Gradients begin at the embeddings, as with an adapter in the first layer.
        module.model.embeddings.register_forward_hook(lambda _module, _inputs, output: output.requires_grad_())
    return module, [parameter for parameter in module.parameters() if parameter.requires_grad]


def peak_alone(model: str, variant: str, shape: str, threads: int, environment: dict[str, str]) -> float:
    """Returns MiB, measured in a process of its own."""
    command = [sys.executable, __file__, "--alone", variant, "--model", model]
    command += ["--shapes", shape, "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | environment)
    return json.loads(done.stdout.splitlines()[-1])


def alone(model: str, variant: str, shape: str) -> float:
    steps = Steps(model, variant, shape)
    before = memory("VmRSS")
    reset_peak()
    for _ in range(STEPS_FOR_MEMORY):
        steps()
    return (memory("VmHWM") - before) / MIB


def rows_of(model: str, shape: str, threads: int, rounds: int) -> list[Row]:
    needed, held = (
        {variant: peak_alone(model, variant, shape, threads, environment) for variant in VARIANTS}
        for environment in (GIVES_BACK, {})
    )
    steps = {variant: Steps(model, variant, shape) for variant in VARIANTS}
    seconds = in_turns(steps, rounds, warm_up=3)
    rows = []
    for variant, values in seconds.items():
        to_library, milliseconds = ratio(values, seconds["library"]), 1e3 * statistics.median(values)
        count = sum(parameter.numel() for parameter in steps[variant].parameters)
        rows.append(Row(model, shape, threads, variant, count, milliseconds, to_library.value, to_library.quartiles,
                        needed[variant], needed[variant] / needed["library"], held[variant],
                        held[variant] / held["library"]))  # fmt: skip
    return rows


def print_table(rows: list[Row], console: Console) -> None:
    table = Table(title="a training step; ratios to the library's")
    columns = ("model", "shape", "threads", "variant", "trained", "ms", "time", "quartiles", "MiB needed", "ratio",
               "held", "ratio")  # fmt: skip
    for name in columns:
        table.add_column(name, justify="left" if name in ("model", "variant") else "right")
    for row in rows:
        table.add_row(row.model, row.shape, str(row.threads), row.variant, f"{row.parameters / 1e6:.2f} M",
                      f"{row.milliseconds:.0f}", f"{row.ratio:.3f}", "{:.3f} to {:.3f}".format(*row.quartiles),
                      f"{row.needed:.0f}", f"{row.needed_ratio:.2f}", f"{row.held:.0f}",
                      f"{row.held_ratio:.2f}")  # fmt: skip
    console.print(table)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["BERT-base", "MiniLM"], default="BERT-base")
    parser.add_argument("--shapes", nargs="+", default=["8x128"], help="rows x tokens")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--alone", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    silence()
    console = table_console()
    rows: list[Row] = []
    for threads, shape in itertools.product(arguments.threads, arguments.shapes):
        torch.set_num_threads(threads)
        if arguments.alone:
            print(json.dumps(alone(arguments.model, arguments.alone, shape)))
            continue
        rows += rows_of(arguments.model, shape, threads, arguments.steps)
    if rows:
        console.print(", ".join(f"{key}: {value}" for key, value in machine().items()))
        print_table(rows, console)
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"machine": machine(), "rows": [asdict(row) for row in rows]}, indent=1) + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
