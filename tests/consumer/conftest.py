"""Installs the build into a temporary prefix and builds the outside hosts against it, once a session."""

import os
import sys
from pathlib import Path

import pytest
import torch

from hosts_support import ROOT, run

BUILD = Path(os.environ.get("TORCHGRAFT_BUILD_DIR", ROOT / "build"))

# The Python package of this checkout with the libraries of that build.
os.environ.setdefault("TORCHGRAFT_LIBRARY_DIR", str(BUILD / "lib"))
sys.path.insert(0, str(ROOT / "python"))


@pytest.fixture(scope="session")
def prefix(tmp_path_factory) -> Path:
    """Where `cmake --install` has put torchgraft."""
    target = tmp_path_factory.mktemp("prefix")
    run("cmake", "--install", BUILD, "--prefix", target)
    return target


def configure_and_build(source: Path, binary: Path, prefix: Path) -> Path:
    search = f"{prefix};{torch.utils.cmake_prefix_path}"
    run("cmake", "-S", source, "-B", binary, "-G", "Ninja", f"-DCMAKE_PREFIX_PATH={search}")
    run("cmake", "--build", binary, "-j", os.environ.get("TORCHGRAFT_JOBS", "2"))
    return binary


@pytest.fixture(scope="session")
def hosts(tmp_path_factory, prefix) -> Path:
    """The folder with the programs of this folder's CMakeLists.txt."""
    return configure_and_build(ROOT / "tests" / "consumer", tmp_path_factory.mktemp("hosts"), prefix)


@pytest.fixture(scope="session")
def serve(tmp_path_factory, prefix) -> Path:
    """The program of examples/serve."""
    return configure_and_build(ROOT / "examples" / "serve", tmp_path_factory.mktemp("serve"), prefix) / "serve"


@pytest.fixture(scope="session")
def server_program(tmp_path_factory, prefix) -> Path:
    """The program of examples/server."""
    return configure_and_build(ROOT / "examples" / "server", tmp_path_factory.mktemp("server"), prefix) / "server"


@pytest.fixture(scope="session")
def train_program(tmp_path_factory, prefix) -> Path:
    """The program of examples/train_cpp."""
    return configure_and_build(ROOT / "examples" / "train_cpp", tmp_path_factory.mktemp("train"), prefix) / "train_cpp"
