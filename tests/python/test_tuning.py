"""graft.py tune: what it writes, the operators read. No times are asserted."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scripts_here import run_here
from test_cli import check_one_line, run
from torchgraft import _tuning
from torchgraft._libraries import patcher

_USE = """
import sys, torch
torch.ops.load_library(sys.argv[1])
torch.ops.torchgraft.gated_lora(torch.randn(1, 3, 8), torch.randn(1, 3, 8), torch.randn(1, 2, 8), torch.randn(1, 8, 2),
                                torch.ones(1))
"""


def test_a_small_measurement() -> None:
    before = patcher().kernel_mode()
    table = _tuning.measure(0.0, tokens=[1, 5], features=[64])
    assert patcher().kernel_mode() == before
    found = [(entry["op"], entry["dtype"], entry["tokens"], entry["features"]) for entry in table["measurements"]]
    assert found == list(itertools.product(_tuning.OPS, ("float32", "bfloat16"), (1, 5), (64,)))
    assert all(entry["fused"] > 0 and entry["reference"] > 0 for entry in table["measurements"])


@pytest.mark.quick
def test_both_ways_compute_the_same() -> None:
    """What is compared are two ways to one result."""
    core = patcher()
    before = core.kernel_mode()
    try:
        for op, build in _tuning.OPS.items():
            case = build(torch.float32, 7, 128)
            results = []
            for mode in (core.KernelMode.FUSED, core.KernelMode.REFERENCE):
                core.set_kernel_mode(mode)
                results.append(case())
            torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3, msg=op)
    finally:
        core.set_kernel_mode(before)


def test_the_file_is_what_the_operators_read(tmp_path: Path) -> None:
    path = tmp_path / "kernels.json"
    done = run("tune", "-o", path, "--seconds", "0.0001", "--tokens", "2", "5", "--features", "64")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(path.read_text())["measurements"]) == len(_tuning.OPS) * 2 * 2
    for op in _tuning.OPS:
        assert f"{op}, bfloat16: fused takes" in done.stdout
    told = ["24 measurements, at least 0 s", *(f"measuring {op}" for op in _tuning.OPS)]
    assert done.stderr.splitlines() == [f"tune: {text}" for text in told]
    [library] = {name for name in torch.ops.loaded_libraries if "libtorchgraft.so" in name}
    environment = os.environ | {"TORCHGRAFT_KERNEL_TABLE": str(path), "TORCHGRAFT_KERNELS": "auto"}
    command = [sys.executable, "-c", _USE, library]
    used = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert used.returncode == 0, used.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["kernels.json"]


def test_it_says_what_it_does_before_it_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """How much there is to do before the first measurement, and each operator before its own."""
    seen = []

    def least(case: object, seconds: float) -> dict[str, float]:
        seen.extend(sys.stderr.getvalue().splitlines()[-1:])
        return {"fused": 1.0, "reference": 2.0}

    monkeypatch.setattr(_tuning, "_least", least)
    options = ["--seconds", "2", "--tokens", "2", "--features", "64"]
    done = run_here("graft.py", "tune", "-o", tmp_path / "kernels.json", *options)
    assert done.returncode == 0 and done.stderr.startswith("tune: 12 measurements, at least 24 s\n"), done.stderr
    assert seen == [f"tune: measuring {op}" for op in _tuning.OPS for _ in range(2)]
    done = run_here("graft.py", "tune", "-o", tmp_path / "kernels.json", *options, "--quiet")
    assert (done.returncode, done.stderr) == (0, "") and len(seen) == 12


def test_what_cannot_be_done(tmp_path: Path) -> None:
    check_one_line(run("tune", "-o", tmp_path / "none" / "kernels.json"), 1, "does not exist")
    check_one_line(run("tune", "-o", tmp_path / "kernels.json", "--features", "100"), 2, "expected multiples of 64")
    assert list(tmp_path.iterdir()) == []
