#!/usr/bin/env python3
"""Makes the errors of mutations.toml, one at a time, and says which of them the tests notice.

    tests/mutations/run.py --tree DIR [NAME...]      of these, or of all

DIR is a checkout that nobody else uses and that scripts/setup --tests has built (git worktree add DIR). The
script restores each file and what was compiled from it, so that the next mutation builds only what it needs. Exit
status 1 when a mutation slips, or when its text is not there any more.
"""

import argparse
import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROGRAMS = ["test_ops", "test_kernels", "test_registration", "test_config", "test_plan", "test_patch", "test_pool"]
OPERATORS = ["torchgraft"]
LIBRARIES = [*OPERATORS, "torchgraft_patch", "torchgraft_python"]


def find_file(tree: Path, mutation: dict) -> Path | str:
    """The one tracked file whose path ends so and that holds the old text once; else what is wrong."""
    listed = subprocess.run(["git", "ls-files", "--", f"*{mutation['file']}"], cwd=tree, capture_output=True, text=True)
    paths = [tree / path for path in listed.stdout.splitlines()]
    found = [path for path in paths if path.read_text().count(mutation["old"]) == 1]
    if len(found) == 1:
        return found[0]
    return f"{len(paths)} files end in {mutation['file']}, in {len(found)} of them the text is there once"


class Tree:
    """A built checkout."""

    def __init__(self, root: Path):
        self.root = root.resolve()
        self.build = self.root / "build"
        self.python = str(self.root / ".venv" / "bin" / "python")
        self.environment = os.environ | {
            "PATH": f"{self.root / '.venv' / 'bin'}:{os.environ['PATH']}",
            "TORCHGRAFT_LIBRARY_DIR": str(self.build / "lib"),
            "TORCHGRAFT_LIBRARY": str(self.build / "lib" / "libtorchgraft.so"),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def run(self, *command: str) -> subprocess.CompletedProcess:
        return subprocess.run(command, cwd=self.root, env=self.environment, capture_output=True, text=True)

    def outdated(self, targets: list[str]) -> list[Path]:
        """Files that building would write."""
        planned = self.run("ninja", "-C", "build", "-n", "-v", *targets).stdout
        outputs = re.findall(r" -o (\S+)", planned)
        return [path for path in (self.build / output for output in outputs) if path.is_file()]

    def compile(self, targets: list[str]) -> bool:
        return self.run("ninja", "-C", "build", "-j", os.environ.get("TORCHGRAFT_JOBS", "2"), *targets).returncode == 0

    def program_of(self, suite: str) -> str:
        for path in (self.root / "tests" / "cpp").rglob("*.cpp"):
            if re.search(rf"^ *TEST(_[FP])?\({suite},", path.read_text(), re.MULTILINE):
                [program] = [name for name in PROGRAMS if path.name in self._sources(name)]
                return program
        raise SystemExit(f"no suite is called {suite}")

    def _sources(self, program: str) -> str:
        text = "\n".join(path.read_text() for path in (self.root / "tests" / "cpp").glob("*/CMakeLists.txt"))
        return re.search(rf"add_executable\({program}\b(.*?)\)", text, re.DOTALL)[1]

    def tests(self, selection: str) -> tuple[list[str], list[list[str]]]:
        """(targets to build, commands to run) of a selection as mutations.toml has it."""
        part, *words = shlex.split(selection)
        if part == "cpp":
            suites: dict[str, list[str]] = {}
            for suite in words:
                suites.setdefault(self.program_of(suite), []).append(suite)
            filters = {name: ":".join(f"{s}.*:*/{s}.*:{s}/*" for s in given) for name, given in suites.items()}
            return [*suites], [[f"build/bin/{name}", f"--gtest_filter={chosen}"] for name, chosen in filters.items()]
        words = [f"tests/{word}" if (self.root / "tests" / word.split("::")[0]).exists() else word for word in words]
        return LIBRARIES, [
            [self.python, "-m", "pytest", "-q", "-x", "-m", "not slow", "-p", "no:cacheprovider", *words]
        ]


@contextlib.contextmanager
def changed(tree: Tree, path: Path, mutation: dict, targets: list[str]) -> Iterator[None]:
    """Inside the context the file has the error. Afterwards the file and all that was built from it are restored, times
    included."""
    with tempfile.TemporaryDirectory() as folder:
        kept = {path: Path(folder) / "source"}
        shutil.copy2(path, kept[path])
        path.write_text(path.read_text().replace(mutation["old"], mutation["new"]))
        for number, built in enumerate(tree.outdated(targets)):
            kept[built] = Path(folder) / str(number)
            shutil.copy2(built, kept[built])
        try:
            yield
        finally:
            for original, copy in kept.items():
                shutil.copy2(copy, original)
            if "examples" in path.parts:
                path.touch()  # tests/consumer builds these programs, and keeps them where this script does not look


def judge(tree: Tree, mutation: dict) -> str:
    """Returns "caught", "slipped", or why the mutation could not be judged."""
    path = find_file(tree.root, mutation)
    if isinstance(path, str):
        return path
    targets, commands = tree.tests(mutation["tests"])
    if targets == LIBRARIES and path.relative_to(tree.root).parts[0] in ("activations", "ops", "registration"):
        targets = OPERATORS
    # What is built must be of these sources and build files: else the mutation's objects are not known, and stay.
    if not tree.compile(targets):
        return "the tree does not build as it is"
    with changed(tree, path, mutation, targets):
        if path.suffix in (".cpp", ".h") and "examples" not in path.parts and not tree.compile(targets):
            return "does not build"
        done = [tree.run(*command) for command in commands]
    statuses = [each.returncode for each in done]
    if any(status == 5 or status == 4 for status in statuses):  # pytest: nothing selected, wrong arguments
        return f"its tests cannot be run: {done[0].stdout[-200:]}"
    return "caught" if any(statuses) else "slipped"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, required=True)
    parser.add_argument("--find", action="store_true", help="only say which texts are not there any more")
    parser.add_argument("names", nargs="*", metavar="NAME")
    arguments = parser.parse_args()
    mutations = tomllib.loads((HERE / "mutations.toml").read_text())
    unknown = set(arguments.names) - set(mutations)
    if unknown:
        parser.error(f"no mutation is called {', '.join(sorted(unknown))}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that files are put back
    tree, bad = Tree(arguments.tree), 0
    for name in arguments.names or mutations:
        started = time.monotonic()
        if arguments.find:
            path = find_file(tree.root, mutations[name])
            verdict = path if isinstance(path, str) else "found"
        else:
            verdict = judge(tree, mutations[name])
        bad += verdict not in ("caught", "found")
        print(f"{name:32} {verdict} ({time.monotonic() - started:.0f} s)", flush=True)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
