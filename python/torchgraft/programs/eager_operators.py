"""What TorchScript's operators do with numbers, sizes, lists and None, where eager PyTorch has no operator to call.

Sizes may be symbolic: torch.export gives them, and sees what is done with them.
"""

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch._export.converter import _TORCH_ENUM_TO_DTYPE

_FORMATS = (torch.contiguous_format, torch.preserve_format, torch.channels_last, torch.channels_last_3d)
_NUMBER_OF = {dtype: number for number, dtype in _TORCH_ENUM_TO_DTYPE.items()}
# Of Python, and symbolic ones, which must stay so.
_NUMBERS = (int, float, torch.SymInt, torch.SymFloat)


def _same(value: Any) -> Any:
    return value


def _append(values: list[Any], value: Any) -> list[Any]:
    values.append(value)
    return values


def _divide(a: Any, b: Any, rounding: str | None = None) -> Any:
    if rounding is None:
        return a / b
    return a // b if rounding == "floor" else torch.sym_int(a / b)


def _square_root(value: Any) -> Any:
    return torch._sym_sqrt(value) if isinstance(value, torch.SymInt | torch.SymFloat) else math.sqrt(value)


def _least(a: Any, *others: Any) -> Any:
    return torch.sym_min(a, *others) if others else min(a)


def _greatest(a: Any, *others: Any) -> Any:
    return torch.sym_max(a, *others) if others else max(a)


def _tensor(value: Any, dtype: int | None = None, device: Any = None, *options: Any) -> Any:
    """A number of its usual dtype stays one, for it may be a size."""
    wanted = None if dtype is None else _TORCH_ENUM_TO_DTYPE[dtype]
    if isinstance(value, torch.SymInt | torch.SymFloat):
        return value if wanted is None else _to(value, dtype)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    usual = torch.get_default_dtype() if isinstance(value, float) else torch.int64
    if is_number and wanted in (None, usual):
        return value
    return torch.tensor(value, dtype=wanted, device=device)


def _to(value: Any, dtype: int, *options: Any) -> Any:
    return torch.sym_float(value) if _TORCH_ENUM_TO_DTYPE[dtype].is_floating_point else torch.sym_int(value)


def _string_format(text: str, *values: Any) -> str:
    return text.replace("{}", "%s") % values


def _add(a: Any, b: Any, factor: Any = 1) -> Any:
    """Of two numbers, or of two lists."""
    return a + (b if factor == 1 else factor * b)


def _subtract(a: Any, b: Any, factor: Any = 1) -> Any:
    return a - (b if factor == 1 else factor * b)


def _part(values: Any, start: int | None = None, stop: int | None = None, step: int = 1) -> Any:
    return values[start:stop:step]


def _sizes(tensor: torch.Tensor, *dim: int) -> Any:
    """A list, as in TorchScript, which can be cut and joined."""
    return tensor.size(*dim) if dim else list(tensor.size())


def _whole(value: Any) -> Any:
    return torch.sym_int(value) if isinstance(value, float | torch.SymFloat) else value


def _convolution(*arguments: Any) -> torch.Tensor:
    """A trace calls what ONNX lacks. The last arguments, from `benchmark` on, choose among the kernels of a GPU."""
    return torch.convolution(*arguments[:9])


def _is_nothing(tensor: torch.Tensor) -> bool:
    return tensor.dim() == 1 and isinstance(tensor.shape[0], int) and tensor.shape[0] == 0


def _cat(tensors: list[torch.Tensor], dim: Any = 0) -> torch.Tensor:
    """ATen passes over tensors of size [0] beside wider ones, as an empty cache of transformers is; ONNX cannot."""
    wide = [tensor for tensor in tensors if tensor.dim() > 1]
    if len({tensor.dtype for tensor in tensors}) == 1 and wide:
        tensors = [tensor for tensor in tensors if not _is_nothing(tensor)]
    return torch.cat(tensors, dim)


ON_VALUES: dict[str, Callable[..., Any]] = {
    "aten::add": _add, "aten::sub": _subtract, "aten::mul": operator.mul,
    "aten::rsub": lambda a, b, *rest: _subtract(b, a, *rest), "aten::div": _divide, "aten::floordiv": operator.floordiv,
    "aten::floor_divide": operator.floordiv, "aten::remainder": operator.mod, "aten::neg": operator.neg,
    "aten::pow": operator.pow, "aten::sqrt": _square_root, "aten::eq": operator.eq, "aten::ne": operator.ne,
    "aten::lt": operator.lt, "aten::le": operator.le, "aten::gt": operator.gt, "aten::ge": operator.ge,
    "aten::__not__": operator.not_, "aten::__and__": operator.and_, "aten::__or__": operator.or_,
    "aten::__is__": operator.is_, "aten::__isnot__": operator.is_not, "aten::__contains__": operator.contains,
    "aten::__getitem__": operator.getitem, "aten::_set_item": operator.setitem, "aten::len": len,
    "aten::append": _append, "aten::slice": _part, "aten::tensor": _tensor, "aten::to": _to, "aten::list": list,
    "aten::cat": _cat,
    "aten::Float": torch.sym_float, "aten::Bool": bool, "aten::Int": _whole, "aten::ScalarImplicit": _same,
    "aten::IntImplicit": _same, "aten::FloatImplicit": _same, "aten::format": _string_format,
    "prim::NumToTensor": _same, "prim::min": _least, "prim::max": _greatest, "prim::unchecked_cast": _same,
    "prim::TupleIndex": operator.getitem, "aten::detach": _same, "aten::device": torch.device,
    "aten::__derive_index": lambda index, start, step: start + index * step,
    "aten::__range_length": lambda low, high, step: len(range(low, high, step)),
}  # fmt: skip

ON_TENSORS: dict[str, Callable[..., Any]] = {
    "aten::Int": torch.Tensor.item, "aten::Float": torch.Tensor.item, "aten::Bool": torch.Tensor.item,
    "aten::ScalarImplicit": torch.Tensor.item, "aten::IntImplicit": torch.Tensor.item,
    "aten::FloatImplicit": torch.Tensor.item, "aten::size": _sizes,
    "aten::dim": torch.Tensor.dim, "aten::numel": torch.Tensor.numel, "aten::len": len,
    "aten::__is__": operator.is_, "aten::__isnot__": operator.is_not,
    "aten::is_floating_point": torch.Tensor.is_floating_point, "prim::dtype": lambda tensor: _NUMBER_OF[tensor.dtype],
    "prim::device": lambda tensor: tensor.device, "prim::unchecked_cast": _same,
    "prim::is_cuda": lambda tensor: tensor.is_cuda, "prim::layout": lambda tensor: 0,
    "prim::requires_grad": lambda tensor: tensor.requires_grad, "aten::_convolution": _convolution,
}  # fmt: skip


def converted(value: Any, kind: str) -> Any:
    """The value for an argument whose type is `kind`: TorchScript writes dtypes and the like as numbers."""
    if isinstance(value, int) and not isinstance(value, bool):
        if kind == "ScalarType":
            return _TORCH_ENUM_TO_DTYPE[value]
        if kind == "MemoryFormat":
            return _FORMATS[value]
        if kind == "Layout":
            return torch.strided
    if kind == "Tensor" and isinstance(value, (*_NUMBERS, bool)):
        is_real = isinstance(value, float | torch.SymFloat)
        dtype = torch.bool if isinstance(value, bool) else torch.float32 if is_real else torch.int64
        return torch.scalar_tensor(value, dtype=dtype)
    return value


class Operator:
    """The operator of a node's schema, with the types of its arguments as call() needs them."""

    def __init__(self, schema_text: str):
        schema = torch._C.parse_schema(schema_text)
        namespace, name = schema.name.split("::")
        packet = getattr(getattr(torch.ops, namespace), name)
        self._op = getattr(packet, schema.overload_name or "default")
        self._arguments = [
            (argument.name, argument.kwarg_only, str(argument.real_type).removeprefix("Optional[").removesuffix("]"))
            for argument in self._op._schema.arguments
        ]

    def call(self, values: list[Any]) -> Any:
        positional, named = [], {}
        for (name, only_named, kind), value in zip(self._arguments, values, strict=True):
            if only_named:
                named[name] = converted(value, kind)
            else:
                positional.append(converted(value, kind))
        return self._op(*positional, **named)
