"""python/torchgraft/_C.pyi lists what the binding exports, with as many parameters of the same names."""

import ast
import re
from pathlib import Path

import pytest

import torchgraft
from torchgraft._libraries import patcher

pytestmark = pytest.mark.quick

STUB = ast.parse((Path(torchgraft.__file__).parent / "_C.pyi").read_text())
Signature = list[str]


def signature_of(function: ast.FunctionDef) -> Signature:
    arguments = function.args
    plain = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    return plain + ([f"*{arguments.vararg.arg}"] if arguments.vararg else [])


def shown_signature(documentation: str) -> Signature:
    """Of the first line that pybind11 writes: "graft(module: torch.ScriptModule, adapters: ...) -> ..."."""
    inside = documentation.split("\n")[0].partition("(")[2].rpartition(") ->")[0]
    while re.search(r"\[[^\[\]]*\]", inside):
        inside = re.sub(r"\[[^\[\]]*\]", "", inside)
    names = [part.split(":")[0].strip() for part in inside.split(",")]
    return [name for name in names if name not in ("", "/")]


def exported() -> dict[str, Signature]:
    result = {}
    for name, value in vars(patcher()).items():
        if name.startswith("__"):
            continue
        if not isinstance(value, type):
            result[name] = shown_signature(value.__doc__)
            continue
        result[name] = []
        for member, held in vars(value).items():
            own = member in ("__init__", "__enter__", "__exit__") or not member.startswith("_")
            if own and name != "KernelMode" and "Initialize self" not in (held.__doc__ or ""):
                result[f"{name}.{member}"] = ["self"] if isinstance(held, property) else shown_signature(held.__doc__)
    return result


def listed() -> dict[str, Signature]:
    result = {}
    for node in STUB.body:
        if isinstance(node, ast.FunctionDef):
            result[node.name] = signature_of(node)
        elif isinstance(node, ast.ClassDef):
            result[node.name] = []
            if node.name != "KernelMode":
                methods = [member for member in node.body if isinstance(member, ast.FunctionDef)]
                result |= {f"{node.name}.{method.name}": signature_of(method) for method in methods}
    return result


def test_the_stub_lists_what_the_binding_exports() -> None:
    ours, theirs = listed(), exported()
    assert sorted(ours) == sorted(theirs)
    for name, signature in theirs.items():
        assert len(ours[name]) == len(signature), name
        # What the binding names can be given by name; the stub gives the other ones names of its own.
        given_by_name = [parameter for parameter in signature if not re.fullmatch(r"arg\d+", parameter)]
        assert [parameter for parameter in ours[name] if parameter in given_by_name] == given_by_name, name


def test_the_kernel_modes_are_listed() -> None:
    modes = {
        member.target.id
        for node in STUB.body
        if isinstance(node, ast.ClassDef) and node.name == "KernelMode"
        for member in node.body
        if isinstance(member, ast.AnnAssign)
    }
    assert modes == set(patcher().KernelMode.__members__)


def test_the_package_says_that_it_has_types() -> None:
    assert (Path(torchgraft.__file__).parent / "py.typed").is_file()
