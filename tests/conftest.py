"""For all tests: each draws the same numbers in each run, and slow ones are skipped where no time is left for them."""

import os
import time
import zlib

import pytest
import torch

# Seconds since 1970, from .ci/run: a slow test that would not be done by then is skipped.
_DEADLINE = float(os.environ.get("TORCHGRAFT_TEST_DEADLINE", "inf"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every run, a quick one, too, finds a slow test that does not say how long it takes."""
    for item in items:
        marker = item.get_closest_marker("slow")
        if marker is not None and "seconds" not in marker.kwargs:
            raise pytest.UsageError(f"{item.nodeid}: expected slow(seconds=...), got slow")


def _seed(node: pytest.Item | pytest.Collector) -> None:
    """PyTorch seeds its generator from the machine's noise, and about one input of a hundred drawn ones amplifies
    rounding beyond a tolerance of 1e-5. Seeds differ, so that no input consists of the numbers of a model's weights."""
    torch.manual_seed(zlib.crc32(node.nodeid.encode()))


def pytest_collectstart(collector: pytest.Collector) -> None:
    """What a file draws while it is imported."""
    if isinstance(collector, pytest.Module):
        _seed(collector)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    _seed(item)
    marker = item.get_closest_marker("slow")
    if marker is None:
        return
    seconds = marker.kwargs["seconds"]
    left = _DEADLINE - time.time()
    if left < seconds:
        pytest.skip(f"takes about {seconds} s, and {max(left, 0):.0f} s are left")
