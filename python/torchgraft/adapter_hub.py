"""Reads AdapterHub adapter directories, as `model.save_adapter()` of the `adapters` library writes them."""

import os
import pickle
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from ._libraries import patcher
from ._reading import MOST_WEIGHT_BYTES, open_regular, parse_json, read_text
from .errors import GraftError

CONFIG_FILE = "adapter_config.json"
SETUP_FILE = "adapter_setup.json"  # of a composition; adapter_setup.py
SAFETENSORS_FILE = "adapter.safetensors"
PICKLE_FILE = "pytorch_adapter.bin"
WEIGHT_FILES = (SAFETENSORS_FILE, PICKLE_FILE)
HEAD_CONFIG_FILE = "head_config.json"
HEAD_SAFETENSORS_FILE = "model_head.safetensors"
HEAD_PICKLE_FILE = "pytorch_model_head.bin"
HEAD_WEIGHT_FILES = (HEAD_SAFETENSORS_FILE, HEAD_PICKLE_FILE)
ADAPTER_FILES = (CONFIG_FILE, *WEIGHT_FILES, HEAD_CONFIG_FILE, *HEAD_WEIGHT_FILES)

_Read = TypeVar("_Read")


@dataclass(frozen=True)
class SavedHead:
    """A task head, as an adapter directory holds it.

    Attributes:
        name: the head's name when it was saved; its weights' names contain it.
        config: the text of head_config.json.
        weights: the state dict, on the CPU.
    """

    name: str
    config: str
    weights: dict[str, Tensor]


@dataclass(frozen=True)
class AdapterDirectory:
    """What an adapter directory holds.

    Attributes:
        name: the adapter's name when it was saved; its weights' names contain it.
        config: the text of adapter_config.json.
        weights: the state dict, on the CPU.
        head: the head that was saved with the adapter. None: there is none, or HeadConfig does not know its kind.
    """

    name: str
    config: str
    weights: dict[str, Tensor]
    head: SavedHead | None = None


def read_config(directory: str | Path) -> str:
    """Returns the text of an adapter_config.json.

    Args:
        directory: the directory that holds the file, or the path of the file itself.

    Raises:
        GraftError: the file is missing, is not JSON, or is no regular file of at most 1 MiB.
    """
    path = Path(directory)
    return _read_config_file(path / CONFIG_FILE if path.is_dir() else path)


# By the file that another directory of the library has in place of adapter_config.json: what it holds.
_OTHER_DIRECTORIES = {
    SETUP_FILE: f"it holds a composition ({SETUP_FILE}), not an adapter; load_adapter_setup() reads it, and its "
    "adapters have directories of their own in it",
    "adapter_fusion_config.json": "it holds AdapterFusion layers (adapter_fusion_config.json), not an adapter; "
    "load_adapter_fusion() puts them into a module that has their adapters",
    HEAD_CONFIG_FILE: f"it holds a head ({HEAD_CONFIG_FILE}) without an adapter; heads are read beside adapters only",
}


def _read_config_file(path: Path) -> str:
    for name, meaning in _OTHER_DIRECTORIES.items():
        if path.name == CONFIG_FILE and not os.path.lexists(path) and os.path.lexists(path.parent / name):
            raise GraftError(f"{path.parent}: {meaning}")
    try:
        text = read_text(path)
    except OSError as error:
        raise GraftError(f"{path}: cannot read the adapter's configuration ({error.strerror})") from error
    parse_json(text, path)
    return text


def read_weights(directory: Path, files: tuple[str, ...] = WEIGHT_FILES) -> dict[str, Tensor]:
    """Reads the state dict from the first of `files` that exists, onto the CPU. Unpickles only tensors.

    Raises:
        GraftError: no file exists, or the file is damaged or holds more than tensors.
    """
    for name in files:
        path = directory / name
        if not os.path.lexists(path):
            continue
        try:
            if path.suffix == ".safetensors":
                return patcher().read_safetensors(str(path), MOST_WEIGHT_BYTES)
            with open_regular(path, MOST_WEIGHT_BYTES) as file:
                weights = torch.load(file, map_location="cpu", weights_only=True)
        except GraftError as error:  # names the file, too
            reason = str(error).removeprefix(f"{path}: ")
            raise GraftError(f"{path}: cannot read the adapter's weights ({reason})") from error
        except pickle.UnpicklingError as error:
            raise GraftError(f"{path}: refused, it holds more than plain tensors") from error
        except Exception as error:  # torch and safetensors raise many kinds for a damaged file
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise GraftError(f"{path}: cannot read the adapter's weights ({reason})") from error
        if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
            raise GraftError(f"{path}: expected a state dict of tensors, got {type(weights).__name__}")
        for key, value in weights.items():
            if value.layout != torch.strided or value.is_quantized or value.is_meta:
                what = "one without numbers (meta)" if value.is_meta else f"{value.layout}, {value.dtype}"
                raise GraftError(f"{path}: {str(key)[:200]}: expected a dense tensor, got {what}")
        return dict(weights)
    raise GraftError(f"{directory}: no weights, looked for {' and '.join(files)}")


def read_head(directory: Path) -> SavedHead | None:
    """Reads the head of an adapter directory. Returns None if there is no head; and, with a warning, if HeadConfig does
    not know its kind.

    Raises:
        GraftError: a file of the head is missing or damaged.
    """
    path = directory / HEAD_CONFIG_FILE
    if not os.path.lexists(path):
        return None
    config = _read_config_file(path)
    if not patcher().is_known_head(config):
        fields = parse_json(config, path).get("config")
        kind = fields.get("head_type") if isinstance(fields, dict) else None
        if isinstance(fields, dict) and fields.get("use_pooler") is True:
            kind = f"{kind}, use_pooler=True"
        warnings.warn(
            f"{directory}: the adapter's head{f' ({kind})' if kind else ''} is not loaded: heads for tagging, "
            "and for classification and regression by the first or last token, are; a prediction needs its own head",
            stacklevel=2,
        )
        return None
    name = parse_json(config, path).get("name")
    if not isinstance(name, str):
        raise GraftError(f'{path}: no "name"; is it an AdapterHub head?')
    return SavedHead(name, config, read_weights(directory, HEAD_WEIGHT_FILES))


def load_adapter_directory(directory: str | Path) -> AdapterDirectory:
    """Reads an adapter's configuration and weights, and its head. Unpickles only tensors. Another process may save into
    the directory meanwhile: what is returned is one whole version.

    Raises:
        GraftError: `directory` is not a directory, or a file is missing or damaged. The message names the file. Or the
            adapters library computes something else with this adapter than torchgraft (docs/adapters.md).
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise GraftError(f"{directory}: not a directory; expected one that model.save_adapter() wrote")
    return read_one_version(directory, (CONFIG_FILE, *WEIGHT_FILES, HEAD_CONFIG_FILE, *HEAD_WEIGHT_FILES), _read_files)


def read_one_version(
    directory: Path, files: Iterable[str], read: Callable[[Path], _Read], marker: str = CONFIG_FILE
) -> _Read:
    """Returns `read(directory)`, which reads some of `files`, when no other process has replaced them meanwhile; else
    calls it again. The last word is the marker's: see DirectoryUpdate in patch/adapters/.

    Raises:
        GraftError: the files change all the time, or `read` raised it.
    """
    results = []
    patcher().read_one_version(str(directory), list(files), marker, lambda: results.append(read(directory)))
    return results[-1]


def _read_files(directory: Path) -> AdapterDirectory:
    config = read_config(directory)
    content = parse_json(config, directory / CONFIG_FILE)
    name = content.get("name") if isinstance(content, dict) else None
    if not isinstance(name, str):
        raise GraftError(f'{directory / CONFIG_FILE}: no "name"; is it an AdapterHub adapter?')
    refused, warned = patcher().library_difference(config)
    if refused:
        raise GraftError(f"{directory}: {refused}")
    if warned:
        warnings.warn(f"{directory}: {warned}", stacklevel=2)
    return AdapterDirectory(name, config, read_weights(directory), read_head(directory))


def convert_to_safetensors(directory: str | Path) -> bool:
    """Writes adapter.safetensors beside the pytorch_adapter.bin of a directory, and a head's model_head.safetensors
    beside its pytorch_model_head.bin. Writes each file whole or not at all.

    Returns:
        Whether it wrote a file. False: the directory had all files already.

    Raises:
        GraftError: a file is missing or damaged, or holds more than tensors; or the directory cannot be written.
    """
    directory = Path(directory)
    done = False
    for new, old in (WEIGHT_FILES, HEAD_WEIGHT_FILES):
        is_head = old == HEAD_PICKLE_FILE
        if os.path.lexists(directory / new) or (is_head and not os.path.lexists(directory / old)):
            continue
        patcher().write_safetensors(read_weights(directory, (old,)), str(directory / new))
        done = True
    return done
