"""scripts/train.py, killed at any instant: its checkpoint is whole each time, and its end is that of a run in peace."""

import contextlib
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from scripts_here import run_here
from tiny import Files, write_files
from torchgraft.training.checkpoint import load_checkpoint

KILLS = 40
STEPS = 42  # six epochs of 50 examples in batches of 8
MOST_RUNS = 10 * KILLS


def train(files: Files, output: Path, *options: object) -> int:
    """options: may replace the number of epochs, and how often a checkpoint is written."""
    return run_here(
        "train.py", files.base, "-o", output, "--train", files.train, "--validation", files.validation, "--epochs", 6,
        "--batch-size", 8, "--learning-rate", 0.003, "--checkpoint-every", 1, "--quiet", "--resume", *options,
    ).returncode  # fmt: skip


def started(files: Files, output: Path) -> int:
    """The number of a process that trains; its exit status is that of train.py."""
    child = os.fork()
    if child == 0:
        status = 99
        with contextlib.suppress(BaseException):
            status = train(files, output)
        os._exit(status)
    return child


def adapter_in(output: Path) -> dict[str, torch.Tensor]:
    """Its weights and those of its head."""
    files = sorted((output / "adapter").glob("*.safetensors"))
    assert len(files) == 2
    return {f"{path.name} {key}": value for path in files for key, value in load_file(path).items()}


def assert_as(whole: Path, output: Path) -> None:
    assert sorted(path.name for path in output.iterdir()) == sorted(path.name for path in whole.iterdir())
    torch.testing.assert_close(adapter_in(output), adapter_in(whole), rtol=0, atol=1e-6)


@pytest.mark.slow(seconds=120)
def test_killed_at_any_instant_it_ends_with_the_same_weights(tmp_path: Path) -> None:
    files, whole, output = write_files(tmp_path), tmp_path / "whole", tmp_path / "out"
    assert train(files, whole) == 0  # what a process does once is done
    begun = time.monotonic()
    child = started(files, tmp_path / "timed")
    assert os.waitpid(child, 0)[1] == 0
    usual = time.monotonic() - begun
    assert_as(whole, tmp_path / "timed")

    source, kills, seen = random.Random(0), 0, set()
    for _ in range(MOST_RUNS):
        child = started(files, output)
        time.sleep(source.uniform(usual / 4, usual))
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if status == 0:  # over before the signal came: the next one begins anew
            assert_as(whole, output)
            shutil.rmtree(output)
        else:
            assert os.WTERMSIG(status) == signal.SIGKILL
            kills += 1
            if (output / "checkpoint.pt").exists():
                seen.add(load_checkpoint(output / "checkpoint.pt").step)
        if kills == KILLS:
            break
    assert kills == KILLS and seen <= set(range(STEPS + 1)) and len(seen) > 5
    assert train(files, output) == 0
    assert_as(whole, output)
