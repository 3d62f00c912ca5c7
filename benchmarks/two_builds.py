"""Measures two checkouts of torchgraft against each other: did a change make grafted models slower?

    git worktree add ../before COMMIT && (cd ../before && scripts/setup)
    .venv/bin/python benchmarks/two_builds.py ../before

Each checkout grafts and runs in a process of its own, with its own patcher, operators and benchmarks/models.py. The
processes take turns, one forward pass each, so that a busy moment of the machine meets both. Prints for each
configuration the medians' ratios to the bare base, before and after, and the ratio of the two.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from subprocess import DEVNULL, PIPE

from rich.table import Table

from table_console import table_console
from this_machine import ALLOCATOR

ROOT = Path(__file__).resolve().parents[1]
SHAPES = {"MiniLM": ["1x16", "1x32", "8x32"], "BERT-base": ["1x32", "1x128", "8x128"]}
CONFIGS = ["UniPELT", "MAM", "LoRA"]
ROUNDS = {"MiniLM": 60, "BERT-base": 14}


def serve(checkout: Path) -> None:
    """Runs forward passes for the other process: reads (model, config or null, shape, threads) as a line of JSON, and
    answers the seconds."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print
    sys.path[:0] = [str(checkout / "python"), str(checkout / "benchmarks")]
    import torch

    import models
    import torchgraft

    if not Path(torchgraft.__file__).is_relative_to(checkout):
        raise SystemExit(f"expected the torchgraft of {checkout}, got {torchgraft.__file__}")

    def made(name: str, config: str | None) -> torch.jit.ScriptModule:
        sizes = models.MODELS[name]
        base = models.traced(models.Positional(models.hugging_face(sizes)).eval(), sizes)
        return torch.jit.freeze(base if config is None else models.grafted(base, models.CONFIGS[config]()))

    modules: dict[tuple[str, str | None], torch.jit.ScriptModule] = {}
    warm = set()
    for line in sys.stdin:
        name, config, shape, threads = json.loads(line)
        torch.set_num_threads(threads)
        if (name, config) not in modules:
            modules[name, config] = made(name, config)
        batch = models.batch_of(shape, models.MODELS[name])
        with torch.inference_mode():
            for _ in range(0 if line in warm else 3):  # TorchScript compiles in the first two
                modules[name, config](*batch)
            warm.add(line)
            start = time.perf_counter()
            modules[name, config](*batch)
            seconds = time.perf_counter() - start
        print(json.dumps(seconds), file=answers, flush=True)


class Checkout:
    """The process that runs one checkout."""

    def __init__(self, path: Path):
        library = path / "build" / "lib"
        environment = dict(os.environ, TORCHGRAFT_LIBRARY_DIR=str(library), **ALLOCATOR)
        environment["TORCHGRAFT_LIBRARY"] = str(library / "libtorchgraft.so")
        command = [sys.executable, __file__, "--serve", str(path)]
        self._process = subprocess.Popen(command, env=environment, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, text=True)

    def seconds(self, *request: object) -> float:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        answer = ""
        with contextlib.suppress(BrokenPipeError):  # it may have ended before, or while it reads
            stdin.write(json.dumps(request) + "\n")
            stdin.flush()
            answer = stdout.readline()
        if not answer:
            raise SystemExit(f"{' '.join(self._process.args)} ended; give it '{json.dumps(request)}' to see why")
        return float(answer)

    def close(self) -> None:
        self._process.communicate()


def measured(
    checkouts: dict[str, Checkout], model: str, shape: str, threads: int, rounds: int
) -> dict[tuple[str, str | None], float]:
    """Returns the medians of the seconds, by checkout and configuration; None is the bare base."""
    seconds: dict[tuple[str, str | None], list[float]] = {}
    for index in range(rounds):
        for config in (None, *CONFIGS):
            for name in list(checkouts)[:: 1 if index % 2 else -1]:  # neither is always the first
                taken = checkouts[name].seconds(model, config, shape, threads)
                seconds.setdefault((name, config), []).append(taken)
    return {key: statistics.median(values) for key, values in seconds.items()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="a checkout that scripts/setup has built")
    parser.add_argument("after", type=Path, nargs="?", default=ROOT, help="another one (this one)")
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, help="of each shape (60 of MiniLM, 14 of BERT-base)")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.serve:
        serve(arguments.before)
        return
    checkouts = {"before": Checkout(arguments.before.resolve()), "after": Checkout(arguments.after.resolve())}
    table = Table("model", "shape", "threads", "config", "before/base", "after/base", "after/before")
    for model in arguments.models:
        for threads in arguments.threads:
            for shape in SHAPES[model]:
                times = measured(checkouts, model, shape, threads, arguments.rounds or ROUNDS[model])
                base = statistics.mean(times[name, None] for name in checkouts)  # the two differ by chance alone
                for config in CONFIGS:
                    before, after = times["before", config], times["after", config]
                    ratios = (before / base, after / base, after / before)
                    table.add_row(model, shape, str(threads), config, *(f"{value:.3f}" for value in ratios))
    for checkout in checkouts.values():
        checkout.close()
    table_console().print(table)


if __name__ == "__main__":
    main()
