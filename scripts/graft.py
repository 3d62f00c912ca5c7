#!/usr/bin/env python3
"""The command `torchgraft` of a checkout that is built and not installed: `scripts/graft.py add ...` is `torchgraft add
...`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))

from torchgraft_command.main import main as run_command  # noqa: E402
from torchgraft_command.main import run  # noqa: E402


def main() -> None:
    run_command("graft.py")


if __name__ == "__main__":
    run(main)
