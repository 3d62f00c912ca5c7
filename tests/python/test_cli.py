"""scripts/graft.py: what it writes, and that bad input gets one line, a non-zero exit and nothing left behind."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from grafted import base, saved_adapter
from models import VARIANTS, make_batch

ROOT = Path(__file__).resolve().parents[2]
FLOAT = torch.float32


def run(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts" / "graft.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=cwd)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    base("bert_sdpa", FLOAT).save(str(folder / "base.pt"))
    torch.jit.script(torch.nn.Sequential(torch.nn.Linear(2, 2))).save(str(folder / "plain.pt"))
    (folder / "text.pt").write_text("not a model")
    torch.save({"weight": torch.zeros(2)}, folder / "state.pt")
    return folder


def test_add_by_config(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.pt"
    done = run("add", folder / "base.pt", "-o", out, "--config", "unipelt", "--name", "task", "--seed", 1)
    assert done.returncode == 0, done.stderr
    assert "task" in done.stdout and "parameters" in done.stdout
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


def test_output_may_replace_its_input(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes((folder / "base.pt").read_bytes())
    assert run("add", path, "-o", path, "--config", "lora", "--name", "task").returncode == 0
    assert torch.jit.load(str(path)).adapter_names() == ["task"]


def test_inspect_prints_a_table_and_data(folder: Path) -> None:
    done = run("inspect", folder / "base.pt")
    assert done.returncode == 0, done.stderr
    for text in ("encoder.layer.2.attention.self.query", "output_adapter", "post"):
        assert text in done.stdout
    data = json.loads(run("inspect", folder / "base.pt", "--json").stdout)
    assert [layer["index"] for layer in data["layers"]] == [0, 1, 2]
    assert data["layers"][0]["ffn_in"]["path"] == "encoder.layer.0.intermediate.dense"
    assert "selfattn_lora" in data["layers"][0]["locations"]


_ADD = ["-o", "{tmp}/out.pt", "--config", "lora", "--name", "task"]
BAD = {
    "no such file": (["add", "{folder}/none.pt", *_ADD], "no such file"),
    "not TorchScript": (["add", "{folder}/text.pt", *_ADD], "not a TorchScript file"),
    "a state dict": (["add", "{folder}/state.pt", *_ADD], "not a TorchScript file"),
    "no attention": (["add", "{folder}/plain.pt", *_ADD], "no attention was found"),
    "unknown config": (["add", "{folder}/base.pt", "-o", "{tmp}/out.pt", "--config", "unipel", "--name", "t"],
                       "no configuration is called 'unipel'"),
    "unsupported field": (["add", "{folder}/base.pt", "-o", "{tmp}/out.pt", "--config", "dora", "--name", "t"],
                          "LoRAConfig.use_dora=True is not supported yet"),
    "no such directory": (["add", "{folder}/base.pt", "-o", "{tmp}/none/out.pt", "--config", "lora", "--name", "t"],
                          "does not exist"),
    "output is a directory": (["add", "{folder}/base.pt", "-o", "{tmp}", "--config", "lora", "--name", "t"],
                              "is a directory"),
    "nothing to graft": (["add", "{folder}/base.pt", "-o", "{tmp}/out.pt"], "nothing to graft"),
    "config without name": (["add", "{folder}/base.pt", "-o", "{tmp}/out.pt", "--config", "lora"], "go together"),
    "one name twice": (["add", "{folder}/base.pt", *_ADD, "--adapter", "task={folder}"], "given to two adapters"),
    "not NAME=DIR": (["add", "{folder}/base.pt", "-o", "{tmp}/out.pt", "--adapter", "task"], "NAME=DIRECTORY"),
    "not an adapter": (["add", "{folder}/base.pt", "-o", "{tmp}/out.pt", "--adapter", "task={folder}"],
                       "cannot read the adapter's configuration"),
    "adapter directory missing": (["add", "{folder}/base.pt", "-o", "{tmp}/out.pt", "--adapter", "task={tmp}/none"],
                                  "not a directory"),
    "bad name": (["add", "{folder}/base.pt", "-o", "{tmp}/out.pt", "--config", "lora", "--name", "a b"],
                 "cannot be an adapter's name"),
    "inspect no attention": (["inspect", "{folder}/plain.pt"], "no attention was found"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case: str, folder: Path, tmp_path: Path) -> None:
    arguments, message = BAD[case]
    done = run(*[argument.format(folder=folder, tmp=tmp_path) for argument in arguments])
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.startswith("graft: error: ") and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_of_another_hidden_size(folder: Path, tmp_path: Path) -> None:
    directory = tmp_path / "adapter"
    directory.mkdir()
    config = {"config": {"architecture": "lora", "r": 2, "attn_matrices": ["q"]}, "name": "small"}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    path = "encoder.layer.{}.attention.self.query.loras.small.lora_{}"
    torch.save({path.format(i, ab): torch.zeros((2, 32) if ab == "A" else (32, 2)) for i in range(3) for ab in "AB"},
               directory / "pytorch_adapter.bin")  # fmt: skip
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
