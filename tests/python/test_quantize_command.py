"""graft.py quantize: what it writes and prints, and that its file needs no more than it says."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import torchgraft
from grafted import base, grafted
from models import VARIANTS, make_batch
from scripts_here import run_here

pytestmark = pytest.mark.quick
_VARIANT = VARIANTS["bert_sdpa"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("quantize")
    base("bert_sdpa", torch.float32).save(str(folder / "base.pt"))
    grafted("bert_sdpa", torch.float32, "unipelt").save(str(folder / "grafted.pt"))
    torch.save(_VARIANT.arguments(make_batch([9, 5], 9, torch.float32)), folder / "example.pt")
    return folder


def test_it_prints_errors_and_sizes(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "int8.pt"
    shown = run_here("graft.py", "quantize", folder / "base.pt", "-o", out, "--example", folder / "example.pt").stdout
    rows = re.findall(r"(encoder\.layer\.\d\.\S+) .*?(query|key|value|output|ffn_in|ffn_out) .*?(\d+\.\d\d)%", shown)
    assert len(rows) == 18
    errors = {entry.path: entry.error for entry in torchgraft.quantization_error(
        base("bert_sdpa", torch.float32), _VARIANT.arguments(make_batch([9, 5], 9, torch.float32)))}  # fmt: skip
    for path, _, percent in rows:
        assert float(percent) == pytest.approx(100 * errors[path], abs=0.01)
    sizes = [(folder / "base.pt").stat().st_size, out.stat().st_size]
    assert f"{sizes[0] / 1e6:.1f} MB before, {sizes[1] / 1e6:.1f} MB after" in shown
    assert "19 of 19 linear maps in int8" in shown
    assert re.search(r"result changes by \d+\.\d\d%: ", shown)


def test_json_has_what_the_table_has(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "int8.pt"
    options = ["--example", folder / "example.pt", "--skip", "query", "--json"]
    shown = json.loads(run_here("graft.py", "quantize", folder / "base.pt", "-o", out, *options).stdout)
    sizes = {"bytes_before": (folder / "base.pt").stat().st_size, "bytes_after": out.stat().st_size}
    assert {name: shown[name] for name in sizes} == sizes and 0 < shown["change_of_result"] < 1
    wanted = torchgraft.quantization_error(
        base("bert_sdpa", torch.float32), _VARIANT.arguments(make_batch([9, 5], 9, torch.float32)), skip=["query"]
    )
    errors = {entry.path: entry.error for entry in wanted}
    assert {entry["path"]: entry["error"] for entry in shown["linear_maps"] if not entry["kept"]} == errors
    kept = [entry for entry in shown["linear_maps"] if entry["kept"]]
    assert [(entry["roles"], entry["error"]) for entry in kept] == [(["query"], None)] * 3


def test_a_bare_file_needs_no_library(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "int8.pt"
    assert run_here("graft.py", "quantize", folder / "base.pt", "-o", out, "--skip", "ffn_out").returncode == 0
    code = f"import torch; m = torch.jit.load({str(out)!r}); m(torch.ones(2, 5).long(), torch.ones(2, 5).long())"
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=False).returncode == 0


def test_a_grafted_file_keeps_its_adapters(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "int8.pt"
    shown = run_here("graft.py", "quantize", folder / "grafted.pt", "-o", out)
    assert shown.returncode == 0, shown.stderr
    module = torch.jit.load(str(out))
    assert module.adapter_names() == ["task"] and module.active_adapter() == "task"
    assert torchgraft.verify(module) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--skip", "nothing"], "skip names 'nothing'"),
        (["--example", "missing.pt"], "cannot read example inputs"),
    ],
)
def test_errors_leave_nothing_behind(folder: Path, tmp_path: Path, options: list[str], message: str) -> None:
    shown = run_here("graft.py", "quantize", folder / "base.pt", "-o", tmp_path / "out.pt", *options)
    assert shown.returncode == 1 and message in shown.stderr and list(tmp_path.iterdir()) == []


def test_quiet_says_nothing(folder: Path, tmp_path: Path) -> None:
    shown = run_here("graft.py", "quantize", folder / "base.pt", "-o", tmp_path / "out.pt", "--quiet")
    assert (shown.returncode, shown.stdout, shown.stderr) == (0, "", "") and (tmp_path / "out.pt").exists()


def test_it_does_not_write_over_its_base(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.pt"
    copy.write_bytes((folder / "base.pt").read_bytes())
    shown = run_here("graft.py", "quantize", copy, "-o", copy)
    assert shown.returncode == 1 and "this is a file that is read" in shown.stderr
    assert copy.read_bytes() == (folder / "base.pt").read_bytes()
