"""Lists, removes, renames, replaces, averages, merges and verifies the adapters of a grafted module.

Every function but list_adapters() and verify() returns a new module and does not change the module that it gets, so
that threads can go on running it: a server makes the new module beside its traffic and swaps it in. Both share the
memory of the base's weights. Every function raises GraftError if the module is not grafted or an adapter is unknown,
and TypeError if the module is not TorchScript.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ._libraries import patcher
from .composition import weights_of
from .configs import config_to_json
from .errors import GraftError
from .grafting import cpp_module, directory_spec, example_arguments, module_with_warnings, script_module


@dataclass(frozen=True)
class AdapterInfo:
    """One adapter of a grafted module.

    Attributes:
        name: the adapter's name.
        config: its configuration as JSON text.
        active: whether rows use it when forward gets no adapter_ids.
        merged: whether merge_adapter() has added it to the base's weights.
        trainable: whether it has parameters of its own to train; see adapter_training.py.
        gate_pooling: "all" or "unpadded": over which tokens its gates are means. Empty: it has no gates, or an
            older version exported the file.
        parameters: how many trained numbers the adapter and its head have, without the padding in the banks. Of a
            composition: those of its AdapterFusion layers and its head.
        bytes: the size of these numbers.
        by_location: the number of parameters at each location ("selfattn_lora", "output_adapter", ...), and of the
            "head".
        composition: "Stack(en, ner)": what compose() was given. Empty: an adapter.
    """

    name: str
    config: str
    active: bool
    merged: bool
    trainable: bool
    gate_pooling: str = field(default="", kw_only=True)
    parameters: int
    bytes: int
    by_location: Mapping[str, int]
    composition: str = field(default="", kw_only=True)


def list_adapters(module: torch.jit.ScriptModule) -> list[AdapterInfo]:
    """Returns the adapters, and behind them the compositions, in the order of adapter_names(): the position is the
    number in adapter_ids.

    Raises:
        GraftError: nothing is grafted onto `module`.
        TypeError: `module` is not TorchScript.
    """
    return [AdapterInfo(**entry) for entry in patcher().list_adapters(cpp_module(module))]


def remove_adapter(module: torch.jit.ScriptModule, *names: str) -> torch.jit.ScriptModule:
    """Returns a copy without these adapters and compositions. Later ones move up: their adapter_ids change.

    Raises:
        GraftError: a name is unknown, an adapter is merged, a composition that stays uses it, or none would be left
            (ungraft() gives the base).
        TypeError: a name is no text.
    """
    for name in names:
        if not isinstance(name, str):
            raise TypeError(
                f"remove_adapter: expected names of adapters, got {type(name).__name__}; give each by itself"
            )
    return script_module(patcher().remove_adapters(cpp_module(module), list(names)))


def rename_adapter(module: torch.jit.ScriptModule, name: str, new_name: str) -> torch.jit.ScriptModule:
    """Returns a copy where the adapter, or the composition, has another name. Its number in adapter_ids stays.

    Raises:
        GraftError: `name` is unknown, or `new_name` is taken, is empty or has a dot.
    """
    return script_module(patcher().rename_adapter(cpp_module(module), name, new_name))


def replace_adapter(
    module: torch.jit.ScriptModule,
    name: str,
    config: Any = None,
    directory: str | Path | None = None,
    trainable: bool = False,
) -> torch.jit.ScriptModule:
    """Returns a copy where `name` is another adapter. Its number in adapter_ids stays.

    Args:
        module: a grafted module.
        name: the adapter to replace.
        config: the configuration of the new adapter, with fresh weights; anything that graft() takes.
        directory: a directory of AdapterHub or PEFT that holds the new adapter. Give `config` or `directory`, not both.
        trainable: give the new adapter parameters of its own, to train it. False: it is frozen.

    Raises:
        GraftError: `name` is unknown, or the new adapter does not fit the module.
    """
    if (config is None) == (directory is None):
        raise GraftError("replace_adapter: give a config or a directory")
    if directory is not None:
        spec = directory_spec(module, directory, name, trainable)
    else:
        spec = (name, config_to_json(config), None, "", trainable, None)
    return script_module(patcher().replace_adapter(cpp_module(module), spec))


def average_adapter(
    module: torch.jit.ScriptModule,
    name: str,
    adapters: Mapping[str, float] | Sequence[str],
    *,
    normalize_weights: bool = True,
    verify: bool = True,
    example: Any = None,
) -> torch.jit.ScriptModule:
    """Returns a copy with one more adapter, whose parameters are weighted means of the parameters of others.

    The function does what average_adapter(combine_strategy="linear") of the `adapters` library does, except that it
    averages prefixes as keys and values, not as weights of the MLP that made them, and a Compacter by its projections,
    not by their factors. VeRA, MTL-LoRA and orthogonal ReFTs are averaged by their factors, so they must be trainable.
    The average is frozen and has no head.

    Args:
        module: a grafted module.
        name: the name of the new adapter.
        adapters: the adapters to average, {name: weight}, or names alone: then all have the same weight. Their
            configurations must agree.
        normalize_weights: divide the weights by their sum.
        verify: run both modules and compare the other adapters' results. A warning says what could not be compared.
        example: for `verify`: inputs, as graft() takes them.

    Raises:
        GraftError: a name is unknown, `name` is taken, the configurations differ, or the weights sum to 0.
    """
    names = list(adapters)
    weights = weights_of(adapters.values(), "average_adapter") if isinstance(adapters, Mapping) else []
    return module_with_warnings(patcher().average_adapters(cpp_module(module), name, names, weights, normalize_weights,
                                                           verify, example_arguments(example)))  # fmt: skip


def merge_adapter(
    module: torch.jit.ScriptModule, name: str, *, into_base: bool = False, verify: bool = True, example: Any = None
) -> torch.jit.ScriptModule:
    """Returns a copy in which an ungated LoRA is added to the base's weights: W + alpha / r B A. It then costs nothing.

    The copy's base is the merged model: deactivate(), adapter_ids = -1 and base_forward() give its results, and other
    adapters act on top of them. The adapter stays in the list, without effect, for unmerge_adapter(). ungraft() of the
    copy gives the plain merged model.

    Args:
        module: a grafted module.
        name: the adapter to merge.
        into_base: merge also if the module has other adapters, whose results change with the weights. False: that is an
            error.
        verify: run both modules, and the copy unmerged again, and compare what must be equal: the merged base with the
            adapter, and after unmerging the base and all adapters. A warning says what could not be compared.
        example: for `verify`: inputs, as graft() takes them.

    Raises:
        GraftError: the adapter has a gate, a bottleneck or a prefix, which no weight can hold; it is trainable or
            merged already; a weight that it updates is used in another place too, where the adapter does not act; the
            base went through torch.jit.freeze, which makes its weights constants; or there are other adapters.
    """
    return module_with_warnings(patcher().merge_adapter(cpp_module(module), name, into_base, verify,
                                                        example_arguments(example)))  # fmt: skip


def unmerge_adapter(
    module: torch.jit.ScriptModule, name: str, *, verify: bool = True, example: Any = None
) -> torch.jit.ScriptModule:
    """Returns a copy in which a merged adapter is subtracted from the base's weights again, exact up to rounding.
    `verify` and `example`: as for merge_adapter().

    Raises:
        GraftError: the adapter is unknown or not merged.
    """
    return module_with_warnings(patcher().unmerge_adapter(cpp_module(module), name, verify, example_arguments(example)))


def lower(module: torch.jit.ScriptModule, *, verify: bool = True, example: Any = None) -> torch.jit.ScriptModule:
    """Returns a copy that calls ATen operators only, for hosts that cannot load libtorchgraft.so. It gives the same
    results up to rounding, and is slower.

    If you graft onto the copy, the new module calls torchgraft's operators again.

    Args:
        module: a grafted module.
        verify: run both modules and compare the base's and all adapters' results. A warning says what could not be
            compared.
        example: for `verify`: inputs, as graft() takes them.

    Raises:
        GraftError: nothing is grafted onto `module`, the base itself calls an operator of torchgraft that has no ATen
            form, or results differ.
        TypeError: `module` is not TorchScript.
    """
    return module_with_warnings(patcher().lower(cpp_module(module), verify, example_arguments(example)))


def ungraft(module: torch.jit.ScriptModule, *, verify: bool = True, example: Any = None) -> torch.jit.ScriptModule:
    """Returns the base, with the signature and the graph that it had before grafting.

    If the module has, or had, a trainable adapter, the base's parameters require no gradients: grafting has switched
    them off. `verify` and `example`: as for lower().

    Raises:
        GraftError: nothing is grafted onto `module`, or results differ.
        TypeError: `module` is not TorchScript.
    """
    return module_with_warnings(patcher().ungraft(cpp_module(module), verify, example_arguments(example)))


def verify(module: torch.jit.ScriptModule, example: Any = None) -> list[str]:
    """Runs a grafted module on inputs and compares what must agree: rows of the base in the grafted graph with the
    base, the operators of each adapter with plain ATen calls, and a merged base with its adapter, also unmerged.

    Args:
        module: a grafted module.
        example: inputs, as graft() takes them. None: made up.

    Returns:
        What was not compared and why, one sentence each. Empty: all was, and is equal.

    Raises:
        GraftError: results differ.
    """
    return patcher().verify(cpp_module(module), example_arguments(example))
