#!/usr/bin/env python3
"""Writes adapter.safetensors beside the pytorch_adapter.bin of AdapterHub's adapter directories.

    scripts/convert_adapters.py FOLDER

FOLDER is one such directory, or holds several. C++ hosts read safetensors only, which cannot carry code. The script
unpickles only tensors. It skips directories that have the file already. If it cannot convert a directory, it converts
the others, and its exit status is 1.
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
