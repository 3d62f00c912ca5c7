"""Finds and loads the shared libraries."""

import importlib.util
import os
import sys
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

import torch

FOLDER_VARIABLE = "TORCHGRAFT_LIBRARY_DIR"
_REMEDY = f"run scripts/setup, or set {FOLDER_VARIABLE} to the folder that holds libtorchgraft.so"


def _folders() -> list[Path]:
    """Returns the folders to search, best first. If the user has named a folder, no other one is searched."""
    if given := os.environ.get(FOLDER_VARIABLE):
        return [Path(given)]
    package = Path(__file__).resolve().parent
    return [package, package.parents[1] / "build" / "lib"]


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


@cache
def load_operators() -> None:
    """Registers the operators torch.ops.torchgraft.* in this process.

    Raises:
        ImportError: the library is missing, or was built for another torch.
    """
    path = library_path()
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        problem = f"torchgraft: {path} does not load with torch {torch.__version__} ({error})"
        raise ImportError(f"{problem}; {_REMEDY}") from error


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
