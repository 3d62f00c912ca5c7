"""The work of `torchgraft train`, on a parsed command line."""

import argparse
import contextlib
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from torchgraft_command.train_arguments import CHECKPOINT

from .. import (
    AdapterInfo,
    Fuse,
    HeadConfig,
    add_adapter_fusion,
    add_head,
    compose,
    freeze_adapter,
    graft,
    head_config,
    list_adapter_fusions,
    list_adapters,
    load_adapter,
    save_adapter,
    save_adapter_setup,
    unfreeze_adapter,
)
from .._console import say
from .._files import EXPECTED_ERRORS, extra_files, load_module, reason, save_module, write_whole
from .._libraries import load_others, version_text
from .._reading import parse_json
from .._steps import showing_steps, step
from .._text import load_tokenizer, text_limits
from ..adapter_setup import check_setup
from ..checkpoints import check_replaces
from ..configs import config_argument, config_fields
from ..errors import CommandLineError, GraftError
from ..grafting import is_grafted, names_of
from .batches import EncodedExamples, encode_examples
from .examples import Columns, Example, check_every_class, class_names, read_examples, split_examples
from .listeners import Listener, ProgressBar, TensorBoardLog
from .options import TrainingOptions
from .resuming import kept_options, with_kept_options
from .trainer import Trainer, TrainingResult, score
from .workers import Workers

__all__ = ["EXPECTED_ERRORS", "reason", "run"]

ADAPTER = "adapter"
DEFAULT_CONFIG = "unipelt"


@dataclass(frozen=True)
class Data:
    """The tokenised examples of a run, and the names of their classes."""

    names: list[str]
    training: EncodedExamples
    validation: EncodedExamples | None
    test: EncodedExamples | None


def run(arguments: argparse.Namespace) -> None:
    """Trains, and writes into arguments.output: adapter/ (with its head), checkpoint.pt, scores.json, logs/ and, with
    --save-model, model.pt. If several processes train together, only the first one writes.

    Raises:
        GraftError: a file or a setting is wrong, or a loss or gradient is not finite. The message says why and what to
            do.
        CommandLineError: --config is not the configuration of the adapter that is there.
    """
    goes_on = arguments.resume and (arguments.output / CHECKPOINT).exists()
    if goes_on:
        arguments = with_kept_options(arguments, arguments.output / CHECKPOINT)
    load_others(arguments.library)
    workers = Workers.started_by_torchrun(arguments.device)
    try:
        with showing_steps(arguments, version_text) if workers.rank == 0 else contextlib.nullcontext():
            if goes_on and workers.rank == 0:
                where = arguments.output / CHECKPOINT
                say(arguments, f"{where}: goes on with {arguments.model} and the options of its run")
            _run(arguments, workers)
    finally:
        workers.close()


def _run(arguments: argparse.Namespace, workers: Workers) -> None:
    output: Path = arguments.output
    checkpoint = output / CHECKPOINT
    if checkpoint.exists() and not (arguments.resume or arguments.restart):
        raise GraftError(f"{checkpoint}: exists already; give --resume to go on, --restart to start anew, "
                         "or another --output")  # fmt: skip
    if not arguments.restart and arguments.fuse is None:
        _check_keeps_adapter(output / ADAPTER, arguments.adapter)
    options = TrainingOptions(**{field.name: getattr(arguments, field.name) for field in fields(TrainingOptions)})
    with step("reading examples"):
        data = _load_data(arguments)
    base = load_module(arguments.model)
    _check_texts(base, data)
    with step("grafting"):
        module = _trainable(base, arguments, data.names).to(workers.device)
    if arguments.fuse is not None:
        _check_can_save_fuse(module, arguments)
    output.mkdir(parents=True, exist_ok=True)
    listeners: list[Listener] = []
    if workers.rank == 0:
        _say_cut(arguments, data)
        listeners.extend([] if arguments.quiet else [ProgressBar()])
        if arguments.tensorboard:
            listeners.append(TensorBoardLog(output / "logs"))
    identity = _identity(arguments, data, _gate_pooling(module, arguments.adapter))
    trainer = Trainer(
        module, arguments.adapter, data.training, data.validation, len(data.names), options, checkpoint=checkpoint,
        identity=identity, arguments=kept_options(arguments), workers=workers, listeners=listeners,
    )  # fmt: skip
    result = trainer.run(resume=arguments.resume)
    with step("scoring"):
        scores = _final_scores(module, data, workers)
    if workers.rank == 0:
        _write(module.cpu(), arguments, data, result, scores)


def _check_keeps_adapter(directory: Path, name: str) -> None:
    """Says before hours of training what writing the adapter would say."""
    with _in_words_of_the_command():
        check_replaces(directory, name)


def _check_can_save_fuse(module: torch.jit.ScriptModule, arguments: argparse.Namespace) -> None:
    """The same for what --fuse writes."""
    with _in_words_of_the_command():
        check_setup(
            module, arguments.adapter, arguments.output / ADAPTER, arguments.restart, model_class=arguments.model_class
        )


@contextlib.contextmanager
def _in_words_of_the_command() -> Iterator[None]:
    try:
        yield
    except GraftError as error:
        function, _, message = str(error).partition(": ")
        found, separator, _ = message.partition("; give another directory, or ")
        if not function.startswith("save_adapter") or not separator:
            raise
        raise GraftError(f"{found}; give another --output, or --restart to replace it") from error


def _identity(arguments: argparse.Namespace, data: Data, gate_pooling: str) -> dict[str, Any]:
    """Returns what a resumed run must share with the run before, beside its options: the model, the examples, and how
    the adapter was made. Files count by their content, and the gates' pooling as the adapter has it."""
    config = config_argument(arguments.config or DEFAULT_CONFIG)
    made = ("new_head", "pooling", "head_layers", "head_dropout")
    return {"model": _digest(arguments.model), "training examples": _digest_of_tokens(data.training),
            "validation examples": _digest_of_tokens(data.validation), "classes": ", ".join(data.names),
            "config": _digest(config) if isinstance(config, Path) else config,
            "start": _digest(arguments.start) if arguments.start else "",
            **({"fuse": f"{arguments.fuse}, {arguments.fusion_config}"} if arguments.fuse is not None else {}),
            "gate_pooling": gate_pooling or "all",  # as runs of before say it
            **{name: str(getattr(arguments, name)) for name in made}}  # fmt: skip


def _digest(path: Path) -> str:
    """Returns a short hash of a file, or of the names and contents of all files in a directory."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb") as opened:
                content = hashlib.file_digest(opened, "sha256")
            name = file.relative_to(path).as_posix()  # "." for `path` itself
            digest.update(f"{name} {content.hexdigest()}\n".encode())
    return digest.hexdigest()[:16]


def _digest_of_tokens(examples: EncodedExamples | None) -> str:
    if examples is None:
        return "none"
    content = [examples.token_ids, examples.type_ids, examples.labels.tolist(), examples.pad_id, examples.pad_type_id]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _load_data(arguments: argparse.Namespace) -> Data:
    columns = Columns(arguments.text_column, arguments.label_column, arguments.group_column)
    training = read_examples(arguments.train, columns)
    without_groups = Columns(arguments.text_column, arguments.label_column)
    validation = read_examples(arguments.validation, without_groups) if arguments.validation else None
    test = read_examples(arguments.test, without_groups) if arguments.test else None
    names = arguments.labels.split(",") if arguments.labels else class_names(training)
    if len(names) < 2 or len(set(names)) < len(names):
        raise GraftError(f"{arguments.train}: expected at least two different classes, got {', '.join(names)}")
    if validation is None and arguments.validation_fraction:
        training, validation = split_examples(training, arguments.validation_fraction, arguments.seed)
    tokenizer = load_tokenizer(arguments.tokenizer or arguments.model.parent / "tokenizer.json", arguments.max_length)

    def encode(examples: list[Example] | None) -> EncodedExamples | None:
        return None if examples is None else encode_examples(tokenizer, examples, names)

    data = Data(names, encode_examples(tokenizer, training, names), encode(validation), encode(test))
    check_every_class(data.training.labels, names)
    return data


def _say_cut(arguments: argparse.Namespace, data: Data) -> None:
    for name, examples in (("training", data.training), ("validation", data.validation), ("test", data.test)):
        if examples is not None and examples.cut:
            what = f"{examples.cut} of {len(examples)} {name} texts were cut to {arguments.max_length} tokens"
            say(arguments, f"{what} (--max-length)")


def _check_texts(base: torch.jit.ScriptModule, data: Data) -> None:
    """Checks that the model has the positions and the tokens of every text."""
    limits = text_limits(base)
    for examples in filter(None, (data.training, data.validation, data.test)):
        for ids, where in zip(examples.token_ids, examples.where, strict=True):
            limits.check(ids, where)


def _trainable(base: torch.jit.ScriptModule, arguments: argparse.Namespace, names: list[str]) -> torch.jit.ScriptModule:
    """Returns the model with a trainable adapter and its head: from --start, from the model itself, or fresh."""
    name = arguments.adapter
    torch.manual_seed(arguments.seed)
    if arguments.fuse is not None:
        module = _fused(base, arguments)
    elif arguments.start:
        module = load_adapter(base, arguments.start, name, trainable=True)
        _check_config(module, name, arguments)
    elif name in names_of(base):
        _check_is_adapter(base, name, arguments)
        module = unfreeze_adapter(base, name)
        _check_config(module, name, arguments)
    else:
        module = graft(
            base, config_argument(arguments.config or DEFAULT_CONFIG), name, gate_pooling=arguments.gate_pooling,
            trainable=True,
        )  # fmt: skip
    _check_gate_pooling(module, name, arguments.gate_pooling)
    own = head_config(module, name)
    if own is not None and not arguments.new_head:
        _check_head(own, name, names)
        return module
    head = HeadConfig(num_labels=len(names), labels=names, pooling=arguments.pooling, layers=arguments.head_layers,
                      dropout_prob=arguments.head_dropout)  # fmt: skip
    return add_head(module, name, head)


def _fused(base: torch.jit.ScriptModule, arguments: argparse.Namespace) -> torch.jit.ScriptModule:
    """Returns the model with a Fuse of --fuse under the name --adapter, whose layers are trainable."""
    name, parts = arguments.adapter, [part for part in arguments.fuse.split(",") if part]
    fuse = Fuse(*parts)
    if not is_grafted(base):
        raise GraftError(f"{arguments.model}: nothing is grafted onto it that --fuse could name; see torchgraft add")
    if name in names_of(base):
        _check_is_fuse(base, name, fuse)
        _check_makes_layers(arguments, f"'{name}'")
        return unfreeze_adapter(base, name)
    frozen = base
    for info in list_adapters(base):
        if info.name in parts and info.trainable:
            frozen = freeze_adapter(frozen, info.name)
    if ",".join(parts) in list_adapter_fusions(frozen):
        _check_makes_layers(arguments, f"the layers of {fuse}")
    else:
        frozen = add_adapter_fusion(frozen, fuse, arguments.fusion_config or "dynamic")
    return unfreeze_adapter(compose(frozen, name, fuse), name)


def _info_of(module: torch.jit.ScriptModule, name: str) -> AdapterInfo:
    return next(info for info in list_adapters(module) if info.name == name)


def _check_is_adapter(base: torch.jit.ScriptModule, name: str, arguments: argparse.Namespace) -> None:
    held = _info_of(base, name)
    if held.composition:
        raise GraftError(
            f"{arguments.model}: '{name}' is the composition {held.composition}; --fuse trains the layers of a Fuse, "
            "and --adapter names one of its adapters"
        )


def _check_makes_layers(arguments: argparse.Namespace, what: str) -> None:
    if arguments.fusion_config is not None:
        raise CommandLineError(
            f"--fusion-config {arguments.fusion_config}: {arguments.model} has {what} already, with a configuration of "
            "their own; leave --fusion-config out"
        )


def _check_is_fuse(base: torch.jit.ScriptModule, name: str, fuse: Fuse) -> None:
    held = _info_of(base, name)
    if not held.composition or parse_json(held.config, name) != fuse.to_dict():
        what = held.composition or "an adapter"
        raise GraftError(f"the model's '{name}' is {what}, not {fuse}; give --adapter another name")


def _check_config(module: torch.jit.ScriptModule, name: str, arguments: argparse.Namespace) -> None:
    """An adapter that is there has its configuration: checks that --config, if given, is no other."""
    if arguments.config is None:
        return
    has = _flat(parse_json(_info_of(module, name).config, name))
    wanted = _flat(config_fields(config_argument(arguments.config)))
    others = [key for key in {**has, **wanted} if has.get(key) != wanted.get(key)]
    if others:
        shown = ", ".join(f"{key} {has.get(key)} and not {wanted.get(key)}" for key in others[:3])
        raise CommandLineError(
            f"--config {arguments.config}: '{name}' of {arguments.start or arguments.model} has another configuration "
            f"({shown}); leave --config out to train it further, or make a new adapter with another --adapter"
            f"{' and without --start' if arguments.start else ''}"
        )


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """Returns {"configs.0.r": 8} of {"configs": [{"r": 8}]}."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        return {path: value}
    return {key: each for name, part in items for key, each in _flat(part, f"{path}.{name}".lstrip(".")).items()}


def _check_gate_pooling(module: torch.jit.ScriptModule, name: str, wanted: str | None) -> None:
    has = _gate_pooling(module, name)
    if wanted == "unpadded" and not has:
        raise GraftError(f"'{name}' has no gates, over whose tokens --gate-pooling could decide; leave it out")
    if wanted and has and has != wanted:
        raise GraftError(
            f"the gates of '{name}' are means over {has} tokens; leave --gate-pooling out to train it further"
        )


def _gate_pooling(module: torch.jit.ScriptModule, name: str) -> str:
    return next(info.gate_pooling for info in list_adapters(module) if info.name == name)


def _check_head(head: HeadConfig, adapter: str, names: list[str]) -> None:
    labels = list(head.labels) if head.labels else names if head.num_labels == len(names) else None
    if head.head_type != "classification" or labels != names:
        what = ", ".join(labels) if labels else f"{head.num_labels} labels"
        raise GraftError(f"the adapter '{adapter}' has a head for {head.head_type} of {what}; the classes here are "
                         f"{', '.join(names)}. Give those in --labels, or --new-head for a fresh one")  # fmt: skip


def _final_scores(module: torch.jit.ScriptModule, data: Data, workers: Workers) -> dict[str, dict[str, float]]:
    result = {}
    for name, examples in (("validation", data.validation), ("test", data.test)):
        if examples is not None:
            scores = score(module, examples, len(data.names), workers=workers)
            if not math.isfinite(scores.loss):
                raise GraftError(f"the trained adapter's loss on the {name} examples is {scores.loss}")
            result[name] = asdict(scores)
    return result


def _write(
    module: torch.jit.ScriptModule, arguments: argparse.Namespace, data: Data, result: TrainingResult,
    scores: dict[str, dict[str, float]],
) -> None:  # fmt: skip
    output: Path = arguments.output
    save = save_adapter if arguments.fuse is None else save_adapter_setup
    save(module, arguments.adapter, output / ADAPTER, model_class=arguments.model_class, overwrite=arguments.restart)
    if arguments.save_model:
        save_module(freeze_adapter(module, arguments.adapter), output / "model.pt", extra_files(arguments.model))
    report = {"labels": data.names, "best_epoch": result.best_epoch, "stopped_early": result.stopped_early,
              "steps": result.steps, "scores": scores, "history": result.history}  # fmt: skip
    write_whole((json.dumps(report, indent=2) + "\n").encode(), output / "scores.json")
    for name, values in scores.items():
        accuracy, macro_f1, loss = values["accuracy"], values["macro_f1"], values["loss"]
        say(arguments, f"{name}: accuracy {accuracy:.3f}, macro-F1 {macro_f1:.3f}, loss {loss:.4f}")
    say(arguments, f"{output / 'adapter'}: adapter {arguments.adapter}")
