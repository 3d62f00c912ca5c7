"""The command line of `torchgraft`: its commands and their options."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import serve_arguments, train_arguments
from .life_arguments import add_example_argument, add_gates_command, add_life_commands
from .line import Parser

DESCRIPTION = """\
Grafts gated adapters onto a TorchScript or exported Transformer, shows where adapters can act, changes the adapters of
a grafted file, and trains them.

  torchgraft add BASE.pt -o OUT.pt --config unipelt --name task
  torchgraft add BASE.pt -o OUT.pt --adapter task=DIRECTORY
  torchgraft inspect BASE.pt
  torchgraft COMMAND --help
"""
STATUS = """\
Exit status: 0 done; 1 refused or failed; 2 wrong command line; 130 Ctrl-C; 141 the reader of the output has closed it;
143 SIGTERM. An error is one line on stderr, and the output file is then as it was.
"""
EDITING = """\
If a layer is seen wrongly, write the description of the layers to a file, edit it, and give it back:

    torchgraft inspect BASE.pt --json > sites.json
    torchgraft inspect BASE.pt --sites sites.json
    torchgraft add BASE.pt -o OUT.pt --config unipelt --name task --sites sites.json

Remove an entry of "layers", and its attention gets no adapters. Change a field (kind, layer, a projection's path, or
null for no projection, a residual to false), and it overrules what is seen. More: docs/sites.md.
"""
# Commands whose output is what was asked for: there is nothing to be quiet about.
SHOWING = {"inspect", "match", "list", "completion"}
LOADING_NOTHING = {"tune", "convert", "completion"}


def two_names(text: str, expected: str = "OLD=NEW") -> tuple[str, str]:
    """Parses the argument of --rename."""
    first, _, second = text.partition("=")
    if not first or not second:
        raise argparse.ArgumentTypeError(f"expected {expected}, got '{text}'")
    return first, second


def seed(text: str) -> int:
    """Parses a seed as torch.manual_seed takes it."""
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got '{text[:40]}'") from None
    if not -(2**63) <= number < 2**64:
        raise argparse.ArgumentTypeError(f"expected a whole number of 64 bits, got {text[:40]}")
    return number


def name_and_directory(text: str) -> tuple[str, Path]:
    """Parses the argument of --adapter."""
    name, directory = two_names(text, "NAME=DIRECTORY")
    return name, Path(directory)


def make_parser(program: str = "torchgraft") -> Parser:
    parser = Parser(prog=program, description=DESCRIPTION, epilog=STATUS)
    parser.add_argument("-V", "--version", action="store_true", help="print the versions and the kernels in use")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands", parser_class=Parser)
    add_add_command(commands)
    add_inspect_command(commands)
    add_life_commands(commands)
    add_gates_command(commands)
    add_export_command(commands)
    add_optimize_command(commands)
    add_quantize_command(commands)
    train_arguments.add_train_command(commands)
    serve_arguments.add_serve_command(commands)
    add_tune_command(commands)
    add_convert_command(commands)
    add_completion_command(commands)
    for name, command in commands.choices.items():
        add_common_arguments(name, command)
    return parser


def add_common_arguments(name: str, parser: argparse.ArgumentParser) -> None:
    """Adds what every command has."""
    parser.set_defaults(parser=parser)
    if name not in LOADING_NOTHING:
        parser.add_argument(
            "--library",
            action="append",
            default=[],
            type=Path,
            metavar="OTHER.so",
            help="a library with operators that the model uses besides torch's; its code runs. May be given several "
            "times",
        )
    if name == "completion":
        return
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("-v", "--verbose", action="store_true", help="tell versions, and each step with its seconds")
    if name not in SHOWING:
        amount.add_argument(
            "-q", "--quiet", action="store_true", help="do not say what was done; warnings and errors are still shown"
        )


def add_completion_command(commands: argparse._SubParsersAction[Parser]) -> None:
    completing = commands.add_parser(
        "completion",
        help='print a script that completes command lines: eval "$(torchgraft completion bash)"',
    )
    completing.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="the shell that reads the script")


def add_adapter_arguments(adding: argparse.ArgumentParser) -> None:
    """Adds the options that say which adapters, and what their gates read."""
    adding.add_argument(
        "--config",
        action="append",
        default=[],
        help='graft a fresh adapter: unipelt, mam, lora, seq_bn, ..., with values ("unipelt[r=4]"), or the path of an '
        "adapter_config.json or of its folder. May be given several times, each with a --name",
    )
    adding.add_argument("--name", action="append", default=[], help="the name of the adapter that --config makes")
    adding.add_argument(
        "--adapter",
        action="append",
        default=[],
        type=name_and_directory,
        metavar="NAME=DIRECTORY",
        help="graft a trained adapter from its AdapterHub directory; may be given several times. adapter_ids count "
        "those of --config first, then these",
    )
    adding.add_argument(
        "--gate-pooling",
        choices=("all", "unpadded"),
        help="whether gates average over padding too (default: as --adapter's directory says; all for a fresh adapter, "
        "as in AdapterHub)",
    )
    adding.add_argument(
        "--token-mask",
        metavar="INPUT",
        help="for --gate-pooling unpadded: the argument of forward that is the token mask",
    )


def add_add_command(commands: argparse._SubParsersAction[Parser]) -> None:
    adding = commands.add_parser("add", help="graft adapters onto BASE and write OUT")
    adding.add_argument("base", type=Path, metavar="BASE.pt", help="a scripted or traced (or already grafted) model")
    adding.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.pt", help="the file to write")
    add_adapter_arguments(adding)
    adding.add_argument("--active", metavar="NAME", help="the adapter that is active in OUT (default: the last one)")
    adding.add_argument("--seed", type=seed, help="seed of fresh weights (default: others each time)")
    adding.add_argument(
        "--trainable",
        action="store_true",
        help="give the adapters parameters of their own, to train them (default: frozen)",
    )
    adding.add_argument(
        "--sites",
        type=Path,
        metavar="FILE",
        help="an edited output of inspect --json; it overrules the layers that are seen",
    )
    adding.add_argument(
        "--part",
        choices=("encoder", "decoder"),
        help="BASE is this part of an encoder and a decoder, and takes its half of an adapter of both",
    )
    adding.add_argument(
        "--allow-partial",
        action="store_true",
        help="graft onto the attention that is recognised where some is not (default: an error that names the rest)",
    )
    adding.add_argument(
        "--rename",
        action="append",
        default=[],
        type=two_names,
        metavar="OLD=NEW",
        help="another name in OUT for what BASE calls as grafting does (adapter_ids, adapters, ...); may be given "
        "several times",
    )
    add_example_argument(adding, "compare OUT with BASE")
    adding.add_argument("--force", action="store_true", help="write also over BASE.pt itself")


def add_inspect_command(commands: argparse._SubParsersAction[Parser]) -> None:
    inspecting = commands.add_parser(
        "inspect",
        help="show the layers that the patcher sees in BASE",
        epilog=EDITING,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    inspecting.add_argument("base", type=Path, metavar="BASE.pt", help="a scripted, traced or grafted model")
    inspecting.add_argument("--json", action="store_true", help="print JSON")
    inspecting.add_argument(
        "--all", action="store_true", help="print each layer (default: layers that look alike are one row)"
    )
    inspecting.add_argument(
        "--sites", type=Path, metavar="FILE", help="an edited output of --json; it overrules the layers that are seen"
    )
    inspecting.add_argument(
        "--svg",
        type=Path,
        metavar="FILE",
        help="draw the layers with their adapters; if nothing is grafted, with the locations where adapters can act",
    )
    inspecting.add_argument(
        "--dump", type=Path, metavar="DIR", help="write the graph after every pass into DIR, for work on the patcher"
    )
    inspecting.add_argument(
        "--config",
        help="show the operators that this configuration (as for add) would run; with --svg, draw where its adapters "
        "would act",
    )


def add_tune_command(commands: argparse._SubParsersAction[Parser]) -> None:
    tuning = commands.add_parser("tune", help="measure which kernels are faster on this machine, and write a table")
    tuning.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="KERNELS.json",
        help="the file that TORCHGRAFT_KERNEL_TABLE may name",
    )
    tuning.add_argument("--seconds", type=float, default=0.3, help="time of each measurement")
    tuning.add_argument("--tokens", type=int, nargs="+", help="tokens of all rows together (default: 16 128 1024)")
    tuning.add_argument("--features", type=int, nargs="+", help="hidden sizes, multiples of 64 (default: 384 768)")


def add_convert_command(commands: argparse._SubParsersAction[Parser]) -> None:
    converting = commands.add_parser(
        "convert", help="write adapter.safetensors beside each pytorch_adapter.bin, for C++, which reads no pickles"
    )
    converting.add_argument(
        "folder",
        type=Path,
        metavar="FOLDER",
        help="an adapter's directory of AdapterHub, or a folder of such directories",
    )


def add_export_command(commands: argparse._SubParsersAction[Parser]) -> None:
    exporting = commands.add_parser(
        "export", help="write an exported program (.pt2), an AOTInductor package or an ONNX file"
    )
    exporting.add_argument("base", type=Path, metavar="MODEL.pt", help="a model, grafted or not")
    exporting.add_argument("-o", "--output", type=Path, metavar="OUT.pt2", help="an exported program of torch.export")
    exporting.add_argument(
        "--aoti", type=Path, metavar="OUT.aoti.pt2", help="a compiled package, which C++ runs without TorchScript"
    )
    exporting.add_argument(
        "--onnx", type=Path, metavar="OUT.onnx", help="an ONNX file, always lowered (needs requirements/onnx.txt)"
    )
    exporting.add_argument("--lowered", action="store_true", help="ATen operators only: no libtorchgraft.so is needed")
    exporting.add_argument("--static", action="store_true", help="fix all sizes to those of the example")
    exporting.add_argument("--gates", action="store_true", help="return the gates, too")
    exporting.add_argument(
        "--no-ids", action="store_true", help="take no adapter_ids: all rows use the adapter that is active"
    )
    exporting.add_argument(
        "--example",
        type=Path,
        metavar="FILE",
        help="inputs of forward: a .pt of torch.save (a tensor, a tuple, or a dict by argument), or .safetensors "
        "(default: made up for a text encoder)",
    )

    exporting.add_argument(
        "--pool",
        type=serve_arguments.positive,
        metavar="ROWS",
        help="leave room for so many adapters at once, which examples/server --package brings in and out",
    )
    exporting.add_argument(
        "--adapters", type=Path, metavar="FOLDER", help="of a pool: its rows can hold each adapter of this folder"
    )
    exporting.add_argument(
        "--room",
        action="append",
        default=[],
        metavar="CONFIG",
        help="of a pool: its rows can hold adapters of this configuration, as add --config takes it; repeat it",
    )
    exporting.add_argument(
        "--gate-pooling",
        choices=("all", "unpadded"),
        help="of a pool: over which tokens gates are means (default: as each adapter's directory says)",
    )


def add_optimize_command(commands: argparse._SubParsersAction[Parser]) -> None:
    optimizing = commands.add_parser("optimize", help="make a faster copy of BASE, grafted or not, for inference")
    optimizing.add_argument("base", type=Path, metavar="BASE.pt", help="a model, grafted or not")
    optimizing.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.pt", help="the file to write")
    optimizing.add_argument(
        "--exact-base", action="store_true", help="leave a grafted module's base as it is: deactivated, bit for bit"
    )
    add_example_argument(optimizing, "compare OUT with BASE")
    optimizing.add_argument("--force", action="store_true", help="write also over BASE.pt itself")


def add_quantize_command(commands: argparse._SubParsersAction[Parser]) -> None:
    quantizing = commands.add_parser("quantize", help="make int8 of the linear maps of BASE, and write OUT")
    quantizing.add_argument("base", type=Path, metavar="BASE.pt", help="a model, grafted or not")
    quantizing.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.pt", help="the file to write")
    quantizing.add_argument(
        "--skip",
        action="append",
        default=[],
        metavar="ROLE_OR_PATH",
        help="linear maps that stay as they are: a role (query, key, value, output, ffn_in, ffn_gate, ffn_out, other), "
        "a module path, or the path of a module around them. May be given several times",
    )
    quantizing.add_argument("--json", action="store_true", help="print JSON")
    add_example_argument(quantizing, "measure the error")
    quantizing.add_argument("--force", action="store_true", help="write also over BASE.pt itself")
