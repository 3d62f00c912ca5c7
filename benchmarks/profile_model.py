"""Shows where the time of a grafted model goes, beside its base: operators' own time in one forward pass.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/profile_model.py --model MiniLM --shape 1x16 --config MAM

Both models are traced and frozen by torch.jit.freeze, and run in turns under torch.profiler. Of each operator the
script takes the least time of all passes, which a busy machine disturbs least. The profiler costs about a microsecond
for each operator, so sums are more than the time without it; the script prints that time, too. At the end it prints the
time of each operator with almost nothing to compute (one token, two features): dispatch, checks, allocations.
"""

import argparse
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "python"), str(Path(__file__).resolve().parent)]

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

from models import CONFIGS, MODELS, Positional, batch_of, grafted, hugging_face, passed, traced  # noqa: E402
from table_console import table_console  # noqa: E402
from this_machine import silence  # noqa: E402
from turns import seconds_of  # noqa: E402


def own_times(run: Callable, batch: tuple) -> dict[str, tuple[int, float]]:
    """Profiles one pass. Returns calls and microseconds of each operator, without the time of operators inside it."""
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU]) as profiler:
        run(*batch)
    found: dict[str, tuple[int, float]] = defaultdict(lambda: (0, 0.0))
    for event in profiler.key_averages():
        if "::" in event.key:
            calls, taken = found[event.key]
            found[event.key] = calls + event.count, taken + event.self_cpu_time_total
    return found


def least(passes: list[dict[str, tuple[int, float]]]) -> dict[str, tuple[int, float]]:
    names = set.intersection(*map(set, passes))
    return {name: (passes[-1][name][0], min(one[name][1] for one in passes)) for name in names}


def smallest_calls() -> dict[str, Callable]:
    """Makes a call of each operator, as MAM and UniPELT call it, on one token of two features; and of linear maps, to
    compare."""
    ops = torch.ops.torchgraft
    x, a, b, weight = torch.randn(1, 1, 2), torch.randn(1, 1, 2), torch.randn(1, 2, 1), torch.randn(2, 2)
    one, gate = torch.ones(1), (torch.randn(1, 1, 2), torch.zeros(1, 1))
    down = (a, torch.zeros(1, 1), b, torch.zeros(1, 2), torch.ones(1, 1), "relu")
    head, prefix, length = torch.randn(1, 1, 1, 2), torch.randn(1, 1, 1, 2), torch.tensor([1])
    return {
        "linear": lambda: torch.nn.functional.linear(x, weight),
        "scaled_dot_product_attention": lambda: torch.nn.functional.scaled_dot_product_attention(head, head, head),
        "gated_bottleneck": lambda: ops.gated_bottleneck(x, x, *down),
        "gated_bottleneck_linear": lambda: ops.gated_bottleneck_linear(x, x, weight, None, *down),
        "gated_bottleneck, gated": lambda: ops.gated_bottleneck(x, x, *down, *gate),
        "gated_lora_linear, gated": lambda: ops.gated_lora_linear(x, weight, None, a, b, one, *gate),
        "gated_prefix_attention": lambda: ops.gated_prefix_attention(head, head, head, x, prefix, prefix, length),
        "gated_prefix_attention, gated": lambda: ops.gated_prefix_attention(
            head, head, head, x, prefix, prefix, length, gate_weight=gate[0], gate_bias=gate[1]
        ),
    }


def print_profile(base: dict, mine: dict, passes: tuple[float, float], console: Console) -> None:
    table = Table(title="microseconds of own time in one pass")
    for column in ("operator", "base: calls", "time", "grafted: calls", "time", "difference"):
        table.add_column(column, justify="left" if column == "operator" else "right")
    nothing = (0, 0.0)
    names = sorted(
        base.keys() | mine.keys(), key=lambda name: -max(base.get(name, nothing)[1], mine.get(name, nothing)[1])
    )
    for name in names:
        (calls, taken), (my_calls, my_time) = base.get(name, nothing), mine.get(name, nothing)
        if max(taken, my_time) >= 0.005 * sum(value for _, value in mine.values()):
            table.add_row(name, str(calls), f"{taken:.0f}", str(my_calls), f"{my_time:.0f}", f"{my_time - taken:+.0f}")
    sums = [sum(value for _, value in side.values()) for side in (base, mine)]
    table.add_row("all", "", f"{sums[0]:.0f}", "", f"{sums[1]:.0f}", f"{sums[1] - sums[0]:+.0f}")
    console.print(table)
    console.print(
        f"without a profiler: base {1e6 * passes[0]:.0f}, grafted {1e6 * passes[1]:.0f} microseconds, "
        f"{passes[1] / passes[0]:.3f}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="MiniLM")
    parser.add_argument("--config", choices=CONFIGS, default="MAM")
    parser.add_argument("--shape", default="1x16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--passes", type=int, default=60)
    given = parser.parse_args()
    silence()
    torch.set_num_threads(given.threads)
    sizes = MODELS[given.model]
    base = traced(Positional(hugging_face(sizes)).eval(), sizes)
    runs = [torch.jit.freeze(base), torch.jit.freeze(grafted(base, CONFIGS[given.config]()))]
    batch = batch_of(given.shape, sizes)
    seconds: list[list[float]] = [[], []]
    profiles: list[list[dict]] = [[], []]
    for index in range(given.passes + 5):
        for run, taken, profiled in zip(runs, seconds, profiles, strict=True):
            taken.append(passed(run, batch, backward=False))
            if index >= 5:
                profiled.append(own_times(run, batch))
    console = table_console()
    passes = tuple(min(taken[5:]) for taken in seconds)
    print_profile(least(profiles[0]), least(profiles[1]), passes, console)
    with torch.inference_mode():
        for name, call in smallest_calls().items():
            taken = [seconds_of(call) for _ in range(500)]
            console.print(f"{name} of next to nothing: {1e6 * statistics.median(taken):.1f} microseconds")
    return 0


if __name__ == "__main__":
    sys.exit(main())
