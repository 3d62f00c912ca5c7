"""Banks of adapters as constants of a program that is compiled: which ones the program reads, and whether the compiler
would compute with them."""

from collections.abc import Iterator

import torch
from torch import fx

_BANKS = "adapters."


def banks_read(program: torch.export.ExportedProgram) -> list[str]:
    """Returns the names of the banks that the program reads, sorted."""
    return sorted(name for name, node in _constants(program) if name.startswith(_BANKS) and node.users)


def computed_from_banks(program: torch.export.ExportedProgram) -> str | None:
    """Returns a bank from which the program computes something without any input; None if there is none. Freezing
    computes it once, so that banks that are written later would not reach it."""
    constant = {node: name for name, node in _constants(program)}
    for node in program.graph.nodes:
        inputs = node.all_input_nodes
        if node.op != "call_function" or not inputs or not all(each in constant for each in inputs):
            continue
        banks = [constant[each] for each in inputs if constant[each].startswith(_BANKS)]
        if banks:
            return banks[0]
        constant[node] = constant[inputs[0]]
    return None


def _constants(program: torch.export.ExportedProgram) -> Iterator[tuple[str, fx.Node]]:
    """Parameters, buffers and lifted constants, by the names that they have in the program."""
    signature = program.graph_signature
    held = (
        dict(signature.inputs_to_parameters)
        | dict(signature.inputs_to_buffers)
        | dict(signature.inputs_to_lifted_tensor_constants)
    )
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in held:
            yield held[node.name], node
