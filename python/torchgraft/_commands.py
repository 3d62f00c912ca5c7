"""What scripts/graft.py does, once its command line is understood."""

import argparse
import contextlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import _life_commands
from ._console import table_console
from ._drawing import draw
from ._files import check_writable, load_module, reason, save_module, write_whole
from ._layers import ROLES, slots_of
from ._operators import operators_of, ranges
from ._tuning import FEATURES, OPS, TOKENS, measure
from .errors import GraftError
from .grafting import graft
from .grafting import inspect as inspect_module
from .life import list_adapters

# What a user can cause; anything else is a defect and deserves its traceback. RuntimeError, torch.jit.Error: torch's.
EXPECTED_ERRORS = (GraftError, OSError, RuntimeError, MemoryError, torch.jit.Error)

__all__ = ["EXPECTED_ERRORS", "add", "inspect", "reason", "run"]

# The environment variable that patch/graph/dump_graph.h reads.
DUMP = "TORCHGRAFT_DUMP"

# A parameter that each kind of module has exactly once, to count modules by.
_ONE_PER_MODULE = (".lora_a", ".prefix_key", ".up_weight")


def run(arguments: argparse.Namespace) -> None:
    """The command that the command line names."""
    {"add": add, "inspect": inspect, "tune": tune, **_life_commands.COMMANDS}[arguments.command](arguments)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """A function that shows what is being done, if somebody is watching."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda text: None
        return
    with console.status("") as status:
        yield status.update


def add(arguments: argparse.Namespace) -> None:
    """Grafts adapters onto a file and writes another, whole or not at all.

    Args:
        arguments: of the command line: base, output (paths), config and name (lists of one length), adapter (pairs of
            name and directory), gate_pooling, token_mask, active, seed, trainable, sites (path or None).
    """
    check_writable(arguments.output)
    started = time.perf_counter()
    with _progress() as show:
        show(f"loading {arguments.base}")
        base = load_module(arguments.base)
        show("grafting")
        grafted = _graft_all(base, arguments)
        show(f"saving {arguments.output}")
        save_module(grafted, arguments.output)
    print(_summary(base, grafted, arguments.output, time.perf_counter() - started))


def _graft_all(base: torch.jit.ScriptModule, arguments: argparse.Namespace) -> torch.jit.ScriptModule:
    """Fresh adapters in the order given, then trained ones: a graft of a grafted module adds to it."""
    if arguments.seed is not None:
        torch.manual_seed(arguments.seed)
    pooling = {"gate_pooling": arguments.gate_pooling, "token_mask": arguments.token_mask}
    requests: list[dict[str, Any]] = []
    for config, name in zip(arguments.config, arguments.name, strict=True):
        requests.append({"config": _config_of(config), "name": name})
    if arguments.adapter:
        requests.append({"adapters": dict(arguments.adapter)})
    result = base
    for request in requests:
        last = request is requests[-1]
        result = graft(result, **request, **pooling, active=arguments.active if last else None, verify=last,
                       sites=arguments.sites, trainable=arguments.trainable)  # fmt: skip
    return result


def _config_of(text: str) -> str | Path:
    """A name without a slash may be a configuration's; what it means is decided where all configurations are read."""
    return Path(text) if "/" in text else text


def _adapter_list(module: torch.jit.ScriptModule) -> str:
    names = ", ".join(f"{index} {name}" for index, name in enumerate(module.adapter_names()))
    return f"adapters {names} (active: {module.active_adapter()})"


def _summary(base: torch.jit.ScriptModule, grafted: torch.jit.ScriptModule, path: Path, seconds: float) -> str:
    """Three lines. Keys of the state dict: adapters.layer_<i>.<slot>.<parameter>, a slot is "selfattn_lora_q", ..."""
    keys = [key for key in grafted.state_dict() if key.startswith("adapters.layer_") and key.endswith(_ONE_PER_MODULE)]
    layers = len({key.split(".")[1] for key in keys})
    slots = Counter(key.split(".")[2] for key in keys)
    places = ", ".join(f"{slot} x {count}" for slot, count in sorted(slots.items()))
    known = base.adapter_names() if hasattr(base, "adapter_names") else []
    added = sum(info.parameters for info in list_adapters(grafted) if info.name not in known)
    return (
        f"{path}: {_adapter_list(grafted)}\n"
        f"  in {layers} layers: {places}\n"
        f"  {added:,} parameters added, {path.stat().st_size / 1e6:.1f} MB, {seconds:.1f} s"
    )


def inspect(arguments: argparse.Namespace) -> None:
    """Prints the layers that the patcher sees in a file and the operators that run there, or draws them.

    Args:
        arguments: of the command line: base (path), json (bool), sites, svg, dump (paths or None), config (what would
            be grafted; a name or a path, or None).

    Raises:
        GraftError: it sees none; what it saw instead is printed nevertheless.
    """
    with _dumping(arguments.dump):
        _inspect(arguments)


@contextlib.contextmanager
def _dumping(folder: Path | None) -> Iterator[None]:
    """Graphs are written after every pass while this lasts."""
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
    structure = inspect_module(module, sites=arguments.sites)
    drawn = arguments.svg is not None and bool(structure["layers"])
    if drawn:
        _save_picture(module, structure, arguments)
    try:
        if arguments.json:
            print(json.dumps(structure, indent=2))
        elif drawn:
            print(f"{arguments.svg}: written")
        else:
            _print_structure(module, structure)
            if structure["layers"]:
                _print_operators(module, arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if not structure["layers"]:
        raise GraftError(f"{arguments.base}: no attention was found")


def tune(arguments: argparse.Namespace) -> None:
    """Measures both ways of every operator and writes the file that TORCHGRAFT_KERNEL_TABLE may name.

    Args:
        arguments: of the command line: output (path), seconds (float, for each measurement), tokens and features (lists
            of numbers, or None).
    """
    check_writable(arguments.output)
    with _progress() as show:
        table = measure(arguments.seconds, arguments.tokens or TOKENS, arguments.features or FEATURES, show)
    write_whole((json.dumps(table, indent=1) + "\n").encode(), arguments.output)
    for op in OPS:
        mine = [entry for entry in table["measurements"] if entry["op"] == op]
        for dtype in dict.fromkeys(entry["dtype"] for entry in mine):
            ratios = [entry["fused"] / entry["reference"] for entry in mine if entry["dtype"] == dtype]
            print(f"{op}, {dtype}: fused takes {min(ratios):.2f} to {max(ratios):.2f} of the composition's time")
    print(f"{arguments.output}: written; use it with TORCHGRAFT_KERNEL_TABLE={arguments.output}")


def _save_picture(module: torch.jit.ScriptModule, structure: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Draws what is grafted and, with a config, what that would add; of a bare module the places."""
    is_grafted = hasattr(module, "adapter_names")
    title = arguments.base.name + (f": {_adapter_list(module)}" if is_grafted else "")
    if arguments.config:
        module = _planned(module, arguments)
        title += f" with {arguments.config}"
    elif not is_grafted:
        title += ": where adapters can go"
    write_whole(draw(structure, slots_of(module), title), arguments.svg)


def _planned(module: torch.jit.ScriptModule, arguments: argparse.Namespace) -> torch.jit.ScriptModule:
    """The module with the config that is asked about. Only a graft tells where everything goes: leave_out, layers that
    share weights, places that are missing, what is fused."""
    taken = module.adapter_names() if hasattr(module, "adapter_names") else []
    name = next(name for name in map("planned_{}".format, range(len(taken) + 1)) if name not in taken)
    return graft(module, _config_of(arguments.config), name, verify=False, sites=arguments.sites)


def _print_structure(module: torch.jit.ScriptModule, structure: dict[str, Any]) -> None:
    console = table_console()
    if hasattr(module, "adapter_names"):
        console.print(f"grafted already: {_adapter_list(module)}")
    layers = structure["layers"]
    if layers:
        console.print(_layer_table(layers))
    for layer in layers:
        for note in layer["notes"]:
            console.print(f"layer {layer['layer']}, {layer['kind']} attention: {note}")
    for miss in structure["near_misses"]:
        console.print(f"not taken: {miss}")


def _print_operators(module: torch.jit.ScriptModule, arguments: argparse.Namespace) -> None:
    """Those of a grafted module, or of what `--config` would graft."""
    if arguments.config:
        module = _planned(module, arguments)
    if hasattr(module, "adapter_names"):
        table_console().print(_operator_table(module, arguments.config))


def _operator_table(module: torch.jit.ScriptModule, config: str | None) -> Table:
    """What computes each slot. gated_lora_linear is a projection and its LoRA in one, gated_bottleneck_linear a linear
    map and its parallel bottleneck; the others are added to a result."""
    table = Table(title="operators" + (f" with {config}" if config else ""))
    for heading in ("slot", "operator", "layers"):
        table.add_column(heading, overflow="fold")
    for slot, operators in operators_of(module).items():
        for operator, numbers in operators.items():
            table.add_row(*map(Text, (slot, operator, ranges(numbers))))
    return table


def _layer_table(layers: list[dict[str, Any]]) -> Table:
    """One row per attention; a decoder layer has two."""
    table = Table(show_lines=True)
    for heading in ("layer", "kind", "heads", "head size", "hidden", "norm"):
        table.add_column(heading, justify="left" if heading in ("kind", "norm") else "right", no_wrap=True)
    table.add_column("projections", overflow="fold")
    table.add_column("locations", overflow="fold")
    for layer in layers:
        heads = str(layer["num_heads"])
        if layer["num_kv_heads"] != layer["num_heads"]:
            heads += f" ({layer['num_kv_heads']} kv)"
        number = str(layer["layer"]) + ("" if layer["shares"] is None else " again")
        cells = [number, layer["kind"], heads, str(layer["head_dim"]), str(layer["hidden_size"]), _norms(layer)]
        # A gate is told of where there is one; the others are missed where there is none.
        roles = [role for role in ROLES if role != "ffn_gate" or layer[role]]
        cells.append("\n".join(_projection_line(role, layer[role]) for role in roles))
        cells.append("\n".join(layer["locations"]))
        table.add_row(*map(Text, cells))  # Text: a path may hold what rich takes for markup
    return table


def _norms(layer: dict[str, Any]) -> str:
    """Of the attention; and of the feed-forward block, where there is one and it differs."""
    attention, ffn = ("-" if order == "none" else order for order in (layer["norm_order"], layer["ffn_norm_order"]))
    return attention if ffn == attention or not layer["ffn_out"] else f"{attention}\n{ffn} (ffn)"


def _projection_line(role: str, projection: dict[str, Any] | None) -> str:
    """E.g. "query: encoder.layer.0.attention.self.query", with columns [from:to] where projections share one weight."""
    if projection is None:
        return f"{role}: -"
    begin = projection["offset"]
    columns = f"[{begin}:{begin + projection['out_features']}]" if projection["packed"] else ""
    return f"{role}: {projection['path'] or '(a constant)'}{columns}"
