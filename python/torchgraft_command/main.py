"""Runs the command line of `torchgraft`, and those of its aliases in a checkout, scripts/graft.py and train.py."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from . import train_arguments
from .argument_checks import check
from .arguments import add_common_arguments, make_parser
from .line import STOPPED, drop_output, fail, on_stop

BROKEN_PIPE = 141  # 128 and SIGPIPE, as shells say
_CHECKOUT = Path(__file__).resolve().parents[2]


def main(program: str = "torchgraft") -> None:
    """Parses the process's command line and runs it. Raises SystemExit where the status is not 0."""
    parser = make_parser(program)
    words, server_options = _split(sys.argv[1:])
    arguments = parser.parse_args(words)
    if arguments.version:
        libraries = _torchgraft(program)._libraries
        _guarded(program, lambda: print(libraries.version_text()))
        return
    if arguments.command is None:
        parser.print_help()
        raise SystemExit(2)
    check(arguments)
    if arguments.command == "completion":
        _print_completion(parser, arguments.shell)
    elif arguments.command == "train":
        _train(program, arguments)
    elif arguments.command == "serve":
        arguments.server_options = server_options
        _serve(program, arguments)
    else:
        commands = _torchgraft(program)._commands
        on_stop(_stopper(program))
        _guarded(program, lambda: commands.run(arguments))


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    """The command line, and what stands behind -- for the server that serve starts."""
    if words[:1] != ["serve"] or "--" not in words:
        return words, []
    at = words.index("--")
    return words[:at], words[at + 1 :]


def train_main(program: str = "train.py") -> None:
    """As main(), for a command line that is `train` alone."""
    parser = train_arguments.make_parser(program)
    add_common_arguments("train", parser)
    arguments = parser.parse_args()
    train_arguments.check(parser, arguments)
    _train(program, arguments)


def run(start: Callable[[], None] = main) -> None:
    """The process: signals are heard from its first moment, and a reader that has closed the output ends it, whatever
    was printed: a table, a help, a script."""
    on_stop(_stop_at_once)
    try:
        try:
            start()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        drop_output()
        raise SystemExit(BROKEN_PIPE) from None


def _train(program: str, arguments: argparse.Namespace) -> None:
    _torchgraft(program)
    from torchgraft.training import _command

    on_stop(_stopper(program, "; --resume goes on from the last checkpoint"))
    _guarded(program, lambda: _command.run(arguments))


def _serve(program: str, arguments: argparse.Namespace) -> None:
    """Runs without torch: the model is in the server's process."""
    try:
        from . import serve
    except ImportError as error:
        fail(_stem(program), f"{error}; serve needs the packages of torchgraft[serve]: aiohttp and tokenizers")
    serve.run(_stem(program), arguments)


def _torchgraft(program: str) -> ModuleType:
    """The package, which is not imported at the top: torch takes seconds to load, and a wrong command line needs no
    torch."""
    try:
        import torchgraft
        import torchgraft._commands
    except ImportError as error:
        script = _CHECKOUT / "scripts" / program
        remedy = f"; run scripts/setup, then use .venv/bin/python scripts/{program}" if script.exists() else ""
        fail(_stem(program), f"{error}{remedy}")
    return torchgraft


def _guarded(program: str, work: Callable[[], None]) -> None:
    """Runs `work`, with one line for an error that a user can cause."""
    from torchgraft._files import EXPECTED_ERRORS, reason
    from torchgraft.errors import CommandLineError

    try:
        work()
        sys.stdout.flush()
    except BrokenPipeError:
        drop_output()
        raise SystemExit(BROKEN_PIPE) from None
    except EXPECTED_ERRORS as error:
        fail(_stem(program), reason(error), 2 if isinstance(error, CommandLineError) else 1)


def _print_completion(parser: argparse.ArgumentParser, shell: str) -> None:
    import shtab

    for action in (action for command in [parser, *_commands_of(parser)] for action in command._actions):
        name = str(action.metavar)
        if action.type in (Path, None) and name.endswith((".pt", ".pt2", ".so", "FILE")):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif name in ("DIRECTORY", "OUT", "DIR"):
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    print(shtab.complete(parser, shell))


def _commands_of(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return list(action.choices.values())
    return []


def _stem(program: str) -> str:
    return Path(program).stem


def _stopper(program: str, remedy: str = "") -> Callable[[int, object], NoReturn]:
    """A handler that raises SystemExit, so that temporary files are removed."""

    def stop(signal_number: int, frame: object) -> NoReturn:
        fail(_stem(program), STOPPED[signal_number] + remedy, 128 + signal_number)  # type: ignore[index]

    return stop


def _stop_at_once(signal_number: int, frame: object) -> NoReturn:
    """Ends the process. Serves while torch is imported: code that runs then can swallow exceptions of a handler, and
    there is nothing to clean up yet."""
    try:
        _stopper("torchgraft" if sys.argv[0].endswith("__main__.py") else sys.argv[0])(signal_number, frame)
    finally:
        sys.stderr.flush()
        os._exit(128 + signal_number)
