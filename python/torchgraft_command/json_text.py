"""Parses JSON that strangers may have written: depths and numbers have limits. Imports no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any, NoReturn

# Levels of brackets, as in registration/parse_json.h: code that walks over a value calls itself once for each level.
DEEPEST = 64


def parse(text: str | bytes, source: object, deepest: int = DEEPEST) -> Any:
    """Parses JSON. The one place of the package that does: scripts/check_tree.py holds that.

    Args:
        text: of a file or a request. Bytes are UTF-8.
        source: what errors call the text: a path, "the body".
        deepest: how many levels of brackets the text may have.

    Raises:
        ValueError: the text is not JSON, nested too deeply, has a number that is not finite, or an object with a name
            twice. The message is for whoever sent it.
    """
    try:
        decoded = text.decode("utf-8") if isinstance(text, bytes) else text
        value = json.loads(decoded, parse_float=_finite, parse_constant=_refuse, object_pairs_hook=_object)
        too_deep = any(depth > deepest for depth in _depths(value))
    except RecursionError:
        too_deep = True
    except ValueError as error:
        raise ValueError(f"{source}: not JSON ({error})") from None
    if too_deep:
        raise ValueError(f"{source}: nested too deeply, expected JSON of at most {deepest} levels")
    return value


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:40]} is out of range")
    return number


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Another reader may take the first of two values, where Python takes the last."""
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has the name {json.dumps(twice)[:200]} twice")
    return result


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number of JSON")


def _depths(value: Any) -> Iterator[int]:
    """Yields how deep each list and object is. A text that is no Unicode raises ValueError."""
    waiting = [(value, 0)]
    while waiting:
        held, depth = waiting.pop()
        if isinstance(held, str):
            held.encode()  # half of a surrogate pair raises
        elif isinstance(held, dict | list):
            yield depth + 1
            waiting.extend((each, depth + 1) for each in held)
            if isinstance(held, dict):
                waiting.extend((each, depth + 1) for each in held.values())
