#!/usr/bin/env python3
"""Trains one adapter, with a classification head, on a file of texts with classes.

    train.py BASE.pt -o OUT --train reviews.csv --validation-fraction 0.1 --config unipelt --adapter reviews
    train.py BASE.pt -o OUT ... --resume                  # continues a run that was stopped or killed
    torchrun --nproc-per-node 2 train.py BASE.pt -o OUT ...

BASE.pt is a TorchScript Transformer, grafted or not, that takes token ids and perhaps a mask. Only the adapter and the
head are trained. Files end in .csv, .tsv (both with the names of columns in the first line) or .jsonl. train.py writes
into OUT: adapter/ (for load_adapter(), here and in AdapterHub), checkpoint.pt, scores.json and logs/ for TensorBoard.

An error is one line on stderr. The exit status is then 2 for a wrong command line, 130 for Ctrl-C, 143 for SIGTERM,
else 1.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))  # for runpy, which does not add a script's folder

from command_line import STOPPED, Parser, fail, on_stop  # noqa: E402

PROGRAM = "train"


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="BASE.pt")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="OUT", help="a folder; made if it is missing"
    )
    _add_data(parser.add_argument_group("data"))
    _add_adapter(parser.add_argument_group("adapter and head"))
    _add_training(parser.add_argument_group("training"))
    _add_running(parser.add_argument_group("running"))
    return parser


def _add_data(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--train", type=Path, required=True, metavar="FILE")
    group.add_argument(
        "--validation", type=Path, metavar="FILE", help="its scores decide which epoch's weights are kept"
    )
    group.add_argument(
        "--validation-fraction",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="without --validation: take this share of --train for validation (default: none)",
    )
    group.add_argument("--test", type=Path, metavar="FILE", help="scored at the end")
    group.add_argument("--text-column", default="text", metavar="NAME", help="default: text")
    group.add_argument("--label-column", default="label", metavar="NAME", help="default: label")
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
    group.add_argument(
        "--max-length", type=int, default=128, metavar="TOKENS", help="longer texts are cut (default: 128)"
    )


def _add_adapter(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--adapter", default="task", metavar="NAME", help="the adapter to train; made if BASE.pt lacks it"
    )
    group.add_argument(
        "--config",
        default="unipelt",
        help="configuration of a new adapter: unipelt, mam, lora, or the path of an "
        "adapter_config.json (default: unipelt)",
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
    group.add_argument("--head-layers", type=int, choices=(1, 2), default=1)
    group.add_argument("--head-dropout", type=float, default=0.1)
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
    group.add_argument("--epochs", type=int, default=3)
    group.add_argument("--batch-size", type=int, default=32, help="rows of all processes together")
    group.add_argument("--accumulate", type=int, default=1, metavar="N", help="batches for one step")
    group.add_argument("--learning-rate", type=float, default=1e-3)
    group.add_argument("--head-learning-rate", type=float, metavar="RATE", help="for the head (default: the same)")
    group.add_argument("--prefix-learning-rate", type=float, metavar="RATE", help="for prefixes (default: the same)")
    group.add_argument("--weight-decay", type=float, default=0.01)
    group.add_argument("--schedule", choices=("linear", "cosine", "constant"), default="linear")
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
        help="stop after this many epochs without a better validation score (default: never)",
    )
    group.add_argument("--best-by", choices=("accuracy", "macro_f1", "loss"), default="accuracy")
    group.add_argument("--seed", type=int, default=0)


def _add_running(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--checkpoint-every", type=int, default=100, metavar="STEPS")
    start = group.add_mutually_exclusive_group()
    start.add_argument("--resume", action="store_true", help="continue from OUT/checkpoint.pt, if there is one")
    start.add_argument("--restart", action="store_true", help="start anew where OUT has a checkpoint")
    group.add_argument("--device", help="default: a GPU if torch sees one, else cpu")
    group.add_argument("--no-tensorboard", dest="tensorboard", action="store_false", help="write no logs")
    group.add_argument("--save-model", action="store_true", help="also write OUT/model.pt, the whole trained model")


def check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Checks the arguments before anything is loaded."""
    if not 0 <= arguments.validation_fraction < 1:
        parser.error(f"--validation-fraction must be at least 0 and below 1, got {arguments.validation_fraction}")
    if arguments.validation and arguments.validation_fraction:
        parser.error("give --validation or --validation-fraction, not both")
    if arguments.patience and not (arguments.validation or arguments.validation_fraction):
        parser.error("--patience needs --validation or --validation-fraction")
    if not 0 <= arguments.head_dropout < 1:
        parser.error(f"--head-dropout must be at least 0 and below 1, got {arguments.head_dropout}")
    if arguments.max_length < 1:
        parser.error(f"--max-length must be at least 1, got {arguments.max_length}")


def stop(signal_number: int, frame: object) -> NoReturn:
    """Raises SystemExit, so that temporary files are removed. The last checkpoint stays."""
    fail(PROGRAM, f"{STOPPED[signal_number]}; --resume goes on from the last checkpoint", 128 + signal_number)


def stop_at_once(signal_number: int, frame: object) -> NoReturn:
    """Ends the process. Serves while torch is imported: code that runs then can swallow exceptions of a handler, and
    there is nothing to clean up yet."""
    try:
        fail(PROGRAM, STOPPED[signal_number], 128 + signal_number)
    finally:
        sys.stderr.flush()
        os._exit(128 + signal_number)


def main() -> None:
    parser = make_parser()
    arguments = parser.parse_args()
    check(parser, arguments)
    sys.path.insert(0, str(ROOT / "python"))
    try:
        # Not at the top of the file: torch takes seconds to load, and a wrong command line needs no torch.
        from torchgraft.training import _command
    except ImportError as error:
        fail(PROGRAM, f"{error}; run scripts/setup, then use .venv/bin/python scripts/train.py")
    on_stop(stop)
    try:
        _command.run(arguments)
    except _command.EXPECTED_ERRORS as error:
        fail(PROGRAM, _command.reason(error))


if __name__ == "__main__":
    on_stop(stop_at_once)
    main()
