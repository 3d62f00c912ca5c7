"""Where a process of a run computes."""

import pytest
import torch

from torchgraft import GraftError
from torchgraft.training import Workers

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(("device", "expected"), [("cuda", "cuda:2"), ("cuda:0", "cuda:0"), (None, "cuda:2")])
def test_each_process_has_a_gpu_of_its_own(device: str | None, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with four GPUs: set_device() takes no device without a number, as torch's."""
    chosen = []
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(device.index))
    monkeypatch.setattr(torch, "empty", lambda size, device: None)
    assert Workers.started_by_torchrun(device).device == torch.device(expected)
    assert chosen == [torch.device(expected).index]


def test_a_device_that_torch_does_not_see() -> None:
    with pytest.raises(GraftError, match="device 'cuda:99': "):
        Workers.started_by_torchrun("cuda:99")
