"""How long a training step takes (forward, backward, AdamW, frozen base), and how much memory.

    .venv/bin/python benchmarks/train_step.py --shapes 8x128 --threads 1

UniPELT on a random BERT-base; adapters==1.3.0 and torchgraft in turns in one process, medians of steps. The library trains
the MLP behind its prefixes too; a grafted module holds the prefixes themselves. Memory: each variant in a process of its
own, the highest resident set (VmHWM) after the steps, less the resident set before them.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "python"), str(Path(__file__).resolve().parent)]

import adapters  # noqa: E402
import torch  # noqa: E402
import torchgraft  # noqa: E402
import transformers  # noqa: E402
from models import MODELS, Positional, batch_of, hugging_face, library, traced  # noqa: E402
from this_machine import memory, reset_peak  # noqa: E402

MIB = 2**20
VARIANTS = ("library", "torchgraft")


def trainable(variant: str) -> torch.nn.Module:
    sizes = MODELS["BERT-base"]
    if variant == "library":
        module = library(sizes, adapters.UniPELTConfig(), ejected=False)
        module.model.train_adapter("task")
        return module.eval()  # dropout would cost both the same
    base = traced(Positional(hugging_face(sizes)).eval())
    module = torchgraft.graft(base, adapters.UniPELTConfig(), "task", verify=False)
    for path, parameter in module.named_parameters():
        parameter.requires_grad_(path.startswith("adapters."))
    return module


class Steps:
    def __init__(self, variant: str, shape: str):
        self.module, self.batch = trainable(variant), batch_of(shape)
        self.optimizer = torch.optim.AdamW([value for value in self.module.parameters() if value.requires_grad], lr=1e-4)

    def __call__(self) -> float:
        start = time.perf_counter()
        self.optimizer.zero_grad()
        self.module(*self.batch).square().mean().backward()
        self.optimizer.step()
        return time.perf_counter() - start


def peak_alone(variant: str, shape: str, threads: int) -> float:
    """MiB, measured in a process of its own."""
    command = [sys.executable, __file__, "--alone", variant, "--shapes", shape, "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def alone(variant: str, shape: str) -> float:
    steps = Steps(variant, shape)
    before = memory("VmRSS")
    reset_peak()
    for _ in range(3):
        steps()
    return (memory("VmHWM") - before) / MIB


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["8x128"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--alone", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    for threads, shape in itertools.product(arguments.threads, arguments.shapes):
        torch.set_num_threads(threads)
        if arguments.alone:
            print(json.dumps(alone(arguments.alone, shape)))
            continue
        steps = {variant: Steps(variant, shape) for variant in VARIANTS}
        seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
        for index in range(arguments.steps + 2):
            for variant, step in steps.items():
                taken = step()
                if index >= 2:
                    seconds[variant].append(taken)
        medians = {variant: statistics.median(values) for variant, values in seconds.items()}
        peaks = {variant: peak_alone(variant, shape, threads) for variant in VARIANTS}
        print(f"{shape}, {threads} threads: " + ", ".join(
            f"{variant} {1e3 * medians[variant]:.0f} ms, {peaks[variant]:.0f} MiB" for variant in VARIANTS)
            + f"; time {medians['torchgraft'] / medians['library']:.2f}, "
              f"memory {peaks['torchgraft'] / peaks['library']:.2f} of the library's")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
