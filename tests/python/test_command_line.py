"""The command line as a whole: help, versions, guesses, exit statuses, what commands say, libraries of others."""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import torchgraft
from grafted import base
from scripts_here import SCRIPTS, run_here, run_process
from torchgraft_command.arguments import make_parser
from torchgraft_command.line import Help

FLOAT = torch.float32
COMMANDS = make_parser()._subparsers._group_actions[0].choices


def run(*arguments: object) -> subprocess.CompletedProcess:
    return run_here("graft.py", *arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("line")
    base("bert_sdpa", FLOAT).save(str(folder / "base.pt"))
    run("add", folder / "base.pt", "-o", folder / "model.pt", "--config", "lora", "--name", "x", "--config", "unipelt",
        "--name", "y")  # fmt: skip
    run("save", folder / "model.pt", "x", folder / "x")
    return folder


@pytest.mark.quick
def test_the_bare_command_prints_its_help() -> None:
    done = run()
    assert done.returncode == 2 and done.stderr == ""
    assert all(command in done.stdout for command in COMMANDS) and "Exit status: 0 done" in done.stdout


@pytest.mark.quick
@pytest.mark.parametrize("option", ["-V", "--version"])
def test_versions_and_kernels(option: str) -> None:
    done = run(option)
    assert done.returncode == 0
    assert done.stdout.startswith(f"torchgraft {torchgraft.__version__}, torch {torch.__version__}, Python 3.")
    assert done.stdout.rstrip().endswith(torchgraft._libraries.patcher().kernel_instruction_set())


@pytest.mark.quick
@pytest.mark.parametrize("name", COMMANDS)
def test_help_tells_every_option_and_its_default(name: str) -> None:
    command = COMMANDS[name]
    shown = " ".join(command.format_help().split())
    for action in command._actions:
        assert action.help, action.dest
        text = Help(prog="")._expand_help(action)
        assert " ".join(text.split()) in shown
        default = action.default
        if action.option_strings and not isinstance(default, bool | None) and default not in ([], argparse.SUPPRESS):
            assert str(default) in text, action.dest


@pytest.mark.quick
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["isnpect"], "invalid choice: 'isnpect' .*; did you mean 'inspect'\\?"),
        (["list", "model.pt", "--jsn"], "unrecognized arguments: --jsn; did you mean '--json'\\?"),
        (
            ["add", "base.pt", "-o", "out.pt", "--config", "", "--name", "t"],
            "--config: expected a configuration's name",
        ),
        (["inspect", "base.pt", "--config", " "], "--config: expected a configuration's name"),
        (["train", "base.pt", "-o", "out", "--train", "x.csv", "--config", ""], "--config: expected a configuration's"),
        (["gates", "m.pt", "--json", "-o", "x.png"], "give one of them"),
    ],
)
def test_what_was_meant(arguments: list[str], message: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert re.search(message, done.stderr), done.stderr


def test_an_empty_configuration_is_refused_in_python() -> None:
    with pytest.raises(torchgraft.GraftError, match="config: expected a configuration, its name"):
        torchgraft.graft(base("bert_sdpa", FLOAT), config="", name="t")


def test_commands_say_what_they_did(folder: Path, tmp_path: Path) -> None:
    a, b = tmp_path / "a.pt", tmp_path / "b.pt"
    loaded = folder / "x"
    merged = "merged into the base's weights"
    none = " (active: none, the base)"
    is_out = "is out of the base's weights already"
    said = [
        (["unfreeze", folder / "model.pt", "x", "-o", a], f"{a}: 'x' is now trainable; adapters x, y (active: y)\n"),
        (["unfreeze", a, "x", "-o", b], f"{b}: nothing to do, 'x' is trainable already; adapters x, y (active: y)\n"),
        (["freeze", a, "x", "-o", b], f"{b}: 'x' is now frozen; adapters x, y (active: y)\n"),
        (["freeze", b, "x", "-o", b], f"{b}: nothing to do, 'x' is frozen already; adapters x, y (active: y)\n"),
        (["rename", b, "y", "z", "-o", b], f"{b}: 'y' is now 'z'; adapters x, z (active: z)\n"),
        (["remove", b, "z", "-o", b], f"{b}: removed 'z'; adapters x{none}\n"),
        (["merge", b, "x", "-o", b], f"{b}: 'x' is now {merged}; adapters x{none}\n"),
        (["merge", b, "x", "-o", b], f"{b}: nothing to do, 'x' is {merged} already; adapters x{none}\n"),
        (["unmerge", b, "x", "-o", b], f"{b}: 'x' is now out of the base's weights; adapters x{none}\n"),
        (["unmerge", b, "x", "-o", b], f"{b}: nothing to do, 'x' {is_out}; adapters x{none}\n"),
        (["load", folder / "base.pt", loaded, "-o", a], f"{a}: {loaded} is 'x'; adapters x (active: x)\n"),
        (["load", a, loaded, "-o", a, "--force", "--name", "x"],
         f"{a}: {loaded} replaces 'x'; adapters x (active: x)\n"),
        (["ungraft", a, "-o", a], f"{a}: the base; no adapters\n"),
    ]  # fmt: skip
    for arguments, text in said:
        force = ["--force"] if arguments.count(arguments[1]) == 2 and "--force" not in arguments else []
        done = run(*arguments, *force)
        assert done.returncode == 0, done.stderr
        assert done.stdout == text


@pytest.mark.parametrize("command", ["merge", "unmerge"])
def test_a_wrong_example_is_told_where_there_is_nothing_to_do(command: str, folder: Path, tmp_path: Path) -> None:
    model, none = tmp_path / "model.pt", tmp_path / "none.pt"
    run("add", folder / "base.pt", "-o", model, "--config", "lora", "--name", "x")
    if command == "merge":
        assert run("merge", model, "x", "-o", model, "--force").returncode == 0
    done = run(command, model, "x", "-o", tmp_path / "out.pt", "--example", none)
    assert done.returncode == 1 and "none.pt" in done.stderr and not (tmp_path / "out.pt").exists()


def test_a_pooling_for_no_gates_is_a_warning(folder: Path, tmp_path: Path) -> None:
    wanted = ["--name", "x", "--gate-pooling", "unpadded", "--token-mask", "attention_mask"]
    for config, told in (("lora", True), ("unipelt", False)):
        done = run("add", folder / "base.pt", "-o", tmp_path / "out.pt", "--config", config, *wanted)
        assert done.returncode == 0, done.stderr
        assert ("'x' has no gates: gate_pooling=\"unpadded\" changes nothing" in done.stderr) == told


def test_what_has_nothing_to_do_is_a_copy(folder: Path, tmp_path: Path) -> None:
    run("freeze", folder / "model.pt", "x", "-o", tmp_path / "copy.pt")
    copy, original = (torch.jit.load(str(path)).state_dict() for path in (tmp_path / "copy.pt", folder / "model.pt"))
    assert copy.keys() == original.keys() and all(torch.equal(copy[key], original[key]) for key in copy)


def test_quiet_commands_say_nothing(folder: Path, tmp_path: Path) -> None:
    a, b = tmp_path / "a.pt", tmp_path / "b.pt"
    add = ["add", folder / "base.pt", "-o", a, "--config", "lora", "--name", "x"]
    for arguments in (add, ["rename", a, "x", "z", "-o", b], ["verify", b]):
        done = run(*arguments, "--quiet")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = run("rename", b, "nosuch", "w", "-o", tmp_path / "c.pt", "-q")
    assert done.returncode == 1 and "nosuch" in done.stderr


def test_verbose_tells_versions_and_steps(folder: Path, tmp_path: Path) -> None:
    source, out = folder / "base.pt", tmp_path / "out.pt"
    add = ["add", source, "-o", out, "--config", "lora", "--name", "x"]
    done = run(*add, "--verbose")
    versions, *steps = done.stderr.splitlines()
    assert done.returncode == 0 and f"{versions}\n" == run("--version").stdout
    wanted = [f"loading {source}", "grafting", f"writing {out}"]
    assert [re.sub(r": \d+\.\d\d s$", "", line) for line in steps] == wanted
    assert done.stdout.startswith(f"{out}: adapters 0 x (active: x)")
    assert run(*add, "--force").stderr == ""
    assert re.search(r"(?m)^rename: \d", run("rename", out, "x", "z", "-o", tmp_path / "b.pt", "-v").stderr)
    done = run(*add, "--verbose", "--quiet")
    assert done.returncode == 2 and "--quiet: not allowed with argument -v/--verbose" in done.stderr


def test_a_step_that_fails_is_no_line(folder: Path, tmp_path: Path) -> None:
    done = run("rename", folder / "model.pt", "nosuch", "w", "-o", tmp_path / "c.pt", "-v")
    assert done.returncode == 1 and "rename: " not in done.stderr and "error: " in done.stderr.splitlines()[-1]
    assert run("list", folder / "model.pt").stderr == ""  # the next command of this process is not verbose


@pytest.mark.quick
def test_every_command_but_completion_can_be_verbose() -> None:
    for name, command in COMMANDS.items():
        options = {option for action in command._actions for option in action.option_strings}
        assert ({"-v", "--verbose"} <= options) == (name != "completion"), name


# Commands that print a table.
TABLES = ("inspect", "match", "list", "gates", "quantize")


@pytest.mark.quick
@pytest.mark.parametrize("name", TABLES)
def test_what_prints_a_table_can_print_json(name: str) -> None:
    assert any("--json" in action.option_strings for action in COMMANDS[name]._actions)


def test_tables_as_json(folder: Path) -> None:
    matches = json.loads(run("match", folder / "base.pt", folder / "x", "--json").stdout)
    lines = run("match", folder / "base.pt", folder / "x").stdout.splitlines()
    assert [f"{match['weight']} -> {match['place']}" for match in matches] == lines and lines


@pytest.mark.parametrize("words", ["match base.pt x", "completion bash", "--help", "add --help", "", "--version"])
def test_a_reader_that_stops_reading_is_no_error(words: str, folder: Path) -> None:
    """The pipe is closed before anything is written."""
    process = subprocess.Popen(
        [sys.executable, str(SCRIPTS / "graft.py"), *words.split()],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(timeout=300) == 141 and errors == ""


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_is_a_script_of_the_shell(shell: str) -> None:
    done = run("completion", shell)
    assert done.returncode == 0
    assert all(command in done.stdout for command in COMMANDS)
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=True)


OTHER = """
#include <torch/library.h>
#include <ATen/ATen.h>
TORCH_LIBRARY(other_line, m) { m.def("twice", [](const at::Tensor& x) { return x * 2; }); }
"""
MAKES_BASE = """
import sys, torch
torch.ops.load_library(sys.argv[1])

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = torch.nn.TransformerEncoder(layer, 2)

    def forward(self, x):
        return self.encoder(torch.ops.other_line.twice(x))

torch.jit.script(Model().eval()).save(sys.argv[2])
"""


@pytest.mark.slow(seconds=15)  # compiles; consumer/test_server_library.py does in every run
def test_libraries_of_others_are_loaded(tmp_path: Path) -> None:
    root = Path(torch.__file__).parent
    library, path, out = tmp_path / "other.so", tmp_path / "base.pt", tmp_path / "out.pt"
    (tmp_path / "other.cpp").write_text(OTHER)
    subprocess.run(
        ["g++", "-shared", "-fPIC", "-std=c++20", f"-I{root / 'include'}", str(tmp_path / "other.cpp"),
         "-o", str(library), f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"],
        check=True,
    )  # fmt: skip
    (tmp_path / "makes_base.py").write_text(MAKES_BASE)
    subprocess.run([sys.executable, str(tmp_path / "makes_base.py"), str(library), str(path)], check=True)
    add = ["add", path, "-o", out, "--config", "lora", "--name", "task"]
    done = run_process("graft.py", *add)
    assert done.returncode == 1 and "other_line::twice" in done.stderr
    for wrong in (tmp_path / "none.so", path):
        done = run_process("graft.py", *add, "--library", wrong)
        assert done.returncode == 1 and str(wrong) in done.stderr and done.stderr.count("\n") == 1
    second = tmp_path / "second.so"
    subprocess.run(["g++", "-shared", "-x", "c++", "-", "-o", str(second)], input="int second;", text=True, check=True)
    done = run_process("graft.py", *add, "--library", library, "--library", second)
    assert done.returncode == 0, done.stderr
    done = run_process("graft.py", "list", out, "--library", library)
    assert done.returncode == 0 and "task" in done.stdout


def test_every_command_that_loads_takes_libraries() -> None:
    for name, command in COMMANDS.items():
        options = {option for action in command._actions for option in action.option_strings}
        assert ("--library" in options) == (name not in ("tune", "convert", "completion")), name
        assert isinstance(command, argparse.ArgumentParser)
