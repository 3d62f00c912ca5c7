"""Measures functions in turns, so that a busy moment of the machine meets all of them, and compares the times."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Ratio:
    """value: the ratio of two medians; quartiles: the first and the third of the rounds' own ratios."""

    value: float
    quartiles: tuple[float, float]


def seconds_of(run: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Returns how long one call takes. clock: time.process_time counts the processor's time, of all threads."""
    start = clock()
    run()
    return clock() - start


def in_turns(runs: Mapping[str, Callable[[], float]], rounds: int, warm_up: int) -> dict[str, list[float]]:
    """Calls every function once in each round.

    Args:
        runs: functions that do something and return the seconds that it took.
        rounds: the rounds that count.
        warm_up: the rounds before these.

    Returns:
        The seconds of each function, one number for each round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(warm_up + rounds):
        for name, run in runs.items():
            taken = run()
            if index >= warm_up:
                seconds[name].append(taken)
    return seconds


def ratio(values: Sequence[float], to: Sequence[float]) -> Ratio:
    """Compares the times of two functions that ran in the same rounds, at least two."""
    rounds = [value / other for value, other in zip(values, to, strict=True)]
    first, _, third = statistics.quantiles(rounds, n=4)
    return Ratio(statistics.median(values) / statistics.median(to), (first, third))
