"""Makes int8 of the linear maps of a TorchScript module, grafted or not, and measures what that costs."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ._libraries import patcher
from .errors import GraftError, one_line
from .grafting import Base, base_module, cpp_module, example_arguments, script_module


@dataclass(frozen=True)
class LinearMap:
    """A linear map of a module's forward.

    Attributes:
        path: the module path of its weight; empty for a constant of a frozen module.
        roles: what it is in its layers: "query", "key", "value", "output", "ffn_in", "ffn_gate", "ffn_out"; "other"
            outside of layers.
        out_features, in_features: its sizes; 0 where they are not known.
        kept: why it stays in floating point; empty if it is quantised.
        error: |int8 product - product| / |product| on the activations of the example; None where it was not measured.
    """

    path: str
    roles: tuple[str, ...]
    out_features: int
    in_features: int
    kept: str
    error: float | None = None


def quantize(module: Base, *, skip: Sequence[str] = ()) -> torch.jit.ScriptModule:
    """Returns a copy of `module` whose linear maps are dynamic int8: one scale for each row of a weight, and one for
    the activations of a call. Adapters and heads stay as they are. `module` itself is unchanged.

    The products are ATen's (`quantized::linear_dynamic`), the numbers those that
    `torch.ao.quantization.quantize_dynamic` with `per_channel_dynamic_qconfig` gives. The copy is for inference on a
    CPU: docs/int8.md says what works on it. It has no other methods than forward, and those of its adapters.

    Args:
        module: a scripted or traced module, grafted or not, or an exported program, with float32 weights on the CPU.
        skip: linear maps that stay in floating point: roles ("ffn_out", ...; see LinearMap), module paths, or paths of
            modules around them.

    Raises:
        GraftError: no linear map can be quantised, `skip` names nothing, or an adapter is trainable.
        TypeError: `module` is neither TorchScript nor a program.
    """
    made, _, messages = patcher().quantize(cpp_module(base_module(module)), list(skip))
    for message in messages:
        warnings.warn(message, stacklevel=2)
    return script_module(made)


def quantization_error(module: Base, example: Any, *, skip: Sequence[str] = ()) -> list[LinearMap]:
    """Returns the linear maps that quantize() would quantise, in execution order, each with its error on `example`.

    A map's error is that of its own product: its input is the float32 module's. Of a grafted module the base runs,
    without adapters. Maps in branches are left out.

    Args:
        module: as for quantize(), before it is quantised.
        example: inputs of forward, adapter_ids left out: a tuple, a dict by name, or one tensor.
        skip: as for quantize().

    Raises:
        GraftError: as quantize() does, or forward fails on the example.
        TypeError: `module` is not TorchScript.
    """
    probe, maps, _ = patcher().quantization_probe(cpp_module(base_module(module)), list(skip))
    positional, named = example_arguments(example) or ((), {})
    try:
        with torch.no_grad():
            errors = script_module(probe)(*positional, **named)
    except (RuntimeError, torch.jit.Error) as error:
        raise GraftError(f"quantize: forward fails on the example inputs: {one_line(error)}") from error
    return [LinearMap(**entry, error=value.item()) for entry, value in zip(maps, errors, strict=True)]


def linear_maps(module: Base, *, skip: Sequence[str] = ()) -> list[LinearMap]:
    """Returns all linear maps of forward in execution order: what quantize() does with each. `skip`: as there.

    Raises:
        GraftError: as quantize() does.
        TypeError: `module` is not TorchScript.
    """
    return [LinearMap(**entry) for entry in patcher().quantize(cpp_module(base_module(module)), list(skip))[1]]
