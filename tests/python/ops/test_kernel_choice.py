"""TORCHGRAFT_KERNELS chooses between fused kernels and ATen's compositions, whose products the profiler sees.

It is read once: each case is a process.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from torchgraft._libraries import patcher

_CODE = """
import torch
torch.ops.load_library({library!r})
torch.manual_seed(0)
x, weight, a, b = torch.randn(2, 8, 96), torch.randn(96, 96), torch.randn(1, 8, 96), torch.randn(1, 96, 8)
with torch.autograd.profiler.profile() as profile:
    result = torch.ops.torchgraft.gated_lora_linear(x, weight, None, a, b, torch.ones(1))[0]
apart = torch.nn.functional.linear(x, weight) + x @ a[0].T @ b[0].T
assert (result - apart).abs().max() < 1e-3
names = {{event.name for event in profile.function_events}}
print(not names.isdisjoint(["aten::linear", "aten::matmul", "aten::mm", "aten::addmm"]))
"""


_LINEAR = """
import torch
torch.ops.load_library({library!r})
weight = torch.randn(64, 64)
for tokens in (16, 191, 192, 1024):
    x = torch.randn(1, tokens, 64)
    with torch.autograd.profiler.profile() as profile:
        torch.ops.torchgraft.linear(x, weight)
    print(tokens, any(event.name == "aten::linear" for event in profile.function_events))
"""


@pytest.mark.parametrize("kernels", ["auto", "fused"])
def test_on_intel_linear_maps_of_many_tokens_are_atens(kernels: str) -> None:
    done = _run(_LINEAR, TORCHGRAFT_KERNELS=kernels)
    assert done.returncode == 0, done.stderr
    is_fast = torch.backends.cpu.get_cpu_capability() in ("AVX512", "AVX2")
    is_intel = "Intel" in torch.cpu.get_capabilities().get("cpu_name", "")
    wanted = {
        tokens: kernels == "auto" and (not is_fast or (is_intel and tokens >= 192)) for tokens in (16, 191, 192, 1024)
    }
    assert done.stdout.splitlines() == [f"{tokens} {is_atens}" for tokens, is_atens in wanted.items()]


_BFLOAT16 = """
import torch
torch.ops.load_library({library!r})
ops = torch.ops.torchgraft
def randn(*size): return torch.randn(size).bfloat16()
def lora(tokens): ops.gated_lora(randn(1, tokens, 64), randn(1, tokens, 64), randn(1, 8, 64), randn(1, 64, 8),
                                 randn(1))
def bottleneck(tokens): ops.gated_bottleneck(randn(1, tokens, 768), randn(1, tokens, 768), randn(1, 8, 768),
                                             randn(1, 8), randn(1, 768, 8), randn(1, 768), randn(1, 1), "relu")
def prefix(tokens): ops.gated_prefix_attention(*randn(3, 1, 2, tokens, 32), randn(1, tokens, 64),
                                               *randn(2, 1, 2, 4, 32), torch.tensor([4]))
def linear(tokens): ops.linear(randn(1, tokens, 64), randn(64, 64))
products = {{"aten::linear", "aten::matmul", "aten::bmm", "aten::baddbmm"}}
for call, sizes in ((lora, (256, 257)), (bottleneck, (16, 17)), (prefix, (128, 129)), (linear, (1, 300))):
    for tokens in sizes:
        with torch.autograd.profiler.profile() as profile:
            call(tokens)
        print(call.__name__, tokens, not products.isdisjoint(event.name for event in profile.function_events))
"""


@pytest.mark.parametrize("kernels", ["auto", "fused"])
def test_with_amx_products_of_bfloat16_are_atens_where_there_is_much_to_multiply(kernels: str) -> None:
    capabilities = torch.cpu.get_capabilities()
    if not (capabilities.get("amx_bf16") and torch.backends.cpu.get_cpu_capability() == "AVX512"):
        pytest.skip("this processor has no AMX")
    done = _run(_BFLOAT16, TORCHGRAFT_KERNELS=kernels)
    assert done.returncode == 0, done.stderr
    atens = ["lora 257", "bottleneck 17", "prefix 129", "linear 1", "linear 300"] if kernels == "auto" else []
    shown = [line.rsplit(" ", 1) for line in done.stdout.splitlines()]
    assert [call for call, is_atens in shown if is_atens == "True"] == atens and len(shown) == 8


def _run(text: str = _CODE, **environment: str) -> subprocess.CompletedProcess:
    [library] = {path for path in torch.ops.loaded_libraries if "libtorchgraft.so" in path}  # this process's, too
    code = text.format(library=library)
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("environment", "is_composition"),
    [
        ({"TORCHGRAFT_KERNELS": "reference"}, True),
        ({"TORCHGRAFT_KERNELS": "fused"}, False),
        ({"TORCHGRAFT_KERNELS": "auto", "ATEN_CPU_CAPABILITY": "default"}, True),
        ({"TORCHGRAFT_KERNELS": "fused", "ATEN_CPU_CAPABILITY": "default"}, False),
    ],
    ids=str,
)
def test_the_environment_chooses_fused_kernels_or_compositions(environment: dict, is_composition: bool) -> None:
    done = _run(**environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(is_composition)


def _table(path: Path, **fields: object) -> Path:
    """A table that says that ATen's composition is faster, of whatever size."""
    entry = dict(op="gated_lora_linear", dtype="float32", tokens=16, features=96, fused=2.0, reference=1.0)
    here = patcher().kernel_instruction_set()
    table = dict(kernel_table=1, instruction_set=here, measurements=[entry]) | fields
    path.write_text(json.dumps(table))
    return path


@pytest.mark.parametrize(
    ("fields", "mode", "is_composition"),
    [({}, "auto", True), ({}, "fused", False), (dict(instruction_set="none"), "auto", None)],
    ids=["the table decides", "not where a mode is asked for", "not of another instruction set"],
)
def test_a_measured_table_decides_where_nothing_else_does(
    tmp_path: Path, fields: dict, mode: str, is_composition: bool | None
) -> None:
    table = str(_table(tmp_path / "table.json", **fields))
    done = _run(TORCHGRAFT_KERNELS=mode, TORCHGRAFT_KERNEL_TABLE=table)
    assert done.returncode == 0, done.stderr
    without = _run(TORCHGRAFT_KERNELS=mode).stdout
    assert done.stdout == (without if is_composition is None else f"{is_composition}\n")


def test_a_file_that_is_no_table_is_named(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("fused")
    for path, message in (("none.json", "cannot be read"), ("text", "not JSON (")):
        done = _run(TORCHGRAFT_KERNEL_TABLE=str(tmp_path / path))
        assert done.returncode != 0
        assert f"TORCHGRAFT_KERNEL_TABLE: {tmp_path / path}" in done.stderr and message in done.stderr


def test_an_unknown_mode_is_named_with_the_known() -> None:
    done = _run(TORCHGRAFT_KERNELS="quick")
    assert done.returncode != 0
    assert 'TORCHGRAFT_KERNELS: expected "auto", "fused" or "reference", got "quick"' in done.stderr
