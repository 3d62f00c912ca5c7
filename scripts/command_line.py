"""Shared by the command lines of graft.py and train.py. Imports no torch, so that a wrong one fails at once."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

STOPPED = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


def fail(program: str, message: object, status: int = 1) -> NoReturn:
    """Prints an error as one line on stderr and exits with `status`."""
    print(f"{program}: error:", " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(status)


class Parser(argparse.ArgumentParser):
    """argparse without the usage text before an error."""

    def error(self, message: str) -> NoReturn:
        program = Path(self.prog.split()[0]).stem  # "graft" of "graft.py add"
        fail(program, f"{message} (see {self.prog} --help)", 2)


def on_stop(handler: Callable[[int, object], NoReturn]) -> None:
    """Calls `handler` on Ctrl-C and SIGTERM. A signal that nohup or the shell has switched off stays off."""
    for number in STOPPED:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)
