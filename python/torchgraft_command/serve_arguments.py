"""The command line of `torchgraft serve`."""

from __future__ import annotations

import argparse
from pathlib import Path

from .line import Parser


def add_serve_command(commands: argparse._SubParsersAction[Parser]) -> None:
    serving = commands.add_parser(
        "serve",
        help="serve texts over HTTP: examples/server, and a tokenizer before it",
        epilog="What stands behind -- goes to the server's own command line: torchgraft serve ... -- --capacity 64",
    )
    serving.add_argument("base", type=Path, metavar="MODEL.pt", help="a text encoder, grafted or not")
    serving.add_argument(
        "--adapters",
        type=Path,
        metavar="DIRECTORY",
        help="folder of adapter directories; a grafted model has adapters without one",
    )
    serving.add_argument(
        "--tokenizer", type=Path, required=True, metavar="FILE", help="the model's tokenizer.json, or its folder"
    )
    serving.add_argument(
        "--server", type=Path, metavar="FILE", help="the program of examples/server (default: $TORCHGRAFT_SERVER)"
    )
    serving.add_argument("--address", default="127.0.0.1", help="IPv4 address to listen on")
    serving.add_argument("--port", type=port, default=8080, help="0: any free port")
    serving.add_argument("--max-body", type=positive, default=4 << 20, metavar="BYTES", help="of a request")
    serving.add_argument(
        "--max-tokens",
        type=positive,
        metavar="N",
        help="cut longer texts to so many tokens (default: refuse what is longer than the server's --max-tokens)",
    )
    serving.add_argument(
        "--drain-seconds", type=positive, default=30, help="how long SIGTERM waits for requests under way"
    )


def positive(text: str) -> int:
    """Parses a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got '{text}'")
    return int(text)


def port(text: str) -> int:
    """Parses a TCP port."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"expected a port, 0 to 65535, got '{text}'")
    return int(text)
