"""Saves and loads the state of a training run, so that it can go on after it was killed."""

import io
import pickle
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._files import reason, write_whole
from .._libraries import patcher
from ..errors import GraftError

_FORMAT = 1


@dataclass
class BestEpoch:
    """The epoch with the best validation score so far, and its weights."""

    epoch: int
    score: float
    parameters: dict[str, Tensor]


@dataclass
class TrainingState:
    """The state of a run between two steps, except what follows from its settings.

    Attributes:
        settings: what a resumed run must share with the run before: options, data, model.
        parameters: the trained weights, by name.
        optimizer, scheduler: their state_dict().
        random: the state of torch's generator in each process.
        epoch, batches_done: the position in the run: complete epochs, and complete batches of the current epoch.
        step: steps of the optimizer so far.
        loss_sum, rows: the sum of losses and the number of rows of the current epoch so far, over all processes.
        seconds: the time of the current epoch so far.
        best: the best epoch. None before the first validation.
        epochs_without_gain: epochs since the best one.
        history: a record of each epoch.
        finished: whether the run has ended.
        arguments: the options of the command line, for one that goes on. Empty: the run has none, or is of before.
    """

    settings: dict[str, Any]
    parameters: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    scheduler: dict[str, Any] = field(default_factory=dict)
    random: list[Tensor] = field(default_factory=list)
    epoch: int = 0
    batches_done: int = 0
    step: int = 0
    loss_sum: float = 0.0
    rows: int = 0
    seconds: float = 0.0
    best: BestEpoch | None = None
    epochs_without_gain: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    finished: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(state: TrainingState, path: Path) -> None:
    """Writes a checkpoint with write_whole(): whenever the process is killed, `path` holds a whole checkpoint.

    Raises:
        GraftError: the file cannot be written, for example because the disk is full. `path` keeps its content.
    """
    content = {name.name: getattr(state, name.name) for name in fields(state)}
    content["best"] = None if state.best is None else {
        "epoch": state.best.epoch, "score": state.best.score, "parameters": state.best.parameters,
    }  # fmt: skip
    buffer = io.BytesIO()
    torch.save({"format": _FORMAT, **content}, buffer)
    write_whole(buffer.getvalue(), path)


def load_checkpoint(path: Path) -> TrainingState:
    """Reads what save_checkpoint() wrote. Unpickles only tensors and plain values.

    Raises:
        GraftError: the file is missing, damaged, or not a checkpoint.
    """
    try:
        written = path.read_bytes()
    except OSError as error:
        raise GraftError(f"{path}: cannot read the checkpoint ({error.strerror or error})") from error
    try:
        content = torch.load(io.BytesIO(written), map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, EOFError, KeyError, OSError, pickle.UnpicklingError) as error:
        raise GraftError(f"{path}: not a checkpoint, or damaged ({reason(error).splitlines()[0]})") from error
    if not isinstance(content, dict) or content.pop("format", None) != _FORMAT:
        raise GraftError(f"{path}: not a checkpoint of this version of torchgraft")
    is_whole = set(content) | {"arguments"} == {name.name for name in fields(TrainingState)}
    if not is_whole or not isinstance(content.get("arguments", {}), dict):
        raise GraftError(f"{path}: not a checkpoint: its entries are {', '.join(map(str, content))}")
    best = content.pop("best")
    return TrainingState(**content, best=None if best is None else BestEpoch(**best))


def _is_same(name: str, before: Any, now: Any) -> bool:
    if before == now or name != "config" or not (isinstance(before, str) and isinstance(now, str)):
        return bool(before == now)
    read = patcher().config_from_string  # which opens no file that a stranger's checkpoint names
    try:  # one configuration has several spellings
        return bool(read(before) == read(now))
    except GraftError:  # one of them is the hash of a file: see _identity() in _command.py
        return False


def check_same_run(state: TrainingState, settings: dict[str, Any], path: Path) -> None:
    """Compares the settings of a checkpoint with those of this run. To mix two runs would give the weights of neither.

    Raises:
        GraftError: a setting differs. The message names it with both values.
    """
    changed = [name for name in sorted(state.settings.keys() | settings.keys())
               if not _is_same(name, state.settings.get(name), settings.get(name))]  # fmt: skip
    if changed:
        told = ", ".join(f"{name} was {state.settings.get(name)}, is {settings.get(name)}" for name in changed)
        raise GraftError(f"{path}: the checkpoint is of another run: {told}; give those settings, or start anew")
