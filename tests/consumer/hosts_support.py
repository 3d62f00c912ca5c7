"""Running programs as somebody outside the source tree would."""

import fcntl
import json
import os
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
BUILD = Path(os.environ.get("TORCHGRAFT_BUILD_DIR", ROOT / "build"))


def run(*command, **options) -> subprocess.CompletedProcess:
    """Runs to success, or fails the test with everything that the command said."""
    result = attempt(*command, **options)
    if result.returncode != 0:
        shown = " ".join(map(str, command))
        pytest.fail(f"{shown}\nexit status {result.returncode}\n{result.stdout}\n{result.stderr}", pytrace=False)
    return result


def attempt(*command, **options) -> subprocess.CompletedProcess:
    """Without LD_LIBRARY_PATH: a host has to find its libraries by itself."""
    environment = {key: value for key, value in options.pop("env", os.environ).items() if key != "LD_LIBRARY_PATH"}
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env=environment, timeout=1800, **options
    )


def made_once(name: str, make: Callable[[Path], None]) -> Path:
    """build/consumer/<name>, as `make` leaves it. Of several workers of pytest-xdist one makes it, the others wait."""
    folder = BUILD / "consumer" / name
    folder.mkdir(parents=True, exist_ok=True)
    of_this_run = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
    with open(folder.with_suffix(".made"), "a+") as made:
        fcntl.flock(made, fcntl.LOCK_EX)
        made.seek(0)
        if made.read() != of_this_run:
            make(folder)
            made.truncate(0)
            made.write(of_this_run)
    return folder


def with_short_record(source: Path, path: Path) -> Path:
    """A copy of a .pt file whose first tensor has four bytes; torch.jit.load takes it."""
    with zipfile.ZipFile(source) as whole, zipfile.ZipFile(path, "w") as short:
        for name in whole.namelist():
            content = whole.read(name)
            short.writestr(name, content[:4] if name.partition("/")[2] == "data/0" else content)
    torch.jit.load(path)
    return path


def package_without_code(path: Path, metadata: dict[str, str]) -> Path:
    """An AOTInductor package as far as what it says of itself: a host that refuses it loads none of its code."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("package/data/aotinductor/model/a.wrapper_metadata.json", json.dumps(metadata))
        archive.writestr("package/archive_format", "pt2")
    return path
