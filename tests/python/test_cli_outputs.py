"""scripts/graft.py does not write over a base."""

from pathlib import Path

import pytest
import torch

import torchgraft
from grafted import base
from scripts_here import run_here


@pytest.mark.quick
def test_a_base_is_not_written_over(tmp_path: Path) -> None:
    """A grafted file holds its base; the file of a base is all that there is of it."""
    path, link, saved = tmp_path / "base.pt", tmp_path / "link.pt", tmp_path / "saved"
    base("bert_sdpa", torch.float32).save(str(path))
    link.symlink_to(path)
    before = path.read_bytes()
    grafting = ("--config", "lora", "--name", "task")
    for output in (path, link):
        done = run_here("graft.py", "add", path, "-o", output, *grafting)
        assert done.returncode == 1 and "this is the base itself" in done.stderr and "--force" in done.stderr
    torchgraft.save_adapter(torchgraft.graft(base("bert_sdpa", torch.float32), "lora", "task"), "task", saved)
    assert "this is the base itself" in run_here("graft.py", "load", path, saved, "-o", path).stderr
    assert path.read_bytes() == before
    assert run_here("graft.py", "add", path, "-o", path, *grafting, "--force").returncode == 0
    assert torch.jit.load(str(path)).adapter_names() == ["task"]
    assert run_here("graft.py", "add", path, "-o", path, "--config", "lora", "--name", "more").returncode == 0
