"""Shows the progress of a run: on a terminal, as lines of text, in TensorBoard."""

import contextlib
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..errors import GraftError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class Listener:
    """The Trainer of rank 0 calls these methods. Here they do nothing."""

    def started(self, done_steps: int, total_steps: int) -> None:
        """Called before the first step. done_steps: steps of the run before, if this run resumes it."""

    def stepped(self, step: int, loss: float, learning_rate: float, gradient_norm: float) -> None:
        """Called after each step, with the mean loss of its examples and the norm of the gradients before clipping."""

    def epoch_ended(self, record: dict[str, Any]) -> None:
        """Called after each epoch, with its record in TrainingResult.history."""

    def ended(self) -> None:
        """Called after the last step, and after an error, even one in started()."""


def describe_epoch(record: dict[str, Any]) -> str:
    """Describes the record of an epoch in one line."""
    text = f"epoch {record['epoch']}: loss {record['train_loss']:.4f}"
    if "validation_accuracy" in record:
        text += (f", validation loss {record['validation_loss']:.4f}, accuracy {record['validation_accuracy']:.3f}, "
                 f"macro-F1 {record['validation_macro_f1']:.3f}")  # fmt: skip
    return f"{text}, {record['seconds']:.1f} s"


class ProgressBar(Listener):
    """Shows steps, the remaining time and the loss as a bar on a terminal. Elsewhere it prints one line per epoch."""

    def __init__(self, stream: TextIO = sys.stderr):
        self._console = Console(file=stream, highlight=False, markup=False)
        self._bar = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
            TimeRemainingColumn(), TextColumn("loss {task.fields[loss]}"), console=self._console,
            disable=not self._console.is_terminal,
        )  # fmt: skip
        self._smooth: float | None = None

    def started(self, done_steps: int, total_steps: int) -> None:
        self._task = self._bar.add_task("", total=total_steps, completed=done_steps, loss="-")
        self._bar.start()

    def stepped(self, step: int, loss: float, learning_rate: float, gradient_norm: float) -> None:
        self._smooth = loss if self._smooth is None else 0.9 * self._smooth + 0.1 * loss
        self._bar.update(self._task, completed=step, loss=f"{self._smooth:.4f}")

    def epoch_ended(self, record: dict[str, Any]) -> None:
        self._console.print(describe_epoch(record), soft_wrap=True)

    def ended(self) -> None:
        self._bar.stop()


class TensorBoardLog(Listener):
    """Writes scalars for TensorBoard: loss, learning rate and gradient norm of each step, scores of each epoch.

    Raises:
        GraftError: the package tensorboard is not installed.
    """

    def __init__(self, folder: Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise GraftError(f"TensorBoard logs need the package tensorboard ({error}); run scripts/setup --train, "
                             "or give --no-tensorboard") from error  # fmt: skip
        self._make, self._folder = SummaryWriter, folder
        self._writer: SummaryWriter | None = None
        self._hook = threading.excepthook

    def started(self, done_steps: int, total_steps: int) -> None:
        try:
            # TensorBoard drops what an earlier run has logged from this step on: a killed run beyond its last
            # checkpoint.
            with self._named_errors():
                self._writer = self._make(str(self._folder), purge_step=done_steps + 1)
        finally:
            threading.excepthook = self._thread_ended

    def stepped(self, step: int, loss: float, learning_rate: float, gradient_norm: float) -> None:
        with self._named_errors():
            for name, value in (("loss", loss), ("learning_rate", learning_rate), ("gradient_norm", gradient_norm)):
                self._running().add_scalar(f"train/{name}", value, step)

    def epoch_ended(self, record: dict[str, Any]) -> None:
        with self._named_errors():
            for name, value in record.items():
                if name.startswith("validation_"):
                    self._running().add_scalar(f"validation/{name.removeprefix('validation_')}", value, record["step"])
            self._running().flush()

    def ended(self) -> None:
        threading.excepthook = self._hook
        if self._writer is not None:
            # A full disk may have ended the run already: then that error is the one to show.
            with self._named_errors() if sys.exc_info()[0] is None else contextlib.suppress(OSError):
                self._writer.close()

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise GraftError(
                f"{self._folder}: cannot write logs ({error.strerror}); --no-tensorboard writes none"
            ) from error

    def _thread_ended(self, ended: Any) -> None:
        """TensorBoard writes in a thread. What goes wrong there is raised again where the trainer logs next: the
        thread's own trace would come before that message."""
        if not issubclass(ended.exc_type, OSError):
            self._hook(ended)

    def _running(self) -> "SummaryWriter":
        assert self._writer is not None, "started() comes first"
        return self._writer
