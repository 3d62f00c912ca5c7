#!/usr/bin/env python3
"""The command `torchgraft train` of a checkout that is built and not installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))

from torchgraft_command.main import run, train_main  # noqa: E402
from torchgraft_command.train_arguments import check, make_parser  # noqa: E402

__all__ = ["check", "main", "make_parser"]


def main() -> None:
    train_main("train.py")


if __name__ == "__main__":
    run(main)
