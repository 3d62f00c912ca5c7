"""What .ci/run makes of the two runs of scripts/test."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

RUN = Path(__file__).resolve().parents[2] / ".ci" / "run"


def run(folder: Path, *, test: str, slow: str, minutes: int = 90) -> tuple[int, list[str]]:
    """Exit status and lines of .ci/run when scripts/test runs the shell commands `test`, and `slow` for slow tests."""
    (folder / ".ci").mkdir()
    (folder / "scripts").mkdir()
    shutil.copy(RUN, folder / ".ci" / "run")
    script = folder / "scripts" / "test"
    script.write_text(f'#!/usr/bin/env bash\nif [[ "$*" == slow ]]; then {slow}; else {test}; fi\n')
    script.chmod(0o755)
    environment = os.environ | {"CI_MINUTES": str(minutes)}
    done = subprocess.run([folder / ".ci" / "run"], env=environment, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout.splitlines()


def test_both_pass(tmp_path: Path) -> None:
    assert run(tmp_path, test="echo 5 passed", slow="echo 2 passed") == (0, ["5 passed", "2 passed"])


def test_a_failing_test_ends_the_run(tmp_path: Path) -> None:
    assert run(tmp_path, test="echo 1 failed; exit 1", slow="echo 2 passed") == (1, ["1 failed"])


def test_a_failing_slow_test_fails_the_run(tmp_path: Path) -> None:
    status, lines = run(tmp_path, test="echo 5 passed", slow="echo 1 failed; exit 1")
    assert status == 1
    assert lines == ["5 passed", "1 failed", "slow tests: FAILED", "1 failed"]


@pytest.mark.parametrize("ended", [124, 137])  # as timeout ends when time is over
def test_stopped_slow_tests_fail_nothing(tmp_path: Path, ended: int) -> None:
    status, lines = run(tmp_path, test="echo 5 passed", slow=f"echo half; exit {ended}")
    assert status == 0
    assert lines == ["5 passed", "half", "slow tests: stopped, 0 of 90 minutes are used", "5 passed"]


def test_no_time_left_for_slow_tests(tmp_path: Path) -> None:
    status, lines = run(tmp_path, test="echo 5 passed", slow="exit 1", minutes=10)
    assert status == 0
    assert lines == ["5 passed", "slow tests: skipped, 0 of 10 minutes are used", "5 passed"]
