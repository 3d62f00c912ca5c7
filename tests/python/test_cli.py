"""scripts/graft.py: what it writes, and that bad input gets one line, a non-zero exit and nothing left behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import torchgraft
from grafted import base, saved_adapter
from models import VARIANTS, make_batch
from scripts_here import run_here, run_process

ROOT = Path(__file__).resolve().parents[2]
FLOAT = torch.float32


def run(*arguments: object) -> subprocess.CompletedProcess:
    """In this process."""
    return run_here("graft.py", *arguments)


def run_alone(*arguments: object, **options: object) -> subprocess.CompletedProcess:
    """As a process of its own."""
    return run_process("graft.py", *arguments, **options)


class NearlyAttention(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(x @ x.transpose(-1, -2), dim=-1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    base("bert_sdpa", FLOAT).save(str(folder / "base.pt"))
    torch.jit.script(torch.nn.Sequential(torch.nn.Linear(2, 2))).save(str(folder / "plain.pt"))
    torch.jit.script(NearlyAttention()).save(str(folder / "near.pt"))
    (folder / "text.pt").write_text("not a model")
    (folder / "empty.pt").write_bytes(b"")
    os.mkfifo(folder / "pipe")
    (folder / "short.pt").write_bytes((folder / "base.pt").read_bytes()[:100_000])
    torch.save({"weight": torch.zeros(2)}, folder / "state.pt")
    return folder


EXTRA = {"vocabulary/words.txt": b"a\nb\n", "note": b"\x00\xff"}


@pytest.mark.quick
def test_what_a_file_carries_beside_its_module_stays(folder: Path, tmp_path: Path) -> None:
    source, added, renamed = tmp_path / "source.pt", tmp_path / "added.pt", tmp_path / "renamed.pt"
    torch.jit.save(torch.jit.load(str(folder / "base.pt")), str(source), _extra_files=EXTRA)
    run("add", source, "-o", added, "--config", "lora", "--name", "task")
    run("rename", added, "task", "other", "-o", renamed)
    for path in (added, renamed):
        found = dict.fromkeys(EXTRA, "")
        torch.jit.load(str(path), _extra_files=found)
        assert found == EXTRA


@pytest.mark.parametrize("name", ["example.pt", "example.safetensors"])
def test_example_inputs_from_a_file(folder: Path, tmp_path: Path, name: str) -> None:
    batch = make_batch([5, 3], 5, FLOAT)
    ids, mask = VARIANTS["bert_sdpa"].arguments(batch)
    if name.endswith(".pt"):
        torch.save((ids, mask), tmp_path / name)
    else:
        save_file({"input_ids": ids, "attention_mask": mask}, tmp_path / name)
    options = ("--config", "lora", "--name", "task", "--example", tmp_path / name)
    done = run("add", folder / "base.pt", "-o", tmp_path / "out.pt", *options)
    assert (done.returncode, done.stderr) == (0, "")
    (tmp_path / name).write_bytes(b"neither")
    done = run("add", folder / "base.pt", "-o", tmp_path / "none.pt", *options)
    assert done.returncode == 1 and not (tmp_path / "none.pt").exists()
    assert done.stderr.startswith("graft: ") and name in done.stderr and done.stderr.count("\n") == 1


def test_every_command_says_what_it_warns_of_in_one_line(folder: Path, tmp_path: Path) -> None:
    run("add", folder / "base.pt", "-o", tmp_path / "model.pt", "--config", "prefix_tuning", "--name", "task")
    run("save", tmp_path / "model.pt", "task", tmp_path / "task")
    config = tmp_path / "task" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "distilbert"}))
    done = run("load", folder / "base.pt", tmp_path / "task", "-o", tmp_path / "out.pt")
    assert done.returncode == 0
    assert done.stderr.startswith(f"warning: {tmp_path / 'task'}: if this prefix was trained with ")
    assert done.stderr.count("\n") == 1


@pytest.mark.quick
def test_add_by_config(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.pt"
    done = run_alone("add", folder / "base.pt", "-o", out, "--config", "unipelt", "--name", "task", "--seed", 1)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and "task" in done.stdout and "parameters" in done.stdout
    module = torch.jit.load(str(out))
    assert module.active_adapter() == "task"
    again = tmp_path / "again.pt"
    run("add", folder / "base.pt", "-o", again, "--config", "unipelt", "--name", "task", "--seed", 1)
    state = torch.jit.load(str(again)).state_dict()
    assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.pt", "out.pt"]


def test_add_trained_adapters_to_a_grafted_file(folder: Path, tmp_path: Path) -> None:
    variant = VARIANTS["bert_sdpa"]
    saved = {name: saved_adapter(variant, FLOAT, name).directory for name in ("unipelt", "mam")}
    first, second = tmp_path / "first.pt", tmp_path / "second.pt"
    assert run("add", folder / "base.pt", "-o", first, "--adapter", f"a={saved['unipelt']}").returncode == 0
    done = run("add", first, "-o", second, "--adapter", f"b={saved['mam']}", "--active", "a")
    assert done.returncode == 0, done.stderr
    module = torch.jit.load(str(second))
    assert module.adapter_names() == ["a", "b"] and module.active_adapter() == "a"
    arguments = variant.arguments(make_batch([5, 3], 5, FLOAT))
    with torch.no_grad():
        assert torch.allclose(module(*arguments)[0], torch.jit.load(str(first))(*arguments)[0], atol=1e-5)


def test_several_fresh_and_trained_adapters_at_once(folder: Path, tmp_path: Path) -> None:
    """Configurations by name and by file; a file that is called like a configuration is not meant."""
    saved = saved_adapter(VARIANTS["bert_sdpa"], FLOAT, "mam").directory
    (tmp_path / "lora").write_text("not JSON")
    done = run_alone("add", folder / "base.pt", "-o", "out.pt", "--config", "lora", "--name", "first", "--config",
               Path(saved) / "adapter_config.json", "--name", "second", "--config", saved, "--name", "third",
               "--adapter", f"fourth={saved}", "--active", "second", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "0 first, 1 second, 2 third, 3 fourth (active: second)" in done.stdout
    module = torch.jit.load(str(tmp_path / "out.pt"))
    assert module.adapter_names() == ["first", "second", "third", "fourth"]
    configs = {name: module.adapter_config(name) for name in module.adapter_names()}
    assert json.loads(configs["first"])["architecture"] == "lora"
    assert configs["second"] == configs["third"] == configs["fourth"] != configs["first"]


def test_the_summary_counts_what_was_added(folder: Path, tmp_path: Path) -> None:
    done = run("add", folder / "base.pt", "-o", tmp_path / "out.pt", "--config", "lora", "--name", "task")
    assert done.returncode == 0, done.stderr
    assert "in 3 layers: selfattn_lora_q x 3, selfattn_lora_v x 3" in done.stdout
    # A and B of rank 8 between 48 features, for q and v of 3 layers.
    numbers = 3 * 2 * (8 * 48 + 48 * 8)
    assert f"{numbers:,} parameters added" in done.stdout
    # A bank's padding, and an adapter that was there before, are nothing that was added.
    again = run("add", tmp_path / "out.pt", "-o", tmp_path / "two.pt", "--config", "lora[r=2]", "--name", "small")
    assert f"{numbers // 4:,} parameters added" in again.stdout


def test_pooling_over_the_real_tokens(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.pt"
    done = run("add", folder / "base.pt", "-o", out, "--config", "unipelt", "--name", "task",
               "--gate-pooling", "unpadded", "--token-mask", "attention_mask")  # fmt: skip
    assert done.returncode == 0, done.stderr
    variant, module = VARIANTS["bert_sdpa"], torch.jit.load(str(out))
    batch = make_batch([5, 3], 5, FLOAT)
    with torch.no_grad():
        gates = [module.forward_with_gates(*variant.arguments(b))[1]["task"] for b in (batch, batch.padded(4))]
    for layer, locations in gates[0].items():
        for location, value in locations.items():
            assert torch.allclose(value, gates[1][layer][location], atol=1e-6)


def test_a_link_is_written_through(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    target, link = tmp_path / "real" / "model.pt", tmp_path / "link.pt"
    target.write_text("old")
    link.symlink_to(target)
    assert run("add", folder / "base.pt", "-o", link, "--config", "lora", "--name", "task").returncode == 0
    assert link.is_symlink() and torch.jit.load(str(target)).adapter_names() == ["task"]


def test_inspect_prints_a_table_and_data(folder: Path) -> None:
    done = run_alone("inspect", folder / "base.pt")
    assert done.returncode == 0, done.stderr
    for text in ("encoder.layer.{0-2}.attention.self.query", "0 to 2", "output_adapter", "post"):
        assert text in done.stdout
    assert done.stderr == ""
    every = run("inspect", folder / "base.pt", "--all").stdout
    for number in range(3):
        assert every.count(f"query: encoder.layer.{number}.attention.self.query") == 1
    data = json.loads(run("inspect", folder / "base.pt", "--json").stdout)
    assert [layer["index"] for layer in data["layers"]] == [0, 1, 2]
    assert data["layers"][0]["ffn_in"]["path"] == "encoder.layer.0.intermediate.dense"
    assert "selfattn_lora" in data["layers"][0]["locations"]


# Arguments (with {folder} of the module's files and {tmp}), what the error says. First the command lines that are wrong
# whatever the files hold: status 2; then those that fail on files: status 1.
_OUT = ["add", "{folder}/base.pt", "-o", "{tmp}/out.pt"]
_LORA = ["--config", "lora", "--name", "task"]
_OUT_LORA = ["-o", "{tmp}/out.pt", *_LORA]
WRONG = {
    "unknown command": (["destroy"], "invalid choice: 'destroy'"),
    "no output": (["add", "{folder}/base.pt", *_LORA], "-o/--output"),
    "nothing to graft": (_OUT, "nothing to graft"),
    "config without name": ([*_OUT, "--config", "lora"], "go together, got 1 and 0"),
    "name without config": ([*_OUT, *_LORA, "--name", "other"], "go together, got 1 and 2"),
    "one name twice": ([*_OUT, *_LORA, "--adapter", "task={folder}"], "'task' is given to two adapters"),
    "one fresh name twice": ([*_OUT, *_LORA, *_LORA], "'task' is given to two adapters"),
    "not NAME=DIRECTORY": ([*_OUT, "--adapter", "task"], "expected NAME=DIRECTORY, got 'task'"),
    "unknown pooling": ([*_OUT, *_LORA, "--gate-pooling", "some"], "invalid choice: 'some'"),
    "mask without pooling": ([*_OUT, *_LORA, "--token-mask", "attention_mask"], "is for --gate-pooling unpadded"),
    "seed is no number": ([*_OUT, *_LORA, "--seed", "x"], "expected a whole number, got 'x'"),
    "seed is too large": ([*_OUT, *_LORA, "--seed", "9" * 23], "expected a whole number of 64 bits"),
    "an empty path": (["save", "{folder}/base.pt", "x", ""], "DIRECTORY: expected a path, got an empty text"),
    "a name twice": (["remove", "{folder}/base.pt", "l", "l", "-o", "{tmp}/o.pt"], "the name 'l' is given twice"),
    "no tokens": (["gates", "{folder}/base.pt", "--text", "a", "--max-length", "0"], "--max-length must be at least 1"),
    "no seconds": (["tune", "-o", "{tmp}/t.json", "--seconds", "nan"], "--seconds: expected a positive number"),
}
FAILING = {
    "no such file": (["add", "{folder}/none.pt", *_OUT_LORA], "none.pt: no such file"),
    "base is a directory": (["add", "{folder}", *_OUT_LORA], "not a file"),
    "not TorchScript": (["add", "{folder}/text.pt", *_OUT_LORA], "not a TorchScript file"),
    "empty file": (["add", "{folder}/empty.pt", *_OUT_LORA], "not a TorchScript file"),
    "cut short": (["add", "{folder}/short.pt", *_OUT_LORA], "not a TorchScript file"),
    "a state dict": (["add", "{folder}/state.pt", *_OUT_LORA], "it is what torch.save() wrote, a state dict or"),
    "no attention": (["add", "{folder}/plain.pt", *_OUT_LORA], "no attention was found"),
    "nearly attention": (["add", "{folder}/near.pt", *_OUT_LORA], "near misses: "),  # several lines in Python
    "unknown config": ([*_OUT, "--config", "unipel", "--name", "t"], "no configuration is called 'unipel'"),
    "no such config file": ([*_OUT, "--config", "{tmp}/none", "--name", "t"], "cannot read the adapter's config"),
    "config is not JSON": ([*_OUT, "--config", "{folder}/text.pt", "--name", "t"], "not JSON"),
    "unsupported field": (
        [*_OUT, "--config", "lora[dtype=int8]", "--name", "t"],
        "LoRAConfig.dtype=int8 is not supported",
    ),
    "no such output directory": (["add", "{folder}/base.pt", "-o", "{tmp}/none/out.pt", *_LORA], "does not exist"),
    "output is a directory": (["add", "{folder}/base.pt", "-o", "{tmp}", *_LORA], "is a directory"),
    "output is a pipe": (["add", "{folder}/base.pt", "-o", "{folder}/pipe", *_LORA], "is not a regular file"),
    # Nobody can make files there, not even root.
    "unwritable directory": (["add", "{folder}/base.pt", "-o", "/proc/out.pt", *_LORA], "cannot write in /proc"),
    "not an adapter": ([*_OUT, "--adapter", "task={folder}"], "cannot read the adapter's configuration"),
    "adapter directory missing": ([*_OUT, "--adapter", "task={tmp}/none"], "not a directory"),
    "bad name": ([*_OUT, "--config", "lora", "--name", "a.b"], "cannot be an adapter's name"),
    "unknown active adapter": ([*_OUT, *_LORA, "--active", "other"], "no adapter is called 'other'; there are: task"),
    "unknown mask": ([*_OUT, *_LORA, "--gate-pooling", "unpadded", "--token-mask", "mask"], "no argument 'mask'"),
    "inspect no attention": (["inspect", "{folder}/plain.pt"], "no attention was found"),
    "inspect no file": (["inspect", "{folder}/none.pt"], "no such file"),
}


# As processes: a wrong command line, what torch says of a damaged file, an error of several lines in Python.
_ALONE = {"no output", "cut short", "nearly attention"}


def check_one_line(done: subprocess.CompletedProcess, status: int, message: str) -> None:
    assert done.returncode == status, done.stderr
    assert message in done.stderr
    assert done.stderr.startswith("graft: error: ") and done.stderr.count("\n") == 1


@pytest.mark.quick
@pytest.mark.parametrize("case", [*WRONG, *FAILING])
def test_bad_input_is_one_line_and_leaves_nothing(case: str, folder: Path, tmp_path: Path) -> None:
    arguments, message = (WRONG | FAILING)[case]
    start = run_alone if case in _ALONE else run
    done = start(*[argument.format(folder=folder, tmp=tmp_path) for argument in arguments])
    check_one_line(done, 2 if case in WRONG else 1, message)
    assert list(tmp_path.iterdir()) == []


# What happens while the new file is written, the exit status, what is said.
ACCIDENTS = {
    "Ctrl-C": ("os.kill(os.getpid(), signal.SIGINT)", 130, "interrupted"),
    "terminated": ("os.kill(os.getpid(), signal.SIGTERM)", 143, "terminated"),
    "disk full": ("resource.setrlimit(resource.RLIMIT_FSIZE, (99, 99))", 1, "out.pt: cannot write (File too large"),
}


@pytest.mark.parametrize("case", ACCIDENTS)
def test_an_accident_while_writing_leaves_the_old_output(case: str, folder: Path, tmp_path: Path) -> None:
    accident, status, message = ACCIDENTS[case]
    out = tmp_path / "out.pt"
    out.write_text("precious")
    script = str(ROOT / "scripts" / "graft.py")
    arguments = [script, "add", str(folder / "base.pt"), "-o", str(out), "--config", "lora", "--name", "task"]
    program = f"""
import os, resource, runpy, signal, sys
sys.path.insert(0, {str(ROOT / "python")!r})
from torchgraft._libraries import patcher
original = patcher().TemporaryFile.write

def write(file, content):
    {accident}
    original(file, content)
patcher().TemporaryFile.write = write
sys.argv = {arguments!r}
runpy.run_path({script!r}, run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    check_one_line(done, status, message)
    assert out.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [out]


def test_ctrl_c_is_not_lost_while_torch_is_imported(folder: Path, tmp_path: Path) -> None:
    """Importing the real one runs code that swallows exceptions; so does this one."""
    (tmp_path / "torch.py").write_text(
        "import os, signal\n"
        "try:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    for _ in range(1000): pass\n"
        "except BaseException: pass\n"
    )
    environment = {"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    out = tmp_path / "out.pt"
    done = run_alone("add", folder / "base.pt", "-o", out, "--config", "lora", "--name", "task", env=environment)
    check_one_line(done, 130, "interrupted")
    assert not out.exists()


def test_without_a_built_library_the_remedy_is_named(folder: Path, tmp_path: Path) -> None:
    done = run_alone("inspect", folder / "base.pt", env={"TORCHGRAFT_LIBRARY_DIR": str(tmp_path)})
    check_one_line(done, 1, "run scripts/setup")
    assert str(tmp_path) in done.stderr


def test_an_adapter_of_another_hidden_size(folder: Path, tmp_path: Path) -> None:
    directory = tmp_path / "adapter"
    directory.mkdir()
    config = {"config": {"architecture": "lora", "r": 2, "attn_matrices": ["q"]}, "name": "small"}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    path = "encoder.layer.{}.attention.self.query.loras.small.lora_{}"
    torch.save(
        {path.format(i, ab): torch.zeros((2, 32) if ab == "A" else (32, 2)) for i in range(3) for ab in "AB"},
        directory / "pytorch_adapter.bin",
    )
    done = run("add", folder / "base.pt", "-o", tmp_path / "out.pt", "--adapter", f"task={directory}")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "trained for hidden size 32, the model has 48" in done.stderr


def test_a_pickle_with_code_in_it_is_refused(folder: Path, tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self):
            return (Path(tmp_path / "ran").write_text, ("ran",))

    directory = tmp_path / "adapter"
    directory.mkdir()
    config = {"config": {"architecture": "lora"}, "name": "x"}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    torch.save({"weight": Harmful()}, directory / "pytorch_adapter.bin")
    done = run("add", folder / "base.pt", "-o", tmp_path / "out.pt", "--adapter", f"task={directory}")
    assert done.returncode == 1 and "refused" in done.stderr
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out.pt").exists()


def test_a_failed_run_leaves_the_old_output(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.pt"
    out.write_text("precious")
    assert run("add", folder / "plain.pt", "-o", out, "--config", "lora", "--name", "t").returncode == 1
    assert out.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.quick
def test_the_life_of_a_file(folder: Path, tmp_path: Path) -> None:
    """add, save, load, list, freeze, unfreeze, rename, remove, merge, unmerge, ungraft: each a command that reads and
    writes files."""
    a, b, saved = tmp_path / "a.pt", tmp_path / "b.pt", tmp_path / "saved"

    def step(*arguments: object) -> str:
        force = ("--force",) if arguments.count(b) == 2 else ()
        done = run(*arguments, *force)
        assert done.returncode == 0, done.stderr
        return done.stdout

    step("add", folder / "base.pt", "-o", a, "--config", "lora[r=4]|seq_bn", "--name", "x", "--seed", 1)
    step("save", a, "x", saved)
    assert "layer 0, selfattn_lora_q: lora_a" in step("match", folder / "base.pt", saved)
    step("load", folder / "base.pt", saved, "-o", b, "--name", "y")
    assert torch.jit.load(str(b)).adapter_names() == ["y"]
    state, again = (torch.jit.load(str(path)).adapters.state_dict() for path in (a, b))
    assert all(torch.equal(tensor, again[key]) for key, tensor in state.items())
    step("add", a, "-o", b, "--config", "lora", "--name", "z")
    listed = json.loads(step("list", b, "--json"))
    assert [entry["name"] for entry in listed] == ["x", "z"] and listed[1]["active"]
    assert "output_adapter" in step("list", b)
    step("unfreeze", b, "z", "-o", b)
    assert "trainable" in step("list", b) and torchgraft.trainable_parameters(torch.jit.load(str(b)), "z")
    step("freeze", b, "z", "-o", b)
    assert "trainable" not in step("list", b)
    done = run("load", b, saved, "-o", tmp_path / "c.pt", "--name", "x", "--trainable")
    assert done.returncode == 1 and "it has an adapter of 'x' already (it has: x, z)" in done.stderr
    step("load", b, saved, "-o", b, "--name", "x", "--trainable")
    assert [entry["trainable"] for entry in json.loads(step("list", b, "--json"))] == [True, False]
    step("rename", b, "z", "w", "-o", b)
    done = run("merge", b, "w", "-o", b, "--force")
    assert done.returncode == 1 and "other adapters too (x)" in done.stderr and "--into-base" in done.stderr
    step("merge", b, "w", "-o", b, "--into-base")
    step("unmerge", b, "w", "-o", b)
    step("remove", b, "x", "-o", b)
    assert torch.jit.load(str(b)).adapter_names() == ["w"]
    assert "no adapters" in step("ungraft", b, "-o", b)
    done = run("list", b)
    assert done.returncode == 1 and "nothing is grafted" in done.stderr
