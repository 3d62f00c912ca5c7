"""AdapterFusion layers (Pfeiffer et al. 2021), which weigh the adapters of a Fuse, and their directories."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ._libraries import patcher
from ._reading import parse_json, read_text
from .adapter_hub import read_one_version, read_weights
from .composition import Fuse, composition_to_json
from .errors import GraftError
from .grafting import cpp_module, script_module

CONFIG_FILE = "adapter_fusion_config.json"
WEIGHT_FILES = ("model_adapter_fusion.safetensors", "pytorch_model_adapter_fusion.bin")


def add_adapter_fusion(
    module: torch.jit.ScriptModule, adapter_names: Sequence[str] | Any,
    config: str | Mapping[str, Any] | Any = "dynamic", name: str | None = None, *, trainable: bool = False,
) -> torch.jit.ScriptModule:  # fmt: skip
    """Returns a copy of `module` that has fresh AdapterFusion layers, drawn as the `adapters` library draws them.

    A composition Fuse("a", "b") uses the layers of the name "a,b". The layers are where the adapters have bottlenecks,
    in all Transformer layers.

        model = torchgraft.add_adapter_fusion(model, ["a", "b"], trainable=True)
        model = torchgraft.compose(model, "both", torchgraft.Fuse("a", "b"))
        optimizer = torch.optim.AdamW(torchgraft.trainable_parameters(model, "both").values())

    Args:
        module: a grafted module.
        adapter_names: the adapters in their order, or a Fuse.
        config: "static" or "dynamic" (with a value matrix), a dict of fields, or the library's AdapterFusionConfig.
        name: the layers' name. None: the Fuse's, or the names of the adapters, joined by commas.
        trainable: the layers are to be trained. In train() mode they drop out scores with the configuration's
            `dropout_prob`; None is no dropout (in the library, that of the model's attention). Afterwards,
            freeze_adapter() of the composition freezes them.

    Raises:
        GraftError: an adapter is unknown or no bottleneck, the adapters have bottlenecks at different locations, or
            there are layers of that name.
    """
    fuse = Fuse(*adapter_names, name=name) if _is_list(adapter_names) else adapter_names
    text = json.dumps({"config": config if isinstance(config, str) else _fields_of(config)})
    return script_module(patcher().add_adapter_fusion(cpp_module(module), composition_to_json(fuse), text, trainable))


def _is_list(names: Any) -> bool:
    return isinstance(names, Sequence) and not isinstance(names, str)


def _fields_of(config: Any) -> dict[str, Any]:
    return dict(config.to_dict() if hasattr(config, "to_dict") else config)


def fusion_regularization_loss(module: torch.jit.ScriptModule, name: str) -> torch.Tensor:
    """Returns what the library's trainer adds to the loss while it trains AdapterFusion layers: 0.01 times the sum of
    squares of (1 - V), over the value matrices V of a composition. A number with a gradient; 0 without such matrices.

    Args:
        module: a grafted module.
        name: a composition with a Fuse whose layers are trainable.

    Raises:
        GraftError: no such composition is there, or its layers are frozen.
    """
    return patcher().fusion_regularization_loss(cpp_module(module), name)


def load_adapter_fusion(
    module: torch.jit.ScriptModule, directory: str | Path, name: str | None = None
) -> torch.jit.ScriptModule:
    """Returns a copy of `module` that has the AdapterFusion layers of a directory. They replace layers of that name.

    A composition Fuse("a", "b") uses the layers of the name "a,b". The layers are frozen; unfreeze_adapter() of the
    composition makes them trainable.

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
