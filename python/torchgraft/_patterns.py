"""Regular expressions out of files of strangers: what `re` takes them for, in bounded time and memory."""

import re
import time
import warnings
from re import _constants, _parser  # type: ignore[attr-defined]  # the tree of an expression
from typing import Any

import regex

from .errors import GraftError

SECONDS = 10.0  # for all expressions of a directory and all paths of a model
MOST_COPIES = 10_000  # that counts make of what they repeat, in all expressions of a directory
_LONGEST_SHOWN = 200
_ESCAPED = re.compile(r"\\.", re.DOTALL)
_BRACE_OF_NO_COUNT = re.compile(r"\{(?!\d+(?:,\d*)?\}|,\d+\})")
_REPEATS = (_constants.MAX_REPEAT, _constants.MIN_REPEAT, _constants.POSSESSIVE_REPEAT)


class Patterns:
    """The regular expressions of one directory, which share what they may take of time and memory.

    The package `regex` can stop, which `re` cannot. But it writes `q{1000}` as a thousand `q`, and cannot stop there.
    """

    def __init__(self, source: object) -> None:
        """source: the file or directory that they come from, for messages."""
        self._source = source
        self._compiled: dict[tuple[str, str], regex.Pattern[str]] = {}
        self._seconds = self._seconds_left = SECONDS
        self._copies_left = MOST_COPIES

    def add(self, pattern: str, whole: str = "{}") -> None:
        """Checks and compiles a regular expression.

        Args:
            pattern: the expression.
            whole: the expression that it becomes a part of, in the place of {}.

        Raises:
            GraftError: `re` does not take it, `regex` may take it for something else, or it repeats too much.
        """
        text = whole.replace("{}", pattern)
        began = time.monotonic()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", FutureWarning)  # of brackets that may mean sets of characters some day
                re.compile(pattern)
                re.compile(text)
                tree = _parser.parse(text)
            self._check_braces(pattern)
            self._count_copies(pattern, tree)
            self._compiled[whole, pattern] = regex.compile(text, cache_pattern=False)
        except (re.error, regex.error, OverflowError, RecursionError, FutureWarning) as error:
            raise GraftError(
                f"{self._shown(pattern)} is no regular expression: {str(error)[:_LONGEST_SHOWN]}"
            ) from None
        self._seconds_left -= time.monotonic() - began

    def match(self, pattern: str, text: str, whole: str = "{}", full: bool = False) -> "regex.Match[str] | None":
        """Matches a pattern that was added with `whole`, as re.match() does; full: as re.fullmatch() does.

        Raises:
            GraftError: all matches of this object have taken longer than SECONDS.
        """
        compiled = self._compiled[whole, pattern]
        began = time.monotonic()
        try:
            if self._seconds_left <= 0:
                raise TimeoutError
            result = (compiled.fullmatch if full else compiled.match)(text, timeout=self._seconds_left)
        except TimeoutError:
            raise GraftError(
                f"{self._shown(pattern)} was matched with {text} in vain: all regular expressions of a directory have "
                f"{self._seconds:g} seconds; write fewer, without repetitions inside of repetitions"
            ) from None
        self._seconds_left -= time.monotonic() - began
        return result

    def _shown(self, pattern: str) -> str:
        return f"{self._source}: {pattern[:_LONGEST_SHOWN]!r}"

    def _check_braces(self, pattern: str) -> None:
        if _BRACE_OF_NO_COUNT.search(_ESCAPED.sub("", pattern)):
            raise GraftError(
                f"{self._shown(pattern)} has a brace that counts nothing; write \\{{ if the brace itself is meant"
            )

    def _count_copies(self, pattern: str, tree: Any) -> None:
        self._copies_left -= _size(tree, with_counts=True) - _size(tree, with_counts=False)
        if self._copies_left < 0:
            raise GraftError(
                f"{self._shown(pattern)} repeats too much: counts may make {MOST_COPIES} copies in all, and counts "
                "inside of counts multiply; write * or + in place of large counts"
            )


def _size(tree: Any, with_counts: bool) -> int:
    """Returns the number of parts of an expression; with_counts: of what `regex` makes of its counts."""
    if isinstance(tree, _parser.SubPattern):
        return sum(_part_size(kind, content, with_counts) for kind, content in tree)
    return sum(_size(each, with_counts) for each in tree) if isinstance(tree, tuple | list) else 0


def _part_size(kind: Any, content: Any, with_counts: bool) -> int:
    if kind is _constants.IN:
        return 1 + len(content)
    if kind not in _REPEATS:
        return 1 + _size(content, with_counts)
    least, most, body = content
    copies = least if most is _constants.MAXREPEAT else most
    return 1 + max(1, _size(body, with_counts)) * (max(1, copies) if with_counts else 1)
