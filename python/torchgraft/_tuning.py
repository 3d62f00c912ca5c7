"""Measures which kernels are faster on this machine, for a file that TORCHGRAFT_KERNEL_TABLE names."""

import itertools
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ._libraries import patcher

DTYPES = (torch.float32, torch.bfloat16)
TOKENS = (16, 128, 1024)
FEATURES = (384, 768)
HEAD_SIZE = 64
RANK = 8
PREFIX = 10
FEED_FORWARD = 4  # times the hidden size
REDUCTIONS = (16, 2)  # of UniPELT's and MAM's bottlenecks; the table has one entry for both

Case = Callable[[], object]


def _lora(dtype: torch.dtype, tokens: int, features: int) -> Case:
    x, base = torch.randn(2, 1, tokens, features).to(dtype)
    a, b = torch.randn(1, RANK, features).to(dtype), torch.randn(1, features, RANK).to(dtype)
    scaling, gate = torch.ones(1, dtype=dtype), _gate(dtype, features)
    return lambda: torch.ops.torchgraft.gated_lora(x, base, a, b, scaling, *gate)


def _lora_linear(dtype: torch.dtype, tokens: int, features: int) -> Case:
    x, weight, bias = (torch.randn(size).to(dtype) for size in ((1, tokens, features), (features, features), features))
    a, b = torch.randn(1, RANK, features).to(dtype), torch.randn(1, features, RANK).to(dtype)
    scaling, gate = torch.ones(1, dtype=dtype), _gate(dtype, features)
    return lambda: torch.ops.torchgraft.gated_lora_linear(x, weight, bias, a, b, scaling, *gate)


def _bottleneck(dtype: torch.dtype, tokens: int, features: int) -> Case:
    x = torch.randn(1, tokens, features).to(dtype)
    scaling, gate = torch.ones(1, 1, dtype=dtype), _gate(dtype, features)
    weights = [_bottleneck_weights(dtype, features, features // reduction) for reduction in REDUCTIONS]
    return lambda: [torch.ops.torchgraft.gated_bottleneck(x, x, *each, scaling, "relu", *gate) for each in weights]


def _bottleneck_linear(dtype: torch.dtype, tokens: int, features: int) -> Case:
    """A bottleneck beside the second linear map of a feed-forward block."""
    wide = FEED_FORWARD * features
    sizes = ((1, tokens, features), (1, tokens, wide), (features, wide), features)
    x, hidden, weight, bias = (torch.randn(size).to(dtype) for size in sizes)
    weights = _bottleneck_weights(dtype, features, features // REDUCTIONS[-1])
    scaling = torch.ones(1, 1, dtype=dtype)
    return lambda: torch.ops.torchgraft.gated_bottleneck_linear(x, hidden, weight, bias, *weights, scaling, "relu")


def _bottleneck_weights(dtype: torch.dtype, features: int, narrow: int) -> list[torch.Tensor]:
    sizes = ((1, narrow, features), (1, narrow), (1, features, narrow), (1, features))
    return [torch.randn(size).to(dtype) for size in sizes]


def _prefix_attention(dtype: torch.dtype, tokens: int, features: int) -> Case:
    heads = features // HEAD_SIZE
    x = torch.randn(1, tokens, features).to(dtype)
    query, key, value = (torch.randn(1, tokens, heads, HEAD_SIZE).to(dtype).transpose(1, 2) for _ in range(3))
    prefix, length = torch.randn(1, heads, PREFIX, HEAD_SIZE).to(dtype), torch.tensor([PREFIX])
    weight, bias = _gate(dtype, features)
    return lambda: torch.ops.torchgraft.gated_prefix_attention(
        query, key, value, x, prefix, prefix, length, gate_weight=weight, gate_bias=bias
    )


def _linear(dtype: torch.dtype, tokens: int, features: int) -> Case:
    """Linear maps of a layer, more than the second cache holds: a model reads each of its weights once in a pass."""
    x = torch.randn(1, tokens, features).to(dtype)
    weights = torch.randn(12, features, features).to(dtype)
    bias = torch.randn(features).to(dtype)
    return lambda: [torch.ops.torchgraft.linear(x, weight, bias) for weight in weights]


def _gate(dtype: torch.dtype, features: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(1, 1, features).to(dtype), torch.zeros(1, 1, dtype=dtype)


OPS: dict[str, Callable[[torch.dtype, int, int], Case]] = {
    "gated_lora": _lora,
    "gated_lora_linear": _lora_linear,
    "gated_bottleneck": _bottleneck,
    "gated_bottleneck_linear": _bottleneck_linear,
    "gated_prefix_attention": _prefix_attention,
    "linear": _linear,
}


def measure(
    seconds: float,
    tokens: Iterable[int] = TOKENS,
    features: Iterable[int] = FEATURES,
    show: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measures the fused kernel and ATen's composition of every operator, in turns, for every dtype and size.

    Args:
        seconds: how long to measure each operator, dtype and size. Each takes at least four turns.
        tokens: numbers of tokens, of all rows together.
        features: hidden sizes, multiples of 64.
        show: called with a description of each measurement before it begins.

    Returns:
        The content of a kernel table: the least seconds of both ways, and the machine that was measured.
    """
    core = patcher()
    before = core.kernel_mode()
    measurements = []
    try:
        for op, dtype, rows, columns in itertools.product(OPS, DTYPES, tokens, features):
            name = str(dtype).removeprefix("torch.")
            show(f"{op}, {name}, {rows} tokens, {columns} features")
            least = _least(OPS[op](dtype, rows, columns), seconds)
            measurements.append(dict(op=op, dtype=name, tokens=rows, features=columns) | least)
    finally:
        core.set_kernel_mode(before)
    return dict(
        kernel_table=1,
        instruction_set=core.kernel_instruction_set(),
        processor=torch.cpu.get_capabilities().get("cpu_name", ""),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        measurements=measurements,
    )


def _least(case: Case, seconds: float) -> dict[str, float]:
    """Returns the shortest time of each way. On a busy machine a median would measure the machine, not the kernel."""
    core = patcher()
    modes = {"fused": core.KernelMode.FUSED, "reference": core.KernelMode.REFERENCE}
    taken: dict[str, list[float]] = {name: [] for name in modes}
    began = time.perf_counter()
    turn = 0
    with torch.inference_mode():
        while turn < 4 or time.perf_counter() < began + seconds:
            for name, mode in modes.items():
                core.set_kernel_mode(mode)
                start = time.perf_counter()
                case()
                taken[name].append(time.perf_counter() - start)
            turn += 1
    return {name: min(values) for name, values in taken.items()}
