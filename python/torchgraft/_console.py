"""Where the commands print tables."""

import sys

from rich.console import Console


def table_console() -> Console:
    """As wide as the terminal; 160 columns where a program reads. What is printed is no markup."""
    return Console(width=None if sys.stdout.isatty() else 160, markup=False, highlight=False)
