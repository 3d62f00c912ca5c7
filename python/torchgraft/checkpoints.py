"""Adapters in directories, as AdapterHub keeps them: adapter_config.json, and the weights beside it."""

import io
from pathlib import Path

import torch

from ._libraries import patcher
from .adapter_hub import CONFIG_FILE, HEAD_CONFIG_FILE, HEAD_WEIGHT_FILES, WEIGHT_FILES
from .grafting import cpp_module, directory_spec, script_module


def _pickled(weights: dict[str, torch.Tensor]) -> bytes:
    buffer = io.BytesIO()
    torch.save(weights, buffer)
    return buffer.getvalue()


def save_adapter(
    module: torch.jit.ScriptModule,
    name: str,
    directory: str | Path,
    safetensors: bool = True,
    model_class: str | None = None,
) -> None:
    """Writes one adapter so that load_adapter() of this package and of `adapters==1.3.0` read it.

    Prefixes of a frozen adapter are written as flat ones ("flat": true): the MLP that made them is not kept, its
    outputs are. A trainable adapter's MLP is written. The directory is made if need be. All files are written or, when
    something goes wrong, none; what else an adapter may have there, of the one before it or in the other format, is
    removed. Killed in between, it has the old adapter, the new one, or (for an instant, of renaming) no
    adapter_config.json.

    Args:
        module: a grafted module.
        name: the adapter's name, which is part of its weights' names.
        directory: where to write.
        safetensors: adapter.safetensors (and model_head.safetensors); False: pytorch_adapter.bin (and
            pytorch_model_head.bin).
        model_class: what the library wants to read in a head's file before it takes it: "BertAdapterModel".

    Raises:
        GraftError: no such adapter, or the directory cannot be written.
    """
    arguments = cpp_module(module), name
    if safetensors:
        patcher().save_adapter(*arguments, str(directory), model_class or "")
        return
    config, weights, head_config, head_weights = patcher().adapter_files(*arguments, model_class or "")
    contents = {CONFIG_FILE: config.encode(), WEIGHT_FILES[1]: _pickled(weights)}
    obsolete = [WEIGHT_FILES[0], HEAD_WEIGHT_FILES[0]]
    if head_config:
        contents |= {HEAD_CONFIG_FILE: head_config.encode(), HEAD_WEIGHT_FILES[1]: _pickled(head_weights)}
    else:  # of an adapter that was there before
        obsolete += [HEAD_CONFIG_FILE, HEAD_WEIGHT_FILES[1]]
    patcher().update_directory(str(directory), contents, obsolete, CONFIG_FILE)


def load_adapter(
    module: torch.jit.ScriptModule, directory: str | Path, name: str | None = None, trainable: bool = False
) -> torch.jit.ScriptModule:
    """A copy of `module`, grafted or not, with the adapter of a directory, in place of one of that name if any.

    The adapter may come from a model whose modules are called otherwise: places are matched by module path where paths
    agree, else by layer number and location. The active adapter stays active; of a bare module the loaded one is.

    Args:
        module: a TorchScript Transformer. It is not changed.
        directory: what save_adapter() wrote, here or in the `adapters` library, or a LoRA that PEFT saved.
        name: the adapter's name in the result. None: its own.
        trainable: it has parameters of its own in the result, to be trained further.

    Raises:
        GraftError: a file is missing or damaged, or the adapter does not fit the module.
    """
    return script_module(patcher().load_adapter(cpp_module(module), directory_spec(module, directory, name, trainable)))


def match_adapter(module: torch.jit.ScriptModule, directory: str | Path) -> list[tuple[str, str]]:
    """What load_adapter() would match to what: (key of the weights, place in the module), every key of the file.

    Raises:
        GraftError: as load_adapter(), where a key has no place.
    """
    return patcher().match_adapter(cpp_module(module), directory_spec(module, directory))
