"""Trains one adapter of a grafted module, or the AdapterFusion layers of a composition, with its head."""

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from .. import fusion_regularization_loss, list_adapters, trainable_parameters
from .._files import remove_leftovers
from .._reading import parse_json
from .._text import text_arguments
from ..composition import adapters_of, has_block
from ..errors import GraftError
from .batches import Batch, EncodedExamples, collate, scoring_batches, training_batches
from .checkpoint import (
    BestEpoch,
    TrainingState,
    check_same_run,
    load_checkpoint,
    save_checkpoint,
)
from .listeners import Listener
from .metrics import Scores, confusion_matrix, scores_of
from .options import DEFAULT_RATES, TrainingOptions
from .schedule import learning_rate_factor
from .workers import Workers


@dataclass(frozen=True)
class TrainingResult:
    """The result of a run.

    Attributes:
        history: one record per epoch: "epoch", "step", "train_loss", "seconds", and "validation_..." scores.
        best_epoch: the epoch whose weights the module has. 0: there were no validation examples, and the module has the
            weights of the last epoch.
        stopped_early: whether `patience` has ended the run.
        steps: steps of the optimizer.
    """

    history: list[dict[str, Any]] = field(default_factory=list)
    best_epoch: int = 0
    stopped_early: bool = False
    steps: int = 0


def score(
    module: torch.jit.ScriptModule, examples: EncodedExamples, num_labels: int, batch_size: int = 64,
    workers: Workers | None = None,
) -> Scores:  # fmt: skip
    """Scores the active adapter's head on examples, in eval mode.

    Args:
        module: a grafted module whose active adapter has a classification head, on the workers' device.
        examples: the tokenised examples.
        num_labels: the number of classes.
        batch_size: the number of examples in one batch, over all processes.
        workers: the processes that score together. None: this process alone.

    Returns:
        The scores over all examples, the same in every process.

    Raises:
        GraftError: forward needs an argument that a text does not give.
    """
    workers = workers or Workers()
    was_training = module.training
    module.eval()
    confusion = torch.zeros(num_labels, num_labels, dtype=torch.float64)
    loss = torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        for indices in scoring_batches(examples.lengths(), batch_size):
            batch = collate(examples, indices, workers.part(), workers.device)
            if batch is not None:
                logits = class_scores(module, batch).float()
                loss += cross_entropy(logits, batch.labels, reduction="sum").double().cpu()
                confusion += confusion_matrix(logits.argmax(-1), batch.labels, num_labels).cpu()
    module.train(was_training)
    workers.add_up([confusion, loss])
    return scores_of(confusion, loss.item() / max(1, len(examples)))


def class_scores(module: torch.jit.ScriptModule, batch: Batch) -> Tensor:
    """Returns the logits of the active adapter's head: [B, L], floating."""
    return module.forward_with_head(*text_arguments(module.forward_with_head, batch.values, "training"))


def _has_parallel(config: Mapping[str, Any]) -> bool:
    """Returns whether a method of a configuration, as adapter_config.json holds it, is a parallel bottleneck."""
    return bool(config.get("is_parallel")) or any(map(_has_parallel, config.get("configs", ())))


def _configs_of(module: torch.jit.ScriptModule, name: str) -> list[dict[str, Any]]:
    """Returns the configuration of an adapter, or those of the adapters of a composition."""
    configs = {info.name: parse_json(info.config, info.name) for info in list_adapters(module)}
    is_composition = "children" in configs[name]
    return [configs[part] for part in (adapters_of(configs[name]) if is_composition else [name])]


def _check_rows(module: torch.jit.ScriptModule, name: str) -> None:
    """Raises GraftError where a row of the examples has several results, and one label."""
    for info in list_adapters(module):
        if info.name != name or not info.composition:
            continue
        tree = parse_json(info.config, name)
        if has_block(tree, "Parallel"):
            raise GraftError(f"training: '{name}', {info.composition}, has a Parallel, whose rows have a result for "
                             "each child; train its children one by one")  # fmt: skip
        if has_block(tree, "MultiTask"):
            raise GraftError(f"training: '{name}', {info.composition}, has a MultiTask, whose rows need the ids of "
                             "their tasks, which no file of examples has; train its children one by one")  # fmt: skip


def _part_of(key: str, parallel: bool) -> str:
    """Returns whether a parameter belongs to the "head", a "prefix", a "parallel" bottleneck, a "fusion" or else the
    "adapter", by its name in the module. Ignores what the user has chosen in it: "adapter_NAME", "SLOT_dropout_NAME".

    Args:
        parallel: whether the adapter has parallel bottlenecks: the factors of a Compacter do not say what they make.
    """
    parts = [name.partition("_dropout_")[0] for name in key.split(".") if not name.startswith("adapter_")]
    if "heads" in parts:
        return "head"
    if any(name.startswith("fusion_") for name in parts):
        return "fusion"
    if any(name.endswith(("_prefix", "_prefix_source")) for name in parts):
        return "prefix"
    is_parallel = any("_adapter_par_" in name or (parallel and name.endswith("_adapter_source")) for name in parts)
    return "parallel" if is_parallel or (parallel and "shared_phm_source" in parts) else "adapter"


def _optimizer(parameters: Mapping[str, Tensor], parallel: bool, options: TrainingOptions) -> torch.optim.AdamW:
    groups = [{"params": [value for key, value in parameters.items() if _part_of(key, parallel) == part],
               "lr": options.rate_of(part)} for part in DEFAULT_RATES]  # fmt: skip
    if not groups[-1]["params"]:  # of a fusion, which checkpoints of before do not have
        groups.pop()
    return torch.optim.AdamW(groups, weight_decay=options.weight_decay)


class Trainer:
    """One run. AdamW minimises the mean cross entropy; it changes the weights of the adapter and its head, not the
    base.

    Args:
        module: a grafted module whose adapter `name` is trainable and has a classification head, on the workers'
            device. The run changes the adapter's weights in place.
        name: the adapter; or a composition, of which all that is trainable is trained: an adapter in a Stack, or the
            AdapterFusion layers of a Fuse. Then the loss has fusion_regularization_loss(), too.
        training, validation: tokenised examples. Without validation examples the last epoch is kept.
        num_labels: the number of classes.
        options: how to train.
        checkpoint: where to write checkpoints. None: the run writes none.
        identity: further settings that a resumed run must share with its checkpoint (the files, the model).
        arguments: the options of the command line, which checkpoints keep. None: there is none.
        workers: the processes that train together. None: this process alone.
        listeners: their methods are called as the run proceeds, on rank 0 only.

    Raises:
        GraftError: there are no training examples, or the adapter is unknown or frozen.
    """

    def __init__(
        self, module: torch.jit.ScriptModule, name: str, training: EncodedExamples,
        validation: EncodedExamples | None, num_labels: int, options: TrainingOptions, *,
        checkpoint: Path | None = None, identity: Mapping[str, Any] | None = None,
        arguments: Mapping[str, Any] | None = None, workers: Workers | None = None, listeners: Sequence[Listener] = (),
    ):  # fmt: skip
        if len(training) == 0:
            raise GraftError("training: there are no training examples")
        self._module, self._name, self._training, self._validation = module, name, training, validation
        self._num_labels, self._options, self._checkpoint = num_labels, options, checkpoint
        self._workers = workers or Workers()
        self._listeners = list(listeners) if self._workers.rank == 0 else []
        _check_rows(module, name)
        module.activate(name)
        self._parameters = trainable_parameters(module, name)
        self._workers.take_from_first(list(self._parameters.values()))
        # Of all processes the first one adds it: their gradients are summed.
        self._regularised = self._workers.rank == 0 and any(key.endswith(".value_weight") for key in self._parameters)
        batches = math.ceil(len(training) / options.batch_size)
        self._total_steps = options.epochs * math.ceil(batches / options.accumulate)
        parallel = any(_has_parallel(config) for config in _configs_of(module, name))
        self._optimizer = _optimizer(self._parameters, parallel, options)
        factor = learning_rate_factor(options.schedule, round(options.warmup * self._total_steps), self._total_steps)
        self._scheduler = torch.optim.lr_scheduler.LambdaLR(self._optimizer, factor)
        torch.manual_seed(options.seed + self._workers.rank)  # for dropout, which differs between processes
        settings = {**options.as_dict(), "processes": self._workers.size, "examples": len(training), "adapter": name}
        del settings["checkpoint_every"]
        self._state = TrainingState({**settings, **(identity or {})}, arguments=dict(arguments or {}))

    def run(self, resume: bool = False) -> TrainingResult:
        """Trains to the end, and leaves the best epoch's weights in the module.

        Args:
            resume: go on from the checkpoint, if there is one. The run then ends with the weights of a run that was not
                interrupted.

        Raises:
            GraftError: the loss before or after a step, or a gradient, is not finite; or a checkpoint cannot be
                written, or is of another run. The last checkpoint is then whole, and from before that step.
        """
        if self._checkpoint is not None:
            if self._workers.rank == 0:
                remove_leftovers(self._checkpoint)
            if resume and self._checkpoint.exists():
                self._restore(load_checkpoint(self._checkpoint))
            else:
                self._save()  # fails now, not after an epoch, if the disk is full
        state = self._state
        with ExitStack() as ends:
            for listener in self._listeners:
                ends.callback(listener.ended)
                listener.started(state.step, self._total_steps)
            while not state.finished:
                self._train_epoch()
                self._end_epoch()
                self._save()
        self._module.eval()
        if state.best is not None:
            self._set_parameters(state.best.parameters)
        return TrainingResult(state.history, state.best.epoch if state.best else 0,
                              state.epoch < self._options.epochs, state.step)  # fmt: skip

    def _train_epoch(self) -> None:
        """Trains from the current position to the end of the epoch."""
        options, state = self._options, self._state
        self._module.train()
        batches = training_batches(self._training.lengths(), options.batch_size, options.seed, state.epoch)
        while state.batches_done < len(batches):
            chosen = batches[state.batches_done : state.batches_done + options.accumulate]
            started = time.perf_counter()
            self._step(chosen)
            state.seconds += time.perf_counter() - started
            state.batches_done += len(chosen)
            ended = state.batches_done >= len(batches)
            if ended or state.step % options.checkpoint_every == 0:
                rows = self._training.chosen(chosen[-1])
                scores = score(self._module, rows, self._num_labels, workers=self._workers)
                self._check_loss(scores.loss, "its own examples")
                if not ended:
                    self._save()

    def _step(self, batches: list[list[int]]) -> None:
        """Makes one step of the optimizer, on the mean loss over all rows of `batches` in all processes."""
        state, rows = self._state, sum(map(len, batches))
        self._optimizer.zero_grad(set_to_none=True)
        loss_sum = torch.zeros((), dtype=torch.float64)
        for indices in batches:
            batch = collate(self._training, indices, self._workers.part(), self._workers.device)
            if batch is not None:
                loss = cross_entropy(class_scores(self._module, batch).float(), batch.labels, reduction="sum")
                (loss / rows).backward()
                loss_sum += loss.detach().double().cpu()
        if self._regularised:
            fusion_regularization_loss(self._module, self._name).backward()
        parameters = list(self._parameters.values())
        gradients = []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        self._workers.add_up([loss_sum, *gradients])
        norm = torch.nn.utils.clip_grad_norm_(parameters, self._options.clip or math.inf).item()
        if not (math.isfinite(loss_sum.item()) and math.isfinite(norm)):
            self._refuse(loss_sum.item() / rows, norm, [index for indices in batches for index in indices])
        learning_rate = self._scheduler.get_last_lr()[0]
        self._optimizer.step()
        self._scheduler.step()
        state.step += 1
        state.loss_sum, state.rows = state.loss_sum + loss_sum.item(), state.rows + rows
        for listener in self._listeners:
            listener.stepped(state.step, loss_sum.item() / rows, float(learning_rate), norm)

    def _refuse(self, loss: float, norm: float, indices: list[int]) -> None:
        """Raises GraftError, before the step is made."""
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the norm of the gradients is {norm}"
        examples = ", ".join(self._training.where[index] for index in indices[:3])
        raise GraftError(
            f"training: {what} in step {self._state.step + 1} of {self._total_steps} (examples: {examples}, ...)"
            f"{self._kept()}. Lower the learning rate, or look at the examples"
        )

    def _check_loss(self, loss: float, where: str) -> None:
        """Raises GraftError if the loss is not finite. Too large a step shows only in the next forward pass; its
        weights must not be written."""
        if not math.isfinite(loss):
            raise GraftError(f"training: after step {self._state.step} of {self._total_steps} the loss on {where} is "
                             f"{loss}{self._kept()}. Lower the learning rate")  # fmt: skip

    def _kept(self) -> str:
        return f"; {self._checkpoint} is from before that step" if self._checkpoint else ""

    def _is_better(self, value: float, loss: float) -> bool:
        """Whether an epoch with this score is better than the best one. Of equal scores the lower loss decides."""
        best = self._state.best
        if best is None or value != best.score:
            return best is None or value > best.score
        return loss < self._state.history[best.epoch - 1]["validation_loss"]

    def _end_epoch(self) -> None:
        """Scores the validation examples, keeps the best weights, and decides whether the run goes on."""
        options, state = self._options, self._state
        state.epoch += 1
        record: dict[str, Any] = {"epoch": state.epoch, "step": state.step, "train_loss": state.loss_sum / state.rows,
                                  "seconds": state.seconds}  # fmt: skip
        state.batches_done, state.loss_sum, state.rows, state.seconds = 0, 0.0, 0, 0.0
        if self._validation is not None:
            scores = score(self._module, self._validation, self._num_labels, workers=self._workers)
            self._check_loss(scores.loss, "the validation examples")
            record |= {f"validation_{key}": value for key, value in asdict(scores).items()}
            value = -scores.loss if options.best_by == "loss" else getattr(scores, options.best_by)
            if self._is_better(value, scores.loss):
                state.best = BestEpoch(state.epoch, value, self._copy_parameters())
                state.epochs_without_gain = 0
            else:
                state.epochs_without_gain += 1
        state.history.append(record)
        out_of_patience = 0 < options.patience <= state.epochs_without_gain
        state.finished = state.epoch == options.epochs or out_of_patience
        for listener in self._listeners:
            listener.epoch_ended(record)

    def _copy_parameters(self) -> dict[str, Tensor]:
        return {key: value.detach().cpu().clone() for key, value in self._parameters.items()}

    def _set_parameters(self, values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for key, parameter in self._parameters.items():
                parameter.copy_(values[key])

    def _save(self) -> None:
        if self._checkpoint is None:
            return
        state = self._state
        generators = self._workers.gather(self._random_state())
        if self._workers.rank == 0:
            state.parameters, state.random = self._copy_parameters(), generators
            state.optimizer, state.scheduler = self._optimizer.state_dict(), self._scheduler.state_dict()
            save_checkpoint(state, self._checkpoint)

    def _random_state(self) -> Tensor:
        on_gpu = self._workers.device.type == "cuda"
        return torch.cuda.get_rng_state(self._workers.device) if on_gpu else torch.get_rng_state()

    def _restore(self, state: TrainingState) -> None:
        assert self._checkpoint is not None
        check_same_run(state, self._state.settings, self._checkpoint)
        if state.parameters.keys() != self._parameters.keys():
            raise GraftError(f"{self._checkpoint}: the checkpoint is of another adapter or head")
        self._set_parameters(state.parameters)
        self._optimizer.load_state_dict(state.optimizer)
        self._scheduler.load_state_dict(state.scheduler)
        if self._workers.device.type == "cuda":
            torch.cuda.set_rng_state(state.random[self._workers.rank], self._workers.device)
        else:
            torch.set_rng_state(state.random[self._workers.rank])
        state.arguments = self._state.arguments or state.arguments
        self._state = state
