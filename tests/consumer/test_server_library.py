"""examples/server and a base with operators that neither torch nor torchgraft has."""

import subprocess
from pathlib import Path

import pytest
import torch

from server_support import TOLERANCE, Server, traced_encoder

SOURCE = """
#include <torch/library.h>
#include <ATen/ATen.h>
TORCH_LIBRARY(other_server, m) { m.def("twice", [](const at::Tensor& x) { return x * 2; }); }
"""


class Twice(torch.nn.Module):
    def __init__(self, encoder: torch.jit.ScriptModule):
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return torch.ops.other_server.twice(self.encoder(input_ids, attention_mask))


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    folder, root = tmp_path_factory.mktemp("library"), Path(torch.__file__).parent
    (folder / "other.cpp").write_text(SOURCE)
    command = ["g++", "-shared", "-fPIC", "-std=c++20", f"-I{root / 'include'}", str(folder / "other.cpp")]
    subprocess.run([*command, "-o", str(folder / "other.so"), f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"], check=True)
    torch.ops.load_library(str(folder / "other.so"))
    return folder / "other.so"


def test_a_library_of_others_is_loaded(server_program, library, tmp_path):
    base = torch.jit.script(Twice(traced_encoder()).eval())
    base.save(tmp_path / "base.pt")
    (tmp_path / "adapters").mkdir()
    arguments = [str(tmp_path / "base.pt"), "--adapters", str(tmp_path / "adapters")]
    done = subprocess.run([str(server_program), *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "other_server::twice" in done.stderr
    (tmp_path / "none.so").write_text("no library")
    done = subprocess.run(
        [str(server_program), "--library", str(tmp_path / "none.so"), *arguments],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1 and "none.so" in done.stderr and done.stderr.count("\n") == 1
    with Server(server_program, tmp_path / "base.pt", tmp_path / "adapters", "--library", library) as server:
        status, answer = server.ask("POST", "/v1/predict", {"input_ids": [[2, 4, 5]]})
        assert status == 200
        ids = torch.tensor([[2, 4, 5]])
        with torch.no_grad():
            expected = base(ids, torch.ones_like(ids))[:, 0]
        torch.testing.assert_close(torch.tensor(answer["outputs"]), expected, **TOLERANCE)
        assert server.stop() == 0
