#!/usr/bin/env python3
"""Grafts adapters onto a TorchScript file, or shows where they could go.

    graft.py add BASE.pt -o OUT.pt --config unipelt --name task
    graft.py add BASE.pt -o OUT.pt --adapter task=DIRECTORY
    graft.py inspect BASE.pt
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "python"))

try:
    import torch
    from rich.console import Console
    from rich.table import Table

    import torchgraft
except ImportError as error:
    sys.exit(f"graft: error: {error}; run scripts/setup, then .venv/bin/python scripts/graft.py")


class UserError(Exception):
    """Something that the person at the keyboard can put right; shown as one line."""


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def load_base(path: Path) -> torch.jit.ScriptModule:
    """Loads a TorchScript file. Nothing in it is unpickled by Python."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        return torch.jit.load(str(path), map_location="cpu")
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path}: not a TorchScript file that can be loaded ({reason})") from error


def save_atomically(module: torch.jit.ScriptModule, path: Path) -> None:
    """Writes beside `path`, syncs and renames: `path` holds its old content or all of the new."""
    if path.is_dir():
        raise UserError(f"{path}: is a directory; give the name of a file")
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp", delete=False) as file:
            temporary = Path(file.name)
            file.write(module.save_to_buffer())
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise UserError(f"{path}: cannot write ({error.strerror or error})") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Fails before the work, not after it."""
    if path.is_dir():
        raise UserError(f"{path}: is a directory; give the name of a file")
    if not path.parent.is_dir():
        raise UserError(f"{path}: the directory {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{path}: the directory {path.parent} is not writable")


def parse_adapters(pairs: list[str]) -> dict[str, str]:
    adapters: dict[str, str] = {}
    for pair in pairs:
        name, separator, directory = pair.partition("=")
        if not separator or not name or not directory:
            raise UserError(f"--adapter expects NAME=DIRECTORY, got '{pair}'")
        if name in adapters:
            raise UserError(f"--adapter gives the name '{name}' twice")
        adapters[name] = directory
    return adapters


def parameter_count(module: torch.jit.ScriptModule) -> int:
    return sum(tensor.numel() for tensor in module.state_dict().values())


def add(arguments: argparse.Namespace) -> None:
    adapters = parse_adapters(arguments.adapter)
    if arguments.config is None and not adapters:
        raise UserError("nothing to graft: give --config with --name, or --adapter NAME=DIRECTORY")
    if (arguments.config is None) != (arguments.name is None):
        raise UserError("--config and --name go together")
    if arguments.name in adapters:
        raise UserError(f"the name '{arguments.name}' is given to two adapters")
    check_writable(arguments.output)
    console = Console(stderr=True)
    started = time.perf_counter()
    with console.status("loading") if console.is_terminal else open(os.devnull) as status:
        base = load_base(arguments.base)
        if arguments.seed is not None:
            torch.manual_seed(arguments.seed)
        if console.is_terminal:
            status.update("grafting")
        grafted = torchgraft.graft(
            base,
            config=arguments.config,
            name=arguments.name,
            adapters=adapters,
            gate_pooling=arguments.gate_pooling,
            token_mask=arguments.token_mask,
            active=arguments.active,
        )
        if console.is_terminal:
            status.update("saving")
        save_atomically(grafted, arguments.output)
    summary = summarise(base, grafted, arguments.output, time.perf_counter() - started)
    print(summary)


def summarise(base: torch.jit.ScriptModule, grafted: torch.jit.ScriptModule, path: Path, seconds: float) -> str:
    slots = Counter(key.split(".")[2] for key in grafted.state_dict() if key.startswith("adapters.layer_")
                    and key.endswith((".lora_a", ".prefix_key", ".up_weight")))  # fmt: skip
    places = ", ".join(f"{name} in {count} layers" for name, count in sorted(slots.items()))
    added = parameter_count(grafted) - parameter_count(base)
    names = ", ".join(grafted.adapter_names())
    return (
        f"{path}: adapters {names} (active: {grafted.active_adapter()})\n"
        f"  {places}\n"
        f"  {added:,} parameters more, {path.stat().st_size / 1e6:.1f} MB, {seconds:.1f} s"
    )


def layer_table(layers: list[dict]) -> Table:
    table = Table(show_lines=True)
    for heading in ("layer", "kind", "heads", "head size", "hidden", "norm"):
        table.add_column(heading, justify="right" if heading != "kind" else "left", no_wrap=True)
    table.add_column("projections", overflow="fold")
    table.add_column("locations", overflow="fold")
    for layer in layers:
        heads = str(layer["num_heads"])
        if layer["num_kv_heads"] != layer["num_heads"]:
            heads += f" ({layer['num_kv_heads']} kv)"
        paths = []
        for role in ("query", "key", "value", "output", "ffn_in", "ffn_out"):
            projection = layer[role]
            if projection:
                columns = f"[{projection['offset']}:{projection['offset'] + projection['out_features']}]"
                path = projection["path"] or "(a constant)"
                paths.append(f"{role}: {path}{columns if projection['packed'] else ''}")
        norm = {"post": "post", "pre": "pre", "none": "-"}[layer["norm_order"]]
        cells = [str(layer["index"]), layer["kind"], heads, str(layer["head_dim"]), str(layer["hidden_size"]), norm]
        table.add_row(*cells, "\n".join(paths).replace("[", r"\["), "\n".join(layer["locations"]))
    return table


def inspect(arguments: argparse.Namespace) -> None:
    structure = torchgraft.inspect(load_base(arguments.base))
    if arguments.json:
        import json

        print(json.dumps(structure, indent=2))
    else:
        console = Console(width=None if sys.stdout.isatty() else 160)
        if structure["layers"]:
            console.print(layer_table(structure["layers"]))
        for layer in structure["layers"]:
            for note in layer["notes"]:
                console.print(f"layer {layer['index']}: {note}", markup=False, highlight=False)
        for miss in structure["near_misses"]:
            console.print(f"not taken: {miss}", markup=False, highlight=False)
    if not structure["layers"]:
        raise UserError(f"{arguments.base}: no attention was found")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="graft.py", description="Graft gated adapters onto a TorchScript Transformer.")
    commands = parser.add_subparsers(dest="command", required=True)

    adding = commands.add_parser("add", help="graft adapters onto BASE and write OUT")
    adding.add_argument("base", type=Path, metavar="BASE.pt", help="a scripted or traced (or already grafted) model")
    adding.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.pt")
    adding.add_argument("--config", help="unipelt, mam, lora, seq_bn, ..., or the path of an adapter_config.json")
    adding.add_argument("--name", help="the name of the adapter that --config makes, freshly initialised")
    adding.add_argument("--adapter", action="append", default=[], metavar="NAME=DIR",
                        help="a trained AdapterHub adapter; may be given several times")  # fmt: skip
    adding.add_argument("--gate-pooling", choices=("all", "unpadded"), default="all",
                        help="whether gates average over padding too (default: all, as in AdapterHub)")  # fmt: skip
    adding.add_argument("--token-mask", metavar="INPUT",
                        help="for --gate-pooling unpadded: the argument of forward that is the token mask")  # fmt: skip
    adding.add_argument("--active", metavar="NAME", help="the adapter that is active in OUT (default: the last one)")
    adding.add_argument("--seed", type=int, help="for fresh weights")
    adding.set_defaults(run=add)

    inspecting = commands.add_parser("inspect", help="show the layers that are seen in BASE")
    inspecting.add_argument("base", type=Path, metavar="BASE.pt")
    inspecting.add_argument("--json", action="store_true", help="as data")
    inspecting.set_defaults(run=inspect)
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = make_parser().parse_args(argv)
    try:
        arguments.run(arguments)
        return 0
    except (UserError, torchgraft.GraftError, RuntimeError, OSError) as error:
        print(f"graft: error: {one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("graft: error: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
