"""The steps of a command, which it tells of on stderr while it runs."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from torchgraft_command.line import printable

if TYPE_CHECKING:
    from rich.status import Status


class _Steps:
    """With `verbose` each step is a line with its seconds, once it has ended; else, on a terminal and unless `quiet`,
    the step under way is shown."""

    def __init__(self, verbose: bool, quiet: bool):
        self._verbose = verbose
        self._spins = sys.stderr.isatty() and not verbose and not quiet
        self._status: Status | None = None

    @contextlib.contextmanager
    def step(self, text: str) -> Iterator[None]:
        started = time.perf_counter()
        with self._spinning(text):
            yield
        if self._verbose:
            print(f"{printable(text)}: {time.perf_counter() - started:.2f} s", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def _spinning(self, text: str) -> Iterator[None]:
        if not self._spins or self._status is not None:
            yield
            return
        # Not at the top: whoever imports the package for its functions needs no rich.
        from rich.console import Console
        from rich.text import Text

        try:
            with Console(stderr=True).status(Text(printable(text))) as self._status:
                yield
        finally:
            self._status = None

    def detail(self, text: str) -> None:
        if self._verbose:
            print(printable(text), file=sys.stderr, flush=True)
        elif self._status is not None:
            from rich.text import Text

            self._status.update(Text(printable(text)))


_shown: _Steps | None = None  # outside of a command nothing is told


@contextlib.contextmanager
def showing_steps(arguments: argparse.Namespace, versions: Callable[[], str]) -> Iterator[None]:
    """Tells of the steps of a command, as long as the context lasts.

    Args:
        arguments: the command line's: verbose and, where the command has it, quiet (bools).
        versions: returns what a verbose command says first.
    """
    global _shown
    if arguments.verbose:
        print(versions(), file=sys.stderr, flush=True)
    _shown = _Steps(arguments.verbose, getattr(arguments, "quiet", False))
    try:
        yield
    finally:
        _shown = None


@contextlib.contextmanager
def step(text: str) -> Iterator[None]:
    """One step of a command: "loading base.pt"."""
    with contextlib.nullcontext() if _shown is None else _shown.step(text):
        yield


def show_detail(text: str) -> None:
    """Tells how far the step under way has come."""
    if _shown is not None:
        _shown.detail(text)
