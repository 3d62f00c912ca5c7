"""For all tests: slow ones are skipped where there is no time left for them."""

import os
import time

import pytest

# Seconds since 1970, from .ci/run: a slow test that would not be done by then is skipped.
_DEADLINE = float(os.environ.get("TORCHGRAFT_TEST_DEADLINE", "inf"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every run, a quick one, too, finds a slow test that does not say how long it takes."""
    for item in items:
        marker = item.get_closest_marker("slow")
        if marker is not None and "seconds" not in marker.kwargs:
            raise pytest.UsageError(f"{item.nodeid}: expected slow(seconds=...), got slow")


def pytest_runtest_setup(item: pytest.Item) -> None:
    marker = item.get_closest_marker("slow")
    if marker is None:
        return
    seconds = marker.kwargs["seconds"]
    left = _DEADLINE - time.time()
    if left < seconds:
        pytest.skip(f"takes about {seconds} s, and {max(left, 0):.0f} s are left")
