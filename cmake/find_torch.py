"""Where the torch lies that is installed, and which one it is, without importing it: for CMake and for the wheel's
metadata.

    python cmake/find_torch.py      # prints the folder and the version, one line each

An isolated build of pip sees only what pyproject.toml asks for; its interpreter still knows its own environment's
folder of packages. There is no torch to download here: another one than the user's would be the wrong one.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any

REMEDY = (
    "torchgraft is built against the torch that is installed, and none was found: install torch (2.13 or later) first; "
    "if it is installed, build without isolation (pip install --no-build-isolation, python -m build --no-isolation)"
)
LEAST = "2.13"


def find_torch() -> tuple[Path, str] | None:
    """Returns the folder and the version of the torch that is installed, or None."""
    spec = importlib.util.find_spec("torch")
    folders = list(spec.submodule_search_locations or []) if spec else []
    folders += [str(Path(sysconfig.get_path(kind), "torch")) for kind in ("platlib", "purelib")]
    for folder in map(Path, folders):
        file = folder / "version.py"
        match = file.is_file() and re.search(r"^__version__ = '([^']+)'", file.read_text(), re.MULTILINE)
        if match:
            return folder, match[1]
    return None


class TorchRequirement:
    """Provider of scikit-build-core: a wheel needs a torch of the minor version that it was built with."""

    def __init__(self) -> None:
        self._state = ""

    def build_state(self, state: str) -> None:
        self._state = state

    def dynamic_wheel(self, settings: Mapping[str, Any]) -> dict[str, bool]:
        return {"dependencies": True}

    def dynamic_metadata(self, settings: Mapping[str, Any], project: Mapping[str, Any]) -> dict[str, list[str]]:
        if self._state == "sdist":
            return {"dependencies": [f"torch>={LEAST}"]}
        found = find_torch()
        if found is None:
            raise SystemExit(REMEDY)
        minor = ".".join(found[1].split(".")[:2])
        return {"dependencies": [f"torch=={minor}.*"]}


if __name__ == "__main__":
    torch = find_torch()
    if torch is None:
        sys.exit(REMEDY)
    print(torch[0], torch[1], sep="\n")
