"""Installs the build and builds the outside hosts against it: once a run, in build/consumer, where the next run finds
what has not changed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hosts_support import BUILD, ROOT, made_once, run

# The Python package of this checkout with the libraries of that build.
os.environ.setdefault("TORCHGRAFT_LIBRARY_DIR", str(BUILD / "lib"))
sys.path.insert(0, str(ROOT / "python"))


@pytest.fixture(scope="session")
def prefix() -> Path:
    """Where `cmake --install` has put torchgraft, and nothing else."""

    def install(folder: Path) -> None:
        run("cmake", "--install", BUILD, "--prefix", folder)
        installed = set((BUILD / "install_manifest.txt").read_text().splitlines())
        for path in folder.rglob("*"):
            if not path.is_dir() and str(path) not in installed:
                path.unlink()  # of an earlier run

    return made_once("prefix", install)


def configured_and_built(name: str, source: Path, prefix: Path) -> Path:
    def build(folder: Path) -> None:
        search = f"{prefix};{torch.utils.cmake_prefix_path}"
        run("cmake", "-S", source, "-B", folder, "-G", "Ninja", f"-DCMAKE_PREFIX_PATH={search}")
        run("cmake", "--build", folder, "-j", os.environ.get("TORCHGRAFT_JOBS", "2"))

    return made_once(name, build)


@pytest.fixture(scope="session")
def hosts(prefix) -> Path:
    """The folder with the programs of this folder's CMakeLists.txt."""
    return configured_and_built("hosts", ROOT / "tests" / "consumer", prefix)


@pytest.fixture(scope="session")
def serve(prefix) -> Path:
    """The program of examples/serve."""
    return configured_and_built("serve", ROOT / "examples" / "serve", prefix) / "serve"


@pytest.fixture(scope="session")
def generate(prefix) -> Path:
    """The program of examples/generate."""
    return configured_and_built("generate", ROOT / "examples" / "generate", prefix) / "generate"


@pytest.fixture(scope="session")
def serve_aoti(prefix) -> Path:
    """The program of examples/serve_aoti."""
    return configured_and_built("serve_aoti", ROOT / "examples" / "serve_aoti", prefix) / "serve_aoti"


@pytest.fixture(scope="session")
def server_program(prefix) -> Path:
    """The program of examples/server. Skips without its HTTP library, which CMake does not download."""
    header = subprocess.run(
        [os.environ.get("CXX", "g++"), "-E", "-x", "c++", "-"],
        input="#include <microhttpd.h>",
        text=True,
        capture_output=True,
    )
    if header.returncode != 0:
        pytest.skip("microhttpd.h was not found: install libmicrohttpd-dev")
    return configured_and_built("server", ROOT / "examples" / "server", prefix) / "server"


@pytest.fixture(scope="session")
def train_program(prefix) -> Path:
    """The program of examples/train_cpp."""
    return configured_and_built("train_cpp", ROOT / "examples" / "train_cpp", prefix) / "train_cpp"


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
    """One server for all tests that do not change it. Another test checks that it lives to the end."""
    from server_support import CAPACITY, Server

    with Server(server_program, models / "base.pt", models / "adapters", "--capacity", CAPACITY) as running:
        yield running
        assert running.ask("GET", "/healthz") == (200, {"status": "ok"})
        assert running.stop() == 0


@pytest.fixture
def own_adapters(models, tmp_path):
    """A copy of the folder for a test that changes it."""
    return shutil.copytree(models / "adapters", tmp_path / "adapters")


@pytest.fixture(scope="session")
def waits_at_open(tmp_path_factory) -> dict[str, str]:
    """The environment of a server that waits at opening PATH while there is a file PATH.wait."""
    library = tmp_path_factory.mktemp("preload") / "wait_at_open.so"
    run("g++", "-shared", "-fPIC", "-o", library, ROOT / "tests" / "consumer" / "wait_at_open.cpp", "-ldl")
    return {"LD_PRELOAD": str(library)}
