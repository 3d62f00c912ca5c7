"""Reads an exported program from a file, as data: nothing is unpickled, no text of the file is run."""

import ast
import contextlib
import io
import logging
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch._export.serde.schema import SCHEMA_VERSION

from .._reading import parse_json
from ..errors import GraftError

# Functions in sizes, as sympy writes them: Mul(Integer(2), Symbol('s0', integer=True)). torch hands the texts to sympy,
# which runs them.
_FUNCTIONS = {
    "Symbol", "Integer", "Float", "Rational", "Mul", "Add", "Pow", "FloorDiv", "ModularIndexing", "Where", "PythonMod",
    "Mod", "CleanDiv", "CeilToInt", "FloorToInt", "CeilDiv", "LShift", "RShift", "PowByNatural", "FloatPow",
    "FloatTrueDiv", "IntTrueDiv", "TruncToInt", "RoundToInt", "ToFloat", "Max", "Min", "Equality", "Inequality",
    "StrictGreaterThan", "GreaterThan", "StrictLessThan", "LessThan", "Eq", "Ne", "Gt", "Ge", "Lt", "Le", "And", "Or",
    "Not", "floor", "ceiling",
}  # fmt: skip
_SYMBOL = re.compile(r"(z?[su]|zuf|zf)\d+")
_NAME = re.compile(r"(z?[su]|zuf|zf)\d+|int_oo|oo|true|false")
_POWERS = ("Pow", "PowByNatural", "FloatPow", "LShift")
_NODES = (
    ast.Expression, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.operator, ast.unaryop, ast.boolop, ast.cmpop,
    ast.expr_context,
)  # fmt: skip
_LARGEST_EXPONENT = 16
_DEEPEST = 200  # levels of brackets in the JSON of a program


def read_program(path: Path) -> torch.export.ExportedProgram:
    """Reads the program of a file that torch.export.save() wrote.

    Raises:
        GraftError: the file is damaged, of another version, holds several programs, or holds what only unpickling
            would read.
    """
    try:
        with path.open("rb") as file:
            _check_archive(path, file)
            file.seek(0)
            with quiet():
                return torch.export.load(file)
    except GraftError:
        raise
    except Exception as error:  # torch's reader raises errors of many classes
        raise GraftError(f"{path}: a damaged exported program ({_first_line(error)}); export it again") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps back what torch.export says of its own deprecations, and the graphs and trace-backs that it writes before
    it raises."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        logging.disable(before)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _check_archive(path: Path, file: BinaryIO) -> None:
    with zipfile.ZipFile(file) as archive:
        if damaged := archive.testzip():
            raise GraftError(f"{path}: a damaged exported program ({damaged}); export it again")
        names = archive.namelist()
        members = {name.partition("/")[2]: name for name in names}
        # What torch reads must be what is checked: one folder, no name twice, none beside it (an older format).
        is_one_folder = len({name.partition("/")[0] for name in names}) == 1 and all("/" in name for name in names)
        if not is_one_folder or len({name.lower() for name in names}) != len(names) or "archive_format" not in members:
            raise GraftError(f"{path}: expected the one folder that torch.export.save() writes; export it again")
        programs = [name for name in members if name.startswith("models/")]
        if programs != ["models/model.json"]:
            raise GraftError(f"{path}: expected one exported program, called 'model', got {', '.join(programs)}")
        program = parse_json(archive.read(members["models/model.json"]), path, _DEEPEST)
        _check_version(path, program)
        _check_sizes(path, program)
        for folder in ("weights", "constants"):
            config = members.get(f"data/{folder}/model_{folder}_config.json")
            if config is None:
                raise GraftError(f"{path}: its {folder} are in a format of an older torch; export it again")
            _check_tensors(path, parse_json(archive.read(config), path, _DEEPEST))
        _check_example(path, archive.read(members["data/sample_inputs/model.pt"]))


def _check_version(path: Path, program: dict[str, Any]) -> None:
    version = program["schema_version"]
    if version["major"] != SCHEMA_VERSION[0]:
        raise GraftError(
            f"{path}: an exported program of torch {program.get('torch_version', '(an old release)')}, format "
            f"{version['major']}; torch {torch.__version__} reads format {SCHEMA_VERSION[0]}: export it with this torch"
        )


def _check_tensors(path: Path, config: dict[str, Any]) -> None:
    for name, payload in config["config"].items():
        is_plain = payload["path_name"].startswith(("weight_", "tensor_"))
        if payload["use_pickle"] or not is_plain:
            raise GraftError(f"{path}: '{name}' is a pickled object, which is not read; only plain tensors are")


def _check_example(path: Path, content: bytes) -> None:
    """torch unpickles example inputs with all that a pickle can do if it cannot read them as plain tensors."""
    try:
        if content:
            torch.load(io.BytesIO(content), weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise GraftError(
            f"{path}: its example inputs are pickled objects, which are not read; export it with plain tensors"
        ) from error


def _check_sizes(path: Path, value: Any) -> None:
    """Checks every text that torch hands to sympy."""
    waiting = [value]
    while waiting:
        held = waiting.pop()
        if isinstance(held, dict):
            text = held.get("expr_str")
            if text is not None and not is_size_text(text):
                raise GraftError(f"{path}: a size is written as {str(text)[:60]!r}, which is no expression of sizes")
            waiting.extend(held.values())
        elif isinstance(held, list):
            waiting.extend(held)


def is_size_text(text: object) -> bool:
    """Whether a text is arithmetic on symbols of sizes, and nothing else."""
    if not isinstance(text, str):
        return False
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return _is_size_node(tree)


def _is_size_node(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        if name == "Symbol":
            return _is_symbol(node)
        if name in _POWERS and not (len(node.args) == 2 and _is_small(node.args[1])):
            return False  # else a short text is a number that no memory holds
        return name in _FUNCTIONS and not node.keywords and all(map(_is_size_node, node.args))
    if isinstance(node, ast.Name):
        return _NAME.fullmatch(node.id) is not None
    if isinstance(node, ast.Constant):
        return isinstance(node.value, int | float)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow | ast.LShift) and not _is_small(node.right):
        return False
    return isinstance(node, _NODES) and all(map(_is_size_node, ast.iter_child_nodes(node)))


def _is_symbol(node: ast.Call) -> bool:
    """Symbol('s0', integer=True)."""
    name = node.args[0].value if len(node.args) == 1 and isinstance(node.args[0], ast.Constant) else None
    facts = all(isinstance(each.value, ast.Constant) and isinstance(each.value.value, bool) for each in node.keywords)
    return isinstance(name, str) and _SYMBOL.fullmatch(name) is not None and facts


def _is_small(node: ast.AST) -> bool:
    """A number, or Integer(number), that may be an exponent."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Integer":
        return len(node.args) == 1 and _is_small(node.args[0])
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return _is_small(node.operand)
    return isinstance(node, ast.Constant) and isinstance(node.value, int) and abs(node.value) <= _LARGEST_EXPONENT
