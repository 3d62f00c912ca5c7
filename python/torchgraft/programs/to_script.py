"""Makes TorchScript of an exported program: its ATen graph, printed and compiled.

What the program knows of sizes goes into the text as views that change nothing. So the patcher, which works out shapes
from weights, sees those of inputs and convolutions, and that equal sizes are equal.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from ..errors import GraftError
from ..grafting import script_module
from .text_of import arguments_text, is_part, is_size, result_text, sizes_of, value_text

# Checks of the export, which the sizes in the text replace.
_CHECKS = ("aten._assert", "aten.sym_constrain_range")
# Calls that only matter where something writes into their result.
_IDENTITIES = ("aten.lift_fresh_copy.default", "aten.detach_.default", "aten.alias.default")
# The patcher cannot work out the sizes of their results.
_OPAQUE = ("aten.conv1d", "aten.conv2d", "aten.conv3d", "aten.convolution")
# Only decompositions to core ATen make these.
_CORE = {
    "aten._softmax.default", "aten.native_layer_norm.default", "aten._native_batch_norm_legit_no_training.default",
    "aten._scaled_dot_product_flash_attention_for_cpu.default", "aten._fused_rms_norm.default", "aten._to_copy.default",
}  # fmt: skip
_OPERATORS = {
    operator.add: "+", operator.sub: "-", operator.mul: "*", operator.floordiv: "//", operator.mod: "%",
    operator.truediv: "/", operator.pow: "**", operator.eq: "==", operator.ne: "!=", operator.lt: "<",
    operator.le: "<=", operator.gt: ">", operator.ge: ">=", operator.and_: "and", operator.or_: "or",
}  # fmt: skip
_FUNCTIONS = {
    torch.sym_max: "max", torch.sym_min: "min", torch.sym_not: "not ", torch.sym_float: "float", torch.sym_int: "int",
    operator.neg: "-", operator.not_: "not ",
}  # fmt: skip


def from_program(program: torch.export.ExportedProgram) -> torch.jit.ScriptModule:
    """Returns a TorchScript module that computes what an exported program computes, for graft() and inspect().

    Parameters and buffers have the program's names and share its memory. forward has one argument for each tensor that
    the program takes, in its order and with its names. It returns one tensor, a tuple of tensors, or a dict of them.

    Args:
        program: what torch.export.export() or torch.export.load() returns.

    Raises:
        GraftError: the program is one of core ATen (run_decompositions()), is grafted already, or calls what
            TorchScript does not have.
        TypeError: `program` is not an ExportedProgram.
    """
    if not isinstance(program, torch.export.ExportedProgram):
        raise TypeError(f"from_program: expected a torch.export.ExportedProgram, got {type(program).__name__}")
    _check_dialect(program)
    source = program.module(check_guards=False)
    _inline_regions(source)
    _inline_numbers(source, program)
    module = _compile(source, _Printer(source, program).text())
    module.train(_is_training(source))
    return script_module(module._c)


def fixed_inputs(program: torch.export.ExportedProgram) -> str | None:
    """Returns the inputs with their sizes if none of these is open: "ids [2, 9], mask [2, 9]"."""
    names = set(program.graph_signature.user_inputs)
    inputs = [node for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    tensors = [(node.name, node.meta["val"]) for node in inputs if isinstance(node.meta.get("val"), torch.Tensor)]
    if not tensors or any(isinstance(size, torch.SymInt) for _, value in tensors for size in sizes_of(value)):
        return None
    return ", ".join(f"{name} {sizes_of(value)}" for name, value in tensors)


def input_ranges(program: torch.export.ExportedProgram) -> list[dict[str, Any]]:
    """Returns the inputs: "name", "dtype", and as "sizes" the least and the most of each size; None: no limit."""
    names = set(program.graph_signature.user_inputs)
    inputs = [node for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    tensors = [(node.name, node.meta["val"]) for node in inputs if isinstance(node.meta.get("val"), torch.Tensor)]
    return [
        {
            "name": name,
            "dtype": str(value.dtype).removeprefix("torch."),
            "sizes": [_range_of(program, size) for size in sizes_of(value)],
        }
        for name, value in tensors
    ]


def _range_of(program: torch.export.ExportedProgram, size: int | torch.SymInt) -> list[int | None]:
    if isinstance(size, int):
        return [size, size]
    limits = program.range_constraints.get(size.node.expr)
    if limits is None:  # computed of other sizes
        return [0, None]
    most = limits.upper
    return [int(limits.lower), None if most.is_infinite or most > 2**62 else int(most)]


def _check_dialect(program: torch.export.ExportedProgram) -> None:
    used = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    if any(name.startswith("torchgraft.") for name in used):
        raise GraftError(
            "from_program: the program is grafted already; change the TorchScript file that it was exported from, and "
            "export that again"
        )
    if core := sorted(used & _CORE):
        raise GraftError(
            f"from_program: the program is one of core ATen (it calls {core[0]}), in which no attention can be "
            "recognised; give what torch.export.export() returned, before run_decompositions()"
        )


def _is_training(source: fx.GraphModule) -> bool:
    """Whether the program was exported from a model in training mode: its dropouts drop."""
    dropouts = (node for node in source.graph.nodes if str(node.target) == "aten.dropout.default")
    return any(len(node.args) > 2 and node.args[2] is True for node in dropouts)


def _compile(source: fx.GraphModule, text: str) -> torch.jit.ScriptModule:
    """Makes a module with the tensors of `source`, by their names, and one method."""

    class Program(torch.jit.ScriptModule):  # a class of its own: define() adds to the class
        def __init__(self) -> None:
            super().__init__()
            for name, tensor in _tensors(source).items():
                _add_tensor(self, name, tensor)
            self.define(text)

    return Program()


def _tensors(source: fx.GraphModule) -> dict[str, torch.Tensor]:
    """Returns parameters and buffers, tied ones under each of their names, and the constants that the graph reads."""
    result = dict(source.named_parameters(remove_duplicate=False)) | dict(source.named_buffers(remove_duplicate=False))
    for node in source.graph.nodes:
        if node.op == "get_attr" and node.target not in result:
            value: Any = source
            for part in node.target.split("."):
                value = getattr(value, part)
            if isinstance(value, torch.Tensor):
                result[node.target] = value
    return result


def _add_tensor(root: nn.Module, name: str, tensor: torch.Tensor) -> None:
    *path, leaf = name.split(".")
    owner = root
    for part in path:
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        owner = getattr(owner, part)
    if isinstance(tensor, nn.Parameter):
        owner.register_parameter(leaf, tensor)
    else:
        owner.register_buffer(leaf, tensor)


def _inline_regions(module: fx.GraphModule) -> None:
    """Puts what no_grad and autocast regions run in their place."""
    graph = module.graph
    for node in list(graph.nodes):
        if not isinstance(node.target, torch._ops.HigherOrderOperator):
            continue
        if node.target.name() not in ("wrap_with_set_grad_enabled", "wrap_with_autocast"):
            raise GraftError(
                f"from_program: the program calls {node.target.name()}, which TorchScript does not have; "
                "export the model without control flow of torch.cond and the like"
            )
        _check_region(node)
        position = next(i for i, value in enumerate(node.args) if isinstance(value, fx.Node) and value.op == "get_attr")
        region = getattr(module, str(node.args[position].target))
        _inline_regions(region)
        inputs = [inner for inner in region.graph.nodes if inner.op == "placeholder"]
        with graph.inserting_before(node):
            values = dict(zip(inputs, node.args[position + 1 :], strict=True))
            results = graph.graph_copy(region.graph, values)
        for user in list(node.users):
            user.replace_all_uses_with(results[user.args[1]])
            graph.erase_node(user)
        graph.erase_node(node)
    graph.eliminate_dead_code()


def _check_region(node: fx.Node) -> None:
    """The casts of autocast are in no graph: only a region that switches autocast off is what its operators say."""
    if node.target.name() == "wrap_with_autocast":
        device, dtype, enabled = node.args[:3]
        if enabled:
            raise GraftError(
                f"from_program: the program runs a part under torch.autocast({device!r}, {dtype}), whose casts it does "
                "not contain; export the model without autocast, with its weights in the dtype that you want"
            )


# Where a constant of no dimension says the same as a number.
_TAKE_NUMBERS = {
    "aten.add.Tensor", "aten.sub.Tensor", "aten.mul.Tensor", "aten.div.Tensor", "aten.fill_.Tensor",
    "aten.copy_.default",
}  # fmt: skip


def _inline_numbers(source: fx.GraphModule, program: torch.export.ExportedProgram) -> None:
    """Makes numbers of constants of no dimension, as a trace has them: factors of scores, numbers that are written."""
    graph = source.graph
    for node in graph.nodes:
        if str(node.target) not in _TAKE_NUMBERS or len(node.args) < 2 or not isinstance(node.args[1], fx.Node):
            continue
        held = node.args[1]
        while str(held.target) in _IDENTITIES:
            held = held.args[0]
        constant = program.constants.get(str(held.target)) if held.op == "get_attr" else None
        changed = node.meta.get("val")
        if (
            isinstance(constant, torch.Tensor)
            and constant.dim() == 0
            and not _is_written(held)
            and constant.is_floating_point() <= (changed.is_floating_point())
        ):
            node.args = (node.args[0], constant.item(), *node.args[2:])
            if node.target is torch.ops.aten.copy_.default:
                node.target, node.args = torch.ops.aten.fill_.Scalar, node.args[:2]
    graph.eliminate_dead_code()


def _is_written(node: fx.Node) -> bool:
    """Whether an operator may write into the tensor of `node`, or into one that may share its memory."""
    for user in node.users:
        if str(user.target) in _IDENTITIES:
            if _is_written(user):
                return True
            continue
        schema = getattr(user.target, "_schema", None)
        if schema is None:  # of Python, such as what takes an element of a tuple
            if user.op == "call_function" and _is_written(user):
                return True
            continue
        given = dict(zip((each.name for each in schema.arguments), user.args, strict=False)) | dict(user.kwargs)
        for argument in schema.arguments:
            held = given.get(argument.name)
            is_given = held is node or (isinstance(held, list | tuple) and any(each is node for each in held))
            if is_given and argument.alias_info is not None and (argument.alias_info.is_write or _is_written(user)):
                return True
    return False


class _Printer:
    """Writes forward as TorchScript's text."""

    def __init__(self, source: fx.GraphModule, program: torch.export.ExportedProgram):
        self._graph = source.graph
        self._out_spec = program.call_spec.out_spec
        self._parameters: list[str] = []
        self._lines: list[str] = []
        self._sizes: dict[str, str] = {}  # by symbol or expression: text that gives it

    def text(self) -> str:
        for node in self._graph.nodes:
            if node.op == "placeholder":
                self._placeholder(node)
        for node in self._graph.nodes:
            if node.op == "call_function":
                self._call(node)
            elif node.op == "output":
                self._lines.append(f"return {self._result(node)}")
            elif node.op not in ("placeholder", "get_attr"):
                raise GraftError(f"from_program: the program has a node of an unknown kind, {node.op} {node.target}")
        signature = ", ".join(["self", *self._parameters])
        return f"def forward({signature}):\n" + "".join(f"    {line}\n" for line in self._lines)

    def _placeholder(self, node: fx.Node) -> None:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            self._parameters.append(f"{node.name}: Tensor")
            self._note_sizes(node, value)
            self._check_sizes(node, value)
            self._pin(node, value)
        elif is_size(value):
            self._parameters.append(f"{node.name}: {'int' if isinstance(value, torch.SymInt) else 'float'}")
        # Else a number, a text or None that the export has made part of the program.

    def _note_sizes(self, node: fx.Node, value: torch.Tensor) -> None:
        for dim, size in enumerate(sizes_of(value)):
            if isinstance(size, torch.SymInt):
                self._sizes.setdefault(str(size), f"{node.name}.size({dim})")

    def _check_sizes(self, node: fx.Node, value: torch.Tensor) -> None:
        """An input of another size than the program was made for is an error that says so."""
        fixed = {dim: size for dim, size in enumerate(sizes_of(value)) if isinstance(size, int)}
        if not fixed:
            return
        shape = [str(size) if isinstance(size, int) else "any" for size in sizes_of(value)]
        terms = [f"{node.name}.size({dim}) == {size}" for dim, size in fixed.items()]
        message = (
            f"the exported program takes {node.name} of size [{', '.join(shape)}] only; export the model with "
            f"dynamic_shapes that leave its sizes open"
        )
        self._lines.append(f"assert {' and '.join(terms)}, {value_text(message)}")

    def _pin(self, node: fx.Node, value: torch.Tensor) -> None:
        known = [str(size) if isinstance(size, int) else self._sizes.get(str(size)) for size in sizes_of(value)]
        if known and known.count(None) <= 1:
            shape = ", ".join("-1" if size is None else size for size in known)
            self._lines.append(f"{node.name} = torch.ops.aten.view({node.name}, [{shape}])")

    def _call(self, node: fx.Node) -> None:
        name = str(node.target)
        if name.startswith(_CHECKS):
            return
        if is_part(node):
            return  # the line of the whole has its name
        self._lines.append(f"{result_text(node)} = {self._expression(node)}" if node.users else self._expression(node))
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and name.startswith(_OPAQUE):
            self._note_sizes(node, value)
            self._pin(node, value)

    def _expression(self, node: fx.Node) -> str:
        target, value = node.target, node.meta.get("val")
        if isinstance(value, torch.SymInt) and str(value) in self._sizes:
            return self._sizes[str(value)]
        if target is torch.ops.aten.sym_size.int:
            return f"{value_text(node.args[0])}.size({node.args[1]})"
        if str(target) in _IDENTITIES:
            is_copy = target is torch.ops.aten.lift_fresh_copy.default and _is_written(node)
            return value_text(node.args[0]) + (".clone()" if is_copy else "")
        if isinstance(target, torch._ops.OpOverload):
            return f"torch.ops.{target.namespace}.{target._opname}({arguments_text(node)})"
        values = [value_text(each) for each in node.args]
        if target in _OPERATORS:
            return f"({f' {_OPERATORS[target]} '.join(values)})"
        if target in _FUNCTIONS:
            return f"{_FUNCTIONS[target]}({', '.join(values)})"
        raise GraftError(f"from_program: the program calls {_name_of(target)}, which TorchScript does not have")

    def _result(self, node: fx.Node) -> str:
        values = [value_text(each) for each in node.args[0]] if isinstance(node.args[0], tuple | list) else None
        if values is None:
            return value_text(node.args[0])
        if self._out_spec.is_leaf():
            return values[0]
        if self._out_spec.type is dict and all(child.is_leaf() for child in self._out_spec.children()):
            keys = map(value_text, self._out_spec.context)
            return "{" + ", ".join(f"{key}: {value}" for key, value in zip(keys, values, strict=True)) + "}"
        return f"({', '.join(values)},)"


def _name_of(target: Callable[..., Any] | str) -> str:
    """What an error calls a function of a graph."""
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))
