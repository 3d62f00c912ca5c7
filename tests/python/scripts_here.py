"""Runs a script of scripts/ in this process, where torch is loaded already, or as a process of its own."""

import contextlib
import functools
import io
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@functools.cache
def _main(script: str) -> Callable[[], int | None]:
    return runpy.run_path(str(SCRIPTS / script))["main"]


def run_here(script: str, *arguments: object) -> subprocess.CompletedProcess:
    """What a process would have given. Exceptions that would have ended it with a traceback come out."""
    command = [str(SCRIPTS / script), *map(str, arguments)]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", command),
        mock.patch.object(sys, "path", list(sys.path)),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            status = _main(script)()
        except SystemExit as end:
            status = end.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return subprocess.CompletedProcess(command, status or 0, out.getvalue(), err.getvalue())


def run_process(script: str, *arguments: object, **options: object) -> subprocess.CompletedProcess:
    """The script as a user starts it: exit status, signals, what imports print."""
    command = [sys.executable, str(SCRIPTS / script), *map(str, arguments)]
    environment = os.environ | options.pop("env", {})
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, **options)
