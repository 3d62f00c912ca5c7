"""examples/server serves what `torchgraft add --rename` made of a base that calls something as grafting does."""

import subprocess
import sys

import torch

import torchgraft
from hosts_support import ROOT, run
from server_support import TOLERANCE, Encoder, Server


class TakenNames(torch.nn.Module):
    """An encoder in an attribute that is called as what grafting adds."""

    def __init__(self):
        super().__init__()
        self.adapters = Encoder()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.adapters(input_ids, attention_mask)


def test_a_base_with_names_of_grafting_is_served(server_program, models, tmp_path):
    """Grafted by the command with new names; the server's own adapters come on top."""
    torch.manual_seed(0)
    ids = torch.ones(2, 8, dtype=torch.int64)
    with torch.no_grad():
        base = torch.jit.trace(TakenNames().eval(), (ids, ids), check_trace=False)
    base.save(tmp_path / "base.pt")
    directory = models / "adapters" / "task-0"
    command = [
        sys.executable,
        ROOT / "scripts" / "graft.py",
        "add",
        tmp_path / "base.pt",
        "-o",
        tmp_path / "grafted.pt",
    ]
    command += ["--adapter", f"own={directory}", "--gate-pooling", "unpadded"]
    assert "--rename adapters=base_adapters" in subprocess.run(command, capture_output=True, text=True).stderr
    run(*command, "--rename", "adapters=encoder")
    module = torchgraft.graft(
        base, adapters={"own": directory}, gate_pooling="unpadded", rename={"adapters": "encoder"}
    )
    row = [9, 8, 7, 6]
    with Server(server_program, tmp_path / "grafted.pt", models / "adapters", "--capacity", 2) as server:
        expected = module(torch.tensor([row]), torch.ones(1, 4, dtype=torch.int64))[0, 0]
        torch.testing.assert_close(server.outputs("own", [row])[0], expected, **TOLERANCE)
        assert server.predict("task-1", [row])[0] == 200
