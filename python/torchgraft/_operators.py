"""Finds the operator that computes each slot of a grafted module."""

import re
from collections.abc import Iterator

import torch

_SLOT_PATH = re.compile(r"adapters\.layer_(\d+)\.([^.]+)\.[^.]+")


def operators_of(module: torch.jit.ScriptModule) -> dict[str, dict[str, list[int]]]:
    """Returns {slot ("selfattn_lora_q"): {operator ("gated_lora_linear"): layers}}. A slot that only ATen calls compute
    is missing."""
    found: dict[str, dict[str, set[int]]] = {}
    for node in _nodes(module.grafted_forward.inlined_graph):
        kind = node.kind()
        slots = {match.groups() for value in node.inputs() if (match := _SLOT_PATH.fullmatch(_path_of(value)))}
        if kind.startswith("torchgraft::"):
            for layer, slot in slots:
                found.setdefault(slot, {}).setdefault(kind.removeprefix("torchgraft::"), set()).add(int(layer))
    return {slot: {name: sorted(layers) for name, layers in found[slot].items()} for slot in sorted(found)}


_OF_OPTIMIZE = ("torchgraft::linear", "torchgraft::residual_norm")


def is_optimized(module: torch.jit.ScriptModule) -> bool:
    """Returns whether optimize() has put its operators into a module, grafted or not."""
    methods = [
        method for name in ("forward", "grafted_forward", "base_forward") if (method := getattr(module, name, None))
    ]
    return any(node.kind() in _OF_OPTIMIZE for method in methods for node in _nodes(method.inlined_graph))


def _nodes(block: torch._C.Block) -> Iterator[torch._C.Node]:
    for node in block.nodes():
        yield node
        for inner in node.blocks():
            yield from _nodes(inner)


def _path_of(value: torch._C.Value) -> str:
    """Returns the path of a value that is an attribute of the module, "adapters.layer_0.selfattn_lora_q.lora_a"; else
    ""."""
    names: list[str] = []
    while value.node().kind() == "prim::GetAttr":
        names.insert(0, value.node().s("name"))
        value = next(value.node().inputs())
    return ".".join(names)


def ranges(numbers: list[int]) -> str:
    """Writes numbers as ranges: [0, 1, 2, 5] -> "0-2, 5"."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
