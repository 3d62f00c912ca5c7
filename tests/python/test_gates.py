"""plot_gates and graft.py gates."""

import math
import subprocess
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

import torchgraft
from grafted import grafted
from models import VARIANTS, make_batch
from scripts_here import run_here, run_process
from torchgraft.gates import gate_table, gather_gates

NAME = "bert_sdpa"
TEXTS = ["red blue", "green red red <b>$x$", "blue"]


def _gates(lengths: list[int]) -> dict:
    variant = VARIANTS[NAME]
    batch = make_batch(lengths, max(lengths), torch.float32, len(lengths))
    with torch.no_grad():
        return grafted(NAME, torch.float32, "unipelt").forward_with_gates(*variant.arguments(batch))[1]["task"]


def _labels(axes) -> list[str]:
    return [label.get_text() for label in axes.get_yticklabels()]


def test_the_map_shows_the_means() -> None:
    gates = _gates([7, 4, 9])
    figure = torchgraft.plot_gates(gates)
    axes = figure.axes[0]
    assert _labels(axes) == ["self_prefix", "selfattn_lora", "output_adapter"]
    shown = torch.from_numpy(axes.images[0].get_array().filled(math.nan))
    for j, layer in enumerate(sorted(gates)):
        for i, location in enumerate(_labels(axes)):
            assert shown[i, j].item() == pytest.approx(gates[layer][location].mean().item())


def test_each_example_has_its_map() -> None:
    gates = _gates([7, 4])
    figure = torchgraft.plot_gates(gates, per_example=True, labels=["a $ b", "c"])
    assert [axes.get_title() for axes in figure.axes[:2]] == ["a $ b", "c"]
    second = figure.axes[1].images[0].get_array()
    assert second[0, 0] == pytest.approx(gates[0]["self_prefix"][1].mean().item())


def test_batches_of_a_data_set_are_weighted_by_their_rows() -> None:
    first, second = _gates([7, 4, 9]), _gates([5])
    gathered = gather_gates([first, second])
    expected = torch.cat([first[1]["output_adapter"], second[1]["output_adapter"]])
    assert torch.equal(gathered[1]["output_adapter"], expected)
    shown = torchgraft.plot_gates([first, second]).axes[0].images[0].get_array()
    assert shown[2, 1] == pytest.approx(expected.mean().item())


def test_rows_whose_branch_did_not_run_stay_empty() -> None:
    first, second = ({0: {"selfattn_lora": torch.full((2, 2), value)}} for value in (0.25, 0.75))
    second[1] = {"selfattn_lora": torch.full((2, 2), 0.5)}
    gathered = gather_gates([first, second])
    assert gathered[0]["selfattn_lora"][:, 0].tolist() == [0.25, 0.25, 0.75, 0.75]
    assert gathered[1]["selfattn_lora"].isnan()[:, 0].tolist() == [True, True, False, False]
    assert gate_table(gathered)[2].tolist() == [[0.5, 0.5]]
    assert gate_table(gathered, 0)[2].isnan().tolist() == [[False, True]]


def test_a_place_without_a_gate_stays_empty() -> None:
    gates = {0: {"selfattn_lora": torch.ones(2, 3)}, 4: {"output_adapter": torch.zeros(2, 1)}}
    locations, layers, values = gate_table(gates)
    assert (locations, layers) == (["selfattn_lora", "output_adapter"], [0, 4])
    assert values.isnan().tolist() == [[False, True], [True, False]]
    torchgraft.plot_gates(gates)


@pytest.mark.parametrize(("ending", "magic"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_pictures_are_written(ending: str, magic: bytes, tmp_path) -> None:
    path = tmp_path / f"gates.{ending}"
    torchgraft.plot_gates(_gates([7, 4]), path)
    assert path.read_bytes().startswith(magic)
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_drawn_is_said(tmp_path) -> None:
    with pytest.raises(torchgraft.GraftError, match="no gates"):
        torchgraft.plot_gates({})
    with pytest.raises(torchgraft.GraftError, match="ending in one of"):
        torchgraft.plot_gates(_gates([3]), tmp_path / "gates.jpeg2")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A grafted model, and its tokenizer beside it."""
    folder = tmp_path_factory.mktemp("gates")
    grafted(NAME, torch.float32, "unipelt").save(str(folder / "model.pt"))
    words = {"[PAD]": 0, "[UNK]": 1, "red": 2, "green": 3, "blue": 4}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def _run(*arguments: object) -> subprocess.CompletedProcess:
    return run_here("graft.py", "gates", *arguments)


@pytest.mark.quick
def test_the_command_prints_what_the_model_gives(folder: Path) -> None:
    done = _run(folder / "model.pt", *[word for text in TEXTS for word in ("--text", text)])
    assert done.returncode == 0, done.stderr
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = [tokenizer.encode(text).ids for text in TEXTS]
    width = max(map(len, ids))
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids])
    with torch.no_grad():
        gates = grafted(NAME, torch.float32, "unipelt").forward_with_gates(tokens, mask)[1]["task"]
    *rows, last = done.stdout.splitlines()[1:]
    assert last.startswith(f"mean of {len(TEXTS)} texts")
    for line in rows:
        location, *values = line.split()
        expected = [gates[layer][location].mean().item() for layer in sorted(gates)]
        assert [float(value) for value in values] == pytest.approx(expected, abs=0.0051)


def test_the_command_draws_a_data_set(folder: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(TEXTS * 15) + "\n\n")
    path = tmp_path / "gates.svg"
    done = run_process("graft.py", "gates", folder / "model.pt", "--file", texts, "-o", path)
    assert done.returncode == 0, done.stderr
    assert "svg" in path.read_text()[:500]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --text"),
        (["--text", "a", "--adapter", "x"], "no adapter is called 'x'"),
        (["--text", "a", "--tokenizer", "nowhere.json"], "no such file"),
        (["--file", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_a_wrong_command_is_one_line(folder: Path, arguments: list, message: str) -> None:
    done = _run(folder / "model.pt", *arguments)
    assert done.returncode == 1 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_gates_of_all_adapters_at_once_are_no_gates_of_one() -> None:
    layers = {0: {"selfattn_lora": torch.rand(2, 1)}}
    with pytest.raises(
        torchgraft.GraftError, match=r"expected the gates of one adapter, gates\[name\]; got those of: a, b"
    ):
        torchgraft.plot_gates({"a": layers, "b": layers})
