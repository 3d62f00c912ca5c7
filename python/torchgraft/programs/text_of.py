"""Writes values and arguments of an exported graph as TorchScript's text."""

import math
import operator
from typing import Any

import torch
from torch import fx
from torch._export.converter import _TORCH_ENUM_TO_DTYPE

from ..errors import GraftError

# TorchScript has numbers for these.
_DTYPES = {dtype: number for number, dtype in _TORCH_ENUM_TO_DTYPE.items()}
_FORMATS = {torch.contiguous_format: 0, torch.preserve_format: 1, torch.channels_last: 2, torch.channels_last_3d: 3}
_LAYOUTS = {torch.strided: 0, torch.sparse_coo: 1}
_LEAST = -(2**63)  # its positive is no int64


def is_size(value: object) -> bool:
    """Whether `value` is a symbolic number."""
    return isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool)


def sizes_of(value: torch.Tensor) -> list[int | torch.SymInt]:
    """The sizes of a tensor in a program; symbols are those that are open."""
    return [int(size) if isinstance(size, torch.SymInt) and size.node.expr.is_number else size for size in value.size()]


def attribute_text(path: str) -> str:
    """ "encoder.layer.0.weight" -> getattr(getattr(self.encoder.layer, "0"), "weight")."""
    text = "self"
    for name in path.split("."):
        text = f"{text}.{name}" if name.isidentifier() else f"getattr({text}, {value_text(name)})"
    return text


def value_text(value: Any) -> str:
    """Writes a value.

    Raises:
        GraftError: TorchScript has no text for it.
    """
    if isinstance(value, fx.Node):
        return attribute_text(str(value.target)) if value.op == "get_attr" else _node_text(value)
    if value is None or isinstance(value, bool):
        return str(value)
    if isinstance(value, int):
        return str(value) if value != _LEAST else f"({_LEAST + 1} - 1)"
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else f'float("{value}")'
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(value_text, value)) + "]"
    for numbers in (_DTYPES, _FORMATS, _LAYOUTS):
        if value in numbers:
            return str(numbers[value])
    if isinstance(value, torch.device):
        return value_text(str(value))
    raise GraftError(f"from_program: the program has a value that TorchScript has no text for: {value!r}")


def is_part(node: fx.Node) -> bool:
    """Whether the node only picks one of the results of another."""
    return node.target is operator.getitem


def result_text(node: fx.Node) -> str:
    """Writes the variables that take the results of a call."""
    if not any(map(is_part, node.users)):
        return node.name
    # Unpacked and not indexed: of what stands in a list, TorchScript's alias analysis knows nothing.
    return " ".join(f"{_part_text(node, index)}," for index in range(len(node.meta["val"])))


def _part_text(whole: fx.Node, index: int) -> str:
    return f"{whole.name}__{index}"


def _node_text(node: fx.Node) -> str:
    """A variable, or the number, text or None that an input of the program has become."""
    if is_part(node):
        return _part_text(*node.args)
    value = node.meta.get("val")
    is_constant = node.op == "placeholder" and not isinstance(value, torch.Tensor) and not is_size(value)
    return value_text(value) if is_constant else node.name


def arguments_text(node: fx.Node) -> str:
    """Writes the arguments of an operator's call."""
    schema = node.target._schema.arguments
    kinds = {argument.name: str(argument.type) for argument in schema}
    texts = [_argument(value, str(argument.type)) for value, argument in zip(node.args, schema, strict=False)]
    texts += [f"{name}={_argument(value, kinds[name])}" for name, value in node.kwargs.items()]
    return ", ".join(texts)


def _argument(value: Any, kind: str) -> str:
    if isinstance(value, list | tuple) and not value:
        element = "int" if "List[int]" in kind else "float" if "List[float]" in kind else "Tensor"
        return f"torch.jit.annotate(List[{element}], [])"
    return value_text(value)
