"""Measures compositions on BERT-base, 8 rows of 128 tokens, in turns: a Stack of two bottlenecks and a Fuse of four
against one bottleneck, and the same in the `adapters` library.

    .venv/bin/python benchmarks/compositions.py --rounds 20
    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/compositions.py --processor-time    # on a machine that others use
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

NAMES = ["a", "b", "c", "d"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--processor-time", action="store_true", help="of all threads, instead of seconds that passed")
    arguments = parser.parse_args()
    clock = time.process_time if arguments.processor_time else time.perf_counter
    torch.manual_seed(0)
    model = BertModel(BertConfig(num_hidden_layers=arguments.layers, return_dict=False)).eval()
    ids = torch.randint(1, 30000, (8, 128))
    mask = torch.ones_like(ids)
    base = torch.jit.trace(model, (ids, mask), check_trace=False)
    adapters.init(model)
    for name in NAMES:
        model.add_adapter(name, config="seq_bn")
    model.add_adapter_fusion(NAMES, "dynamic")
    model.eval()
    with tempfile.TemporaryDirectory() as folder:
        for name in NAMES:
            model.save_adapter(f"{folder}/{name}", name)
        model.save_adapter_fusion(f"{folder}/fusion", ",".join(NAMES))
        plain = torchgraft.graft(base, adapters={name: f"{folder}/{name}" for name in NAMES}, active="a")
        module = torchgraft.load_adapter_fusion(plain, f"{folder}/fusion")
    module = torchgraft.compose(module, "stack", torchgraft.Stack("a", "b"), verify=False)
    module = torchgraft.compose(module, "fuse", torchgraft.Fuse(*NAMES), verify=False)
    setups = {"a": library.Stack("a"), "stack": library.Stack("a", "b"), "fuse": library.Fuse(*NAMES)}

    def ours(held: torch.jit.ScriptModule, name: str) -> float:
        held.activate(name)
        return seconds_of(lambda: held(ids, mask), clock)

    def theirs(name: str) -> float:
        model.set_active_adapters(setups[name])
        return seconds_of(lambda: model(ids, mask), clock)

    runs = {"one, without compositions": lambda: ours(plain, "a")}
    runs |= {f"{name} in a module with compositions": lambda name=name: ours(module, name) for name in setups}
    runs |= {f"{name} in the library": lambda name=name: theirs(name) for name in setups}
    with torch.no_grad():
        seconds = in_turns(runs, arguments.rounds, warm_up=3)
    for name, times in seconds.items():
        one = seconds["a in the library" if "library" in name else "one, without compositions"]
        found = ratio(times, one)
        quartiles = f"(quartiles {found.quartiles[0]:.3f} to {found.quartiles[1]:.3f})"
        print(f"{name:38} {found.value:.3f} of one {quartiles}  {1000 * statistics.median(times):.0f} ms")


if __name__ == "__main__":
    main()
