"""Replaced modules give their memory back: a clone's types and graphs go with the clone (graph/clone_module.h)."""

import gc
import inspect
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

import torchgraft
from grafted import base
from models import HIDDEN
from programs import small
from test_adapter_fusion import library_fusion
from test_compositions import bank

MIB = 2**20
ALLOWED = 0.2 * MIB  # for each replacement: a clone that stayed would take 0.7 MiB for these three layers
# TorchScript keeps each class that Python defines: docs/trust.md says who does that, and how much it is.
KEPT = {"from_program": 0.4 * MIB}  # of a program of one layer


def _resident() -> int:
    gc.collect()
    return psutil.Process().memory_info().rss


@pytest.fixture
def grafted() -> torch.jit.ScriptModule:
    return torchgraft.graft(base("bert_sdpa", torch.float32), config="mam", name="task")


def _renamed(module: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    (name,) = module.adapter_names()
    return torchgraft.rename_adapter(module, name, "other" if name == "task" else "task")


def _of_one(grafted: torch.jit.ScriptModule, folder: Path) -> dict[str, Callable]:
    """Changes of a module with one adapter, which `folder` holds, too."""
    source = base("bert_sdpa", torch.float32)
    lora = torchgraft.graft(source, "lora", "task")
    trained = torchgraft.graft(source, "mam", "task", trainable=True)
    merged = torchgraft.merge_adapter(lora, "task")
    with_head = torchgraft.add_head(grafted, "task", torchgraft.HeadConfig())
    torchgraft.save_adapter(grafted, "task", folder / "adapter")
    grafted.save(folder / "grafted.pt")
    return {
        "graft": lambda _: torchgraft.graft(source, config="mam", name="task"),
        "load_adapter": lambda module: torchgraft.load_adapter(module, folder / "adapter", "task"),
        "load_module": lambda _: torchgraft.load_module(folder / "grafted.pt"),
        "rename_adapter": _renamed,
        "replace_adapter": lambda module: torchgraft.replace_adapter(module, "task", directory=folder / "adapter"),
        "lower": lambda _: torchgraft.lower(grafted),
        "merge_adapter": lambda _: torchgraft.merge_adapter(lora, "task"),
        "unmerge_adapter": lambda _: torchgraft.unmerge_adapter(merged, "task"),
        "ungraft": lambda _: torchgraft.ungraft(merged),
        "freeze_adapter": lambda _: torchgraft.freeze_adapter(trained, "task"),
        "unfreeze_adapter": lambda _: torchgraft.unfreeze_adapter(grafted, "task"),
        "add_head": lambda module: torchgraft.add_head(module, "task", torchgraft.HeadConfig()),
        "remove_head": lambda _: torchgraft.remove_head(with_head, "task"),
        "optimize": lambda _: torchgraft.optimize(grafted),
        "quantize": lambda _: torchgraft.quantize(grafted),
    }


def _of_two(folder: Path) -> dict[str, Callable]:
    """Changes of a module with two adapters and their AdapterFusion layers."""
    two = bank("bert_sdpa", "bn", "bn2")
    library_fusion("bert_sdpa", ["bn", "bn2"], "static", folder / "fusion")
    fused = torchgraft.load_adapter_fusion(two, folder / "fusion", "bn,bn2")
    composed = torchgraft.compose(fused, "both", torchgraft.Fuse("bn", "bn2"))
    torchgraft.save_adapter_setup(composed, "both", folder / "setup")
    plain = base("bert_sdpa", torch.float64)
    return {
        "remove_adapter": lambda _: torchgraft.remove_adapter(two, "bn2"),
        "average_adapter": lambda _: torchgraft.average_adapter(two, "mean", ["bn", "bn2"]),
        "compose": lambda _: torchgraft.compose(fused, "both", torchgraft.Fuse("bn", "bn2")),
        "add_adapter_fusion": lambda _: torchgraft.add_adapter_fusion(two, torchgraft.Fuse("bn", "bn2")),
        "load_adapter_fusion": lambda _: torchgraft.load_adapter_fusion(two, folder / "fusion", "bn,bn2"),
        "remove_adapter_fusion": lambda _: torchgraft.remove_adapter_fusion(fused, "bn,bn2"),
        "load_adapter_setup": lambda _: torchgraft.load_adapter_setup(plain, folder / "setup", "both"),
    }


def _rebuilt(folder: Path) -> Callable:
    """A pool whose banks have to grow."""

    def change(module: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
        pool = torchgraft.AdapterPool(base("bert_sdpa", torch.float32), capacity=2, room=["lora[r=2]"])
        pool.insert("task", folder / "adapter")
        assert pool.stats()["rebuilds"] == 1
        return module

    return change


@pytest.fixture
def changes(grafted: torch.jit.ScriptModule, tmp_path: Path) -> dict[str, Callable]:
    """Each makes another module of the one that it made before, or of one that stays."""
    program = torch.export.export(small.Encoder().eval(), (torch.randn(2, 5, small.HIDDEN),))
    others = {"AdapterPool": _rebuilt(tmp_path), "from_program": lambda _: torchgraft.from_program(program)}
    return _of_one(grafted, tmp_path) | _of_two(tmp_path) | others


OFTEN = ["graft", "replace_adapter"]
OTHERS = [
    "AdapterPool",
    "add_adapter_fusion",
    "add_head",
    "average_adapter",
    "compose",
    "freeze_adapter",
    "from_program",
    "load_adapter",
    "load_adapter_fusion",
    "load_adapter_setup",
    "load_module",
    "lower",
    "merge_adapter",
    "optimize",
    "quantize",
    "remove_adapter",
    "remove_adapter_fusion",
    "remove_head",
    "rename_adapter",
    "unfreeze_adapter",
    "ungraft",
    "unmerge_adapter",
]


@pytest.mark.parametrize(
    ("change", "replacements"),
    [(change, 40) for change in OFTEN]
    + [pytest.param(change, 200, marks=pytest.mark.slow(seconds=120)) for change in OFTEN + OTHERS],
)
def test_replacing_a_module_gives_its_memory_back(
    grafted: torch.jit.ScriptModule, changes: dict[str, Callable], change: str, replacements: int
) -> None:
    module = grafted
    for _ in range(10):  # what is allocated once
        module = changes[change](module)
    before = _resident()
    for _ in range(replacements):
        module = changes[change](module)
    grown = _resident() - before
    print(f"{change}: {grown / MIB:.1f} MiB after {replacements} replacements")
    assert grown < replacements * KEPT.get(change, ALLOWED)


def test_every_change_is_measured(changes: dict[str, Callable]) -> None:
    """Every function of the package that gives a module."""
    public = {name: getattr(torchgraft, name) for name in torchgraft.__all__}
    giving = {
        name
        for name, function in public.items()
        if inspect.isfunction(function) and inspect.signature(function).return_annotation is torch.jit.ScriptModule
    }
    assert set(changes) == set(OFTEN + OTHERS) == giving | {"AdapterPool"}


def test_an_error_in_the_copy_of_a_copy_that_is_gone_is_an_error(tmp_path: Path) -> None:
    """Inlined nodes named the functions of the modules before, and the interpreter looks there when a node throws."""
    module = torch.jit.freeze(base("encoder_script_post", torch.float32))
    module = torchgraft.graft(module, config="lora", name="task")
    for name in ("second", "third"):
        module = torchgraft.graft(module, config="lora", name=name)
        gc.collect()
    for _ in range(3):
        with pytest.raises(RuntimeError, match=r"expected adapter_ids in \[-1, 3\), got 7 in row 0"):
            module(torch.randn(2, 5, HIDDEN), adapter_ids=torch.tensor([7, 0]))
