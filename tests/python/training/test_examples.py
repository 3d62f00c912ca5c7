"""Reading texts with classes: what the formats hold, and what is wrong with a file is said with its line."""

import json
from pathlib import Path

import pytest
import torch

from torchgraft import GraftError
from torchgraft.training import Columns, Example, class_names, read_examples, split_examples
from torchgraft.training.examples import check_every_class, class_indices

pytestmark = pytest.mark.quick

AWKWARD = 'says "no", twice\u2028and, on'


def _write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_the_three_formats_hold_the_same(tmp_path: Path) -> None:
    quoted = AWKWARD.replace('"', '""')
    files = [
        _write(tmp_path, "a.csv", f'\ufefftext,label\r\n"{quoted}",1\r\nplain,0\r\n'),
        _write(tmp_path, "a.tsv", f"label\ttext\n1\t{AWKWARD}\n0\tplain\n"),
        _write(tmp_path, "a.jsonl", "\n".join([json.dumps({"text": AWKWARD, "label": 1}, ensure_ascii=False), "",
                                                json.dumps({"label": "0", "text": "plain", "more": None})])),
    ]  # fmt: skip
    for path in files[:2]:
        assert [(one.text, one.label) for one in read_examples(path)] == [(AWKWARD, "1"), ("plain", "0")]
    # A null in a column that nobody reads is no error.
    assert [(one.text, one.label) for one in read_examples(files[2])] == [(AWKWARD, "1"), ("plain", "0")]
    assert read_examples(files[2])[1].where == f"{files[2]}, line 3"


def test_columns_of_other_names(tmp_path: Path) -> None:
    path = _write(tmp_path, "a.csv", 'id,review,stars,n\nx,"two\nlines",3,7\ny,one,4,7\n')
    first, second = read_examples(path, Columns("review", "stars", "n"))
    assert (first.text, first.label, first.group) == ("two\nlines", "3", "7")
    assert second.where == f"{path}, line 4"


WRONG = {
    "no such file": ("none.csv", None, "cannot read"),
    "other ending": ("a.txt", "text,label\na,b\n", "expected a file ending in .csv, .tsv, .jsonl"),
    "empty": ("a.csv", "", "holds no examples"),
    "empty JSONL": ("a.jsonl", "\n\n", "holds no examples"),
    "only a header": ("a.tsv", "text\tlabel\n", "holds no examples"),
    "no such column": ("a.csv", "text,class\na,b\n", "has no column 'label'; its columns are text, class"),
    "a cell missing": ("a.csv", "text,label\na,b\nc\n", "line 3: expected as many cells"),
    "a cell too many": ("a.csv", "text,label\na,b,c\n", "line 2: expected as many cells"),
    "an open quotation mark": ("a.csv", 'text,label\n"a,b\n', "line 2: unexpected end of data"),
    "an empty text": ("a.csv", "text,label\n  ,b\n", "line 2: 'text' is empty"),
    "an empty label": ("a.tsv", "text\tlabel\na\t\n", "line 2: 'label' is empty"),
    "not JSON": ("a.jsonl", '{"text": "a", "label": 1}\n{"text": ', "line 2: not JSON"),
    "not an object": ("a.jsonl", "[1]\n", "line 1: expected an object, got list"),
    "a fraction": ("a.jsonl", '{"text": "a", "label": 0.5}\n', "'label' is neither text nor a whole number"),
    "no label": (
        "a.jsonl",
        '{"text": "a"}\n',
        "'label' is missing; the row has text: see --text-column, --label-column",
    ),
    "Latin-1": ("a.csv", "text,label\ncliché,b\n".encode("latin-1"), "not UTF-8 text (byte 16"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_with_a_file(case: str, tmp_path: Path) -> None:
    name, content, message = WRONG[case]
    path = tmp_path / name if content is None else _write(tmp_path, name, content)
    with pytest.raises(GraftError) as caught:
        read_examples(path)
    assert message in str(caught.value) and str(path) in str(caught.value)


def _labelled(*labels: str) -> list[Example]:
    return [Example("text", label, f"file, line {line}") for line, label in enumerate(labels, 2)]


def test_classes_are_names_or_positions() -> None:
    assert class_names(_labelled("b", "10", "9")) == ["10", "9", "b"]
    assert class_names(_labelled("10", "9", "0")) == ["0", "9", "10"]
    assert class_indices(_labelled("good", "bad", "1"), ["bad", "good"]).tolist() == [1, 0, 1]
    assert class_names(_labelled("1", "-1", "0")) == ["-1", "0", "1"]
    # A number that is a name is that name.
    assert class_indices(_labelled("1", "2"), ["2", "1"]).tolist() == [1, 0]


@pytest.mark.parametrize("label", ["0", "-1", "--1", "٣"])
def test_no_number_is_a_position_where_names_are_numbers(label: str) -> None:
    with pytest.raises(GraftError, match=f"file, line 3: label '{label}' is unknown; the classes are 1, 2, 3"):
        class_indices(_labelled("1", label), ["1", "2", "3"])


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("--1", "file, line 3: label '--1' is unknown; the classes are bad, good"),
        ("2", "file, line 3: label 2 is out of range for 2 classes (0 to 1: bad, good)"),
        ("-1", "file, line 3: label -1 is out of range"),
        ("ugly", "file, line 3: label 'ugly' is unknown; the classes are bad, good"),
    ],
)
def test_a_label_that_is_no_class(label: str, message: str) -> None:
    with pytest.raises(GraftError) as caught:
        class_indices(_labelled("good", label), ["bad", "good"])
    assert message in str(caught.value)


def test_a_class_without_examples() -> None:
    check_every_class(torch.tensor([0, 1, 2]), ["a", "b", "c"])
    with pytest.raises(GraftError, match="no training example has the label b .there are 3 of a: 2, c: 1"):
        check_every_class(torch.tensor([0, 2, 0]), ["a", "b", "c"])


def test_a_split_keeps_groups_together() -> None:
    examples = [Example(f"text {index}", "a", str(index), f"review {index // 7}") for index in range(100)]
    rest, taken = split_examples(examples, 0.2, 3)
    assert sorted(rest + taken, key=lambda one: int(one.where)) == examples
    assert not {one.group for one in rest} & {one.group for one in taken}
    assert 20 <= len(taken) < 27  # as many groups as are needed, and no more
    assert split_examples(examples, 0.2, 3) == (rest, taken) != split_examples(examples, 0.2, 4)


def test_a_split_with_nothing_on_one_side() -> None:
    with pytest.raises(GraftError, match="one side would be empty"):
        split_examples([Example("text", "a", str(index), "the only one") for index in range(9)], 0.2, 0)
