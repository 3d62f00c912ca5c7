#!/usr/bin/env python3
"""Trains one adapter, with a classification head, on a file of texts with classes.

    train.py BASE.pt -o OUT --train reviews.csv --validation-fraction 0.1 --config unipelt --adapter reviews
    train.py BASE.pt -o OUT ... --resume                  # goes on after it was stopped, however that was
    torchrun --nproc-per-node 2 train.py BASE.pt -o OUT ...

BASE.pt is a TorchScript Transformer, grafted or not, that takes token ids and, if it does, a mask; only the adapter and
the head are trained. Files end in .csv, .tsv (both with the names of columns in the first line) or .jsonl. OUT gets
adapter/ (for load_adapter(), here and in AdapterHub), checkpoint.pt, scores.json and logs/ for TensorBoard.

What goes wrong is one line on stderr; the exit status is then 2 for a wrong command line, 130 for Ctrl-C, 143 for
SIGTERM, else 1.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
STOPPED = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


def fail(message: object, status: int = 1) -> NoReturn:
    """One line, whatever the message looks like."""
    print("train: error:", " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(status)


class Parser(argparse.ArgumentParser):
    """argparse without the usage text before an error."""

    def error(self, message: str) -> NoReturn:
        fail(f"{message} (see {self.prog} --help)", 2)


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="BASE.pt")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="a folder; made if need be")
    _add_data(parser.add_argument_group("data"))
    _add_adapter(parser.add_argument_group("adapter and head"))
    _add_training(parser.add_argument_group("training"))
    _add_running(parser.add_argument_group("running"))
    return parser


def _add_data(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--train", type=Path, required=True, metavar="FILE")
    group.add_argument("--validation", type=Path, metavar="FILE", help="decides which epoch is kept")
    group.add_argument("--validation-fraction", type=float, default=0.0, metavar="SHARE",
                       help="without --validation: take so much of --train for it (default: none)")  # fmt: skip
    group.add_argument("--test", type=Path, metavar="FILE", help="scored at the end")
    group.add_argument("--text-column", default="text", metavar="NAME", help="default: text")
    group.add_argument("--label-column", default="label", metavar="NAME", help="default: label")
    group.add_argument("--group-column", metavar="NAME",
                       help="rows that have it alike (sentences of one review) are not split apart")  # fmt: skip
    group.add_argument("--labels", metavar="A,B,...", help="the classes in order (default: those in --train, sorted)")
    group.add_argument("--tokenizer", type=Path, metavar="TOKENIZER.json",
                       help="the model's tokenizer (default: tokenizer.json beside BASE.pt)")  # fmt: skip
    group.add_argument("--max-length", type=int, default=128, metavar="TOKENS", help="longer texts are cut (128)")


def _add_adapter(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--adapter", default="task", metavar="NAME", help="the one to train, made if BASE.pt lacks it")
    group.add_argument("--config", default="unipelt",
                       help="of a new adapter: unipelt, mam, lora, or the path of an adapter_config.json")  # fmt: skip
    group.add_argument("--start", type=Path, metavar="DIRECTORY", help="begin with a saved adapter and its head")
    group.add_argument("--gate-pooling", choices=("all", "unpadded"), default="all",
                       help="of a new adapter: whether gates average over padding too (default: all)")  # fmt: skip
    group.add_argument("--pooling", choices=("mean", "first"), default="mean",
                       help="what the head sees: the mean over real tokens (default), or the first token")  # fmt: skip
    group.add_argument("--head-layers", type=int, choices=(1, 2), default=1)
    group.add_argument("--head-dropout", type=float, default=0.1)
    group.add_argument("--new-head", action="store_true",
                       help="a fresh head also for an adapter that has one; else that is trained further")  # fmt: skip
    group.add_argument("--model-class", metavar="CLASS",
                       help="what AdapterHub wants to read before it takes the head: BertAdapterModel")  # fmt: skip


def _add_training(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--epochs", type=int, default=3)
    group.add_argument("--batch-size", type=int, default=32, help="of all processes together")
    group.add_argument("--accumulate", type=int, default=1, metavar="N", help="batches that make one step")
    group.add_argument("--learning-rate", type=float, default=1e-3)
    group.add_argument("--head-learning-rate", type=float, metavar="RATE", help="of the head (default: the same)")
    group.add_argument("--prefix-learning-rate", type=float, metavar="RATE", help="of prefixes (default: the same)")
    group.add_argument("--weight-decay", type=float, default=0.01)
    group.add_argument("--schedule", choices=("linear", "cosine", "constant"), default="linear")
    group.add_argument("--warmup", type=float, default=0.06, metavar="SHARE", help="of all steps")
    group.add_argument("--clip", type=float, default=1.0, metavar="NORM", help="of all gradients; 0: none")
    group.add_argument("--patience", type=int, default=0, metavar="EPOCHS",
                       help="stop after so many epochs without a better validation score (default: never)")  # fmt: skip
    group.add_argument("--best-by", choices=("accuracy", "macro_f1", "loss"), default="accuracy")
    group.add_argument("--seed", type=int, default=0)


def _add_running(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--checkpoint-every", type=int, default=100, metavar="STEPS")
    start = group.add_mutually_exclusive_group()
    start.add_argument("--resume", action="store_true", help="go on from OUT/checkpoint.pt, if there is one")
    start.add_argument("--restart", action="store_true", help="start anew where OUT has a checkpoint")
    group.add_argument("--device", help="default: a GPU where torch sees one, else cpu")
    group.add_argument("--no-tensorboard", dest="tensorboard", action="store_false", help="write no logs")
    group.add_argument("--save-model", action="store_true", help="also write OUT/model.pt, the whole trained model")


def check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """What a wrong command line gets told before anything is loaded."""
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
    """Raises, so that a file that was begun is removed. The last checkpoint stays."""
    fail(f"{STOPPED[signal_number]}; --resume goes on from the last checkpoint", 128 + signal_number)


def main() -> None:
    parser = make_parser()
    arguments = parser.parse_args()
    check(parser, arguments)
    sys.path.insert(0, str(ROOT / "python"))
    try:
        # Not at the top of the file: loading torch takes seconds, a wrong command line is known before.
        from torchgraft.training import _command
    except ImportError as error:
        fail(f"{error}; run scripts/setup, then use .venv/bin/python scripts/train.py")
    for number in STOPPED:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup and background jobs want it
            signal.signal(number, stop)
    try:
        _command.run(arguments)
    except _command.EXPECTED_ERRORS as error:
        fail(_command.reason(error))


if __name__ == "__main__":
    main()
