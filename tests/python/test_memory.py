"""Replaced modules give their memory back: a clone's types and graphs go with the clone (graph/clone_module.h)."""

import gc
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


@pytest.mark.parametrize("change", ["graft", "load_adapter", "rename_adapter", "lower", "replace_adapter"])
@pytest.mark.parametrize("replacements", [60, pytest.param(200, marks=pytest.mark.slow(seconds=40))])
def test_replacing_a_module_gives_its_memory_back(
    grafted: torch.jit.ScriptModule, change: str, replacements: int, tmp_path: Path
) -> None:
    torchgraft.save_adapter(grafted, "task", tmp_path)
    source = base("bert_sdpa", torch.float32)

    def rename(module: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
        (name,) = module.adapter_names()
        return torchgraft.rename_adapter(module, name, "other" if name == "task" else "task")

    changes = {
        "graft": lambda _: torchgraft.graft(source, config="mam", name="task"),
        "load_adapter": lambda module: torchgraft.load_adapter(module, tmp_path),
        "rename_adapter": rename,
        "replace_adapter": lambda module: torchgraft.replace_adapter(module, "task", directory=tmp_path),
        "lower": lambda _: torchgraft.lower(grafted),
    }
    module = grafted
    for _ in range(10):  # what is allocated once
        module = changes[change](module)
    before = _resident()
    for _ in range(replacements):
        module = changes[change](module)
    assert _resident() - before < replacements * ALLOWED


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
