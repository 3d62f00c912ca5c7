"""Installs the build into a temporary prefix and builds the outside hosts against it, once a session."""

import os
import shutil
import subprocess
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
    """The program of examples/server. Skips without its HTTP library, which CMake does not download."""
    header = subprocess.run(
        [os.environ.get("CXX", "g++"), "-E", "-x", "c++", "-"],
        input="#include <microhttpd.h>",
        text=True,
        capture_output=True,
    )
    if header.returncode != 0:
        pytest.skip("microhttpd.h was not found: install libmicrohttpd-dev")
    return configure_and_build(ROOT / "examples" / "server", tmp_path_factory.mktemp("server"), prefix) / "server"


@pytest.fixture(scope="session")
def train_program(tmp_path_factory, prefix) -> Path:
    """The program of examples/train_cpp."""
    return configure_and_build(ROOT / "examples" / "train_cpp", tmp_path_factory.mktemp("train"), prefix) / "train_cpp"


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """base.pt and the folder of adapters task-0 ... task-11, of all kinds."""
    from server_support import ADAPTERS, save_models

    folder = tmp_path_factory.mktemp("models")
    save_models(folder, ADAPTERS)
    shutil.copytree(folder / "adapters" / "task-0", folder / "secret")
    return folder


@pytest.fixture(scope="session")
def expected(models):
    from server_support import Expected

    return Expected(torch.jit.load(models / "base.pt"), models / "adapters")


@pytest.fixture(scope="module")
def server(server_program, models):
    """One server for all that leave it as it is; that it lives to the end is a test of its own."""
    from server_support import CAPACITY, Server

    with Server(server_program, models / "base.pt", models / "adapters", "--capacity", CAPACITY) as running:
        yield running
        assert running.ask("GET", "/healthz") == (200, {"status": "ok"})
        assert running.stop() == 0


@pytest.fixture
def own_adapters(models, tmp_path):
    """A copy of the folder for a test that changes it."""
    return shutil.copytree(models / "adapters", tmp_path / "adapters")
