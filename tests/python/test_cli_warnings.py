"""What graft.py warns of on stderr."""

from pathlib import Path

import pytest
import torch

from odd_layers import Plain
from test_cli import run

pytestmark = pytest.mark.quick


class _Noisy(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Plain()

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.layer(x, mask) + torch.rand(1)


def test_add_says_when_nothing_was_compared(tmp_path: Path) -> None:
    torch.jit.script(_Noisy().eval()).save(str(tmp_path / "noisy.pt"))
    done = run("add", tmp_path / "noisy.pt", "-o", tmp_path / "out.pt", "--config", "lora", "--name", "task")
    assert done.returncode == 0
    assert "warning: graft: the result was not compared with the base's: its forward draws random" in done.stderr
