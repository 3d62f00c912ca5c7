"""The reference of the installed C++ headers, as Markdown: each declaration with the comment before it.

scripts/docs_site.py calls it. Comments say shapes, invariants and errors; cxxheaderparser tells what a declaration
declares.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cxxheaderparser.simple import NamespaceScope, parse_string

ROOT = Path(__file__).resolve().parent.parent
_EXPORTS = re.compile(r"\bTORCHGRAFT(_PATCH)?_API\s+")
_LITERALS = re.compile(r"""'(\\.|[^'\\])'|"(\\.|[^"\\])*"|//.*""")  # and comments
_INTRODUCTION = """\
# C++

The installed headers, included as `<torchgraft/...>`. Those of `config/`, `patch/` and `plan/` belong to
`torchgraft::torchgraft_patch`, the others to `torchgraft::torchgraft`. A function that meets a wrong argument throws
`c10::Error`.
"""


@dataclass
class Declaration:
    """Declarations that share a comment: they stand below each other, without an empty line between.

    Attributes:
        comment: the lines of the comment, without slashes.
        code: as it stands in the header, without private members, bodies of functions and export macros.
        names: what is declared.
    """

    comment: list[str]
    code: str = ""
    names: list[str] = field(default_factory=list)


@dataclass
class Header:
    """comments: those that belong to no declaration."""

    comments: list[list[str]]
    declarations: list[Declaration]


def installed_headers() -> list[str]:
    text = (ROOT / "cmake" / "install.cmake").read_text()
    return sorted(re.findall(r"^\s+([a-z_]+/[a-z_]+\.h)\)?$", text, re.MULTILINE))


def names_in(code: str) -> list[str]:
    """What C++ declares outside of functions and classes, macros not counted."""
    lines = _EXPORTS.sub("", code).splitlines()
    return _names(parse_string("\n".join(line for line in lines if not line.startswith("#"))).namespace)


def _names(scope: NamespaceScope) -> list[str]:
    kinds = [each.typename for each in [*(one.class_decl for one in scope.classes), *scope.enums]]
    found = [kind.segments[-1].format() for kind in kinds]
    found += [each.name.segments[-1].format() for each in [*scope.functions, *scope.variables]]
    found += [each.alias for each in scope.using_alias] + [each.typename.segments[-1].format() for each in scope.using]
    for inner in scope.namespaces.values():
        found += _names(inner)
    return found


def read_header(text: str) -> Header:
    """Splits a header into comments and declarations. Macros and includes are left out."""
    header = Header([], [])
    comment: list[str] = []
    shared = False  # the declaration before ends on the line before
    for code in _statements(_EXPORTS.sub("", text)):
        if code.startswith("//"):
            comment.append(code.removeprefix("//").removeprefix(" "))
            continue
        if code and names_in(code):
            if comment or not shared:
                header.declarations.append(Declaration(comment))
            last = header.declarations[-1]
            last.code = f"{last.code}\n{_public(code)}".strip()
            last.names += [name for name in names_in(code) if name not in last.names]
        elif comment:
            header.comments.append(comment)
        shared, comment = bool(code), []
    return header


def _statements(text: str) -> Iterator[str]:
    """Yields lines of comments, empty lines, and declarations whole. Braces of namespaces do not count."""
    lines: list[str] = []
    depth = 0
    for line in text.splitlines():
        bare = _LITERALS.sub("", line).rstrip()
        if not lines and (bare == "" or bare.startswith(("#", "namespace", "}"))):
            yield line if line.startswith("//") else ""
            continue
        lines.append(line)
        depth += sum(map(bare.count, "{(")) - sum(map(bare.count, "})"))
        if depth == 0 and bare.endswith((";", "}")):
            yield "\n".join(lines)
            lines = []


def _public(code: str) -> str:
    """A class without its private members, a function without its body."""
    functions = parse_string(code).namespace.functions
    if functions and functions[0].has_body:
        return code[: re.search(r"\s*\{(?=\n|[^{}]*\}$)", code).start()] + ";"
    code = re.sub(r"\n*^( *)private:\n(?:\1 .*\n|\n)*", "\n", code, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", code)


def prose(comment: list[str]) -> str:
    """A comment as Markdown: what is indented, formulas and lists, stays line by line."""
    blocks: list[tuple[bool, list[str]]] = []
    for line in comment:
        indented = line.startswith("  ")
        if not blocks or blocks[-1][0] != indented or not line.strip():
            blocks.append((indented, []))
        if line.strip():
            blocks[-1][1].append(f"    {line}" if indented else _escaped(line))
    return "\n\n".join("\n".join(lines) for _, lines in blocks if lines)


def _escaped(line: str) -> str:
    """Without marks of Markdown and HTML, but for code between backticks."""
    parts = re.split(r"(`[^`]*`)", line)
    return "".join(part if part.startswith("`") else re.sub(r"([\\*_\[\]<>|])", r"\\\1", part) for part in parts)


def reference(headers: list[str]) -> str:
    lines = [_INTRODUCTION]
    seen: set[str] = set()
    for path in headers:
        header = read_header((ROOT / path).read_text())
        lines.append(f"## {path}\n")
        lines += [prose(comment) + "\n" for comment in header.comments]
        for each in header.declarations:
            title = ", ".join(each.names).replace("_", r"\_")
            new = [name.lower() for name in each.names if name.lower() not in seen and len(each.names) > 1]
            seen |= {name.lower() for name in each.names}  # one name is the anchor of its heading
            anchors = "".join(f'<a id="{name}"></a>' for name in new)
            lines += [f"### {title}\n", anchors + "\n", f"```cpp\n{each.code}\n```\n", prose(each.comment) + "\n"]
    return "\n".join(lines)
