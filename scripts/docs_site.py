#!/usr/bin/env python3
"""Makes build/docs/source, which mkdocs builds the site from: the repository's Markdown and what it links to, at the
same places, so that links need no translation; and the reference, of the package and of the installed headers.

scripts/docs_site.py    # scripts/docs calls it
"""

import ast
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import cpp_reference

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "build" / "docs" / "source"
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def markdown_files() -> list[Path]:
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard", "*.md"]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
    return [Path(name) for name in sorted(set(names)) if name and (ROOT / name).is_file()]


def outside_code(text: str) -> Iterator[tuple[bool, str]]:
    """Yields each line with whether it is prose: not within a fence, not indented code."""
    fenced = False
    for line in text.split("\n"):
        fence = line.lstrip().startswith("```")
        yield not (fenced or fence or line.startswith("    ")), line
        fenced ^= fence


def linked(line: str, page: Path) -> str:
    """The line with links that lead somewhere on the site. What they lead to is copied."""

    def replaced(match: re.Match[str]) -> str:
        mark, text, target = match.groups()
        path, _, anchor = target.partition("#")
        if not path or "://" in target or target.startswith("mailto:"):
            return match[0]
        file = (ROOT / page.parent / path).resolve()
        if not file.is_relative_to(ROOT) or not (file.exists() or is_generated(file)):
            return match[0]  # mkdocs reports it
        if file.is_dir():
            if not (file / "README.md").is_file():
                return text
            path = f"{path.rstrip('/')}/README.md"
        elif file.suffix != ".md" and file.exists():
            copy = SOURCE / file.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
        return f"{mark}[{text}]({path}{'#' + anchor if anchor else ''})"

    # Code in a line has brackets and parentheses of its own.
    parts = re.split(r"(?<!\[)(`[^`]*`)(?!\])", line)
    return "".join(part if part.startswith("`") else LINK.sub(replaced, part) for part in parts)


def is_generated(file: Path) -> bool:
    return file.parent == ROOT / "docs" / "reference"


def page_text(page: Path) -> str:
    """The page as Python's Markdown reads it: lists need an empty line before them, and nested ones four spaces."""
    result: list[str] = []
    for prose, line in outside_code((ROOT / page).read_text(encoding="utf-8")):
        if not prose:
            result.append(line)
            continue
        before = result[-1] if result else ""
        starts_list = re.match(r"(- |\d+\. )", line) is not None
        if starts_list and before.strip() and not re.match(r"\s|- |\d+\. |<!--|#|\|", before):
            result.append("")
        result.append(linked(re.sub(r"^  - ", "    - ", line), page))
    return "\n".join(result)


def exported() -> dict[str, str]:
    """The module of the package that defines each name of torchgraft.__all__."""
    tree = ast.parse((ROOT / "python" / "torchgraft" / "__init__.py").read_text())
    modules: dict[str, str] = {}
    names: list[str] = []
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            modules |= {alias.asname or alias.name: f"torchgraft.{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            names = ast.literal_eval(node.value)
    return {name: modules[name] for name in names if name in modules}


def python_reference() -> str:
    lines = ["# Python", "", "What `import torchgraft` gives. `python -m torchgraft --help` is the command line.", ""]
    for name, path in exported().items():
        lines += [f"## {name}", "", f"::: {path}", ""]
    return "\n".join(lines)


def write(page: Path, text: str) -> None:
    target = SOURCE / page
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")


def main() -> None:
    shutil.rmtree(SOURCE, ignore_errors=True)
    for page in markdown_files():
        write(page, page_text(page))
    write(Path("docs/reference/python.md"), python_reference())
    write(Path("docs/reference/cpp.md"), cpp_reference.reference(cpp_reference.installed_headers()))


if __name__ == "__main__":
    main()
