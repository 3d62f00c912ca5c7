"""Reads files and texts that strangers may have written: nothing here waits, and sizes and depths have limits."""

import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from torchgraft_command import json_text
from torchgraft_command.json_text import DEEPEST as DEEPEST_JSON

from .errors import GraftError

MOST_CONFIG_BYTES = 1 << 20
MOST_SITES_BYTES = 1 << 26
MOST_WEIGHT_BYTES = 4 << 30  # the limit of read_safetensors() in C++, too


def open_regular(path: Path, most_bytes: int) -> BinaryIO:
    """Opens a regular file of at most `most_bytes` for reading. Never waits, as opening a FIFO or a device may.

    Raises:
        GraftError: the file is of another kind, or larger.
        OSError: there is no file, or it cannot be opened.
    """
    _check_kind(path, os.stat(path))  # opening a device may have effects
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY), "rb")
    try:
        status = os.fstat(file.fileno())
        _check_kind(path, status)  # another file may have come in between
        if status.st_size > most_bytes:
            raise GraftError(f"{path}: expected a file of at most {most_bytes} bytes, got {status.st_size}")
    except BaseException:
        file.close()
        raise
    return file


def read_text(path: Path, most_bytes: int = MOST_CONFIG_BYTES) -> str:
    """Returns the text of a regular file.

    Raises:
        GraftError: the file is not a regular one, larger than `most_bytes`, or not UTF-8.
        OSError: the file cannot be read.
    """
    with open_regular(path, most_bytes) as file:
        content = file.read(most_bytes + 1)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise GraftError(f"{path}: not JSON ({error})") from None


def parse_json(text: str | bytes, source: object, deepest: int = DEEPEST_JSON) -> Any:
    """Parses JSON, as json_text.parse() does.

    Args:
        text: of a file or a request. Bytes are UTF-8.
        source: what errors call the text: a path, "the body".
        deepest: how many levels of brackets the text may have.

    Raises:
        GraftError: the text is not JSON, nested too deeply, or has a number that is not finite.
    """
    try:
        return json_text.parse(text, source, deepest)
    except ValueError as error:
        raise GraftError(str(error)) from None


def _check_kind(path: Path, status: os.stat_result) -> None:
    if stat.S_ISREG(status.st_mode):
        return
    if stat.S_ISDIR(status.st_mode):
        raise GraftError(f"{path}: expected a regular file, got a directory")
    kind = "FIFO" if stat.S_ISFIFO(status.st_mode) else "socket" if stat.S_ISSOCK(status.st_mode) else "device"
    raise GraftError(f"{path}: expected a regular file, got a {kind}")
