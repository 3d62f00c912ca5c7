"""The command tune."""

import argparse
import json
import sys

from ._console import say
from ._files import check_writable, write_whole
from ._steps import show_detail, step
from ._tuning import DTYPES, FEATURES, OPS, TOKENS, measure


def tune_command(arguments: argparse.Namespace) -> None:
    """Measures every operator with fused kernels and with ATen's compositions, and writes a kernel table for
    TORCHGRAFT_KERNEL_TABLE.

    Args:
        arguments: the command line's: output (path), seconds (float, for each measurement), tokens and features (lists
            of numbers, or None).
    """
    check_writable(arguments.output)
    tokens, features = arguments.tokens or TOKENS, arguments.features or FEATURES
    count = len(OPS) * len(DTYPES) * len(tokens) * len(features)
    if not arguments.quiet:
        print(f"tune: {count} measurements, at least {count * arguments.seconds:.0f} s", file=sys.stderr, flush=True)
    told: set[str] = set()

    def tell(text: str) -> None:
        """Shows each measurement; where there is no terminal to show it on, one line for each operator."""
        show_detail(text)
        operator = text.partition(",")[0]
        is_shown = arguments.quiet or arguments.verbose or sys.stderr.isatty()
        if operator not in told and not is_shown:
            print(f"tune: measuring {operator}", file=sys.stderr, flush=True)
        told.add(operator)

    with step("measuring"):
        table = measure(arguments.seconds, tokens, features, tell)
    write_whole((json.dumps(table, indent=1) + "\n").encode(), arguments.output)
    for op in OPS:
        mine = [entry for entry in table["measurements"] if entry["op"] == op]
        for dtype in dict.fromkeys(entry["dtype"] for entry in mine):
            ratios = [entry["fused"] / entry["reference"] for entry in mine if entry["dtype"] == dtype]
            span = f"{min(ratios):.2f} to {max(ratios):.2f}"
            say(arguments, f"{op}, {dtype}: fused takes {span} of the composition's time")
    say(arguments, f"{arguments.output}: written; use it with TORCHGRAFT_KERNEL_TABLE={arguments.output}")
