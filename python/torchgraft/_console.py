"""The console on which the commands print tables."""

import sys

from rich.console import Console


def table_console() -> Console:
    """Returns a console as wide as the terminal, or 160 columns wide if a program reads the output. It prints text as
    it is: brackets are no markup."""
    return Console(width=None if sys.stdout.isatty() else 160, markup=False, highlight=False)
