"""What is shown of a run."""

import errno
import os
import threading
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter

from torchgraft import GraftError
from torchgraft.training import TensorBoardLog


def test_a_full_disk_is_one_error_without_the_thread_s_trace(tmp_path: Path, monkeypatch, capfd) -> None:
    def write(self: object, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(RecordWriter, "write", write)
    log = TensorBoardLog(tmp_path)
    hook = threading.excepthook

    def run() -> None:
        log.started(0, 6)
        for step in range(1, 1000):
            log.stepped(step, 1.0, 1.0, 1.0)
        log.epoch_ended({"epoch": 1, "step": 6, "validation_loss": 1.0})

    with pytest.raises(GraftError, match="cannot write logs .No space left on device.; --no-tensorboard"):
        run()
    monkeypatch.undo()
    log.ended()
    assert threading.excepthook is hook and capfd.readouterr().err == ""


@pytest.mark.parametrize(("done", "expected"), [(0, [1, 2]), (3, [1, 2, 3, 4, 5])])
def test_the_log_has_one_run(done: int, expected: list[int], tmp_path: Path) -> None:
    """Begun anew, or gone on with from step `done`, after a process that logged six steps."""
    for first, last in ((0, 6), (done, done + 2)):
        log = TensorBoardLog(tmp_path)
        log.started(first, 6)
        for step in range(first + 1, last + 1):
            log.stepped(step, float(first), 1.0, 1.0)
            if step == 6:
                log.epoch_ended({"epoch": 1, "step": 6, "validation_loss": 1.0})
        log.ended()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == expected
    assert events.Scalars("train/loss")[-1].value == done
    assert events.Scalars("validation/loss") == []
