"""An exported program in a file as a base for the patcher."""

import warnings
from pathlib import Path

import torch

from ..errors import GraftError
from .read_program import read_program
from .to_script import fixed_inputs, from_program


def load_program(path: Path) -> torch.jit.ScriptModule:
    """Makes TorchScript of the program of a file. Warns if every size of its inputs is fixed.

    Raises:
        GraftError: the file cannot be read, or its program not be made TorchScript.
    """
    program = read_program(path)
    try:
        module = from_program(program)
    except GraftError as error:
        raise GraftError(f"{path}: {str(error).removeprefix('from_program: ')}") from error
    if (fixed := fixed_inputs(program)) is not None:
        warnings.warn(
            f"{path}: the program takes inputs of one size only ({fixed}); export the model with dynamic_shapes "
            "that leave the batch and the length open",
            stacklevel=2,
        )
    return module
