"""Running programs as somebody outside the source tree would."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


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
