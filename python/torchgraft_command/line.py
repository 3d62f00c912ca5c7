"""What all command lines share: errors of one line, help with defaults, guesses at what was meant, signals."""

from __future__ import annotations

import argparse
import difflib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

STOPPED = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


def fail(program: str, message: object, status: int = 1) -> NoReturn:
    """Prints an error as one line on stderr and exits with `status`."""
    print(f"{program}: error:", " ".join(printable(message).split()), file=sys.stderr)
    raise SystemExit(status)


def printable(message: object) -> str:
    """Returns the text without what a terminal takes for a command: names in a stranger's file may hold some."""
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in str(message))


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """Returns "; did you mean '...'?" for the one of `known` that is most like `word`, or nothing."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


class Help(argparse.RawDescriptionHelpFormatter):
    """Adds to each option its default, where its text does not tell it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help
        default = action.default
        is_value = default is not None and default is not argparse.SUPPRESS and not isinstance(default, bool | list)
        if text and action.option_strings and is_value and "default" not in text:
            text += " (default: %(default)s)"
        return text


class Parser(argparse.ArgumentParser):
    """argparse with Help, with guesses at what was meant, and without the usage text before an error."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", Help)
        super().__init__(**options)

    def error(self, message: str) -> NoReturn:
        program = Path(self.prog.split()[0]).stem  # "graft" of "graft.py add"
        fail(program, f"{message} (see {self.prog} --help)", 2)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            error.message += did_you_mean(str(value), [str(choice) for choice in action.choices or ()])
            raise

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        if action.type is Path and not arg_string:  # Path("") is the current directory
            raise argparse.ArgumentError(action, "expected a path, got an empty text")
        return super()._get_value(action, arg_string)

    def _print_message(self, message: str, file: Any = None) -> None:
        """argparse's own one would hide that the reader of a help has closed the pipe."""
        (file or sys.stderr).write(message)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        arguments, unknown = self.parse_known_args(args, namespace)
        if unknown:
            asked: Parser = getattr(arguments, "parser", self)
            guess = did_you_mean(unknown[0].partition("=")[0], list(asked._option_string_actions))
            asked.error(f"unrecognized arguments: {' '.join(unknown)}{guess}")
        return arguments


def on_stop(handler: Callable[[int, object], NoReturn]) -> None:
    """Calls `handler` on Ctrl-C and SIGTERM. A signal that nohup or the shell has switched off stays off."""
    for number in STOPPED:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def drop_output() -> None:
    """Lets what is still to be printed go nowhere: the reader, such as `head`, has closed the pipe."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
