"""Finds and loads the shared libraries."""

import importlib.util
import os
import sys
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import torch

_REMEDY = "run scripts/setup, or set TORCHGRAFT_LIBRARY_DIR to the folder that holds libtorchgraft.so"


def _candidates() -> list[Path]:
    package = Path(__file__).resolve().parent
    folders = [package, package.parents[1] / "build" / "lib"]
    if given := os.environ.get("TORCHGRAFT_LIBRARY_DIR"):
        folders.insert(0, Path(given))
    return folders


@lru_cache(maxsize=None)
def library_path() -> Path:
    """The path of libtorchgraft.so: all that serving a grafted module needs.

    Raises:
        ImportError: it is not built; the message says where it was looked for.
    """
    for folder in _candidates():
        path = folder / "libtorchgraft.so"
        if path.exists():
            return path
    looked = ", ".join(str(folder) for folder in _candidates())
    raise ImportError(f"torchgraft: libtorchgraft.so was not found in {looked}; {_REMEDY}")


@lru_cache(maxsize=None)
def load_operators() -> None:
    """Registers the operators torch.ops.torchgraft.* in this process."""
    torch.ops.load_library(str(library_path()))


@lru_cache(maxsize=None)
def patcher() -> ModuleType:
    """The pybind11 module, loaded on first use.

    Raises:
        ImportError: it is not built, or it was built for another Python.
    """
    load_operators()
    folder = library_path().parent
    for path in sorted(folder.glob("_C.*.so")):
        spec = importlib.util.spec_from_file_location("torchgraft._C", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except ImportError:
            continue
        sys.modules["torchgraft._C"] = module
        return module
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    raise ImportError(f"torchgraft: no _C module for Python {version} was found in {folder}; {_REMEDY}")
