"""The command line of `torchgraft train`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .line import Parser

CHECKPOINT = "checkpoint.pt"  # in OUT

DESCRIPTION = """\
Trains one adapter, with a classification head, on a file of texts with classes.

  torchgraft train BASE.pt -o OUT --train reviews.csv --validation-fraction 0.1 --config unipelt --adapter reviews
  torchgraft train MODEL.pt -o OUT --train all.csv --fuse films,books,tweets --adapter fused    # AdapterFusion
  torchgraft train -o OUT --resume                       # continues a run that was stopped or killed
  torchrun --nproc-per-node 2 -m torchgraft train BASE.pt -o OUT ...

BASE.pt is a TorchScript Transformer, grafted or not, that takes token ids and perhaps a mask. Only the adapter and the
head are trained. Files end in .csv, .tsv (both with the names of columns in the first line) or .jsonl. What is written
into OUT: adapter/ (for load_adapter(), here and in AdapterHub; with --fuse for load_adapter_setup()), checkpoint.pt,
scores.json and logs/ for TensorBoard.
"""


def add_train_command(commands: argparse._SubParsersAction[Parser]) -> None:
    add_arguments(commands.add_parser("train", help="train an adapter with a head on texts", description=DESCRIPTION))


def make_parser(program: str = "train.py") -> Parser:
    """For scripts/train.py, which is this command alone."""
    parser = Parser(prog=program, description=DESCRIPTION)
    add_arguments(parser)
    return parser


class _Noted(argparse.Action):
    """Stores a value, and notes in `given` that the command line has it: --resume takes the rest from a checkpoint."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        if self.nargs == 0:  # a flag
            values = not self.default
        if self.option_strings or values is not None:
            setattr(namespace, self.dest, values)
            namespace.given = namespace.given | {self.dest}


def _flag(default: bool) -> Callable[..., _Noted]:
    return lambda **options: _Noted(nargs=0, default=default, **options)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(given=frozenset())
    parser.register("action", None, _Noted)
    parser.register("action", "store_true", _flag(False))
    parser.register("action", "store_false", _flag(True))
    parser.add_argument("model", type=Path, nargs="?", metavar="BASE.pt", help="the model to train on")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="OUT", help="a folder; made if it is missing"
    )
    _add_data(parser.add_argument_group("data"))
    _add_adapter(parser.add_argument_group("adapter and head"))
    _add_training(parser.add_argument_group("training"))
    _add_running(parser.add_argument_group("running"))


def _add_data(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--train", type=Path, metavar="FILE", help="texts with classes")
    group.add_argument(
        "--validation", type=Path, metavar="FILE", help="its scores decide which epoch's weights are kept"
    )
    group.add_argument(
        "--validation-fraction",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="without --validation: take this share of --train for validation",
    )
    group.add_argument("--test", type=Path, metavar="FILE", help="scored at the end")
    group.add_argument("--text-column", default="text", metavar="NAME", help="the column of texts")
    group.add_argument("--label-column", default="label", metavar="NAME", help="the column of classes")
    group.add_argument(
        "--group-column",
        metavar="NAME",
        help="rows with the same value in this column (sentences of one review) stay together when --train is split",
    )
    group.add_argument("--labels", metavar="A,B,...", help="the classes in order (default: those in --train, sorted)")
    group.add_argument(
        "--tokenizer",
        type=Path,
        metavar="TOKENIZER.json",
        help="the model's tokenizer (default: tokenizer.json beside BASE.pt)",
    )
    group.add_argument("--max-length", type=int, default=128, metavar="TOKENS", help="longer texts are cut")


def _add_adapter(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--adapter", default="task", metavar="NAME", help="the adapter to train; made if BASE.pt lacks it"
    )
    group.add_argument(
        "--config",
        help="configuration of a new adapter: unipelt, mam, lora, or the path of an adapter_config.json (default: "
        "unipelt). An adapter of --start or BASE.pt has its own; another one is refused",
    )
    group.add_argument(
        "--fuse",
        metavar="A,B,...",
        help="train AdapterFusion layers over these adapters of BASE.pt, which stay frozen; --adapter names the result",
    )
    group.add_argument(
        "--fusion-config", choices=("dynamic", "static"), help="of new AdapterFusion layers (default: dynamic)"
    )
    group.add_argument(
        "--start", type=Path, metavar="DIRECTORY", help="begin with the adapter and the head of this directory"
    )
    group.add_argument(
        "--gate-pooling",
        choices=("all", "unpadded"),
        help="whether gates average over padding, too (default: as --start's directory says; all for a new adapter)",
    )
    group.add_argument(
        "--pooling",
        choices=("mean", "first"),
        default="mean",
        help="what the head reads: the mean over real tokens (default), or the first token",
    )
    group.add_argument("--head-layers", type=int, choices=(1, 2), default=1, help="linear maps of the head")
    group.add_argument("--head-dropout", type=float, default=0.1, help="before each linear map of the head")
    group.add_argument(
        "--new-head",
        action="store_true",
        help="give an adapter that has a head a fresh one (default: train its head further)",
    )
    group.add_argument(
        "--model-class",
        metavar="CLASS",
        help="the model class of AdapterHub that is to load the head: BertAdapterModel",
    )


def _add_training(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--epochs", type=int, default=3, help="how often to go through --train")
    group.add_argument("--batch-size", type=int, default=32, help="rows of all processes together")
    group.add_argument("--accumulate", type=int, default=1, metavar="N", help="batches for one step")
    group.add_argument(
        "--learning-rate",
        type=float,
        metavar="RATE",
        help="the largest, of AdamW (default: 0.003; 0.0005 for prefixes, parallel bottlenecks and AdapterFusion "
        "layers, 0.01 for the head)",
    )
    for part, what in (("head", "the head"), ("prefix", "prefixes"), ("parallel", "parallel bottlenecks")):
        group.add_argument(
            f"--{part}-learning-rate",
            type=float,
            metavar="RATE",
            help=f"for {what} (default: --learning-rate, if given)",
        )
    group.add_argument("--weight-decay", type=float, default=0.01, help="of AdamW")
    group.add_argument(
        "--schedule", choices=("linear", "cosine", "constant"), default="linear", help="how the rate falls"
    )
    group.add_argument(
        "--warmup", type=float, default=0.06, metavar="SHARE", help="share of all steps in which the rate rises"
    )
    group.add_argument(
        "--clip", type=float, default=1.0, metavar="NORM", help="largest norm of all gradients; 0: no limit"
    )
    group.add_argument(
        "--patience",
        type=int,
        default=0,
        metavar="EPOCHS",
        help="stop after this many epochs without a better validation score; 0: never",
    )
    group.add_argument(
        "--best-by", choices=("accuracy", "macro_f1", "loss"), default="accuracy", help="the score that counts"
    )
    group.add_argument("--seed", type=int, default=0, help="of fresh weights, batches and dropout")


def _add_running(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--checkpoint-every", type=int, default=100, metavar="STEPS", help="write a checkpoint")
    start = group.add_mutually_exclusive_group()
    start.add_argument(
        "--resume",
        action="store_true",
        help="continue from OUT/checkpoint.pt, if there is one, with the options of its run: give none, or the same",
    )
    start.add_argument("--restart", action="store_true", help="start anew where OUT has a checkpoint")
    group.add_argument("--device", help="default: a GPU if torch sees one, else cpu")
    group.add_argument("--no-tensorboard", dest="tensorboard", action="store_false", help="write no logs")
    group.add_argument("--save-model", action="store_true", help="also write OUT/model.pt, the whole trained model")


def check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Checks the arguments before anything is loaded."""
    if arguments.config is not None and not arguments.config.strip():
        parser.error("--config: expected a configuration's name (unipelt, mam, lora, ...) or a path, got an empty text")
    if arguments.fuse is not None and arguments.start:
        parser.error("--fuse trains adapters of BASE.pt together, and --start begins with one of a directory; give one")
    if arguments.fuse is not None and arguments.config is not None:
        parser.error("--fuse trains AdapterFusion layers (--fusion-config), and --config is of an adapter; give one")
    if arguments.fuse is None and arguments.fusion_config is not None:
        parser.error("--fusion-config is of the layers that --fuse makes; give --fuse")
    if arguments.fuse is not None and len(list(filter(None, arguments.fuse.split(",")))) < 2:
        parser.error(f"--fuse: expected the names of at least two adapters, got '{arguments.fuse}'")
    if arguments.resume and (arguments.output / CHECKPOINT).exists():
        return  # which has the options that are not given
    missing = {"BASE.pt": arguments.model, "--train": arguments.train}
    if None in missing.values():
        names = ", ".join(name for name, value in missing.items() if value is None)
        nothing = f"{arguments.output / CHECKPOINT} is not there to go on from, and " if arguments.resume else ""
        parser.error(f"{nothing}the following arguments are required: {names}")
    if not 0 <= arguments.validation_fraction < 1:
        parser.error(f"--validation-fraction must be at least 0 and below 1, got {arguments.validation_fraction}")
    if arguments.validation and arguments.validation_fraction:
        parser.error("give --validation or --validation-fraction, not both")
    if arguments.patience and not (arguments.validation or arguments.validation_fraction):
        parser.error("--patience needs --validation or --validation-fraction")
    if not 0 <= arguments.head_dropout < 1:
        parser.error(f"--head-dropout must be at least 0 and below 1, got {arguments.head_dropout}")
    if not 0 <= arguments.seed < 2**63:
        parser.error(f"--seed must be at least 0 and below 2**63, got {str(arguments.seed)[:40]}")
    check_max_length(parser, arguments.max_length)


def check_max_length(parser: argparse.ArgumentParser, number: int) -> None:
    """Checks --max-length, which the tokenizer takes."""
    if not 1 <= number < 2**31:
        parser.error(f"--max-length must be at least 1 and below 2**31, got {str(number)[:40]}")
