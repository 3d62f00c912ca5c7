"""The `adapters` library run eagerly on a model whose linear maps are torch.ao's dynamic int8 ones."""

import contextlib
import warnings
from collections.abc import Iterator

import torch
import torch.ao.nn.quantized.dynamic
import torch.ao.quantization
from torch import Tensor, nn

from case import Case

SCHEMES = {
    "per_tensor": torch.ao.quantization.default_dynamic_qconfig,
    "per_channel": torch.ao.quantization.per_channel_dynamic_qconfig,
    "float16": torch.ao.quantization.float16_dynamic_qconfig,
}


def quantised(model: nn.Module, scheme: str, names: frozenset[str] | None = None) -> nn.Module:
    """A copy of the model whose linear maps are packed: all, or those with `names`."""
    which = {nn.Linear} if names is None else names
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao.quantization is deprecated
        return torch.ao.quantization.quantize_dynamic(model, dict.fromkeys(which, SCHEMES[scheme]))


def linear_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if type(module) is nn.Linear]


def trace(case: Case, scheme: str, names: frozenset[str] | None = None) -> torch.jit.ScriptModule:
    """The case's model, quantised and traced."""
    model = quantised(case.make(torch.float32), scheme, names)
    return torch.jit.trace(model, case.arguments(torch.float32, 0), check_trace=False, strict=False)


@contextlib.contextmanager
def packed_products(library: nn.Module, base: nn.Module, scheme: str, names: frozenset[str] | None = None) -> Iterator:
    """While it is open, `library`, a model that adapters.init() has prepared, multiplies by packed weights, as a
    quantised `base` does: a fresh model of the same weights.

    The library knows no quantised layers. Its layers with LoRA derive from nn.Linear and, as all others do, call
    torch.nn.functional.linear with their weight.
    """
    packed = {}
    for name, module in quantised(base, scheme, names).named_modules():
        if isinstance(module, torch.ao.nn.quantized.dynamic.Linear):
            packed[library.get_submodule(name).weight.data_ptr()] = module
    assert packed
    plain = nn.functional.linear

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        module = packed.get(weight.data_ptr())
        return plain(x, weight, bias) if module is None else module(x)

    nn.functional.linear = linear
    try:
        yield
    finally:
        nn.functional.linear = plain
