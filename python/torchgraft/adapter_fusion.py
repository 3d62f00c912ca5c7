"""AdapterFusion layers (Pfeiffer et al. 2021), which weigh the adapters of a Fuse, and their directories."""

import os
from pathlib import Path

import torch

from ._libraries import patcher
from ._reading import parse_json, read_text
from .adapter_hub import read_one_version, read_weights
from .errors import GraftError
from .grafting import cpp_module, script_module

CONFIG_FILE = "adapter_fusion_config.json"
WEIGHT_FILES = ("model_adapter_fusion.safetensors", "pytorch_model_adapter_fusion.bin")


def load_adapter_fusion(
    module: torch.jit.ScriptModule, directory: str | Path, name: str | None = None
) -> torch.jit.ScriptModule:
    """Returns a copy of `module` that has the AdapterFusion layers of a directory. They replace layers of that name.

    A composition Fuse("a", "b") uses the layers of the name "a,b". The layers are frozen.

    Args:
        module: a grafted module.
        directory: what save_adapter_fusion() wrote, here or in the `adapters` library.
        name: the layers' name in the result. None: the name in the directory.

    Raises:
        GraftError: a file is missing or damaged, a layer does not fit the module, or the configuration has
            temperature=true: the library's results then depend on how often it ran.
    """
    text, weights = read_one_version(Path(directory), (CONFIG_FILE, *WEIGHT_FILES), _read_files, CONFIG_FILE)
    return script_module(patcher().load_adapter_fusion(cpp_module(module), text, weights, name or ""))


def _read_files(directory: Path) -> tuple[str, dict[str, torch.Tensor]]:
    path = directory / CONFIG_FILE
    try:
        text = read_text(path)
    except OSError as error:
        raise GraftError(f"{path}: cannot read the configuration of AdapterFusion ({error.strerror})") from error
    parse_json(text, path)
    return text, read_weights(directory, WEIGHT_FILES)


def save_adapter_fusion(
    module: torch.jit.ScriptModule, name: str, directory: str | Path, overwrite: bool = False
) -> None:
    """Writes AdapterFusion layers into a directory that load_adapter_fusion() of this package and of `adapters==1.3.0`
    (with use_safetensors=True) read.

    Args:
        module: a grafted module.
        name: the layers' name: "a,b".
        directory: where to write. It is made if it is missing. All files are written, or none.
        overwrite: replace layers of another name.

    Raises:
        GraftError: the module has no such layers, the directory holds others, or it cannot be written.
    """
    patcher().save_adapter_fusion(cpp_module(module), name, os.fspath(directory), overwrite)


def remove_adapter_fusion(module: torch.jit.ScriptModule, name: str) -> torch.jit.ScriptModule:
    """Returns a copy without the AdapterFusion layers of a name.

    Raises:
        GraftError: the module has no such layers, or a composition uses them.
    """
    return script_module(patcher().remove_adapter_fusion(cpp_module(module), name))


def list_adapter_fusions(module: torch.jit.ScriptModule) -> list[str]:
    """Returns the names of the module's AdapterFusion layers.

    Raises:
        GraftError: nothing is grafted onto `module`.
        TypeError: `module` is not TorchScript.
    """
    return patcher().list_adapter_fusions(cpp_module(module))
