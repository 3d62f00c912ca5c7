"""Finds and loads the shared libraries."""

import importlib.util
import os
import re
import sys
from collections.abc import Iterable
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

import torch

FOLDER_VARIABLE = "TORCHGRAFT_LIBRARY_DIR"
_CHECKOUT = Path(__file__).resolve().parents[2]
_IN_CHECKOUT = (_CHECKOUT / "scripts" / "setup").exists()
_MAKE = "run scripts/setup" if _IN_CHECKOUT else "install torchgraft again (pip install --force-reinstall)"
_REMEDY = f"{_MAKE}, or set {FOLDER_VARIABLE} to the folder that holds libtorchgraft.so"
# Written by the build, beside the libraries.
_TORCH_VERSION = "torchgraft_torch_version.txt"


def _folders() -> list[Path]:
    """Returns the folders to search, best first: that of a wheel, then that of a checkout's build. If the user has
    named a folder, no other one is searched."""
    if given := os.environ.get(FOLDER_VARIABLE):
        return [Path(given)]
    # An editable installation has two folders: the sources and what was built.
    installed = [Path(folder) / "lib" for folder in sys.modules[__package__].__path__]
    return [*installed, _CHECKOUT / "build" / "lib"] if _IN_CHECKOUT else installed


@cache
def library_path() -> Path:
    """Returns the path of libtorchgraft.so, the only library that serving a grafted module needs.

    Raises:
        ImportError: no folder has the library; the message names the folders.
    """
    for folder in _folders():
        path = folder / "libtorchgraft.so"
        if path.exists():
            return path
    looked = ", ".join(str(folder) for folder in _folders())
    raise ImportError(f"torchgraft: libtorchgraft.so was not found in {looked}; {_REMEDY}")


def cmake_prefix_path() -> str:
    """Returns the folder in which CMake finds this installation or build: CMAKE_PREFIX_PATH for
    find_package(torchgraft)."""
    return str(library_path().parents[1])


def built_for() -> str | None:
    """Returns the version of the torch that the libraries were built for; None if they do not say.

    A file beside the libraries says so. Without it, as where somebody copied libtorchgraft.so alone, the bytes of the
    library do: its own check (registration/check_torch.cpp) has the version in its message. Loading it would end the
    process if the versions differ.
    """
    library = library_path()
    file = library.with_name(_TORCH_VERSION)
    if file.is_file():
        return file.read_text(encoding="utf-8").strip()
    found = re.search(rb"was built for torch ([0-9][^ ,]*), and this process", library.read_bytes())
    return found[1].decode() if found else None


def _check_torch() -> None:
    """Compares minor versions: with each, torch's C++ interface changes."""
    built = built_for()
    if built is None:
        return
    minor = ".".join(built.split(".")[:2])
    if minor != ".".join(torch.__version__.split(".")[:2]):
        raise ImportError(
            f"torchgraft: the libraries in {library_path().parent} were built for torch {built}, and torch "
            f"{torch.__version__} is installed; install torch=={minor}.*, or build torchgraft for this one: "
            + ("scripts/setup" if _IN_CHECKOUT else "pip install --no-build-isolation --force-reinstall --no-deps")
        )


@cache
def load_operators() -> None:
    """Registers the operators torch.ops.torchgraft.* in this process.

    Raises:
        ImportError: the library is missing, or was built for another torch.
    """
    path = library_path()
    _check_torch()
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        problem = f"torchgraft: {path} does not load with torch {torch.__version__} ({error})"
        raise ImportError(f"{problem}; {_REMEDY}") from error


def load_others(paths: Iterable[Path]) -> None:
    """Loads libraries with operators that are neither torch's nor torchgraft's. Their code runs.

    Raises:
        OSError: a file is missing, or is no library that loads here. The message names it.
    """
    for path in paths:
        if not path.is_file():
            raise OSError(f"{path}: no such file; expected a library of operators")
        try:
            torch.ops.load_library(str(path.resolve()))
        except OSError as error:
            raise OSError(f"{path}: not a library that loads with torch {torch.__version__} ({error})") from None


@cache
def patcher() -> ModuleType:
    """Returns the pybind11 module, and loads it on first use: serving needs only the operators.

    Raises:
        ImportError: the module is missing, or was built for another Python or another torch.
    """
    load_operators()
    folder = library_path().parent
    for suffix in EXTENSION_SUFFIXES:
        path = folder / f"_C{suffix}"
        if not path.exists():
            continue
        spec = importlib.util.spec_from_file_location("torchgraft._C", path)
        assert spec is not None and spec.loader is not None, path
        try:
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        except ImportError as error:
            raise ImportError(f"torchgraft: {path} does not load ({error}); {_REMEDY}") from error
        sys.modules["torchgraft._C"] = module
        return module
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    raise ImportError(f"torchgraft: no _C module for Python {version} was found in {folder}; {_REMEDY}")


def version_text() -> str:
    """Returns the versions, and which kernels the operators run here."""
    core = patcher()
    mode = core.kernel_mode().name.lower()
    return (
        f"torchgraft {core.version()}, torch {torch.__version__}, Python {sys.version.split()[0]}; "
        f"kernels: {mode}, {core.kernel_instruction_set()}"
    )
