"""The console on which benchmarks print their tables."""

import sys

from rich.console import Console

WIDTH_OF_FILES = 400  # columns; a table takes only what it needs


def table_console() -> Console:
    """Returns a console of the terminal's width. In a file or a pipe no table is so wide that its cells wrap: who
    searches the output finds each cell whole."""
    return Console(width=None if sys.stdout.isatty() else WIDTH_OF_FILES, emoji=False)
