"""Runs a TorchScript module node by node in Python, so that torch.export sees plain operators with symbolic sizes."""

import inspect
import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..errors import GraftError
from .eager_operators import ON_TENSORS, ON_VALUES, Operator

# Operators that read the values of a tensor. What they give is unknown while a program is exported.
_READ_VALUES = {"aten::nonzero", "aten::item", "aten::is_nonzero", "aten::equal", "aten::allclose"}


class _Part:
    """A (sub)module of the script, by its path."""

    def __init__(self, path: str, script: torch.jit.ScriptModule):
        self.path, self.script = path, script


class Eager(nn.Module):
    """A TorchScript module as an nn.Module with the same parameters and buffers under the same names.

    Args:
        script: the module. Its tensors are shared.
        method: the method that forward runs.
        given: arguments of the method that forward does not take, by name.
    """

    def __init__(self, script: torch.jit.ScriptModule, method: str = "forward", given: dict[str, Any] | None = None):
        super().__init__()
        object.__setattr__(self, "_script", script)
        self._method = method
        self._given = given or {}
        self._operators: dict[str, Operator] = {}
        self._graph = getattr(script, method).inlined_graph.copy()
        _drop_checks_of_values(self._graph)
        tensors = script.state_dict(keep_vars=True)
        # The banks of frozen adapters are parameters in TorchScript only.
        trained = {
            name
            for name, tensor in script.named_parameters(remove_duplicate=False)
            if tensor.requires_grad or not name.startswith("adapters.")
        }
        # Of tied parameters there is one.
        parameters = {id(tensors[name]): nn.Parameter(tensors[name].detach(), tensors[name].requires_grad)
                      for name in tensors if name in trained}  # fmt: skip
        for name, tensor in tensors.items():
            self._add(name, parameters[id(tensor)] if name in trained else tensor)
        self.train(script.training)
        # torch.export takes the names of inputs from the signature. It belongs to a class.
        self.__class__ = type("Eager", (type(self),), {"forward": _named_forward(self._names())})

    def _add(self, name: str, tensor: torch.Tensor) -> None:
        *path, leaf = name.split(".")
        owner: nn.Module = self
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner._modules[part]
        if isinstance(tensor, nn.Parameter):
            owner.register_parameter(leaf, tensor)
        else:
            owner.register_buffer(leaf, tensor)

    def _arguments(self) -> list[Any]:
        return list(getattr(self._script, self._method).schema.arguments[1:])

    def _names(self) -> list[str]:
        """A trace of forward(*args) can carry one name twice."""
        names: list[str] = []
        for argument in self._arguments():
            if argument.name not in self._given:
                candidates = itertools.chain([argument.name], (f"{argument.name}_{i}" for i in itertools.count(1)))
                names.append(next(name for name in candidates if name not in names))
        return names

    def run(self, values: Iterable[Any]) -> Any:
        """Runs the method on the arguments that forward takes, in order. Those that are missing have their default."""
        waiting = list(values)
        arguments = []
        for argument in self._arguments():
            if argument.name in self._given:
                arguments.append(self._given[argument.name])
            else:
                arguments.append(waiting.pop(0) if waiting else argument.default_value)
        names = [value.debugName() for value in self._graph.inputs()]
        return self._block(self._graph, dict(zip(names, [_Part("", self._script), *arguments], strict=True)))[0]

    def _block(self, block: Any, values: dict[str, Any]) -> list[Any]:
        for node in block.nodes():
            self._node(node, values)
        return [values[output.debugName()] for output in block.outputs()]

    def _node(self, node: torch._C.Node, values: dict[str, Any]) -> None:
        arguments = [values[value.debugName()] for value in node.inputs()]
        results = self._results(node, arguments, values)
        values.update(zip((output.debugName() for output in node.outputs()), results, strict=True))

    def _results(self, node: torch._C.Node, arguments: list[Any], values: dict[str, Any]) -> list[Any]:
        kind = node.kind()
        if kind == "prim::Constant":
            return [node.output().toIValue()]
        if kind == "prim::GetAttr":
            return [self._attribute(arguments[0], node.s("name"))]
        if kind == "prim::ListConstruct":
            return [list(arguments)]
        if kind == "prim::TupleConstruct":
            return [tuple(arguments)]
        if kind == "prim::DictConstruct":
            return [dict(zip(arguments[::2], arguments[1::2], strict=True))]
        if kind in ("prim::TupleUnpack", "prim::ListUnpack"):
            return list(arguments[0])
        if kind == "prim::If":
            return self._block(list(node.blocks())[0 if arguments[0] else 1], values)
        if kind == "prim::Loop":
            return self._loop(next(node.blocks()), arguments, values)
        if kind == "prim::RaiseException":
            raise GraftError(f"export: the module refuses the example inputs: {arguments[0]}")
        result = self._operator(node, kind, arguments)
        outputs = node.outputsSize()
        return [] if outputs == 0 else [result] if outputs == 1 else list(result)

    def _loop(self, body: Any, arguments: list[Any], values: dict[str, Any]) -> list[Any]:
        limit, go, *carried = arguments
        names = [value.debugName() for value in body.inputs()]
        count = 0
        while go and count < limit:
            values.update(zip(names, [count, *carried], strict=True))
            go, *carried = self._block(body, values)
            count += 1
        return carried

    def _attribute(self, owner: _Part, name: str) -> Any:
        path = f"{owner.path}.{name}" if owner.path else name
        value = getattr(owner.script, name)
        if isinstance(value, torch.jit.ScriptModule):
            return _Part(path, value)
        if not isinstance(value, torch.Tensor):
            return value
        holder: Any = self
        for part in path.split("."):
            holder = getattr(holder, part, None)
        return value if holder is None else holder  # a plain attribute is in no state dict

    def _operator(self, node: torch._C.Node, kind: str, arguments: list[Any]) -> Any:
        is_of_list = bool(arguments) and isinstance(arguments[0], list | tuple | dict)
        has_tensor = not is_of_list and any(isinstance(value, torch.Tensor) for value in arguments[:2])
        function = (ON_TENSORS if has_tensor else ON_VALUES).get(kind)
        if function is not None:
            return function(*arguments)
        schema = node.schema()
        if schema == "(no schema)":
            raise GraftError(f"export: the module does {kind}, which an exported program cannot do")
        if schema not in self._operators:
            self._operators[schema] = Operator(schema)
        return self._operators[schema].call(arguments)


def _named_forward(names: list[str]) -> Any:
    def forward(self: Eager, *arguments: Any) -> Any:
        return self.run(arguments)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    forward.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in ["self", *names]])
    return forward


def _drop_checks_of_values(graph: torch._C.Graph) -> None:
    """Removes assertions on what a tensor holds, such as lower()'s on adapter_ids. A program cannot make them."""
    for node in list(_nodes(graph)):
        if node.kind() == "prim::If" and _is_check(node) and _reads_values(node.inputsAt(0), set()):
            node.destroy()
    torch._C._jit_pass_dce(graph)


def _nodes(block: Any) -> Iterable[torch._C.Node]:
    for node in block.nodes():
        for inner in node.blocks():
            yield from _nodes(inner)
        yield node


def _is_check(node: torch._C.Node) -> bool:
    """Whether an If does nothing but raise, in one of its blocks."""
    blocks = [[inner.kind() for inner in block.nodes()] for block in node.blocks()]
    raising = [kinds for kinds in blocks if "prim::RaiseException" in kinds]
    others = [kinds for kinds in blocks if "prim::RaiseException" not in kinds]
    does_nothing = all(kind == "prim::Constant" for kinds in others for kind in kinds)
    return node.outputsSize() == 0 and bool(raising) and does_nothing


def _reads_values(value: torch._C.Value, seen: set[str]) -> bool:
    node = value.node()
    if node.kind() in _READ_VALUES:
        return True
    if node.kind() == "aten::Bool" and next(node.inputs()).node().kind() != "prim::NumToTensor":
        return True
    fresh = [each for each in node.inputs() if each.debugName() not in seen]
    seen.update(each.debugName() for each in fresh)
    return any(_reads_values(each, seen) for each in fresh)
