"""Loads libtorchgraft once: whatever is loaded already (by the Python package), else TORCHGRAFT_LIBRARY, else the
newest build. So the suite also runs without the package: `pytest --confcutdir=tests/python/ops tests/python/ops`."""

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]


def library_path() -> Path:
    if "TORCHGRAFT_LIBRARY" in os.environ:
        return Path(os.environ["TORCHGRAFT_LIBRARY"])
    built = [*ROOT.glob("build*/lib/libtorchgraft.so"), *ROOT.glob("build*/*/lib/libtorchgraft.so")]
    if not built:
        pytest.exit(f"no libtorchgraft.so under {ROOT}/build*: build it, or set TORCHGRAFT_LIBRARY", returncode=2)
    return max(built, key=lambda path: path.stat().st_mtime)


# What takes long; of it, one case of each operator is quick.
_LONG = {
    "test_opcheck_finds_nothing",
    "test_gradients_equal_finite_differences",
    "test_random_shapes_equal_the_reference",
    "test_dropout_is_random_and_right_on_average",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    folder = Path(__file__).parent
    for item in items:
        if item.path.parent == folder and (
            item.originalname not in _LONG or item.name.endswith(("[plain]", "-plain]"))
        ):
            item.add_marker(pytest.mark.quick)


# A second copy of the library would register its operators twice, which ends the process.
if not hasattr(torch.ops.torchgraft, "gated_lora"):
    torch.ops.load_library(str(library_path()))
