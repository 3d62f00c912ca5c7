"""Checkpoints are whole or not there, and nothing but data is read from them."""

import resource
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from torchgraft import GraftError
from torchgraft._libraries import patcher
from torchgraft.training.checkpoint import (
    BestEpoch,
    TrainingState,
    check_same_run,
    load_checkpoint,
    save_checkpoint,
)

pytestmark = pytest.mark.quick


def _state(step: int = 7) -> TrainingState:
    weight = torch.nn.Parameter(torch.randn(3, generator=torch.Generator().manual_seed(step)))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    return TrainingState(
        {"seed": 1}, {"weight": weight.detach()}, optimizer.state_dict(), {"last_epoch": step}, [torch.get_rng_state()],
        epoch=2, batches_done=3, step=step, loss_sum=0.1, rows=9, seconds=1.5,
        best=BestEpoch(1, 0.5, {"weight": torch.ones(3)}), epochs_without_gain=1, history=[{"epoch": 1, "loss": 0.25}],
    )  # fmt: skip


def _flat(value: object) -> list:
    """Everything in a nest of dicts, lists and dataclasses, tensors as bytes: comparable by ==."""
    if isinstance(value, torch.Tensor):
        return [value.dtype, tuple(value.shape), value.numpy().tobytes()]
    if isinstance(value, dict):
        return [[key, _flat(one)] for key, one in value.items()]
    if isinstance(value, list | tuple):
        return [_flat(one) for one in value]
    if isinstance(value, TrainingState | BestEpoch):
        return [[field.name, _flat(getattr(value, field.name))] for field in fields(value)]
    return [value]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    state = _state()
    save_checkpoint(state, tmp_path / "checkpoint.pt")
    assert _flat(load_checkpoint(tmp_path / "checkpoint.pt")) == _flat(state)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(_state(7), path)

    file = patcher().TemporaryFile
    write, limits = file.write, resource.getrlimit(resource.RLIMIT_FSIZE)

    def write_to_full_disk(*arguments: object) -> None:
        """The system lets no file grow beyond the limit: write() fails as it does on a full disk."""
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            write(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(file, "write", write_to_full_disk)
    with pytest.raises(GraftError, match="checkpoint.pt: cannot write .File too large"):
        save_checkpoint(_state(8), path)
    assert load_checkpoint(path).step == 7
    assert [one.name for one in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_damaged_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(GraftError, match="cannot read the checkpoint"):
        load_checkpoint(path)
    save_checkpoint(_state(), path)
    whole = path.read_bytes()
    for content in (b"", b"not a checkpoint", whole[: len(whole) // 2], whole[:-30]):
        path.write_bytes(content)
        with pytest.raises(GraftError, match="checkpoint.pt: not a checkpoint"):
            load_checkpoint(path)
    torch.save({"format": 1, "step": 3}, path)
    with pytest.raises(GraftError, match="not a checkpoint: its entries are step"):
        load_checkpoint(path)
    torch.save({"format": 99}, path)
    with pytest.raises(GraftError, match="not a checkpoint of this version"):
        load_checkpoint(path)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self):
            return (Path(tmp_path / "ran").write_text, ("ran",))

    torch.save({"format": 1, "step": Harmful()}, tmp_path / "checkpoint.pt")
    with pytest.raises(GraftError, match="not a checkpoint, or damaged"):
        load_checkpoint(tmp_path / "checkpoint.pt")
    assert not (tmp_path / "ran").exists()


def test_another_runs_checkpoint_is_not_gone_on_with(tmp_path: Path) -> None:
    check_same_run(_state(), {"seed": 1}, tmp_path)
    with pytest.raises(GraftError, match="seed was 1, is 2"):
        check_same_run(_state(), {"seed": 2}, tmp_path)
    with pytest.raises(GraftError, match="model was None, is x"):
        check_same_run(_state(), {"seed": 1, "model": "x"}, tmp_path)
