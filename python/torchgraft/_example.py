"""Example inputs of forward, for commands."""

import pickle
from pathlib import Path
from typing import Any

import torch

from ._files import reason
from ._kinds import Kind, kind_of
from ._libraries import patcher
from ._text import text_arguments
from .errors import GraftError


def read_example(path: Path | None) -> Any:
    """Reads example inputs of forward: tensors of torch.save, read without unpickling code, or safetensors by argument.
    Returns None for None.

    Raises:
        GraftError: `path` has neither.
    """
    if path is None:
        return None
    try:
        if path.suffix == ".safetensors":
            return dict(patcher().read_safetensors(str(path)))
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise GraftError(
            f"{path}: cannot read example inputs ({_fault(path, error)}); expected what torch.save() of a tensor, "
            "a tuple or a dict of forward's arguments writes, or a .safetensors file with tensors named as they are"
        ) from error


def _fault(path: Path, error: Exception) -> str:
    """Why a file holds no example inputs. What torch says of a pickle recommends to run what is in it."""
    if isinstance(error, OSError) or path.suffix == ".safetensors":
        return reason(error)
    kind = kind_of(path)
    return f"it is {kind.value}" if kind not in (Kind.PICKLE, Kind.ZIP) else "it is damaged, or holds more than tensors"


def text_example(module: torch.jit.ScriptModule) -> tuple[Any, ...]:
    """Makes up inputs of a text encoder: two rows of seven tokens, the second with two tokens of padding.

    Raises:
        GraftError: forward takes what a text does not give.
    """
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[1, 5:] = 0
    values = {"ids": torch.arange(14).view(2, 7) % 3, "mask": mask, "type": torch.zeros_like(mask)}
    try:
        return tuple(text_arguments(module.forward, values, "export"))
    except GraftError as error:
        forward: Any = module.forward  # a ScriptMethod
        names = ", ".join(argument.name for argument in forward.schema.arguments[1:])
        raise GraftError(
            f"export: no example inputs can be made up for forward({names}), which is not that of a text encoder; "
            "give --example FILE"
        ) from error
