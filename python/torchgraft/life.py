"""What can be done with the adapters of a grafted module.

Every function returns a new module and leaves the one that it is given as it is, so that threads which run that are not
disturbed: a server makes the new one beside its traffic and swaps it in. Both share the memory of the base's weights.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ._libraries import patcher
from .configs import config_to_json
from .errors import GraftError
from .grafting import cpp_module, directory_spec, script_module


@dataclass(frozen=True)
class AdapterInfo:
    """One adapter of a grafted module.

    Attributes:
        name: its name.
        config: its configuration as JSON text.
        active: whether rows without adapter_ids use it.
        merged: whether merge_adapter() has moved it into the base's weights.
        trainable: whether it has parameters of its own to train; see adapter_training.py.
        parameters: how many trained numbers it has, without the padding of the bank that it shares with others.
        bytes: their size.
        by_location: the parameters by the place where they are ("selfattn_lora", "output_adapter", ...).
    """

    name: str
    config: str
    active: bool
    merged: bool
    trainable: bool
    parameters: int
    bytes: int
    by_location: Mapping[str, int]


def list_adapters(module: torch.jit.ScriptModule) -> list[AdapterInfo]:
    """The adapters in the order of adapter_names(), which adapter_ids count."""
    return [AdapterInfo(**entry) for entry in patcher().list_adapters(cpp_module(module))]


def remove_adapter(module: torch.jit.ScriptModule, *names: str) -> torch.jit.ScriptModule:
    """A copy without these adapters. Those behind them move up: their adapter_ids change.

    Raises:
        GraftError: an unknown name, the last adapter (ungraft() gives the base), or one that is merged.
    """
    return script_module(patcher().remove_adapters(cpp_module(module), list(names)))


def rename_adapter(module: torch.jit.ScriptModule, name: str, new_name: str) -> torch.jit.ScriptModule:
    """A copy where the adapter has another name; its adapter_id stays."""
    return script_module(patcher().rename_adapter(cpp_module(module), name, new_name))


def replace_adapter(
    module: torch.jit.ScriptModule,
    name: str,
    config: Any = None,
    directory: str | Path | None = None,
    trainable: bool = False,
) -> torch.jit.ScriptModule:
    """A copy where `name`, with its adapter_id, has a new configuration with fresh weights, or those of a directory."""
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
) -> torch.jit.ScriptModule:
    """A copy with one more adapter, whose every parameter is the weighted mean of the others'.

    As average_adapter(combine_strategy="linear") of the `adapters` library, but that prefixes are averaged as keys and
    values and not as weights of the MLP that made them.

    Args:
        module: a grafted module.
        name: of the new adapter.
        adapters: the names of those to average, with weights or without (all alike). Their configurations must agree.
        normalize_weights: divide the weights by their sum.
    """
    names = list(adapters)
    weights = [float(adapters[key]) for key in names] if isinstance(adapters, Mapping) else []
    return script_module(patcher().average_adapters(cpp_module(module), name, names, weights, normalize_weights))


def merge_adapter(module: torch.jit.ScriptModule, name: str) -> torch.jit.ScriptModule:
    """A copy whose base weights hold the adapter, an ungated LoRA: W + alpha / r B A. It then costs nothing.

    The adapter stays listed, without effect, for unmerge_adapter(). ungraft() of the copy is the plain merged model.

    Raises:
        GraftError: a gate, a bottleneck or a prefix, which no weight can hold; or frozen weights.
    """
    return script_module(patcher().merge_adapter(cpp_module(module), name))


def unmerge_adapter(module: torch.jit.ScriptModule, name: str) -> torch.jit.ScriptModule:
    """A copy with the adapter taken out of the base's weights again, up to rounding."""
    return script_module(patcher().unmerge_adapter(cpp_module(module), name))


def lower(module: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    """A copy made of ATen calls alone, which loads where no custom library can be loaded. Same results, but slower.

    What is grafted onto it later is made of this package's ops again.
    """
    return script_module(patcher().lower(cpp_module(module)))


def ungraft(module: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    """The base, with the signature and the graph that it had before it was grafted.

    Its parameters require no gradients when the module has, or had, a trainable adapter: grafting that froze them.
    """
    return script_module(patcher().ungraft(cpp_module(module)))
