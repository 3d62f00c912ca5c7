"""The pool that the command `torchgraft export --pool` makes a program of."""

import argparse
import warnings
from pathlib import Path

import torch

from ..adapter_hub import load_adapter_directory
from ..configs import config_to_json
from ..errors import GraftError
from ..peft import is_peft_directory
from ..pool import AdapterPool, check_room


def pool_of(arguments: argparse.Namespace, module: torch.jit.ScriptModule) -> AdapterPool:
    """Returns a pool that has room for --room and for the adapters of --adapters.

    Args:
        arguments: the command line's: pool (a number), room (configurations), adapters (path or None), gate_pooling
            (text or None).
    """
    found = {config_to_json(config): "--room" for config in arguments.room}
    if arguments.adapters is not None:
        found |= {config: name for name, config in _configs_in(arguments.adapters) if config not in found}
    faults = check_room(module, found, gate_pooling=arguments.gate_pooling)
    for (config, name), fault in zip(found.items(), faults, strict=True):
        if fault and name == "--room":
            raise GraftError(f"export: --room {config}: {fault}")
        if fault:
            warnings.warn(f"export: there is no room for adapters like '{name}': {fault}", stacklevel=2)
    room = [config for config, fault in zip(found, faults, strict=True) if not fault]
    return AdapterPool(module, arguments.pool, room, gate_pooling=arguments.gate_pooling, max_compositions=0)


def _configs_in(folder: Path) -> list[tuple[str, str]]:
    """The adapters of a folder, and the configuration of each as JSON."""
    result = []
    for directory in sorted(path for path in folder.iterdir() if (path / "adapter_config.json").is_file()):
        try:
            if is_peft_directory(directory):
                raise GraftError("a directory of PEFT, which the server does not read: torchgraft load, then save")
            result.append((directory.name, config_to_json(load_adapter_directory(directory).config)))
        except GraftError as error:
            warnings.warn(f"export: there is no room for '{directory.name}': {error}", stacklevel=3)
    return result
