"""examples/train_cpp, killed at each of its renames: run again, it ends with the weights of a run in peace."""

import itertools
import os
import shutil
import signal
import subprocess

import pytest

from test_train_cpp import accident, check_equal_weights, command, folder, library, run  # noqa: F401

SHORT = ("--epochs", 2, "--batch-size", 24, "--checkpoint-every", 5)


@pytest.mark.slow(seconds=60)
def test_killed_at_every_rename(train_program, folder, accident, tmp_path) -> None:  # noqa: F811
    whole, output = tmp_path / "whole", tmp_path / "out"
    run(*command(train_program, folder, whole, *SHORT))
    for number in itertools.count(1):
        killed = subprocess.run(
            command(train_program, folder, output, *SHORT),
            env=accident | {"KILL_AT_RENAME": str(number)}, capture_output=True, text=True,
        )  # fmt: skip
        if killed.returncode == 0:
            break
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        run(*command(train_program, folder, output, *SHORT))
        check_equal_weights(output, whole)
        assert not [name for name in os.listdir(output) if name.endswith(".torchgraft-tmp")]
        shutil.rmtree(output)
    check_equal_weights(output, whole)
    print(f"{number - 1} kills")
    assert number > 8  # checkpoints, then the files of the adapter and of its head
