"""The tables of `inspect`: layers, each or those that look alike as one, and the operators that run."""

import json
import re
from pathlib import Path

import pytest
import torch

import torchgraft
from grafted import base
from test_cli import run
from test_drawing import entry, projection, structure
from torchgraft import _commands
from torchgraft._operators import ranges

FLOAT = torch.float32
BERT = "bert_sdpa"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tables")
    base(BERT, FLOAT).save(str(folder / "base.pt"))
    return folder


def test_the_table_says_all_that_is_known(capsys) -> None:
    """Two layers by hand: a decoder's two attentions, and that layer run again; and what was not recognised."""
    cross = entry(0, "dec.{}.", "cross", num_heads=8, num_kv_heads=2, ffn_norm_order="post", output=None,
                  ffn_gate=projection("dec.0.gate"), value=projection("dec.0.kv", packed=True, offset=48),
                  cache="filled")  # fmt: skip
    layers = [entry(0, "dec.{}.", ffn=False, notes=["no feed-forward block"]), cross, entry(0, "dec.{}.", shares=0)]
    _commands._print_structure(base(BERT, FLOAT), structure(layers, ("at dec.1: no softmax",)))
    printed = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if line.startswith("│")]
    starts = [row[:6] for row in rows if row[0]]
    assert starts == [
        ["0", "self", "4", "12", "48", "pre"],
        ["0", "cross", "8 (2 kv)", "12", "48", "pre"],
        ["0 again", "self", "4", "12", "48", "pre"],
    ]
    for text in ("query: dec.0.cross.query", "value: dec.0.kv[48:96]", "output: -", "ffn_gate: dec.0.gate",
                 "post (ffn)", "cross_prefix", "filled cache", "layer 0, self attention: no feed-forward block",
                 "not taken: at dec.1: no softmax"):  # fmt: skip
        assert text in printed
    assert printed.count("ffn_gate") == 1  # only where there is one


def table_rows(layers: list[dict], every_layer: bool, capsys) -> list[list[str]]:
    """The table's rows: the layers' numbers, the kind of attention, and each projection."""
    _commands._print_structure(base(BERT, FLOAT), structure(layers), every_layer)
    rows: list[list[str]] = []
    for line in capsys.readouterr().out.splitlines():
        cells = [cell.strip() for cell in line.split("│")[1:-1]]
        if cells and cells[0]:
            rows.append(cells[:2])
        if cells:
            rows[-1] += [cells[6]] if cells[6] else []
    return rows


def test_alike_layers_are_one_row_and_others_are_not(capsys) -> None:
    """A decoder of four layers, whose third has other heads; and its last run once more."""
    layers = []
    for number in range(4):
        layers.append(entry(number, "dec.{}.", ffn=False))
        layers.append(entry(number, "dec.{}.", "cross", num_heads=2 if number == 2 else 4))
    layers += [entry(3, "dec.{}.", ffn=False, shares=6), entry(3, "dec.{}.", "cross", shares=7)]
    folded = table_rows(layers, False, capsys)
    assert [row[:3] for row in folded] == [
        ["0, 1", "self", "query: dec.{0-1}.self.query"],
        ["0, 1", "cross", "query: dec.{0-1}.cross.query"],
        ["2", "self", "query: dec.2.self.query"],
        ["2", "cross", "query: dec.2.cross.query"],
        ["3, run 2 times", "self", "query: dec.3.self.query"],
        ["3, run 2 times", "cross", "query: dec.3.cross.query"],
    ]
    assert folded[1][3:] == ["key: dec.{0-1}.cross.key", "value: dec.{0-1}.cross.value",
                             "output: dec.{0-1}.cross.output", "ffn_in: dec.{0-1}.ffn_in",
                             "ffn_out: dec.{0-1}.ffn_out"]  # fmt: skip
    every = table_rows(layers, True, capsys)
    numbers = ["0", "0", "1", "1", "2", "2", "3", "3", "3 again", "3 again"]
    assert [row[0] for row in every] == numbers
    assert every[4][2] == "query: dec.2.self.query" and every[9][2] == "query: dec.3.cross.query"


def operator_rows(text: str) -> list[list[str]]:
    """The cells of the table of operators, without its heading."""
    lines = text[text.index("operators") :].splitlines()
    rows = [re.split(r"[│┃]", line)[1:-1] for line in lines if re.match(r"\s*[│┃]", line)]
    return [[cell.strip() for cell in row] for row in rows[1:]]


@pytest.mark.quick
def test_which_operators_run(folder: Path, tmp_path: Path) -> None:
    """The table shows which LoRAs are fused with their projections. For a bare module it is empty."""
    assert "operators" not in run("inspect", folder / "base.pt").stdout
    assert operator_rows(run("inspect", folder / "base.pt", "--config", "unipelt").stdout) == [
        ["output_adapter_seq_ln_relu", "gated_bottleneck", "0-2"],
        ["self_prefix", "gated_prefix_attention", "0-2"],
        ["selfattn_lora_q", "gated_lora_linear", "0-2"],
        ["selfattn_lora_v", "gated_lora_linear", "0-2"],
    ]
    assert operator_rows(run("inspect", folder / "base.pt", "--config", "par_bn").stdout) == [
        ["output_adapter_par_relu", "gated_bottleneck_linear", "0-2"]
    ]
    apart = torchgraft.graft(base(BERT, FLOAT), config="lora", name="task", fuse=False)
    apart.save(str(tmp_path / "apart.pt"))
    assert operator_rows(run("inspect", tmp_path / "apart.pt").stdout) == [
        ["selfattn_lora_q", "gated_lora", "0-2"],
        ["selfattn_lora_v", "gated_lora", "0-2"],
    ]


def test_operators_as_json(folder: Path, tmp_path: Path) -> None:
    """As the table has them. The layers can be given back with --sites."""
    shown = run("inspect", folder / "base.pt", "--json", "--config", "unipelt").stdout
    (tmp_path / "sites.json").write_text(shown)
    structure = json.loads(shown)
    operators = structure.pop("operators")
    table = operator_rows(run("inspect", folder / "base.pt", "--config", "unipelt").stdout)
    rows = [[slot, name, ranges(layers)] for slot, names in operators.items() for name, layers in names.items()]
    assert rows == table
    assert structure == json.loads(run("inspect", folder / "base.pt", "--json").stdout)
    again = run("inspect", folder / "base.pt", "--sites", tmp_path / "sites.json", "--json")
    assert again.returncode == 0 and len(json.loads(again.stdout)["layers"]) == len(structure["layers"])


def test_ranges_of_layers() -> None:
    assert ranges([5, 0, 1, 2, 2]) == "0-2, 5" and ranges([3]) == "3" and ranges([]) == ""
