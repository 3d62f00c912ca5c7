#!/usr/bin/env python3
"""Checks for scripts/check that no tool makes: line lengths, sizes of files and functions, includes between
folders, what tables say of them, and who parses JSON.

scripts/check_tree.py          # one line for each finding; exit code 1 if there is one
scripts/check_tree.py --fix    # wraps paragraphs of Markdown that are too wide
"""

import argparse
import ast
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 120
FILE_LINES, FUNCTION_LINES = 400, 60
NOT_TEXT = {".png", ".svg", ".json", ".j2", ".bin", ".pt", ".safetensors"}

# For each folder: what its sources may include of this project (folders, without those inside them, and headers),
# and the prefixes of other libraries' headers. Every source may include the standard library, its own folder and
# BOTTOM. A folder whose first part is not listed may include anything. In patch/ each folder knows those before it at
# most. The tables of CONTRIBUTING.md and docs/architecture.md repeat the second column.
BOTTOM = {"registration/export.h", "registration/parse_json.h"}
LAYERS: dict[str, tuple[str, str]] = {
    "registration": (
        "",
        "torch/library.h torch/headeronly/version.h torch/csrc/inductor/aoti_torch/c/shim.h c10/ caffe2/serialize/ "
        "nlohmann/",
    ),
    "activations": ("", "ATen/ c10/"),
    "config": ("activations", "c10/util/ nlohmann/"),
    "plan": ("activations config", "ATen/ c10/ nlohmann/ fcntl.h sys/ unistd.h"),
    "ops": ("activations ops/cpu", "ATen/ c10/ torch/library.h nlohmann/"),
    "ops/cpu/vectorized": ("ops/cpu", "ATen/"),
    "ops/cpu": ("activations ops", "ATen/ c10/"),
    "ops/forward": (
        "activations registration/masked_score.h registration/token_mask_error.h ops ops/cpu",
        "ATen/ c10/ torch/library.h",
    ),
    "ops/autograd": (
        "activations ops ops/cpu ops/forward",
        "ATen/ c10/ torch/library.h torch/csrc/autograd/ torch/headeronly/version.h",
    ),
    "patch/graph": ("activations registration/error_text.h", "ATen/ c10/ torch/csrc/jit/"),
    "patch/canonicalise": ("registration/masked_score.h patch/graph", "ATen/ c10/ torch/csrc/jit/"),
    "patch/sites": ("plan patch/graph patch/canonicalise", "ATen/ c10/ torch/csrc/jit/"),
    "patch/adapters": (
        "config plan patch/graft_spec.h patch/sites",
        "ATen/ c10/ torch/csrc/jit/ nlohmann/ fcntl.h sys/ unistd.h",
    ),
    "patch/insert": (
        "activations registration/masked_score.h registration/token_mask_error.h config plan patch/graph patch/sites "
        "patch/adapters",
        "ATen/ c10/ torch/csrc/jit/",
    ),
    "patch/module": (
        "registration patch/graft_spec.h patch/text_limits.h patch/graph patch/canonicalise patch/sites patch/adapters "
        "patch/insert",
        "ATen/ c10/ torch/csrc/jit/",
    ),
    "patch/pool": ("config plan patch/adapter_pool.h patch/adapters patch/module", "ATen/ c10/ torch/csrc/jit/"),
    "patch": (
        "registration/error_text.h registration/tensor_records.h config plan patch/graph patch/canonicalise "
        "patch/sites patch/adapters patch/insert patch/module patch/pool",
        "ATen/ c10/ caffe2/serialize/ torch/csrc/jit/ nlohmann/ sys/ unistd.h",
    ),
    "python": (
        "config plan registration ops/kernel_mode.h patch patch/canonicalise patch/adapters",
        "torch/csrc/ pybind11/",
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


def included_header(path: Path, line: str) -> str | None:
    """The header that a line of `path` includes: headers of this project by their path, others as they are written."""
    match = re.match(r'\s*#\s*include\s*([<"])([^>"]+)', line)
    if not match:
        return None
    beside = os.path.normpath(path.parent / match[2])
    if match[1] == '"' and (ROOT / beside).is_file():
        return f"torchgraft/{beside}"
    return match[2]


def forbidden_includes(path: Path) -> Iterator[Finding]:
    folder = path.parent.as_posix()
    if folder not in LAYERS:
        yield path, 1, f"{folder}/ stands in no layer: enter it in LAYERS in scripts/check_tree.py"
        return
    known, libraries = (column.split() for column in LAYERS[folder])
    for number, line in enumerate(lines_of(path), 1):
        header = included_header(path, line)
        if header is None:
            continue
        if header.startswith("torchgraft/"):
            own = header.removeprefix("torchgraft/")
            allowed = own in {*BOTTOM, *known} or own.rpartition("/")[0] in {folder, *known}
        else:
            allowed = header.startswith(tuple(libraries)) or not re.search(r"[/.]", header)
        if not allowed:
            yield path, number, f"{folder}/ may not include {header}: see LAYERS in scripts/check_tree.py"


def layers_of(document: str) -> dict[str, set[str]]:
    """What the last column of a document's tables has to say, by folder. CONTRIBUTING.md has a row for each folder at
    the top, docs/architecture.md one for each folder of ops/ and patch/."""
    if document != "CONTRIBUTING.md":
        return {folder: set(known.split()) for folder, (known, _) in LAYERS.items() if re.match("(ops|patch)", folder)}
    tops: dict[str, set[str]] = {}
    for folder, (known, _) in LAYERS.items():
        top = folder.split("/")[0]
        names = {name if name.endswith(".h") else name.split("/")[0] for name in known.split()}
        tops.setdefault(top, set()).update(name for name in names if name.split("/")[0] != top)
    return {top: {name for name in names if name.split("/")[0] not in names - {name}} for top, names in tops.items()}


def wrong_layers(path: Path) -> Iterator[Finding]:
    """Rows of tables | `folder/` | ... | what it knows | that differ from LAYERS."""
    wanted = layers_of(path.as_posix())
    for number, line in enumerate(lines_of(path), 1):
        cells = line.strip().strip("|").split("|")
        folder = cells[0].strip().strip("`").rstrip("/")
        if not line.startswith("| `") or folder not in wanted:
            continue
        expected = wanted.pop(folder)
        if {name.rstrip("/") for name in re.findall("`([^`]+)`", cells[-1])} != expected:
            names = ", ".join(sorted(expected)) or "nothing"
            yield path, number, f"LAYERS in scripts/check_tree.py says that {folder}/ knows {names}: change one of them"
    for folder in wanted:
        yield path, 1, f"no table has a row for {folder}/, a layer in scripts/check_tree.py"


def wrong_installed(path: Path) -> Iterator[Finding]:
    """A row | `patch/` | what is installed: `a`, `b` | that names other headers than cmake/install.cmake does, and
    sources at the top of patch/ that belong to none of these headers."""
    wanted = set(re.findall(r"^ *patch/(\w+)\.h\b", "\n".join(lines_of(Path("cmake/install.cmake"))), re.MULTILINE))
    for number, line in enumerate(lines_of(path), 1):
        if line.startswith("| `patch/` |"):
            found = set(re.findall("`([^`]+)`", line.split("|")[2]))
            for name in sorted(found ^ wanted):
                yield path, number, f"`{name}` is installed by this table or by cmake/install.cmake alone: change one"
    for source in sorted((ROOT / "patch").glob("*.*")):
        if source.suffix in (".cpp", ".h") and source.stem not in wanted:
            yield source.relative_to(ROOT), 1, "not installed: move it to the folder of patch/ that it belongs to"


# --- Parsing ---

# Where JSON becomes values: these have limits and name what they read. Examples and benchmarks in Python may read what
# they wrote themselves, and so may tests.
PARSERS = {"registration/parse_json.h", "python/torchgraft_command/json_text.py"}
_OWN_PARSING = {".py": r"\bjson\.loads?\(", ".cpp": r"[Jj]son::(parse|accept|sax_parse)\("}
_OWN_PARSING[".h"] = _OWN_PARSING[".cpp"]


def own_parsing(path: Path) -> Iterator[Finding]:
    is_program = path.parts[0] in ("python", *(folder.split("/")[0] for folder in LAYERS)) or path.parts[:2] == (
        "examples",
        "ray_serve",
    )
    if str(path) in PARSERS or (path.suffix == ".py" and not is_program) or path.parts[0] == "tests":
        return
    for number, line in enumerate(lines_of(path), 1):
        if re.search(_OWN_PARSING[path.suffix], line):
            yield (
                path,
                number,
                "parses JSON without limits: call parse_json (registration/parse_json.h, json_text.py)",
            )


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
        if path.as_posix() in ("CONTRIBUTING.md", "docs/architecture.md"):
            findings += wrong_layers(path)
        if path.as_posix() == "docs/architecture.md":
            findings += wrong_installed(path)
    for path, number, text in findings:
        print(f"{path}:{number}: {text}")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
