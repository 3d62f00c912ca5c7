"""The commands of `torchgraft`, on a parsed command line: add and inspect."""

import argparse
import contextlib
import json
import os
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from torchgraft_command.line import printable

from . import _life_commands
from ._console import say, table_console
from ._convert_command import convert_command
from ._drawing import draw
from ._example import read_example
from ._files import (
    EXPECTED_ERRORS,
    check_keeps_inputs,
    check_script_output,
    check_writable,
    extra_files,
    load_module,
    reason,
    save_module,
    write_whole,
)
from ._layers import ROLES, blocks_of, patterns_of, slots_of
from ._libraries import load_others, version_text
from ._operators import is_optimized, operators_of, ranges
from ._optimize_command import optimize_command
from ._quantize_command import quantize_command
from ._steps import showing_steps, step
from ._tune_command import tune_command
from .adapter_hub import ADAPTER_FILES
from .configs import config_argument, is_there
from .errors import GraftError
from .grafting import graft, is_grafted, names_of
from .grafting import inspect as inspect_module
from .life import list_adapters
from .programs._command import export_command

__all__ = ["EXPECTED_ERRORS", "add", "inspect", "reason", "run"]

# The environment variable that patch/graph/dump_graph.h reads.
DUMP = "TORCHGRAFT_DUMP"

# The options that name files to write. Paths of all others are read, but for the folder of --dump.
_OUTPUTS = ("output", "svg", "aoti", "onnx")

# A key of a slot. With dropout an adapter has a slot of its own.
_SLOT_KEY = re.compile(r"adapters\.layer_(\d+)\.(.+?)(_dropout_[^.]*)?\.")


def run(arguments: argparse.Namespace) -> None:
    """Runs the command that the command line names. What it warns of comes last, one line each on stderr."""
    command = {
        "add": add,
        "inspect": inspect,
        "tune": tune_command,
        "convert": convert_command,
        "export": export_command,
        "optimize": optimize_command,
        "quantize": quantize_command,
        **_life_commands.COMMANDS,
    }[arguments.command]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        _check_keeps_inputs(arguments)
        load_others(getattr(arguments, "library", []))
        with showing_steps(arguments, version_text):
            command(arguments)
    for warning in caught:
        if issubclass(warning.category, UserWarning):
            text = str(warning.message).removesuffix(". verify=False does without")  # which no command has
            print(f"warning: {printable(text)}", file=sys.stderr)


def _check_keeps_inputs(arguments: argparse.Namespace) -> None:
    inputs: list[Path] = []
    outputs: list[Path] = []
    for name, value in vars(arguments).items():
        values = [part for each in (value if isinstance(value, list) else [value])
                  for part in (each if isinstance(each, tuple) else [each])]  # fmt: skip
        if name == "config":  # a configuration's text, or a path
            values = [Path(text) for text in values if text is not None and is_there(text)]
        if arguments.command == "save" and name == "directory":
            values = [value / file for file in ADAPTER_FILES]
        to_write = name in _OUTPUTS or (arguments.command == "save" and name == "directory")
        (outputs if to_write else inputs).extend(path for path in values if isinstance(path, Path))
    check_keeps_inputs(inputs, outputs, getattr(arguments, "force", None))


def add(arguments: argparse.Namespace) -> None:
    """Grafts adapters onto the module of a file, and writes another file, whole or not at all.

    Args:
        arguments: the command line's: base, output (paths), config and name (lists of one length), adapter (pairs of
            name and directory), gate_pooling, token_mask, active, seed, trainable, sites, example (paths or None),
            allow_partial, rename (pairs of names), part (a text or None), force.
    """
    check_script_output(arguments.output)
    started = time.perf_counter()
    base = load_module(arguments.base)
    with step("grafting"):
        grafted = _graft_all(base, arguments)
    save_module(grafted, arguments.output, extra_files(arguments.base))
    say(arguments, _summary(base, grafted, arguments.output, time.perf_counter() - started))


def _graft_all(base: torch.jit.ScriptModule, arguments: argparse.Namespace) -> torch.jit.ScriptModule:
    """Grafts fresh adapters in the order of the command line, then trained ones."""
    if arguments.seed is not None:
        torch.manual_seed(arguments.seed)
    pooling = {"gate_pooling": arguments.gate_pooling, "token_mask": arguments.token_mask}
    requests: list[dict[str, Any]] = []
    for config, name in zip(arguments.config, arguments.name, strict=True):
        requests.append({"config": config_argument(config), "name": name})
    if arguments.adapter:
        requests.append({"adapters": dict(arguments.adapter)})
    example = read_example(arguments.example)
    result = base
    for request in requests:
        last = request is requests[-1]
        result = graft(result, **request, **pooling, active=arguments.active if last else None, verify=last,
                       sites=arguments.sites, trainable=arguments.trainable, example=example,
                       allow_partial=arguments.allow_partial, part=arguments.part,
                       rename=dict(arguments.rename) if result is base else None)  # fmt: skip
    return result


def _adapter_list(module: torch.jit.ScriptModule) -> str:
    infos = list_adapters(module)
    names = ", ".join(f"{index} {info.name}" for index, info in enumerate(infos))
    unpadded = ", ".join(info.name for info in infos if info.gate_pooling == "unpadded")
    pooling = f"; gates over unpadded tokens: {unpadded}" if unpadded else ""
    return f"adapters {names} (active: {module.active_adapter()}{pooling})"


def _summary(base: torch.jit.ScriptModule, grafted: torch.jit.ScriptModule, path: Path, seconds: float) -> str:
    """Describes a graft in three lines, from the keys adapters.layer_<i>.<slot>.<parameter> of the state dict."""
    places = {match.group(1, 2) for key in grafted.state_dict() if (match := _SLOT_KEY.match(key))}
    layers = len({layer for layer, _ in places})
    slots = Counter(slot for _, slot in places)
    counts = ", ".join(f"{slot} x {count}" for slot, count in sorted(slots.items()))
    known = names_of(base)
    new = [info for info in list_adapters(grafted) if info.name not in known]
    added, size = sum(info.parameters for info in new), sum(info.bytes for info in new)
    was_optimized = is_optimized(base)
    return (
        f"{path}: {_adapter_list(grafted)}\n"
        f"  in {layers} {'layer' if layers == 1 else 'layers'}: {counts}\n"
        f"  {added:,} parameters added ({_in_bytes(size)}); the file has {_in_bytes(path.stat().st_size)}; "
        f"{seconds:.1f} s"
        + ("\n  the base was optimised, this file is not: see torchgraft optimize" if was_optimized else "")
    )


def _in_bytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"


def inspect(arguments: argparse.Namespace) -> None:
    """Prints or draws the layers that the patcher sees in a file, and the operators that run in them.

    Args:
        arguments: the command line's: base (path), json, all (bools), sites, svg, dump (paths or None), config (the
            configuration to show as if it was grafted; a name or a path, or None).

    Raises:
        GraftError: the patcher sees no attention. The command has printed the near misses then.
    """
    with _dumping(arguments.dump):
        _inspect(arguments)


@contextlib.contextmanager
def _dumping(folder: Path | None) -> Iterator[None]:
    """Makes the patcher write its graphs into `folder` after every pass, as long as the context lasts. None:
    nowhere."""
    before = os.environ.get(DUMP)
    if folder is not None:
        os.environ[DUMP] = str(folder)
    try:
        yield
    finally:
        if folder is not None:
            del os.environ[DUMP]
            os.environ.update({} if before is None else {DUMP: before})


def _inspect(arguments: argparse.Namespace) -> None:
    if arguments.svg:
        check_writable(arguments.svg)
    module = load_module(arguments.base)
    with step("finding layers"):
        structure = inspect_module(module, sites=arguments.sites)
    drawn = arguments.svg is not None and bool(structure["layers"])
    if drawn:
        _save_picture(module, structure, arguments)
    if drawn and not arguments.json:
        print(f"{arguments.svg}: written")
    else:
        # What is wrong with --config is said before anything is printed.
        planned = _planned(module, arguments) if arguments.config and structure["layers"] else module
        operators = operators_of(planned) if is_grafted(planned) else None
        if arguments.json:
            print(json.dumps(structure | ({} if operators is None else {"operators": operators}), indent=2))
        else:
            _print_structure(module, structure, arguments.all)
            if operators is not None:
                table_console().print(_operator_table(operators, arguments.config))
    if not structure["layers"]:
        raise GraftError(f"{arguments.base}: no attention was found")


def _save_picture(module: torch.jit.ScriptModule, structure: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Draws the grafted modules and, with a config, those that it would add. If nothing is grafted, draws the locations
    where adapters can act."""
    grafted = is_grafted(module)
    title = arguments.base.name + (f": {_adapter_list(module)}" if grafted else "")
    if arguments.config:
        module = _planned(module, arguments)
        title += f" with {arguments.config}"
    elif not grafted:
        title += ": where adapters can act"
    write_whole(draw(structure, slots_of(module), title), arguments.svg)


def _planned(module: torch.jit.ScriptModule, arguments: argparse.Namespace) -> torch.jit.ScriptModule:
    """Grafts the config that the user asks about. Only a graft shows the effect of leave_out, shared weights, missing
    locations and fusion."""
    taken = names_of(module)
    name = next(name for name in map("planned_{}".format, range(len(taken) + 1)) if name not in taken)
    with step(f"grafting {arguments.config}"):
        return graft(module, config_argument(arguments.config), name, verify=False, sites=arguments.sites)


def _print_structure(module: torch.jit.ScriptModule, structure: dict[str, Any], every_layer: bool = False) -> None:
    console = table_console()
    if is_grafted(module):
        console.print(f"grafted already: {_adapter_list(module)}")
    layers = structure["layers"]
    if layers:
        console.print(_layer_table(_rows(layers) if every_layer else _folded_rows(layers)))
    for line in _notes(layers):
        console.print(line)
    for miss in structure["near_misses"]:
        console.print(f"not taken: {miss}")


def _notes(layers: list[dict[str, Any]]) -> list[str]:
    """Returns the notes of all layers, each once, with the layers that have it. Notes that differ in the numbers of
    paths only count as one."""
    layers_by_note: dict[tuple[str, str], list[int]] = {}
    first: dict[tuple[str, str], str] = {}
    for layer in layers:
        for note in layer["notes"]:
            key = layer["kind"], re.sub(r"(?<=\.)\d+(?=\.|$|\W)", "#", note)
            first.setdefault(key, note)
            layers_by_note.setdefault(key, []).append(layer["layer"])
    return [
        f"layer{'s' if len(set(numbers)) > 1 else ''} {ranges(sorted(set(numbers)))}, {kind} attention: "
        f"{first[kind, note]}"
        for (kind, note), numbers in layers_by_note.items()
    ]


def _operator_table(operators: dict[str, dict[str, list[int]]], config: str | None) -> Table:
    """Tabulates the operator of each slot. gated_lora_linear computes a projection and its LoRA,
    gated_bottleneck_linear a linear map and its parallel bottleneck; the other operators compute an adapter alone."""
    table = Table(title="operators" + (f" with {config}" if config else ""))
    for heading in ("slot", "operator", "layers"):
        table.add_column(heading, overflow="fold")
    for slot, computing in operators.items():
        for operator, numbers in computing.items():
            table.add_row(*map(Text, (slot, operator, ranges(numbers))))
    return table


Row = tuple[str, dict[str, Any], dict[str, str]]  # the layers' numbers, one of the attentions, the paths of its roles


def _rows(layers: list[dict[str, Any]]) -> list[Row]:
    """Returns a row for each attention; a decoder layer has two attentions."""
    return [
        (
            str(layer["layer"]) + ("" if layer["shares"] is None else " again"),
            layer,
            {role: layer[role]["path"] for role in ROLES if layer[role]},
        )
        for layer in layers
    ]


def _folded_rows(layers: list[dict[str, Any]]) -> list[Row]:
    """Returns a row for each attention of layers that look alike."""
    rows: list[Row] = []
    for pattern in patterns_of(blocks_of(layers, {})):
        for group in pattern:
            if len(group.blocks) == 1:
                rows += _rows(list(group.first.attentions))
                continue
            for index, layer in enumerate(group.first.attentions):
                rows.append((group.numbers, layer, {role: group.path(index, role) for role in ROLES if layer[role]}))
    return rows


def _layer_table(rows: list[Row]) -> Table:
    table = Table(show_lines=True)
    for heading in ("layer", "kind", "heads", "head size", "hidden", "norm"):
        table.add_column(heading, justify="left" if heading in ("kind", "norm") else "right", no_wrap=True)
    table.add_column("projections", overflow="fold")
    table.add_column("locations", overflow="fold")
    for number, layer, paths in rows:
        heads = str(layer["num_heads"] or "-")  # without heads: described by --sites, not recognised
        if layer["num_kv_heads"] != layer["num_heads"]:
            heads += f" ({layer['num_kv_heads']} kv)"
        kind = layer["kind"] + ("" if layer["cache"] == "none" else f"\n{layer['cache']} cache")
        cells = [number, kind, heads, str(layer["head_dim"] or "-"), str(layer["hidden_size"]), _norms(layer)]
        # A role without a linear map gets the line "role: -", except the gate, which few models have.
        roles = [role for role in ROLES if role != "ffn_gate" or layer[role]]
        cells.append("\n".join(_projection_line(role, layer[role], paths.get(role, "")) for role in roles))
        cells.append("\n".join(layer["locations"]))
        table.add_row(*map(Text, cells))  # Text: rich would read brackets in a path as markup
    return table


def _norms(layer: dict[str, Any]) -> str:
    """Returns the norm order of the attention, and of the feed-forward block if that differs."""
    attention, ffn = ("-" if order == "none" else order for order in (layer["norm_order"], layer["ffn_norm_order"]))
    return attention if ffn == attention or not layer["ffn_out"] else f"{attention}\n{ffn} (ffn)"


def _projection_line(role: str, projection: dict[str, Any] | None, path: str) -> str:
    """Returns "query: encoder.layer.0.attention.self.query", with columns [from:to] if projections share one weight."""
    if projection is None:
        return f"{role}: -"
    begin = projection["offset"]
    columns = f"[{begin}:{begin + projection['out_features']}]" if projection["packed"] else ""
    return f"{role}: {path or '(a constant)'}{columns}"
