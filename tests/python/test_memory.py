"""Replaced modules give their memory back: a clone's types and graphs go with the clone (graph/clone_module.h)."""

import gc
from pathlib import Path

import psutil
import pytest
import torch

import torchgraft
from grafted import base

MIB = 2**20
REPLACEMENTS, ALLOWED = 60, 12 * MIB  # a clone that stayed would take 0.7 MiB for these three layers


def _resident() -> int:
    gc.collect()
    return psutil.Process().memory_info().rss


@pytest.fixture
def grafted() -> torch.jit.ScriptModule:
    return torchgraft.graft(base("bert_sdpa", torch.float32), config="mam", name="task")


@pytest.mark.parametrize("change", ["graft", "load_adapter", "rename_adapter", "lower", "replace_adapter"])
def test_replacing_a_module_gives_its_memory_back(grafted: torch.jit.ScriptModule, change: str, tmp_path: Path) -> None:
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
    for _ in range(REPLACEMENTS):
        module = changes[change](module)
    assert _resident() - before < ALLOWED
