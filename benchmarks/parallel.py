"""Measures a Parallel of two bottlenecks on BERT-base, in turns, by how deep the first adapter sits: against the same
rows given once for each adapter, and in the `adapters` library.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/parallel.py --processor-time    # on a machine that others use
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))

import adapters.composition as library
import torch
from transformers import BertConfig, BertModel

import adapters
import torchgraft
from turns import in_turns, ratio, seconds_of

NAMES = ["a", "b"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--first", type=int, nargs="+", default=[0, 3, 6, 9], help="the first layer with adapters")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--processor-time", action="store_true", help="of all threads, instead of seconds that passed")
    arguments = parser.parse_args()
    clock = time.process_time if arguments.processor_time else time.perf_counter
    torch.manual_seed(0)
    config = BertConfig(num_hidden_layers=arguments.layers, return_dict=False)
    ids = torch.randint(1, 30000, (arguments.rows, 128))
    mask = torch.ones_like(ids)
    for first in arguments.first:
        model = BertModel(config).eval()
        base = torch.jit.trace(model, (ids, mask), check_trace=False)
        adapters.init(model)
        with tempfile.TemporaryDirectory() as folder:
            for name in NAMES:
                model.add_adapter(name, config=adapters.SeqBnConfig(leave_out=list(range(first))))
                model.save_adapter(f"{folder}/{name}", name)
            module = torchgraft.graft(base, adapters={name: f"{folder}/{name}" for name in NAMES})
        model.eval()
        model.set_active_adapters(library.Parallel(*NAMES))
        module = torchgraft.compose(module, "both", torchgraft.Parallel(*NAMES), verify=False)
        module.activate("both")
        rows_twice = ids.repeat(2, 1), mask.repeat(2, 1), torch.arange(2).repeat_interleave(arguments.rows)
        runs = {
            "every row twice": lambda module=module, rows=rows_twice: seconds_of(lambda: module(*rows), clock),
            "Parallel": lambda module=module: seconds_of(lambda: module(ids, mask), clock),
            "Parallel in the library": lambda model=model: seconds_of(lambda: model(ids, mask), clock),
        }
        with torch.no_grad():
            seconds = in_turns(runs, arguments.rounds, warm_up=3)
        for name, times in seconds.items():
            found = ratio(times, seconds["every row twice"])
            quartiles = f"(quartiles {found.quartiles[0]:.3f} to {found.quartiles[1]:.3f})"
            print(f"first adapter in layer {first:2}: {name:24} {found.value:.3f} of every row twice {quartiles}  "
                  f"{1000 * statistics.median(times):.0f} ms")  # fmt: skip


if __name__ == "__main__":
    main()
