"""Everything that can happen to a grafted file, in random order: after each step every adapter, a mixed batch and the
base give what the library gives for the same adapters.

python tests/python/test_drawn_operations.py --cases 100 --seed 7
"""

import argparse
import contextlib
import copy
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "python"))

import pytest
import torch
from adapters.methods.lora import LoRALayer

import torchgraft
from grafted import base, reloaded
from models import VARIANTS, make_batch
from oracle import Saved, difference, oracle_for

CASES, STEPS = 5, 10  # CASES: one of them in every run
DTYPE = torch.float64
TOLERANCE = 1e-9  # merging and unmerging add and take away
FORMS = ["bert_sdpa", "bert_eager", "distilbert_sdpa", "own_post_packed_matmul", "encoder_script_post"]
CONFIGS = ["unipelt", "mam", "seq_bn", "par_bn_gated", "lora", "lora_all", "lora_gated", "prefix", "union_everything"]
MERGED = ["lora", "lora_all"]  # what can be


class File:
    """A grafted module, and which of the library's adapters each of its own must equal."""

    def __init__(self, variant: str, draw: random.Random, folder: Path):
        self.variant, self.draw, self.folder = VARIANTS[variant], draw, folder
        self.oracle = oracle_for(self.variant, DTYPE)
        self.batch = make_batch([9, 4, 7], 9, DTYPE) if self.variant.masked else make_batch([9, 9, 9], 9, DTYPE)
        self.adapters: dict[str, Saved] = {}
        self.kinds: dict[str, str] = {}  # the configuration of an adapter of the library, by its name there
        self.merged: str | None = None
        self.count = 0
        self.module = base(variant, DTYPE)
        self.add()

    def fresh_name(self) -> str:
        self.count += 1
        return self.draw.choice(["task", "sst-2", "lang/en", "2nd", "größe"]) + str(self.count)

    def any_name(self, configs: list[str] = CONFIGS, or_merged: bool = False) -> str | None:
        names = [name for name, saved in self.adapters.items() if self.kinds.get(saved.name) in configs]
        names = [name for name in names if name != self.merged or or_merged]
        return self.draw.choice(names) if names else None

    def drawn(self) -> Saved:
        config = self.draw.choice(CONFIGS)
        saved = self.oracle.adapter(config, self.draw.randrange(2))
        self.kinds[saved.name] = config
        return saved

    def add(self) -> None:
        name = self.fresh_name()
        self.adapters[name] = self.drawn()
        how = self.draw.choice([self.by_graft, self.by_load])
        self.module = how(name, self.adapters[name].directory)

    def by_graft(self, name: str, directory: str) -> torch.jit.ScriptModule:
        return torchgraft.graft(self.module, adapters={name: directory})

    def by_load(self, name: str, directory: str) -> torch.jit.ScriptModule:
        return torchgraft.load_adapter(self.module, directory, name)

    def remove(self) -> None:
        name = self.any_name()
        if name is not None and len(self.adapters) > 1:
            del self.adapters[name]
            self.module = torchgraft.remove_adapter(self.module, name)

    def rename(self) -> None:
        name = self.any_name(or_merged=True)
        if name is not None:
            new = self.fresh_name()
            self.merged = new if self.merged == name else self.merged
            self.adapters = {new if each == name else each: saved for each, saved in self.adapters.items()}
            self.module = torchgraft.rename_adapter(self.module, name, new)

    def replace(self) -> None:
        name = self.any_name()
        if name is not None:
            self.adapters[name] = self.drawn()
            self.module = torchgraft.replace_adapter(self.module, name, directory=self.adapters[name].directory)

    def save_and_load(self) -> None:
        name = self.any_name(or_merged=True)
        if name is not None:
            directory = self.folder / str(self.count)
            torchgraft.save_adapter(self.module, name, directory)
            new = self.fresh_name()
            self.adapters[new] = self.adapters[name]
            self.module = self.by_load(new, str(directory))

    def average(self) -> None:
        name = self.any_name(["lora", "seq_bn", "par_bn_gated"])
        if name is None:
            return
        kind = self.kinds[self.adapters[name].name]
        first = self.adapters[name]
        others = [each for each, saved in self.adapters.items()
                  if self.kinds.get(saved.name) == kind and saved != first and each != self.merged]  # fmt: skip
        if others:
            shares = {name: 0.3, self.draw.choice(others): 0.7}
            new = self.fresh_name()
            model, theirs = self.oracle.model, [self.adapters[each].name for each in shares]
            mean = "+".join(theirs)
            if mean not in model.adapters_config.adapters:
                model.average_adapter(mean, theirs, weights=list(shares.values()), combine_strategy="linear")
                model.to(DTYPE).eval()
            self.adapters[new] = Saved(mean, "")
            self.module = torchgraft.average_adapter(self.module, new, shares)

    def merge(self) -> None:
        name = self.any_name(MERGED)
        if self.merged is None and name is not None:
            alone = len(self.adapters) == 1
            if not alone:
                with pytest.raises(torchgraft.GraftError, match="into_base"):
                    torchgraft.merge_adapter(self.module, name)
            self.merged = name
            self.module = torchgraft.merge_adapter(self.module, name, into_base=not alone)

    def unmerge(self) -> None:
        if self.merged is not None:
            self.module = torchgraft.unmerge_adapter(self.module, self.merged)
            self.merged = None

    def lower(self) -> None:
        self.module = torchgraft.lower(self.module)

    def write_file(self) -> None:
        self.module = reloaded(self.module)

    def make_trainable_and_back(self) -> None:
        name = self.any_name()
        if name is not None:
            self.module = torchgraft.freeze_adapter(torchgraft.unfreeze_adapter(self.module, name), name)

    def verify(self) -> None:
        torchgraft.verify(self.module)

    def expected(self, name: str | None) -> torch.Tensor:
        """The library's result with its adapter, on its base or on the one that another is merged into."""
        saved = None if name in (None, self.merged) else self.adapters[name]
        with self.merged_in_oracle():
            return self.oracle.run(self.variant, self.batch, saved).hidden

    @contextlib.contextmanager
    def merged_in_oracle(self) -> Iterator[None]:
        """The library unmerges when adapters are activated, so it must not know that its weights are merged."""
        layers = [layer for layer in self.oracle.model.modules() if isinstance(layer, LoRALayer)]
        weights = [layer.weight.data for layer in layers]
        if self.merged is not None:
            self.oracle.model.merge_adapter(self.adapters[self.merged].name)
        for layer in layers:
            layer.merged = False
        try:
            yield
        finally:
            for layer, weight in zip(layers, weights, strict=True):
                layer.weight.data = weight

    def check(self) -> None:
        names = list(self.adapters)
        assert self.module.adapter_names() == names == [info.name for info in torchgraft.list_adapters(self.module)]
        arguments = self.variant.arguments(self.batch)
        expected = {name: self.expected(name) for name in [*names, None]}
        for what, module in {"as it is": self.module, "lowered": torchgraft.lower(self.module)}.items():
            for name in names:
                module.activate(name)
                self.compare(module(*arguments), expected[name], f"{name}, {what}")
            ids = [self.draw.randrange(-1, len(names)) for _ in range(self.batch.rows)]
            mixed = torch.stack([expected[names[i] if i >= 0 else None][row] for row, i in enumerate(ids)])
            self.compare(module(*arguments, adapter_ids=torch.tensor(ids)), mixed, f"{ids}, {what}")
            module.deactivate()
            self.compare(module(*arguments), expected[None], f"the base, {what}")
        self.compare(torchgraft.ungraft(self.module)(*arguments), expected[None], "ungrafted")

    def compare(self, actual, expected: torch.Tensor, what: str) -> None:
        hidden = self.variant.hidden(actual)
        found = difference(self.variant.compared(hidden, self.batch), self.variant.compared(expected, self.batch))
        assert found <= TOLERANCE, f"{what}: differs by {found}"


OPERATIONS = [
    File.add, File.add, File.remove, File.rename, File.replace, File.save_and_load, File.average, File.merge,
    File.merge, File.unmerge, File.lower, File.write_file, File.make_trainable_and_back, File.verify,
]  # fmt: skip


@torch.no_grad()
def run_case(seed: int, folder: Path) -> None:
    draw = random.Random(seed)
    file = File(FORMS[seed % len(FORMS)], draw, folder)
    steps = []
    try:
        file.check()
        for _ in range(STEPS):
            operation = draw.choice(OPERATIONS)
            steps.append(operation.__name__)
            before, kept = file.module, copy.copy(file.module.state_dict())
            operation(file)
            assert all(torch.equal(before.state_dict()[name], tensor) for name, tensor in kept.items())
            file.check()
    except Exception as error:
        error.add_note(f"python {sys.argv[0]} --cases 1 --seed {seed}: {file.variant.name}, {', '.join(steps)}")
        raise


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow(seconds=15)) for seed in range(1, CASES))]
)
@pytest.mark.filterwarnings("ignore:graft|merge_adapter|unmerge_adapter|average_adapter|lower|ungraft")
def test_every_adapter_stays_what_it_is_through_drawn_operations(seed: int, tmp_path: Path) -> None:
    run_case(seed, tmp_path)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=CASES)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for seed in range(arguments.seed, arguments.seed + arguments.cases):
        with tempfile.TemporaryDirectory() as folder:
            run_case(seed, Path(folder))


if __name__ == "__main__":
    main()
