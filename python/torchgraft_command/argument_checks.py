"""What can be checked of a command line before anything is loaded."""

from __future__ import annotations

import argparse

from . import train_arguments


def check_export(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    outputs = {"--output": arguments.output, "--aoti": arguments.aoti, "--onnx": arguments.onnx}
    if not any(outputs.values()):
        parser.error("nothing to write: give -o OUT.pt2, --aoti OUT.aoti.pt2 or --onnx OUT.onnx")
    for option, path in outputs.items():
        suffix = ".onnx" if option == "--onnx" else ".pt2"
        if path and path.suffix != suffix:
            parser.error(f"{option}: expected a file ending in {suffix}, got '{path}'")
        if path and path.resolve() == arguments.base.resolve():
            parser.error(f"{option}: '{path}' is the model itself; give another file")
    of_pools = {"--room": arguments.room, "--adapters": arguments.adapters, "--gate-pooling": arguments.gate_pooling}
    if arguments.pool is None:
        if given := [option for option, value in of_pools.items() if value]:
            parser.error(f"{given[0]} goes with --pool ROWS")
        return
    if not arguments.room and arguments.adapters is None:
        parser.error("--pool: give the adapters that its rows can hold: --adapters FOLDER, --room CONFIG")
    if arguments.adapters is not None and not arguments.adapters.is_dir():
        parser.error(f"--adapters: '{arguments.adapters}' is no folder")
    others = {"--gates": arguments.gates, "--no-ids": arguments.no_ids, "--lowered": arguments.lowered,
              "--onnx": arguments.onnx}  # fmt: skip
    if given := [option for option, value in others.items() if value]:
        parser.error(f"{given[0]} does not go with --pool: the server's programs return no gates, and take adapter_ids")


def check_add(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Checks the arguments of add, before anything is loaded."""
    configs, names = len(arguments.config), len(arguments.name)
    if configs != names:
        parser.error(f"--config and --name go together, got {configs} and {names} of them")
    if not all(config.strip() for config in arguments.config):
        parser.error("--config: expected a configuration's name (unipelt, mam, lora, ...) or a path, got an empty text")
    names = arguments.name + [name for name, _ in arguments.adapter]
    if not names:
        parser.error("nothing to graft: give --config with --name, or --adapter NAME=DIRECTORY")
    for name in names:
        if names.count(name) > 1:
            parser.error(f"the name '{name}' is given to two adapters")
    if arguments.token_mask and arguments.gate_pooling != "unpadded" and not arguments.adapter:
        parser.error("--token-mask is for --gate-pooling unpadded")


def check_tune(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if not 0 < arguments.seconds < float("inf"):
        parser.error(f"--seconds: expected a positive number, got {arguments.seconds}")
    if min(arguments.tokens or [1]) < 1:
        parser.error("--tokens: expected positive numbers")
    if any(size < 64 or size % 64 for size in arguments.features or []):
        parser.error("--features: expected multiples of 64")


def check_inspect(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if arguments.config is not None and not arguments.config.strip():
        parser.error("--config: expected a configuration's name (unipelt, mam, lora, ...) or a path, got an empty text")
    if arguments.all and (arguments.json or arguments.svg):
        parser.error("--all is for the table: leave it out with --json and --svg")
    if arguments.svg and arguments.svg.suffix != ".svg":
        parser.error(f"--svg: expected a file ending in .svg, got '{arguments.svg}'")


def check_gates(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if arguments.json and arguments.output:
        parser.error("--json prints, --output draws: give one of them")
    train_arguments.check_max_length(parser, arguments.max_length)


def check_remove(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    for name in arguments.name:
        if arguments.name.count(name) > 1:
            parser.error(f"the name '{name}' is given twice")


CHECKS = {
    "add": check_add, "inspect": check_inspect, "tune": check_tune, "export": check_export, "gates": check_gates,
    "remove": check_remove, "train": train_arguments.check,
}  # fmt: skip


def check(arguments: argparse.Namespace) -> None:
    """Checks what needs no file; ends the process with status 2 if it is wrong."""
    if arguments.command in CHECKS:
        CHECKS[arguments.command](arguments.parser, arguments)
