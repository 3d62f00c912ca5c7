"""Files of several LoRAs on drawn models whose weights have several uses: every operation as a step, in random order;
after each, every adapter, the base and a mixed batch give what the formula gives, or the step was refused with the
reason.

python tests/python/test_drawn_uses.py --cases 100 --seed 7
"""

import argparse
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "python"))

import pytest
import torch
from torch import Tensor

import torchgraft
from drawn_uses import MATRICES, Drawn, Update, draw, inputs
from grafted import reloaded
from oracle import difference

CASES, STEPS = 8, 8
TOLERANCE = 1e-10
CONFIGS = ["r=2, attn_matrices=['q', 'v']", "r=3, alpha=5, attn_matrices=['v']", "r=2, attn_matrices=['q', 'k']"]


class File:
    """A grafted module, and the updates of its adapters by name."""

    def __init__(self, drawn: Drawn, choose: random.Random, folder: Path):
        self.drawn, self.choose, self.folder = drawn, choose, folder
        base = torch.jit.script(drawn.base) if drawn.is_script else torch.jit.trace(drawn.base, inputs())
        self.module = base
        self.adapters: dict[str, Update] = {}
        self.configs: dict[str, str] = {}
        self.merged: str | None = None
        self.count = 0
        self.done = Counter()
        self.graft()

    def fresh_name(self) -> str:
        self.count += 1
        return f"task{self.count}"

    def any_name(self) -> str | None:
        names = [name for name in self.adapters if name != self.merged]
        return self.choose.choice(names) if names else None

    def graft(self) -> None:
        name, config = self.fresh_name(), self.choose.choice(CONFIGS)
        self.module = torchgraft.graft(self.module, f"lora[{config}, init_weights=bert]", name)
        with torch.no_grad():
            self.adapters[name] = self.drawn_update(name)
        self.configs[name] = config

    def drawn_update(self, name: str) -> Update:
        """Gives an adapter drawn weights. They stand in row `name` of the banks, padded with zeros to a rank."""
        row = self.module.adapter_names().index(name)
        banks = dict(self.module.adapters.named_parameters()) | dict(self.module.adapters.named_buffers())
        update = {}
        for layer in range(2):
            for matrix in MATRICES:
                place = f"layer_{layer}.selfattn_lora_{matrix}"
                if f"{place}.lora_a" not in banks or banks[f"{place}.scaling"][row] == 0:
                    continue
                a, b = banks[f"{place}.lora_a"][row], banks[f"{place}.lora_b"][row]
                b.copy_(torch.randn_like(b) * (a.abs().sum(1) > 0) / 4)
                update[layer, matrix] = (a.clone(), b * banks[f"{place}.scaling"][row])
        return update

    def remove(self) -> None:
        name = self.any_name()
        if name is not None and len(self.adapters) > 1:
            self.module = torchgraft.remove_adapter(self.module, name)
            del self.adapters[name]

    def rename(self) -> None:
        name, new = self.choose.choice(list(self.adapters)), self.fresh_name()
        self.module = torchgraft.rename_adapter(self.module, name, new)
        self.adapters = {new if each == name else each: update for each, update in self.adapters.items()}
        self.configs[new] = self.configs[name]
        self.merged = new if self.merged == name else self.merged

    def average(self) -> None:
        """Of A and of B, as the library does."""
        name = self.any_name()
        others = [each for each in self.adapters if each not in (name, self.merged) and name is not None
                  and self.configs[each] == self.configs[name]]  # fmt: skip
        if others:
            other, new = self.choose.choice(others), self.fresh_name()
            self.module = torchgraft.average_adapter(self.module, new, {name: 0.25, other: 0.75})
            one, two = self.adapters[name], self.adapters[other]
            self.adapters[new] = {
                place: tuple(_mean(one[place][part], two[place][part]) for part in range(2)) for place in one
            }
            self.configs[new] = self.configs[name]

    def merge(self) -> None:
        name = self.any_name()
        if name is None or self.merged is not None:
            return
        has_other_use = bool(self.drawn.uses & self.adapters[name].keys())
        into_base = len(self.adapters) > 1
        refused = ""
        try:
            result = torchgraft.merge_adapter(self.module, name, into_base=into_base)
        except torchgraft.GraftError as error:
            refused = str(error)
        if refused:
            is_told = has_other_use and "does not act in the same way" in refused
            assert is_told or self.drawn.may_refuse, f"refused for another reason: {refused}"
            self.done["merge refused"] += 1
            return
        assert not has_other_use, "merged into a weight with another use"
        self.module, self.merged = result, name
        self.done["merged"] += 1

    def unmerge(self) -> None:
        if self.merged is not None:
            self.module, self.merged = torchgraft.unmerge_adapter(self.module, self.merged), None

    def lower(self) -> None:
        self.module = torchgraft.lower(self.module)

    def write_file(self) -> None:
        self.module = reloaded(self.module)

    def save_and_load(self) -> None:
        name = self.any_name()
        if name is None:
            return
        new, directory = self.fresh_name(), self.folder / f"{self.drawn.reference.__class__.__module__}_{self.count}"
        refused = ""
        try:
            torchgraft.save_adapter(self.module, name, directory)
            self.module = torchgraft.load_adapter(self.module, directory, new)
        except torchgraft.GraftError as error:
            refused = str(error)
        if refused:
            assert self.drawn.may_refuse, refused  # slices of one parameter have no paths of their own
            self.done["save refused"] += 1
            return
        self.adapters[new], self.configs[new] = self.adapters[name], self.configs[name]

    def verify(self) -> None:
        assert torchgraft.verify(self.module, inputs()) == []

    def expected(self, name: str | None) -> Tensor:
        """With the merged adapter in the base, on which all others run."""
        names = {each for each in (name, self.merged) if each is not None}
        return self.drawn.with_updates(inputs(), *(self.adapters[each] for each in sorted(names)))

    def check(self) -> None:
        names = list(self.adapters)
        assert self.module.adapter_names() == names
        expected = {name: self.expected(name) for name in [*names, None]}
        for name in names:
            self.module.activate(name)
            _compare(self.module(inputs()), expected[name], name)
        ids = [self.choose.randrange(-1, len(names)) for _ in range(3)]
        mixed = torch.stack([expected[names[i] if i >= 0 else None][row] for row, i in enumerate(ids)])
        _compare(self.module(inputs(), adapter_ids=torch.tensor(ids)), mixed, f"rows of {ids}")
        self.module.deactivate()
        _compare(self.module(inputs()), expected[None], "the base")
        _compare(torchgraft.ungraft(self.module)(inputs()), expected[None], "ungrafted")


def _mean(one: Tensor, two: Tensor) -> Tensor:
    return 0.25 * one + 0.75 * two


def _compare(actual: Tensor, expected: Tensor, what: str) -> None:
    found = difference(actual, expected)
    assert found <= TOLERANCE, f"{what}: differs by {found}"


OPERATIONS = [File.graft, File.graft, File.remove, File.rename, File.average, File.merge, File.merge, File.unmerge,
              File.lower, File.write_file, File.save_and_load, File.verify]  # fmt: skip


@torch.no_grad()
def run_case(seed: int, folder: Path) -> Counter:
    """Returns how often each step was done, and "refused" for a model with heads one by one."""
    drawn, choose = draw(seed, folder), random.Random(seed)
    steps: list[str] = []
    try:
        if "heads.append" in drawn.source:
            with pytest.raises(torchgraft.GraftError, match="they are heads of one attention"):
                File(drawn, choose, folder)
            return Counter(["refused"])
        file = File(drawn, choose, folder)
        file.check()
        for _ in range(STEPS):
            operation = choose.choice(OPERATIONS)
            steps.append(operation.__name__)
            operation(file)
            file.check()
        return file.done + Counter(steps)
    except Exception as error:
        error.add_note(f"python {sys.argv[0]} --cases 1 --seed {seed}: {', '.join(steps)}\n{drawn.source}")
        raise


@pytest.mark.filterwarnings("ignore:graft|merge_adapter|unmerge_adapter|average_adapter|lower|ungraft")
def test_files_of_weights_with_several_uses_are_exact_or_refused(tmp_path: Path) -> None:
    seen = sum((run_case(seed, tmp_path) for seed in range(CASES)), Counter())
    assert seen["merged"] > 0 and seen["refused"] + seen["merge refused"] > 0


@pytest.mark.slow(seconds=200)
@pytest.mark.filterwarnings("ignore:graft|merge_adapter|unmerge_adapter|average_adapter|lower|ungraft")
def test_many_files_of_weights_with_several_uses(tmp_path: Path) -> None:
    seen = sum((run_case(seed, tmp_path) for seed in range(CASES, 12 * CASES)), Counter())
    assert {operation.__name__ for operation in OPERATIONS} | {"refused", "merged", "merge refused"} <= seen.keys()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=CASES)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    seen = Counter()
    for seed in range(arguments.seed, arguments.seed + arguments.cases):
        with tempfile.TemporaryDirectory() as folder:
            seen += run_case(seed, Path(folder))
    print(dict(seen))


if __name__ == "__main__":
    main()
