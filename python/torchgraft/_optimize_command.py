"""The command optimize of torchgraft."""

import argparse

from ._console import say
from ._example import read_example
from ._files import check_script_output, extra_files, load_module, save_module
from ._steps import step
from .optimization import optimize


def optimize_command(arguments: argparse.Namespace) -> None:
    """Writes a faster copy of a file, whole or not at all.

    Args:
        arguments: the command line's: base, output (paths), exact_base (bool), example (path or None), force (bool).
    """
    check_script_output(arguments.output)
    module = load_module(arguments.base)
    example = read_example(arguments.example)
    with step("optimising"):
        result = optimize(module, exact_base=arguments.exact_base, example=example)
    save_module(result, arguments.output, extra_files(arguments.base))
    say(arguments, f"{arguments.output}: optimised; it needs libtorchgraft.so")
