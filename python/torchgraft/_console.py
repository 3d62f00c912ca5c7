"""The console on which the commands print tables."""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator

from rich.console import Console


def say(arguments: argparse.Namespace, *lines: str) -> None:
    """Prints what a command has done, unless the command line asks for --quiet."""
    if not arguments.quiet:
        print(*lines, sep="\n")


def table_console() -> Console:
    """Returns a console as wide as the terminal, or 160 columns wide if a program reads the output. It prints text as
    it is: brackets are no markup."""
    return Console(width=None if sys.stdout.isatty() else 160, markup=False, highlight=False)


@contextlib.contextmanager
def progress(quiet: bool) -> Iterator[Callable[[str], None]]:
    """Yields a function that shows a text as the current step. On a stream that is no terminal, or if the user wants
    it quiet, it shows nothing."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield lambda text: None
        return
    with console.status("") as status:
        yield status.update
