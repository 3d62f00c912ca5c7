#!/usr/bin/env python3
"""Grafts UniPELT and MAM onto a real sentence encoder and compares C++, Python and the oracle. Called by scripts/demo.

The encoder is all-MiniLM-L6-v2. The oracle, the `adapters` library, makes and saves its adapters with random weights;
grafting reads them from their directories. Then three adapters that were trained on rated sentences say what they think
of others. Exit status 1 if the three implementations disagree, or if anything fails.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import sys
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "python"))
warnings.filterwarnings("ignore")  # torch.jit is deprecated, and says so dozens of times

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import track  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402

import torchgraft  # noqa: E402
from demo_models import (  # noqa: E402
    GATED,
    Batch,
    DemoError,
    Oracle,
    Run,
    load_tokenizer,
    milliseconds,
    run_cpp,
    run_program,
    run_python,
    trace_encoder,
)
from demo_report import Agreement, print_gates, print_similarities, print_sizes, print_times  # noqa: E402
from demo_sentiment import show_sentiment  # noqa: E402

SENTENCES = [
    "The cat is sleeping on the sofa.",
    "A kitten naps on the couch.",
    "How do I reset my password?",
    "I forgot my login, what should I do now?",
    "The central bank raised interest rates by half a point on Thursday.",
    "Borrowing has become more expensive after the monetary authority's decision.",
    "This film is a complete waste of two hours.",
    "Wonderful acting, a moving story, and a score that stays with you for days.",
    "Add the flour slowly and whisk until no lumps are left.",
    "Rain.",
]
PAIRS = [(0, 1), (2, 3), (4, 5), (6, 7), (0, 4)]
TIMED_RUNS = 15
WARM_UP_RUNS = 3  # TorchScript specialises its graphs in the first runs

console = Console(width=None if sys.stdout.isatty() else 110)


class Demo:
    """The encoder, its adapters, and the folder for models and results."""

    def __init__(self, serve: Path, folder: Path):
        self.serve, self.folder = serve, folder
        folder.mkdir(parents=True, exist_ok=True)
        encoded = load_tokenizer()(SENTENCES, padding=True, return_tensors="pt")
        self.batch = Batch(encoded["input_ids"], encoded["attention_mask"])
        with console.status("tracing MiniLM"):
            self.base = trace_encoder(self.batch, torch.float32)
            self.base.save(str(self.path("base")))
        with console.status("making adapters with the oracle"):
            self.oracle = Oracle(folder)
        self.grafted: dict[str, torch.jit.ScriptModule] = {}
        self.seconds: dict[str, float | None] = {"base": None}

    def path(self, model: str) -> Path:
        return self.folder / f"{model}.pt"

    def graft(self) -> None:
        """Grafts each adapter into a file of its own, in Python, and both into one file, on the command line."""
        for name in GATED:
            with console.status(f"grafting {name}"):
                started = time.perf_counter()
                self.grafted[name] = torchgraft.graft(self.base, adapters={name: self.folder / name})
                self.seconds[name] = time.perf_counter() - started
                self.grafted[name].save(str(self.path(name)))
        with console.status("grafting both with scripts/graft.py"):
            started = time.perf_counter()
            pairs = [word for name in GATED for word in ("--adapter", f"{name}={self.folder / name}")]
            program = [sys.executable, ROOT / "scripts" / "graft.py"]
            run_program([*program, "add", self.path("base"), "-o", self.path("both"), *pairs])
            self.seconds["both"] = time.perf_counter() - started  # the time of the whole program
        self.grafted["both"] = torch.jit.load(str(self.path("both")))

    def compare(self) -> tuple[Agreement, dict[str, Run], dict[str, list[float]]]:
        """Compares the three implementations.

        Returns:
            (how well they agree, the results in Python by case, the times in C++ by case, in milliseconds).
        """
        agreement, results, cpp_times = Agreement(self.batch.mask), {}, {}
        cases = [("base", self.base, self.batch)]
        cases += [(name, self.grafted[name], self.batch) for name in GATED]
        cases.append(("both", self.grafted["both"], self.batch.mixed(len(GATED))))
        for name, model, batch in cases:
            with console.status(f"running {name} in C++, Python and the oracle"):
                cpp = run_cpp(self.serve, self.path(name), batch, self.folder / f"{name}.json", TIMED_RUNS)
                python = run_python(model, batch)
                if name == "both":
                    oracle = self.oracle.run_mixed(batch, list(GATED))
                else:
                    oracle = self.oracle.run(batch, name if name in GATED else None)
            case = "one batch: unipelt, mam, base" if name == "both" else name
            agreement.add(case, torch.float32, python, cpp, oracle)
            results[name], cpp_times[name] = python, cpp.milliseconds
        with console.status("the same in float64"):
            self._compare_in_float64(agreement)
        return agreement, results, cpp_times

    def _compare_in_float64(self, agreement: Agreement) -> None:
        base = trace_encoder(self.batch, torch.float64)
        self.oracle.model.double()
        for name in GATED:
            model, stem = torchgraft.graft(base, adapters={name: self.folder / name}), f"{name}_float64"
            model.save(str(self.path(stem)))
            cpp = run_cpp(self.serve, self.path(stem), self.batch, self.folder / f"{stem}.json", 0)
            python, oracle = run_python(model, self.batch), self.oracle.run(self.batch, name)
            agreement.add(f"{name}, float64", torch.float64, python, cpp, oracle)
        self.oracle.model.float()  # exact: the weights were float32 before

    def time(self, cpp: dict[str, list[float]]) -> dict[str, float]:
        """Returns median milliseconds. In Python the models run in turns, so that a slow moment hits all of them."""
        batch, mixed = self.batch, self.batch.mixed(len(GATED))
        functions = {"base, TorchScript": lambda: self.base(batch.ids, batch.mask)}
        for name in GATED:
            functions[f"{name}, grafted"] = lambda model=self.grafted[name]: model(batch.ids, batch.mask)
            functions[f"{name}, oracle eager"] = lambda: self.oracle.hidden(batch)
        both = self.grafted["both"]
        functions["mixed batch, grafted"] = lambda: both(mixed.ids, mixed.mask, adapter_ids=mixed.adapter_ids)

        samples: dict[str, list[float]] = {name: [] for name in functions}
        for index in track(range(WARM_UP_RUNS + TIMED_RUNS), "timing", console=console, transient=True):
            for name, function in functions.items():
                if name.endswith("oracle eager"):
                    self.oracle.activate(name.split(",")[0])
                taken = milliseconds(function)
                if index >= WARM_UP_RUNS:
                    samples[name].append(taken)
        times = {name: statistics.median(values) for name, values in samples.items()}
        for name, values in cpp.items():
            times[("mixed batch" if name == "both" else name) + ", C++ program"] = statistics.median(values)
        return times

    def sizes(self) -> list[tuple[str, int, int, float | None]]:
        rows = []
        for name, model in {"base": self.base, **self.grafted}.items():
            parameters = sum(tensor.numel() for tensor in model.state_dict().values())
            rows.append((name, self.path(name).stat().st_size, parameters, self.seconds[name]))
        return rows


@torch.no_grad()
def run(arguments: argparse.Namespace) -> None:
    demo = Demo(arguments.serve, arguments.output)
    demo.graft()
    agreement, results, cpp_times = demo.compare()
    agreement.print(console)
    hidden = {name: results[name].hidden for name in ("base", *GATED)}
    print_similarities(console, SENTENCES, PAIRS, hidden, demo.batch.mask)
    print_gates(console, "UniPELT's gates, mean over the sentences", results["unipelt"].gates["unipelt"])
    show_sentiment(console, demo.base, demo.path("sentiment"))
    print_sizes(console, demo.sizes())
    times = demo.time(cpp_times)
    rows, tokens = demo.batch.ids.shape
    threads = f"{torch.get_num_threads()} threads, OMP_NUM_THREADS {os.environ.get('OMP_NUM_THREADS', 'not set')}"
    print_times(console, f"One batch of {rows} x {tokens} tokens, median of {TIMED_RUNS}, {threads}", times)
    if agreement.failures:
        raise DemoError("; ".join(agreement.failures))
    console.print(f"\nC++, Python and the oracle agree within the limits. Files: {demo.folder}", highlight=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--serve", type=Path, required=True, help="the program of examples/serve")
    parser.add_argument("--output", type=Path, required=True, help="the folder for models and results")
    transformers_logging.set_verbosity_error()
    logging.getLogger("adapters").setLevel(logging.ERROR)  # it warns in every run of the base model
    try:
        run(parser.parse_args())
        return 0
    except (DemoError, OSError, torchgraft.GraftError) as error:
        print("demo: error:", " ".join(str(error).split()), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: error: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
