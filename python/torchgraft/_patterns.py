"""Regular expressions out of files of strangers: what `re` takes them for, in bounded time."""

import re
import warnings

import regex

from .errors import GraftError

SECONDS = 1.0  # for one text
_ESCAPED = re.compile(r"\\.", re.DOTALL)
_BRACE_OF_NO_COUNT = re.compile(r"\{(?!\d+(?:,\d*)?\}|,\d+\})")


def check_pattern(pattern: str, source: object, whole: str = "{}") -> None:
    """Checks a regular expression.

    Args:
        pattern: the expression.
        source: the file that it comes from, for the message.
        whole: the expression that it becomes a part of, in the place of {}.

    Raises:
        GraftError: `re` does not take it, or the package `regex`, which can stop, may take it for something else.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)  # of brackets that may mean sets of characters some day
            re.compile(pattern)
            re.compile(whole.replace("{}", pattern))
    except (re.error, OverflowError, RecursionError, FutureWarning) as error:
        raise GraftError(f"{source}: {pattern[:200]!r} is no regular expression: {error}") from None
    if _BRACE_OF_NO_COUNT.search(_ESCAPED.sub("", pattern)):
        raise GraftError(
            f"{source}: {pattern[:200]!r} has a brace that counts nothing; write \\{{ if the brace itself is meant"
        )


def match_pattern(pattern: str, text: str, source: object, full: bool = False) -> "regex.Match[str] | None":
    """Matches a pattern that check_pattern() took, as re.match() does; full: as re.fullmatch() does.

    Raises:
        GraftError: that takes longer than SECONDS.
    """
    try:
        return (regex.fullmatch if full else regex.match)(pattern, text, timeout=SECONDS)
    except TimeoutError:
        raise GraftError(
            f"{source}: {pattern[:200]!r} was matched with {text} for {SECONDS:g} second in vain; write a regular "
            "expression without repetitions inside of repetitions"
        ) from None
