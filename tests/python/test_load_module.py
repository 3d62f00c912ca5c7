"""Loading a .pt: what torch.jit.load takes although it holds less of a tensor than its shape says is refused."""

import contextlib
import pickletools
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import torchgraft
from scripts_here import run_here
from torchgraft._libraries import patcher

pytestmark = pytest.mark.quick


SHIFT = torch.arange(4.0)  # a constant of the trace


class Shift(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + SHIFT


class Model(torch.nn.Module):
    """With tensors of several types, a view, a constant, and tensors in a list and in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.arange(12.0).view(3, 4))
        self.register_buffer("view", torch.arange(20, dtype=torch.int64)[4:12].view(2, 4).t())
        self.register_buffer("scalar", torch.tensor(2.5, dtype=torch.bfloat16))
        self.register_buffer("empty", torch.zeros(0, 3))
        self.parts = [torch.ones(2), torch.ones(300, dtype=torch.half)]
        self.shift = torch.jit.trace(Shift(), torch.ones(4))
        self.named = {"a": torch.ones(5, dtype=torch.bool)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shift(x @ self.weight) + self.parts[0].sum() + self.named["a"].sum() + self.scalar


def saved(path: Path, module: torch.nn.Module | None = None) -> Path:
    torch.jit.script(module or Model()).save(path)
    return path


def rewritten(path: Path, change: Callable[[str, bytes], bytes]) -> Path:
    """The file with each of its records as `change(name, content)` returns it."""
    other = path.with_name("changed.pt")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(other, "w") as target:
        for name in source.namelist():
            target.writestr(name, change(name.partition("/")[2], source.read(name)))
    return other


def records(path: Path) -> list[str]:
    with zipfile.ZipFile(path) as file:
        names = [entry.filename.partition("/")[2] for entry in file.infolist() if entry.file_size > 0]
    return [name for name in names if name.startswith(("data/", "constants/"))]


def test_a_whole_file_is_loaded(tmp_path: Path) -> None:
    path = saved(tmp_path / "model.pt")
    x = torch.ones(2, 3)
    assert torch.equal(torchgraft.load_module(path)(x), torch.jit.load(path)(x))
    assert any(name.startswith("constants/") for name in records(path)) and len(records(path)) == 7


def test_every_record_that_is_short_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path / "model.pt")
    for record in records(path):
        short = rewritten(path, lambda name, content, record=record: content[:-1] if name == record else content)
        torch.jit.load(short)  # takes it
        with pytest.raises(torchgraft.GraftError, match=rf"its record {record.split('/')[1]} has \d+ bytes, expected"):
            torchgraft.load_module(short)


def test_a_shape_beyond_its_data_is_refused(tmp_path: Path) -> None:
    """The pickle says 3 x 4 of 12 elements, and is changed to say 3 x 5."""
    path = saved(tmp_path / "model.pt")

    def larger(name: str, content: bytes) -> bytes:
        if name != "data.pkl":
            return content
        sizes = b"(K\x03K\x04t"
        assert content.count(sizes) == 1
        return content.replace(sizes, b"(K\x03K\x05t")

    with pytest.raises(torchgraft.GraftError, match="holds 12 elements, which is less than a tensor's shape needs"):
        torchgraft.load_module(rewritten(path, larger))


def test_every_damage_of_the_pickle_is_an_error_or_harmless(tmp_path: Path) -> None:
    path = saved(tmp_path / "model.pt")
    with zipfile.ZipFile(path) as file:
        pickle = file.read("model/data.pkl")
    places = [place for _, _, place in pickletools.genops(pickle) if place]
    for place in places:
        for byte in (0, 0x28, 0x51, 0x52, 0x74, 0x86, 0xFF):
            bad = pickle[:place] + bytes([byte]) + pickle[place + 1 :]
            changed = rewritten(path, lambda name, content, bad=bad: bad if name == "data.pkl" else content)
            with contextlib.suppress(torchgraft.GraftError):
                patcher().check_tensor_records(str(changed))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_quantised_and_frozen_modules_are_loaded(tmp_path: Path) -> None:
    linear = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU())
    for module in (
        torch.ao.quantization.quantize_dynamic(linear, dtype=torch.qint8),
        torch.ao.quantization.quantize_dynamic(
            linear, {torch.nn.Linear: torch.ao.quantization.per_channel_dynamic_qconfig}
        ),
    ):
        path = saved(tmp_path / "model.pt", module)
        x = torch.ones(2, 8)
        assert torch.equal(torchgraft.load_module(path)(x), torch.jit.load(path)(x))
    torch.jit.freeze(torch.jit.script(linear.eval())).save(tmp_path / "frozen.pt")
    assert torchgraft.load_module(tmp_path / "frozen.pt")(torch.ones(1, 8)).shape == (1, 8)


def test_commands_refuse_it_in_one_line(tmp_path: Path) -> None:
    path = rewritten(saved(tmp_path / "model.pt"), lambda name, content: content[:8] if name == "data/0" else content)
    done = run_here("graft.py", "inspect", path)
    assert done.returncode == 1 and "its record 0 has 8 bytes, expected 48" in done.stderr
