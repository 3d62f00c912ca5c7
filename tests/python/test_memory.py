"""Replaced modules give their memory back: a clone's types and graphs go with the clone (graph/clone_module.h)."""

import gc
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

import torchgraft
from grafted import base
from models import HIDDEN

MIB = 2**20
ALLOWED = 0.2 * MIB  # for each replacement: a clone that stayed would take 0.7 MiB for these three layers


def _resident() -> int:
    gc.collect()
    return psutil.Process().memory_info().rss


@pytest.fixture
def grafted() -> torch.jit.ScriptModule:
    return torchgraft.graft(base("bert_sdpa", torch.float32), config="mam", name="task")


def _renamed(module: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    (name,) = module.adapter_names()
    return torchgraft.rename_adapter(module, name, "other" if name == "task" else "task")


@pytest.fixture
def changes(grafted: torch.jit.ScriptModule, tmp_path: Path) -> dict[str, Callable]:
    """Each makes another module of the one that it made before, or of one that stays."""
    source = base("bert_sdpa", torch.float32)
    lora = torchgraft.graft(source, "lora", "task")
    two = torchgraft.graft(lora, "lora", "second")
    torchgraft.save_adapter(grafted, "task", tmp_path)
    return {
        "graft": lambda _: torchgraft.graft(source, config="mam", name="task"),
        "load_adapter": lambda module: torchgraft.load_adapter(module, tmp_path),
        "rename_adapter": _renamed,
        "replace_adapter": lambda module: torchgraft.replace_adapter(module, "task", directory=tmp_path),
        "lower": lambda _: torchgraft.lower(grafted),
        "remove_adapter": lambda _: torchgraft.remove_adapter(two, "second"),
        "average_adapter": lambda _: torchgraft.average_adapter(two, "mean", ["task", "second"]),
    }


OFTEN = ["graft", "load_adapter", "rename_adapter", "replace_adapter", "lower"]
OTHERS = ["remove_adapter", "average_adapter"]


@pytest.mark.parametrize(
    ("change", "replacements"),
    [(change, 60) for change in OFTEN]
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
    assert _resident() - before < replacements * ALLOWED


def test_every_change_is_measured(changes: dict[str, Callable]) -> None:
    assert set(changes) == set(OFTEN + OTHERS)


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
