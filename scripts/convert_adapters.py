#!/usr/bin/env python3
"""`torchgraft convert FOLDER` of a checkout that is built and not installed: adapter.safetensors beside each
pytorch_adapter.bin."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))

from torchgraft_command.main import main as run_command  # noqa: E402
from torchgraft_command.main import run  # noqa: E402


def main() -> None:
    sys.argv.insert(1, "convert")
    run_command("convert_adapters.py")


if __name__ == "__main__":
    run(main)
