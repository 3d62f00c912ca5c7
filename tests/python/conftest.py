"""Puts the package of this checkout first on the path and loads the operators."""

import gc
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "python"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import hypothesis  # noqa: E402
import torch  # noqa: E402

import torchgraft  # noqa: E402, F401

# Each run draws the same cases.
hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.load_profile("same")

# Imports and traces make objects by the million, nearly all of which stay. The collector looks through them thirty
# times less often than by default, and not at all before the tests.
gc.disable()
gc.set_threshold(20_000, 10, 10)

# Tiny models: a second thread only waits, and waits long where the cores are shared.
torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """What has been imported stays: the collector, which would look through all of it thousands of times, leaves it
    out."""
    gc.collect()
    gc.freeze()
    gc.enable()
