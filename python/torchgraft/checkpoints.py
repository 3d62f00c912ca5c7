"""Saves adapters to AdapterHub directories (adapter_config.json and weights), and loads them."""

import io
import warnings
from pathlib import Path
from typing import Any

import torch

from ._libraries import patcher
from .adapter_hub import CONFIG_FILE, HEAD_CONFIG_FILE, HEAD_WEIGHT_FILES, SETUP_FILE, WEIGHT_FILES
from .grafting import (
    Base,
    base_module,
    cpp_module,
    directory_spec,
    example_arguments,
    is_grafted,
    module_with_warnings,
)


def pickled(weights: dict[str, torch.Tensor]) -> bytes:
    buffer = io.BytesIO()
    torch.save(weights, buffer)
    return buffer.getvalue()


def check_replaces(directory: str | Path, name: str) -> None:
    """Raises GraftError where save_adapter() would write over another adapter than `name`."""
    patcher().check_replaces(str(directory), name)


def save_adapter(
    module: torch.jit.ScriptModule,
    name: str,
    directory: str | Path,
    safetensors: bool = True,
    model_class: str | None = None,
    overwrite: bool = False,
) -> None:
    """Writes one adapter into a directory that load_adapter() of this package and of `adapters==1.3.0` read.

    A frozen adapter's prefixes are written as flat ones ("flat": true), because it keeps the outputs of the MLP that
    made them and not the MLP. A trainable adapter's MLP is written.

    The function makes the directory if it is missing. It writes all files or, if something goes wrong, none. It removes
    files that an earlier adapter or the other format left there. If the process is killed meanwhile, the directory has
    the old adapter, the new one, or (for the instant of renaming) no adapter_config.json.

    Args:
        module: a grafted module.
        name: the adapter's name; its weights' names contain it.
        directory: where to write.
        safetensors: write adapter.safetensors (and model_head.safetensors). False: pytorch_adapter.bin (and
            pytorch_model_head.bin).
        model_class: the model class of the `adapters` library that is to load the head ("BertAdapterModel"). The
            library ignores a head whose file does not name the class of its model.
        overwrite: write also where an adapter of another name is, or files of an adapter without adapter_config.json.

    Raises:
        GraftError: the module has no such adapter, the directory holds an adapter of another name (or files of one and
            no adapter_config.json), or it cannot be written.
        TypeError: `module` is not TorchScript.
    """
    arguments = cpp_module(module), name
    if safetensors:
        _warn(patcher().save_adapter(*arguments, str(directory), model_class or "", overwrite))
        return
    config, weights, head_config, head_weights, messages = patcher().adapter_files(*arguments, model_class or "")
    contents = {CONFIG_FILE: config.encode(), WEIGHT_FILES[1]: pickled(weights)}
    if not overwrite:
        patcher().check_replaces(str(directory), name)
    obsolete = [WEIGHT_FILES[0], HEAD_WEIGHT_FILES[0], SETUP_FILE]
    if head_config:
        contents |= {HEAD_CONFIG_FILE: head_config.encode(), HEAD_WEIGHT_FILES[1]: pickled(head_weights)}
    else:  # an adapter that was there before may have left a head
        obsolete += [HEAD_CONFIG_FILE, HEAD_WEIGHT_FILES[1]]
    patcher().update_directory(str(directory), contents, obsolete, CONFIG_FILE, "" if overwrite else name, None)
    _warn(messages)


def _warn(messages: list[str]) -> None:
    """Warns the caller of save_adapter()."""
    for message in messages:
        warnings.warn(message, stacklevel=3)


def load_adapter(
    module: Base, directory: str | Path, name: str | None = None, trainable: bool = False, *,
    verify: bool = True, example: Any = None,
) -> torch.jit.ScriptModule:  # fmt: skip
    """Returns a copy of `module` that has the adapter of a directory. It replaces the adapter of that name, if there is
    one.

    The adapter may come from a model whose modules have other names: weights are matched by module path where paths
    agree, else by layer number and location. The active adapter stays active; if `module` was not grafted, the loaded
    adapter is active.

    Args:
        module: a TorchScript Transformer, grafted or not, or an exported program. It is not changed.
        directory: what save_adapter() wrote, here or in the `adapters` library, or a LoRA that PEFT saved.
        name: the adapter's name in the result. None: the name in the directory.
        trainable: give the adapter parameters of its own, to train it further. False: the adapter is frozen.
        verify: if `module` was not grafted, compare results with the base's, as graft() does.
        example: for `verify`: inputs, as graft() takes them.

    Raises:
        GraftError: a file is missing or damaged, or the adapter does not fit the module.
        TypeError: `module` is neither TorchScript nor a program.
    """
    module = base_module(module)
    spec = directory_spec(module, directory, name, trainable)
    if is_grafted(module):
        return module_with_warnings(patcher().load_adapter(cpp_module(module), spec))
    made = patcher().graft(cpp_module(module), [spec], "", "", "", verify, example=example_arguments(example))
    return module_with_warnings(made)


def match_adapter(module: Base, directory: str | Path) -> list[tuple[str, str]]:
    """Returns where load_adapter() would put each weight of a directory.

    Returns:
        For every key of the file (key, layer, slot and parameter): ("...query.loras.task.lora_A", "layer 1,
        selfattn_lora_q: lora_a").

    Raises:
        GraftError: load_adapter() would refuse the directory, for example because a key has no location in the module.
        TypeError: `module` is neither TorchScript nor a program.
    """
    module = base_module(module)
    return patcher().match_adapter(cpp_module(module), directory_spec(module, directory))
