"""The command convert."""

import argparse
import sys

from ._console import say
from .adapter_hub import PICKLE_FILE, convert_to_safetensors
from .errors import GraftError


def convert_command(arguments: argparse.Namespace) -> None:
    """Writes adapter.safetensors beside each pytorch_adapter.bin of a directory, or of the directories in a folder, and
    a head's file likewise. Converts the others where it cannot convert one.

    Args:
        arguments: the command line's: folder (path).

    Raises:
        GraftError: there is nothing to convert, or some could not be converted.
    """
    folder = arguments.folder
    directories = [path.parent for path in sorted([*folder.glob(PICKLE_FILE), *folder.glob(f"*/{PICKLE_FILE}")])]
    if not directories:
        raise GraftError(f"{folder}: no {PICKLE_FILE} in it or one level below")
    failed = 0
    for directory in directories:
        try:
            done = "converted" if convert_to_safetensors(directory) else "was converted before"
            say(arguments, f"{directory}: {done}")
        except GraftError as error:
            print(error, file=sys.stderr)
            failed += 1
    if failed:
        raise GraftError(f"{failed} of {len(directories)} could not be converted")
