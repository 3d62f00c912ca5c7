#!/usr/bin/env python3
"""Makes of a table of texts with classes the file that train_cpp reads.

    tokenise.py reviews.csv --tokenizer tokenizer.json --labels bad,good -o reviews.safetensors

The table is CSV or, ending in .tsv, tab-separated without quoting; its first line names the columns. The result holds
input_ids and attention_mask [n, S] and labels [n], all int64; S is the number of tokens of the longest text. Needs the
packages `tokenizers`, `safetensors` and `numpy`.
"""

import argparse
import csv
import os
import sys
from pathlib import Path

import numpy
from safetensors.numpy import save
from tokenizers import Tokenizer


class InputError(Exception):
    """What is wrong with an input file."""


def load_tokenizer(path: str) -> Tokenizer:
    try:
        return Tokenizer.from_file(path)
    except Exception as error:  # the library raises no class of its own
        raise InputError(f"{path}: not a tokenizer.json ({error})") from error


def read_table(path: Path, text_column: str, label_column: str, labels: list[str]) -> tuple[list[str], list[int]]:
    """The texts, and for each the number of its class."""
    form = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix.lower() == ".tsv" else {"strict": True}
    texts, classes = [], []
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, **form)
        for column in (text_column, label_column):
            if column not in (reader.fieldnames or []):
                raise InputError(f"{path}: no column '{column}'; its first line has {reader.fieldnames or 'nothing'}")
        for row in reader:
            text, label = row[text_column], row[label_column]
            if not text or label not in labels:
                problem = f"label '{label}' is none of {', '.join(labels)}" if text else "no text"
                raise InputError(f"{path}, line {reader.line_num}: {problem}")
            texts.append(text)
            classes.append(labels.index(label))
    if not texts:
        raise InputError(f"{path}: no rows")
    return texts, classes


def write_whole(content: bytes, path: Path) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--tokenizer", required=True, help="the model's tokenizer.json")
    parser.add_argument("--labels", required=True, help="the classes in order, as for train_cpp: bad,good")
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--label-column", default="label")
    parser.add_argument("--max-length", type=int, default=128, help="longer texts are cut (128 tokens)")
    arguments = parser.parse_args()
    try:
        tokenizer = load_tokenizer(arguments.tokenizer)
        columns = (arguments.text_column, arguments.label_column)
        texts, classes = read_table(arguments.table, *columns, arguments.labels.split(","))
        tokenizer.enable_truncation(arguments.max_length)
        tokenizer.enable_padding(**{**(tokenizer.padding or {}), "length": None})
        encodings = tokenizer.encode_batch(texts)
        tensors = {
            "input_ids": numpy.array([encoding.ids for encoding in encodings], numpy.int64),
            "attention_mask": numpy.array([encoding.attention_mask for encoding in encodings], numpy.int64),
            "labels": numpy.array(classes, numpy.int64),
        }
        write_whole(save(tensors), arguments.output)
    except (InputError, OSError, UnicodeDecodeError, csv.Error) as error:
        print(f"tokenise.py: {error}", file=sys.stderr)
        return 1
    rows, tokens = tensors["input_ids"].shape
    print(f"{arguments.output}: {rows} rows of {tokens} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
