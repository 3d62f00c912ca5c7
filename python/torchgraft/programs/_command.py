"""The command `torchgraft export`."""

import argparse
import contextlib
import io
import warnings
from pathlib import Path

import torch

from .._console import say
from .._example import read_example, text_example
from .._files import check_writable, extra_files, load_module, write_whole
from .._steps import step
from .._text import of_texts
from ..grafting import names_of
from .description import FILE, description_text
from .export import export
from .onnx_file import check_packages, save_onnx
from .package import compile_package
from .pool_of import pool_of
from .read_program import quiet
from .text_of import sizes_of


def export_command(arguments: argparse.Namespace) -> None:
    """Writes an exported program, a package or an ONNX file of the module of a file.

    Args:
        arguments: the command line's: base (path), output, aoti, onnx, example (paths or None), lowered, static,
            gates, no_ids (bool), pool (a number or None), and what pool_of() takes.
    """
    outputs = [path for path in (arguments.output, arguments.aoti, arguments.onnx) if path]
    for path in outputs:
        check_writable(path)
    if arguments.onnx:
        check_packages()
    module = load_module(arguments.base)
    pool = pool_of(arguments, module) if arguments.pool is not None else None
    example = read_example(arguments.example) if arguments.example else text_example(module)
    options = {"adapter_ids": not arguments.no_ids, "gates": arguments.gates, "dynamic": not arguments.static}
    lowered = arguments.lowered or not (arguments.output or arguments.aoti)
    with step("exporting"), contextlib.nullcontext() if arguments.example else of_texts("export", module):
        program = export(pool or module, example, lowered=lowered, **options)
    if arguments.output:
        save_program(program, arguments.output, _texts(extra_files(arguments.base)))
    if arguments.aoti:
        with step(f"compiling {arguments.aoti}"):
            compile_package(program, arguments.aoti)
    if arguments.onnx:
        with step(f"writing {arguments.onnx}"):
            save_onnx(program if lowered else export(module, example, lowered=True, **options), arguments.onnx)
    adapters = ", ".join(f"{index} {name}" for index, name in enumerate(names_of(module)))
    held = f"; adapters {adapters}" if adapters else ""
    if pool is not None:
        held = f"; rows for {arguments.pool} adapters of {len(pool.room())} configurations"
    for path in outputs:
        say(arguments, f"{path}: {_inputs(program)}{held}")


def save_program(program: torch.export.ExportedProgram, path: Path, extra: dict[str, str]) -> None:
    """Writes a program, whole or not at all, with its description and the texts `extra` beside it."""
    buffer = io.BytesIO()
    description = description_text(program)
    with quiet():
        torch.export.save(program, buffer, extra_files=extra | ({FILE: description} if description else {}))
    write_whole(buffer.getvalue(), path)


def _texts(extra: dict[str, bytes]) -> dict[str, str]:
    """An exported program carries texts only."""
    result = {}
    for name, content in extra.items():
        try:
            result[name] = content.decode("utf-8")
        except UnicodeDecodeError:
            warnings.warn(f"export: '{name}', which the model carries, is left out: it is no UTF-8 text", stacklevel=2)
    return result


def _inputs(program: torch.export.ExportedProgram) -> str:
    """ "input_ids [*, *], adapter_ids [*]": a star is a size that is open."""
    texts = []
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in program.graph_signature.user_inputs:
            value = node.meta.get("val")
            if isinstance(value, torch.Tensor):
                sizes = ", ".join("*" if isinstance(size, torch.SymInt) else str(size) for size in sizes_of(value))
                texts.append(f"{node.name} [{sizes}]")
    return ", ".join(texts)
