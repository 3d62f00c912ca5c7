"""Reads texts with classes from CSV, TSV or JSONL files, and splits them."""

import csv
import io
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .._reading import parse_json
from ..errors import GraftError

FORMATS = (".csv", ".tsv", ".jsonl")

_WHOLE_NUMBER = re.compile("-?[0-9]+")
_MOST_SHOWN, _LONGEST_SHOWN = 10, 40  # keys of a row in an error, characters of each


@dataclass(frozen=True)
class Columns:
    """The names of the columns to read (in JSONL: keys).

    Attributes:
        text: the column of the text.
        label: the column of the class.
        group: a column whose equal values make a group. split_examples() keeps groups together. None: no groups.
    """

    text: str = "text"
    label: str = "label"
    group: str | None = None


@dataclass(frozen=True)
class Example:
    """One row of a file. where: "FILE, line N", for messages; group: "" if it is in no group."""

    text: str
    label: str
    where: str
    group: str = ""


def read_examples(path: Path, columns: Columns = Columns()) -> list[Example]:
    """Reads every row of a file. A CSV or TSV file begins with the names of its columns; JSONL has one object per line.

    Raises:
        GraftError: the file is missing, empty, not UTF-8 or not in its format, or a row lacks its text, label or group.
    """
    if path.suffix.lower() not in FORMATS:
        raise GraftError(f"{path}: expected a file ending in {', '.join(FORMATS)}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise GraftError(f"{path}: cannot read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise GraftError(f"{path}: not UTF-8 text (byte {error.start}: {error.reason})") from error
    rows = _json_rows(path, text) if path.suffix.lower() == ".jsonl" else _table_rows(path, text, columns)
    examples = [_example(f"{path}, line {line}", row, columns) for line, row in rows]
    if not examples:
        raise GraftError(f"{path}: holds no examples")
    return examples


def _table_rows(path: Path, text: str, columns: Columns) -> Iterator[tuple[int, dict[str, Any]]]:
    # In the TSV files of NLP data sets, a quotation mark is an ordinary character.
    form = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix.lower() == ".tsv" else {"strict": True}
    reader = csv.DictReader(io.StringIO(text, newline=""), **form)
    try:
        names = reader.fieldnames or []
        for name in filter(None, (columns.text, columns.label, columns.group)):
            if names and name not in names:
                raise GraftError(f"{path}: has no column '{name}'; its columns are {', '.join(names)}")
        for row in reader:
            if None in row or None in row.values():  # DictReader marks too many or too few cells so
                raise GraftError(f"{path}, line {reader.line_num}: expected as many cells as the first line has")
            yield reader.line_num, row
    except csv.Error as error:  # the fault is in the row after the last one read
        raise GraftError(f"{path}, line {reader.line_num + 1}: {error}") from error


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    # Not splitlines(): it also splits at characters that JSON strings may hold, such as U+2028.
    for line, content in enumerate(text.split("\n"), 1):
        if not content.strip():
            continue
        row = parse_json(content, f"{path}, line {line}")
        if not isinstance(row, dict):
            raise GraftError(f"{path}, line {line}: expected an object, got {type(row).__name__}")
        yield line, row


def _example(where: str, row: dict[str, Any], columns: Columns) -> Example:
    values = {}
    for name in filter(None, (columns.text, columns.label, columns.group)):
        value = row.get(name)
        if isinstance(value, bool) or not isinstance(value, str | int):
            if name in row and value is None:
                told = "null"
            elif value is None:
                keys = ", ".join(str(key)[:_LONGEST_SHOWN] for key in itertools.islice(row, _MOST_SHOWN))
                told = f"missing; the row has {keys or 'nothing'}: see --text-column, --label-column"
            else:
                told = "neither text nor a whole number"
            raise GraftError(f"{where}: '{name}' is {told}")
        values[name] = str(value).strip()
        if not values[name]:
            raise GraftError(f"{where}: '{name}' is empty")
    return Example(values[columns.text], values[columns.label], where, values.get(columns.group or "", ""))


def class_names(examples: Sequence[Example]) -> list[str]:
    """Returns the labels that occur, in alphabetical order; if all are whole numbers, in order of their values."""
    found = {example.label for example in examples}
    numbers = all(map(_WHOLE_NUMBER.fullmatch, found))
    return sorted(found, key=lambda label: (int(label) if numbers else 0, label))


def class_indices(examples: Sequence[Example], names: Sequence[str]) -> torch.Tensor:
    """Returns the class of each example, int64 [N]: the position of its label in `names`.

    If no name is a whole number, a label that is a whole number is the position itself.

    Raises:
        GraftError: a label is unknown, or a number is out of range.
    """
    positions = {name: index for index, name in enumerate(names)}
    by_position = not any(map(_WHOLE_NUMBER.fullmatch, names))  # else "0" of "1", "2" would be "1"
    result = []
    for example in examples:
        index = positions.get(example.label)
        if index is None and by_position and _WHOLE_NUMBER.fullmatch(example.label):
            index = int(example.label)
            if not 0 <= index < len(names):
                raise GraftError(f"{example.where}: label {index} is out of range for {len(names)} classes "
                                 f"(0 to {len(names) - 1}: {', '.join(names)})")  # fmt: skip
        if index is None:
            raise GraftError(f"{example.where}: label '{example.label}' is unknown; the classes are {', '.join(names)}")
        result.append(index)
    return torch.tensor(result, dtype=torch.int64)


def check_every_class(indices: torch.Tensor, names: Sequence[str]) -> None:
    """Checks that every class has an example: a model would never learn to choose a class without one.

    Args:
        indices: int64 [N], the class of each example.
        names: the names of the classes.

    Raises:
        GraftError: a class has no example.
    """
    counts = Counter(indices.tolist())
    missing = [name for index, name in enumerate(names) if not counts[index]]
    if missing:
        raise GraftError(f"no training example has the label {', '.join(missing)} (there are {len(indices)} of "
                         f"{', '.join(f'{names[index]}: {count}' for index, count in sorted(counts.items()))}); give "
                         "more examples, another --seed for the split, or leave the class out")  # fmt: skip


def split_examples(examples: Sequence[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Splits examples at random into (the rest, about `fraction` of them).

    `seed` decides the draw. All examples of a group go to the same side; an example without a group is a group of its
    own.

    Raises:
        GraftError: one side would be empty.
    """
    groups: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        groups.setdefault(f"group {example.group}" if example.group else f"row {index}", []).append(index)
    members = list(groups.values())
    wanted = round(fraction * len(examples))
    taken: set[int] = set()
    for position in torch.randperm(len(members), generator=torch.Generator().manual_seed(seed)).tolist():
        if len(taken) >= wanted:
            break
        taken.update(members[position])
    if not 0 < len(taken) < len(examples):
        raise GraftError(f"cannot split {len(examples)} examples in {len(members)} groups at {fraction}: one side "
                         "would be empty")  # fmt: skip
    return ([example for index, example in enumerate(examples) if index not in taken],
            [examples[index] for index in sorted(taken)])  # fmt: skip
