"""scripts/graft.py: what it prints and when; full disks and closed pipes."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import torchgraft
from grafted import base, grafted
from odd_layers import Plain as AttentionOnly
from odd_layers import TwoLayers, batch
from scripts_here import SCRIPTS, run_here


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("messages")
    base("bert_sdpa", torch.float32).save(folder / "base.pt")
    grafted("bert_sdpa", torch.float32, "unipelt").save(folder / "model.pt")
    torchgraft.save_adapter(grafted("bert_sdpa", torch.float32, "unipelt"), "task", folder / "saved")
    return folder


def test_a_configuration_that_is_none_is_said_before_anything_is_printed(folder: Path) -> None:
    done = run_here("graft.py", "inspect", folder / "base.pt", "--config", "unipel")
    assert (done.returncode, done.stdout) == (1, "") and "no configuration is called 'unipel'" in done.stderr


def test_a_stranger_s_text_commands_no_terminal(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "\x1b[31m\x07\x9b31m"}))
    done = run_here("graft.py", "load", folder / "base.pt", tmp_path, "-o", tmp_path / "out.pt")
    assert done.returncode == 1 and "PEFT's ?[31m??31m is not supported" in done.stderr
    assert done.stderr.rstrip("\n").isprintable()


def test_add_tells_the_adapter_s_size_from_the_file_s(folder: Path, tmp_path: Path) -> None:
    done = run_here("graft.py", "add", folder / "base.pt", "-o", tmp_path / "out.pt", "--config", "lora", "--name", "a")
    (info,) = torchgraft.list_adapters(torch.jit.load(tmp_path / "out.pt"))
    size = (tmp_path / "out.pt").stat().st_size
    expected = f"{info.parameters:,} parameters added ({info.bytes / 1e3:.1f} kB); the file has {size / 1e3:.1f} kB; "
    assert expected in done.stdout and info.bytes < 100_000 < size < 1_000_000


def test_a_reader_that_closes_the_pipe_is_told_nothing(folder: Path) -> None:
    command = f"{sys.executable} {SCRIPTS / 'graft.py'} match {folder / 'base.pt'} {folder / 'saved'}"
    # The reader ends before the first line is written.
    done = subprocess.run(f"{command} | true; exit ${{PIPESTATUS[0]}}", shell=True, executable="/bin/bash", text=True,
                          capture_output=True, timeout=300)  # fmt: skip
    assert (done.returncode, done.stderr) in ((0, ""), (141, ""))  # it may be written before the reader ends


@pytest.mark.parametrize("safetensors", [True, False])
def test_a_full_disk_leaves_no_directory_and_names_the_file(safetensors: bool, tmp_path: Path) -> None:
    module = grafted("bert_sdpa", torch.float32, "unipelt")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (99, limits[1]))
    try:
        with pytest.raises(torchgraft.GraftError) as raised:
            torchgraft.save_adapter(module, "task", tmp_path / "new" / "saved", safetensors=safetensors)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(tmp_path / "new" / "saved") in str(raised.value) and "cannot write (File too large)" in str(raised.value)
    assert "torchgraft-tmp" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_a_note_of_all_layers_stands_once(tmp_path: Path) -> None:
    module = torch.jit.trace(TwoLayers(AttentionOnly()).eval(), batch(), check_trace=False)
    with pytest.raises(torchgraft.GraftError, match="no output_adapter in layers 0, 1") as raised:
        torchgraft.graft(module, "seq_bn", "task")
    assert str(raised.value).count("feed-forward") == 1 and "; layers 0, 1: " in str(raised.value)
    module.save(tmp_path / "two.pt")
    shown = run_here("graft.py", "inspect", tmp_path / "two.pt").stdout
    assert shown.count("feed-forward") == 1 and "layers 0-1, self attention: " in shown
