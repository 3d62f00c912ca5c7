#!/usr/bin/env python3
"""Checks for scripts/check that no tool makes: line lengths, sizes of files and functions, includes between
folders, and who parses JSON.

scripts/check_tree.py          # one line for each finding; exit code 1 if there is one
scripts/check_tree.py --fix    # wraps paragraphs of Markdown that are too wide
"""

import argparse
import ast
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 120
FILE_LINES, FUNCTION_LINES = 400, 60
NOT_TEXT = {".png", ".svg", ".json", ".j2"}

# For each folder: the folders (or single headers) of this project that its sources may include, and the prefixes of
# other libraries' headers. Every source may include the standard library. A folder that is not listed may include
# anything.
_EXPORT, _JSON = "registration/export.h", "registration/parse_json.h"
LAYERS: dict[str, tuple[set[str], tuple[str, ...]]] = {
    "activations": ({"activations", _EXPORT}, ("ATen/", "c10/")),
    "config": ({"config", "activations", _EXPORT, _JSON}, ("c10/util/", "nlohmann/")),
    "plan": (
        {"plan", "config", "activations", _EXPORT, _JSON},
        ("ATen/", "c10/", "nlohmann/", "fcntl.h", "sys/", "unistd.h"),
    ),
    "ops": (
        {"ops", "activations", "registration"},
        ("ATen/", "c10/", "torch/library.h", "torch/csrc/autograd/", "nlohmann/"),
    ),
    "registration": ({"registration"}, ("torch/library.h", "c10/util/", "nlohmann/")),
    "patch": (
        {"patch", "plan", "config", "activations", "registration"},
        ("ATen/", "c10/", "torch/csrc/jit/", "nlohmann/", "fcntl.h", "sys/", "unistd.h"),
    ),
    "python": (
        {"python", "patch", "plan", "config", "registration", "ops/kernel_mode.h"},
        ("torch/csrc/", "pybind11/"),
    ),
}

Finding = tuple[Path, int, str]


def tracked_files() -> list[Path]:
    """Returns the files of the tree, relative to ROOT: those that git knows, and new files that it does not ignore."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
    return [Path(name) for name in sorted(set(names)) if name and (ROOT / name).is_file()]


def lines_of(path: Path) -> list[str]:
    return (ROOT / path).read_text(encoding="utf-8").splitlines()


def is_too_wide(line: str, markdown: bool) -> bool:
    """In Markdown, rows of tables may have any width, and the addresses of links do not count."""
    if markdown:
        if line.lstrip().startswith("|"):
            return False
        line = re.sub(r"(?<=\])\([^)\s]*\)|https?://\S+", "", line)
    return len(line) > WIDTH


def long_lines(path: Path) -> Iterator[Finding]:
    markdown = path.suffix == ".md"
    for number, line in enumerate(lines_of(path), 1):
        if is_too_wide(line, markdown):
            mend = "scripts/check --fix wraps prose" if markdown else "wrap it"
            yield path, number, f"{len(line)} columns, {WIDTH} are allowed: {mend}"


# --- Sizes ---


def cpp_functions(lines: list[str]) -> Iterator[tuple[int, int]]:
    """Yields the first and the last line of every definition that clang-format begins in the first column."""
    start = None
    for number, line in enumerate(lines, 1):
        if line == "}" and start:
            opener = lines[start - 1]
            if not re.match(r"(namespace|class|struct|union|enum|extern)\b", opener):
                yield start, number
            start = None
        elif re.match(r"[A-Za-z_~:\[]", line) and not re.match(r"(namespace|using|public|private|protected)\b", line):
            start = number


def python_functions(lines: list[str]) -> Iterator[tuple[int, int]]:
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
            first = body[0].lineno - (node.body[0].lineno - node.lineno)  # the docstring does not count
            yield first, node.end_lineno or node.lineno


def sizes(path: Path) -> Iterator[Finding]:
    lines = lines_of(path)
    if len(lines) > FILE_LINES:
        yield path, 1, f"{len(lines)} lines, {FILE_LINES} are allowed in a file: split it by what it does"
    functions = python_functions if path.suffix == ".py" else cpp_functions
    for first, last in functions(lines):
        if last - first + 1 > FUNCTION_LINES:
            yield path, first, f"{last - first + 1} lines, {FUNCTION_LINES} are allowed in a function: name its steps"


# --- Layers ---


def forbidden_includes(path: Path) -> Iterator[Finding]:
    rooms, libraries = LAYERS[path.parts[0]]
    for number, line in enumerate(lines_of(path), 1):
        match = re.match(r'\s*#\s*include\s*([<"])([^>"]+)', line)
        if not match or match[1] == '"':
            continue
        header = match[2]
        if header.startswith("torchgraft/"):
            own = header.removeprefix("torchgraft/")
            allowed = own in rooms or own.split("/")[0] in rooms
        else:
            allowed = header.startswith(libraries) or not re.search(r"[/.]", header)
        if not allowed:
            yield path, number, f"{path.parts[0]}/ may not include <{header}>: see LAYERS in scripts/check_tree.py"


# --- Parsing ---

# Where JSON becomes values: these have limits and name what they read. Examples and benchmarks in Python may read what
# they wrote themselves, and so may tests.
PARSERS = {"registration/parse_json.h", "python/torchgraft/_reading.py"}
_OWN_PARSING = {".py": r"\bjson\.loads?\(", ".cpp": r"[Jj]son::(parse|accept|sax_parse)\("}
_OWN_PARSING[".h"] = _OWN_PARSING[".cpp"]


def own_parsing(path: Path) -> Iterator[Finding]:
    is_program = path.parts[0] in ("python", *LAYERS) or path.parts[:2] == ("examples", "ray_serve")
    if str(path) in PARSERS or (path.suffix == ".py" and not is_program) or path.parts[0] == "tests":
        return
    for number, line in enumerate(lines_of(path), 1):
        if re.search(_OWN_PARSING[path.suffix], line):
            yield path, number, "parses JSON without limits: call parse_json (registration/parse_json.h, _reading.py)"


# --- Wrapping Markdown ---

_ITEM = re.compile(r"\s*(?:[-*+]|\d+[.)])\s+")
_NO_PROSE = re.compile(r"\s*(?:$|\||#|>|<|```|---|===|!\[)| {4,}\S")
_SPAN = re.compile(r"`[^`]*`")


def paragraphs(lines: list[str]) -> Iterator[tuple[int, int]]:
    """Yields half-open ranges of lines: paragraphs and items of lists, without code, tables, headings and HTML."""
    start, fenced, in_list = None, False, False
    for number, line in enumerate([*lines, ""]):
        item = _ITEM.match(line)
        fence = line.lstrip().startswith("```")
        # Four spaces are code, unless they continue an item.
        continues = start is not None or in_list
        prose = not fenced and not fence and not _NO_PROSE.match(line.lstrip() if continues else line)
        if start is not None and (item or not prose):
            yield start, number
            start = None
        if prose and start is None:
            start = number
        if line.strip():
            in_list = bool(item) or (in_list and line.startswith(" "))
        fenced ^= fence


def wrapped(lines: list[str]) -> list[str]:
    """Wraps a paragraph at WIDTH. Leaves it as it is if a new line would begin like a list, a heading or a table."""
    item = _ITEM.match(lines[0])
    indent = re.match(r"\s*", lines[0])[0]
    inner = " " * item.end() if item else indent
    text = " ".join(line.strip() for line in lines)
    held = _SPAN.sub(lambda span: span[0].replace(" ", "\0"), text)  # no line ends inside `code`
    result = textwrap.wrap(
        held, WIDTH, initial_indent=indent, subsequent_indent=inner, break_long_words=False, break_on_hyphens=False
    )
    if any(_ITEM.match(line) or _NO_PROSE.match(line.lstrip()) for line in result[1:]):
        return lines
    return [line.replace("\0", " ") for line in result]


def wrap_markdown(path: Path) -> None:
    lines = lines_of(path)
    result, done = [], 0
    for start, end in paragraphs(lines):
        paragraph = lines[start:end]
        hard_break = any(line.endswith(("  ", "\\")) for line in paragraph)
        if any(is_too_wide(line, True) for line in paragraph) and not hard_break:
            result += [*lines[done:start], *wrapped(paragraph)]
            done = end
    if done:
        (ROOT / path).write_text("\n".join([*result, *lines[done:]]) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fix", action="store_true", help="wrap paragraphs of Markdown that are too wide")
    arguments = parser.parse_args()
    findings: list[Finding] = []
    for path in tracked_files():
        if path.suffix in NOT_TEXT or path.name == "LICENSE":
            continue
        if path.suffix == ".md" and arguments.fix:
            wrap_markdown(path)
        if path.suffix != ".py":  # ruff holds those
            findings += long_lines(path)
        if path.suffix in (".cpp", ".h", ".py"):
            findings += sizes(path)
            findings += own_parsing(path)
        if path.suffix in (".cpp", ".h") and path.parts[0] in LAYERS:
            findings += forbidden_includes(path)
    for path, number, text in findings:
        print(f"{path}:{number}: {text}")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
