"""TorchScript files on disk, and the errors of commands."""

import stat
import tempfile
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path

import torch

from ._kinds import Kind, kind_of
from ._libraries import patcher
from ._steps import step
from .adapter_hub import ADAPTER_FILES
from .errors import GraftError, one_line
from .grafting import with_short_errors
from .programs.load_program import load_program

# The errors that a user of a command can cause. Any other is a defect, and Python shows its traceback. torch raises
# RuntimeError and torch.jit.Error.
EXPECTED_ERRORS = (GraftError, OSError, RuntimeError, MemoryError, torch.jit.Error)

# The folder of `_extra_files` inside a TorchScript file.
_EXTRA = "extra/"

_PART_BYTES = 1 << 24

# How the message of an error begins that a module raised while it ran. The useful sentence comes last.
_TRACE = "The following operation failed in the TorchScript interpreter"


def reason(error: BaseException) -> str:
    """Returns the message of an error, without the C++ stack and the trace of TorchScript that torch's messages
    carry."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if _TRACE in str(error):
        return one_line(error)
    text = str(error).split("\nException raised from")[0].strip() or type(error).__name__
    return text.split(" This is an internal miniz error.")[0].rstrip(".")  # the rest tells users to report a bug


def load_module(path: str | Path) -> torch.jit.ScriptModule:
    """Loads a TorchScript file onto the CPU, or makes TorchScript of an exported program (.pt2). Python unpickles
    nothing in them.

    The file is a program, and may do what any program may. Unlike `torch.jit.load` this refuses a file that holds less
    of a tensor than its shape says, where whoever uses the tensor would read other memory.

    Raises:
        GraftError: there is no file at `path`, it is neither, or it is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise GraftError(f"{path}: no such file" if not path.exists() else f"{path}: not a file")
    try:
        kind = kind_of(path)
        with step(f"loading {path}"):
            if kind is Kind.PROGRAM:
                return load_program(path)
            if kind is Kind.SCRIPT:
                _check_records(path)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=r"`torch\.jit\.load` is deprecated")  # nobody can help it
                return with_short_errors(torch.jit.load(str(path), map_location="cpu"))
    except (RuntimeError, ValueError, OSError) as error:
        if isinstance(error, GraftError):
            raise
        raise GraftError(_refused(path, kind, error)) from error


def _check_records(path: Path) -> None:
    try:
        patcher().check_tensor_records(str(path))
    except GraftError as error:
        raise RuntimeError(str(error)) from error  # as torch calls a file that it cannot load


def _refused(path: Path, kind: Kind, error: Exception) -> str:
    if kind is Kind.PACKAGE:
        return (
            f"{path}: {kind.value}, which is compiled code and no model to change; give the .pt or .pt2 that it was "
            "made from"
        )
    if kind in (Kind.PICKLE, Kind.SAFETENSORS):
        return (
            f"{path}: it is {kind.value}, without the code of a model; expected what torch.jit.save() of a traced or "
            "scripted module or torch.export.save() writes"
        )
    found = f"it is {kind.value}; " if kind not in (Kind.SCRIPT, Kind.UNKNOWN) else ""
    return (
        f"{path}: not a TorchScript file that can be loaded ({reason(error)}); {found}expected what torch.jit.save() "
        "of a traced or scripted module or torch.export.save() writes, not a state dict or a model saved by "
        "torch.save()"
    )


def extra_files(path: Path) -> dict[str, bytes]:
    """Returns what a TorchScript file carries beside its module (`_extra_files` of torch.jit.save), by name.

    Raises:
        GraftError: `path` is not a TorchScript file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            # The archive's one folder has the name that the file had when it was written.
            members = [(name.partition("/")[2], name) for name in archive.namelist()]
            return {
                inner.removeprefix(_EXTRA): archive.read(name) for inner, name in members if inner.startswith(_EXTRA)
            }
    except (zipfile.BadZipFile, OSError) as error:
        raise GraftError(f"{path}: not a TorchScript file that can be read ({reason(error)})") from error


def check_writable(path: Path) -> None:
    """Checks, before the work that makes the content, that `path` can be written. Leaves no file behind.

    Raises:
        GraftError: `path` cannot be written as a file.
    """
    if path.is_dir():
        raise GraftError(f"{path}: is a directory; give the name of a file")
    # Renaming a file onto /dev/null would replace the device.
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        raise GraftError(f"{path}: is not a regular file")
    if not path.parent.is_dir():
        raise GraftError(f"{path}: the directory {path.parent} does not exist")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise GraftError(f"{path}: cannot write in {path.parent} ({error.strerror})") from error


def check_script_output(path: Path) -> None:
    """Checks, before the work that makes it, that a TorchScript file can be written to `path`; see check_writable().

    Raises:
        GraftError: it cannot, or readers would take it for an exported program.
    """
    if path.suffix == ".pt2":
        raise GraftError(f"{path}: a .pt2 is an exported program; write a .pt, then use torchgraft export on it")
    check_writable(path)


def check_keeps_inputs(inputs: Iterable[Path], outputs: Iterable[Path], force: bool | None) -> None:
    """Checks that a command writes over none of the files that it reads: nothing may give their content back.

    Args:
        force: whether the user wants it all the same. None: the command has no --force.

    Raises:
        GraftError: an output is an input, or a file of an adapter's directory that is one, by any name.
    """
    read = [path for path in inputs if path.exists()]
    read += [path / file for path in read if path.is_dir() for file in ADAPTER_FILES if (path / file).exists()]
    for output in outputs:
        if not force and output.exists() and any(output.samefile(path) for path in read):
            remedy = "" if force is None else ", or --force to write over it"
            raise GraftError(f"{output}: this is a file that is read; give the output another name{remedy}")


def save_module(module: torch.jit.ScriptModule, path: Path, extra: dict[str, bytes] | None = None) -> None:
    """Writes `module` as a TorchScript file with the files `extra` beside it, whole or not at all; see
    write_whole().

    Raises:
        GraftError: the file cannot be written.
    """
    check_script_output(path)
    with step(f"writing {path}"):
        write_whole(module.save_to_buffer(_extra_files=extra or {}), path)


def write_whole(content: bytes, path: Path) -> None:
    """Writes `content` to a temporary file beside `path`, syncs it and renames it to `path`. So `path` always holds
    either its old content or all of the new. A process that is killed leaves its temporary file: the next call for the
    same path deletes it.

    Raises:
        GraftError: the file cannot be written, for example because the disk is full.
    """
    check_writable(path)
    target = path.resolve()  # a symbolic link stays, the file behind it is replaced
    with patcher().TemporaryFile(str(target)) as file:
        for start in range(0, len(content), _PART_BYTES):  # signals are heard between the parts
            file.write(memoryview(content)[start : start + _PART_BYTES])
        file.keep()


def remove_leftovers(path: Path) -> None:
    """Removes the temporary files that processes left beside `path` when they were killed in write_whole()."""
    patcher().remove_leftovers(str(path.resolve()))
