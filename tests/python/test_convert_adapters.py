"""torchgraft convert: adapters that the library saved become readable without pickle."""

import pickle
import subprocess
from pathlib import Path

import pytest
import torch
import transformers

import adapters
import torchgraft
from scripts_here import run_here, run_process
from torchgraft.adapter_hub import PICKLE_FILE, SAFETENSORS_FILE


def convert(folder: Path) -> subprocess.CompletedProcess:
    return run_here("graft.py", "convert", folder)


class Bomb:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return (open, (str(self.target), "w"))


@pytest.fixture
def folder(tmp_path):
    """What the library writes: first/ (UniPELT) and second/ (MAM)."""
    sizes = dict(hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20, vocab_size=30)
    model = transformers.BertModel(transformers.BertConfig(**sizes))
    adapters.init(model)
    for name, config in (("first", "unipelt"), ("second", "mam")):
        model.add_adapter(name, config)
        model.save_adapter(str(tmp_path / name), name)
    return tmp_path


@pytest.mark.quick
def test_weights_stay_what_they_are(folder):
    result = convert(folder)
    assert result.returncode == 0, result.stderr
    for name in ("first", "second"):
        expected = torch.load(folder / name / PICKLE_FILE, weights_only=True)
        got = torchgraft.load_adapter_directory(folder / name).weights
        assert (folder / name / SAFETENSORS_FILE).exists() and got.keys() == expected.keys()
        assert all(torch.equal(got[key], value) for key, value in expected.items())
    before = (folder / "first" / SAFETENSORS_FILE).stat().st_mtime_ns
    assert "was converted before" in convert(folder).stdout
    assert (folder / "first" / SAFETENSORS_FILE).stat().st_mtime_ns == before


def test_what_holds_code_is_refused_and_the_others_are_converted(folder):
    target = folder / "ran"
    (folder / "first" / PICKLE_FILE).write_bytes(pickle.dumps(Bomb(target)))
    (folder / "broken").mkdir()
    (folder / "broken" / PICKLE_FILE).write_bytes(b"garbage")
    result = run_process("convert_adapters.py", folder)
    assert result.returncode == 1
    assert "holds more than plain tensors" in result.stderr and "broken" in result.stderr
    assert not target.exists() and not (folder / "first" / SAFETENSORS_FILE).exists()
    assert (folder / "second" / SAFETENSORS_FILE).exists()


def test_a_folder_without_adapters(tmp_path):
    result = convert(tmp_path)
    assert result.returncode == 1 and "no pytorch_adapter.bin" in result.stderr
