"""The commands for grafted files: what the command line says of them."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path

from .line import Parser

Command = Callable[..., argparse.ArgumentParser]


def add_example_argument(parser: argparse.ArgumentParser, purpose: str) -> None:
    parser.add_argument(
        "--example",
        type=Path,
        metavar="FILE",
        help=f"inputs of forward to {purpose} on: a .pt of torch.save (a tensor, a tuple, or a dict by argument), or "
        ".safetensors (default: made up where possible)",
    )


def life_command(
    commands: argparse._SubParsersAction[Parser], name: str, about: str, writes: bool = True, forcing: str = ""
) -> argparse.ArgumentParser:
    """Adds a command for grafted files. One that changes the adapters writes another file."""
    result = commands.add_parser(name, help=about)
    result.add_argument("base", type=Path, metavar="MODEL.pt", help="a grafted model")
    if writes:
        result.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.pt", help="the file to write")
        result.add_argument("--force", action="store_true", help=f"write also over MODEL.pt itself{forcing}")
    return result


def _add_directory_commands(command: Command) -> None:
    saving = command(
        "save", "write one adapter, or a composition with its adapters, into an AdapterHub directory", writes=False
    )
    saving.add_argument("name", metavar="NAME", help="the adapter")
    saving.add_argument("directory", type=Path, metavar="DIRECTORY", help="made if it is missing")
    saving.add_argument(
        "--model-class",
        metavar="CLASS",
        help="the model class of the adapters library that is to load the head: BertAdapterModel",
    )
    saving.add_argument(
        "--force", action="store_true", help="write also where an adapter of another name is (default: an error)"
    )
    saving.add_argument("--bin", action="store_true", help="write pytorch_adapter.bin instead of adapter.safetensors")
    loading = command(
        "load",
        "add the adapter of a directory, or its composition with its adapters",
        forcing=", and replace adapters of those names",
    )
    loading.add_argument(
        "directory",
        type=Path,
        metavar="DIRECTORY",
        help="of AdapterHub (an adapter, or a composition with its adapters), or a LoRA or (IA)^3 of PEFT",
    )
    loading.add_argument(
        "--name", help="the adapter's name in OUT.pt (default: its name in the directory; of PEFT: default)"
    )
    loading.add_argument("--trainable", action="store_true", help="give it parameters of its own, to train it")
    matching = command("match", "show where load would put each weight of a directory", writes=False)
    matching.add_argument(
        "directory", type=Path, metavar="DIRECTORY", help="of AdapterHub, or a LoRA or (IA)^3 of PEFT"
    )
    matching.add_argument("--json", action="store_true", help="print JSON")
    add_example_argument(loading, "compare OUT with MODEL")


def add_life_commands(commands: argparse._SubParsersAction[Parser]) -> None:
    """Adds the commands for grafted files."""
    command = functools.partial(life_command, commands)
    _add_directory_commands(command)
    listing = command("list", "show the adapters and their sizes", writes=False)
    listing.add_argument("--json", action="store_true", help="print JSON")
    composing = command("compose", "add a composition of the adapters, which is used as an adapter is")
    composing.add_argument(
        "composition", metavar="COMPOSITION", help='the adapters: "Stack(en, ner)", "Average(a, b, weights=[0.3, 0.7])"'
    )
    composing.add_argument("--name", required=True, help="the composition's name in OUT.pt")
    command("remove", "remove adapters and compositions").add_argument(
        "name", nargs="+", metavar="NAME", help="the adapters"
    )
    renaming = command("rename", "give an adapter another name")
    renaming.add_argument("name", metavar="NAME", help="the adapter")
    renaming.add_argument("to", metavar="NEW_NAME", help="its name in OUT.pt")
    command("freeze", "make a trainable adapter frozen: a row of the banks, to be served").add_argument(
        "name", metavar="NAME", help="the adapter"
    )
    command("unfreeze", "make a frozen adapter trainable: it gets parameters of its own").add_argument(
        "name", metavar="NAME", help="the adapter"
    )
    merging = command("merge", "add an ungated LoRA to the base's weights")
    merging.add_argument("name", metavar="NAME", help="the adapter")
    merging.add_argument(
        "--into-base",
        action="store_true",
        help="merge also where MODEL.pt has other adapters, which then run on the merged weights (default: an error)",
    )
    unmerging = command("unmerge", "subtract a merged LoRA from the base's weights")
    unmerging.add_argument("name", metavar="NAME", help="the adapter")
    lowering = command("lower", "replace torchgraft's operators by ATen calls: OUT.pt loads without libtorchgraft.so")
    ungrafting = command("ungraft", "give back the base (after merge: with the merged weights)")
    for changing in (composing, merging, unmerging, lowering, ungrafting):
        add_example_argument(changing, "compare OUT with MODEL")
    verifying = command("verify", "run MODEL.pt on inputs and compare what must agree", writes=False)
    add_example_argument(verifying, "run MODEL")


def add_gates_command(commands: argparse._SubParsersAction[Parser]) -> None:
    gates = life_command(commands, "gates", "draw the gates of an adapter on texts, or print them", writes=False)
    gates.add_argument("--json", action="store_true", help="print JSON: numbers by location and layer")
    gates.add_argument("--text", action="append", default=[], help="a text; may be given several times")
    gates.add_argument("--file", type=Path, metavar="FILE", help="a data set: one text per line")
    gates.add_argument(
        "--tokenizer",
        type=Path,
        metavar="TOKENIZER.json",
        help="the model's tokenizer (default: tokenizer.json beside MODEL.pt)",
    )
    gates.add_argument("--max-length", type=int, default=128, help="tokens per text")
    gates.add_argument("--adapter", metavar="NAME", help="the adapter (default: the active one)")
    gates.add_argument(
        "--each", action="store_true", help="draw or print one map per text, not the mean over all texts"
    )
    gates.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="a picture: .png, .svg or .pdf (default: print text)"
    )
