#!/usr/bin/env python3
"""Gives adapter directories of AdapterHub that have pytorch_adapter.bin an adapter.safetensors beside it.

    scripts/convert_adapters.py FOLDER

FOLDER is one such directory, or holds several. C++ hosts read safetensors only, which cannot carry code. Here nothing
is unpickled but tensors. Directories that have the file already are left alone. Exit status 1 when one could not be
converted; the others are.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "python"))

from torchgraft import GraftError  # noqa: E402
from torchgraft.adapter_hub import PICKLE_FILE, convert_to_safetensors  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    directories = [path.parent for path in sorted([*folder.glob(PICKLE_FILE), *folder.glob(f"*/{PICKLE_FILE}")])]
    if not directories:
        print(f"{folder}: no {PICKLE_FILE} in it or one level below", file=sys.stderr)
        return 1
    failed = False
    for directory in directories:
        try:
            print(f"{directory}: {'converted' if convert_to_safetensors(directory) else 'was converted before'}")
        except GraftError as error:
            print(error, file=sys.stderr)
            failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
