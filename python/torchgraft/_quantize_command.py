"""The command quantize of torchgraft."""

import argparse
import json
from dataclasses import replace
from typing import Any

import torch
from rich.table import Table

from ._console import say, table_console
from ._example import read_example, text_example
from ._files import check_script_output, extra_files, load_module, save_module
from ._steps import step
from .errors import GraftError
from .grafting import is_grafted
from .quantization import LinearMap, linear_maps, quantization_error, quantize


def quantize_command(arguments: argparse.Namespace) -> None:
    """Writes a file whose linear maps are int8; prints what that changes in each of them, in the result and in size.

    Args:
        arguments: the command line's: base, output (paths), skip (list), example (path or None), force (bool).
    """
    check_script_output(arguments.output)
    module = load_module(arguments.base)
    example, why_not = _example(arguments, module)
    maps = linear_maps(module, skip=arguments.skip)
    with step("quantising"):
        result = quantize(module, skip=arguments.skip)
    measured: list[LinearMap] = []
    difference = None
    if example is not None:
        with step("measuring the error"):
            measured = quantization_error(module, example, skip=arguments.skip)
            difference = _result_difference(module, result, example)
    before = arguments.base.stat().st_size
    save_module(result, arguments.output, extra_files(arguments.base))
    after = arguments.output.stat().st_size
    maps = _with_errors(maps, measured)
    if arguments.json:
        entries = [vars(entry) for entry in maps]
        print(json.dumps({"linear_maps": entries, "bytes_before": before, "bytes_after": after,
                          "change_of_result": difference}, indent=2))  # fmt: skip
        return
    if not arguments.quiet:
        _print(maps)
    say(arguments, f"{arguments.output}: {_count(maps)}; {before / 1e6:.1f} MB before, {after / 1e6:.1f} MB after")
    if difference is None:
        say(arguments, f"no error was measured: {why_not}")
    else:
        inputs = arguments.example or "made-up inputs"
        say(arguments, f"forward's result changes by {difference:.2%}: |change| / |result|, measured on {inputs}")


def _example(arguments: argparse.Namespace, module: torch.jit.ScriptModule) -> tuple[Any, str]:
    """Inputs, or None and why there are none."""
    if arguments.example:
        return read_example(arguments.example), ""
    try:
        return text_example(module), ""
    except GraftError:
        return None, "no inputs can be made up for this forward; give --example FILE"


def _result_difference(module: torch.jit.ScriptModule, quantised: torch.jit.ScriptModule, example: Any) -> float | None:
    """|difference| / |result|, of all floating-point tensors together, without adapters."""
    method = "base_forward" if is_grafted(module) else "forward"
    named = example if isinstance(example, dict) else {}
    positional = () if named else (example,) if isinstance(example, torch.Tensor) else tuple(example)
    with torch.no_grad():
        wanted, got = (_numbers(getattr(each, method)(*positional, **named)) for each in (module, quantised))
    norm = torch.linalg.vector_norm(wanted).item()
    return torch.linalg.vector_norm(got - wanted).item() / norm if norm > 0 else None


def _numbers(result: Any) -> torch.Tensor:
    """All floating-point numbers of a result, in one row."""
    if isinstance(result, torch.Tensor):
        return result.flatten().double() if result.is_floating_point() else torch.zeros(0, dtype=torch.float64)
    if isinstance(result, dict):
        result = [result[key] for key in result]
    parts = [_numbers(part) for part in result] if isinstance(result, (list, tuple)) else []
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def _with_errors(maps: list[LinearMap], measured: list[LinearMap]) -> list[LinearMap]:
    """A frozen module's maps have no paths: of maps of one path and role the first is the first that was measured."""
    errors: dict[tuple[str, Any], list[float | None]] = {}
    for entry in measured:
        errors.setdefault((entry.path, entry.roles), []).append(entry.error)
    left = {key: iter(found) for key, found in errors.items()}
    return [
        entry if entry.kept else replace(entry, error=next(left.get((entry.path, entry.roles), iter(())), None))
        for entry in maps
    ]


def _print(maps: list[LinearMap]) -> None:
    table = Table()
    for heading in ("linear map", "role", "size", "error"):
        table.add_column(heading, justify="right" if heading in ("size", "error") else "left")
    for entry in maps:
        shown = entry.kept or ("" if entry.error is None else f"{entry.error:.2%}")
        table.add_row(
            entry.path or "(a constant)", ", ".join(entry.roles), f"{entry.out_features} x {entry.in_features}", shown
        )
    table_console().print(table)


def _count(maps: list[LinearMap]) -> str:
    done = sum(not entry.kept for entry in maps)
    return f"{done} of {len(maps)} linear maps in int8"
