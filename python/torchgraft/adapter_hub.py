"""Reads AdapterHub adapter directories, as `model.save_adapter()` of the `adapters` library writes them."""

import json
import pickle
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ._libraries import patcher
from .errors import GraftError

CONFIG_FILE = "adapter_config.json"
SAFETENSORS_FILE = "adapter.safetensors"
PICKLE_FILE = "pytorch_adapter.bin"
WEIGHT_FILES = (SAFETENSORS_FILE, PICKLE_FILE)
HEAD_CONFIG_FILE = "head_config.json"
HEAD_SAFETENSORS_FILE = "model_head.safetensors"
HEAD_PICKLE_FILE = "pytorch_model_head.bin"
HEAD_WEIGHT_FILES = (HEAD_SAFETENSORS_FILE, HEAD_PICKLE_FILE)


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
        GraftError: the file is missing, or is not JSON.
    """
    path = Path(directory)
    if path.is_dir():
        path = path / CONFIG_FILE
    try:
        text = path.read_text(encoding="utf-8")
        json.loads(text)
    except OSError as error:
        raise GraftError(f"{path}: cannot read the adapter's configuration ({error.strerror})") from error
    except ValueError as error:
        raise GraftError(f"{path}: not a JSON file ({error})") from error
    return text


def read_weights(directory: Path, files: tuple[str, ...] = WEIGHT_FILES) -> dict[str, Tensor]:
    """Reads the state dict from the first of `files` that exists, onto the CPU. Unpickles only tensors.

    Raises:
        GraftError: no file exists, or the file is damaged or holds more than tensors.
    """
    for name in files:
        path = directory / name
        if not path.exists():
            continue
        try:
            if path.suffix == ".safetensors":
                return patcher().read_safetensors(str(path))
            weights = torch.load(path, map_location="cpu", weights_only=True)
        except GraftError as error:  # read_safetensors() raised it, and names the file, too
            reason = str(error).removeprefix(f"{path}: ")
            raise GraftError(f"{path}: cannot read the adapter's weights ({reason})") from error
        except pickle.UnpicklingError as error:
            raise GraftError(f"{path}: refused, it holds more than plain tensors") from error
        except Exception as error:  # torch and safetensors raise many kinds for a damaged file
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise GraftError(f"{path}: cannot read the adapter's weights ({reason})") from error
        if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
            raise GraftError(f"{path}: expected a state dict of tensors, got {type(weights).__name__}")
        return dict(weights)
    raise GraftError(f"{directory}: no weights, looked for {' and '.join(files)}")


def read_head(directory: Path) -> SavedHead | None:
    """Reads the head of an adapter directory. Returns None if there is no head; and, with a warning, if HeadConfig does
    not know its kind.

    Raises:
        GraftError: a file of the head is missing or damaged.
    """
    path = directory / HEAD_CONFIG_FILE
    if not path.exists():
        return None
    config = read_config(path)
    if not patcher().is_known_head(config):
        fields = json.loads(config).get("config")
        kind = fields.get("head_type") if isinstance(fields, dict) else None
        warnings.warn(
            f"{directory}: the adapter's head{f' ({kind})' if kind else ''} is not loaded: heads for classification, "
            "multi-label classification, regression and tagging are; a prediction needs its own head",
            stacklevel=2,
        )
        return None
    name = json.loads(config).get("name")
    if not isinstance(name, str):
        raise GraftError(f'{path}: no "name"; is it an AdapterHub head?')
    return SavedHead(name, config, read_weights(directory, HEAD_WEIGHT_FILES))


def load_adapter_directory(directory: str | Path) -> AdapterDirectory:
    """Reads an adapter's configuration and weights, and its head. Unpickles only tensors.

    Raises:
        GraftError: `directory` is not a directory, or a file is missing or damaged. The message names the file.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise GraftError(f"{directory}: not a directory; expected one that model.save_adapter() wrote")
    config = read_config(directory)
    content = json.loads(config)
    name = content.get("name") if isinstance(content, dict) else None
    if not isinstance(name, str):
        raise GraftError(f'{directory / CONFIG_FILE}: no "name"; is it an AdapterHub adapter?')
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
        if (directory / new).exists() or (is_head and not (directory / old).exists()):
            continue
        patcher().write_safetensors(read_weights(directory, (old,)), str(directory / new))
        done = True
    return done
