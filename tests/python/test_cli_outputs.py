"""No command writes over a file that it reads, and none over an adapter of another name."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import torchgraft
from grafted import base
from scripts_here import run_here
from torchgraft.adapter_hub import ADAPTER_FILES


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a model with some adapters, one in which "task" is merged, and the directory of "task"."""
    folder = tmp_path_factory.mktemp("files")
    module = base("bert_sdpa", torch.float32)
    module.save(str(folder / "base.pt"))
    one = torchgraft.graft(module, "lora", "task")
    torchgraft.save_adapter(one, "task", folder / "saved")
    torchgraft.merge_adapter(one, "task").save(str(folder / "merged.pt"))
    two = torchgraft.graft(torchgraft.graft(one, "unipelt", "other"), "lora", "learner", trainable=True)
    two.save(str(folder / "model.pt"))
    torch.save((torch.ones(1, 4, dtype=torch.int64),), folder / "example.pt")
    return folder


@pytest.mark.quick
def test_a_base_is_not_written_over(folder: Path, tmp_path: Path) -> None:
    path, link = tmp_path / "base.pt", tmp_path / "link.pt"
    path.write_bytes((folder / "base.pt").read_bytes())
    link.symlink_to(path)
    before = path.read_bytes()
    grafting = ("--config", "lora", "--name", "task")
    for output in (path, link):
        done = run_here("graft.py", "add", path, "-o", output, *grafting)
        assert done.returncode == 1 and "this is a file that is read" in done.stderr and "--force" in done.stderr
    assert "this is a file that is read" in run_here("graft.py", "load", path, folder / "saved", "-o", path).stderr
    assert path.read_bytes() == before
    assert run_here("graft.py", "add", path, "-o", path, *grafting, "--force").returncode == 0
    assert torch.jit.load(str(path)).adapter_names() == ["task"]


IN_PLACE = {
    "add": ["add", "{model}", "-o", "{model}", "--config", "lora", "--name", "more"],
    "load": ["load", "{model}", "{folder}/saved", "-o", "{model}", "--name", "more"],
    "remove": ["remove", "{model}", "task", "-o", "{model}"],
    "rename": ["rename", "{model}", "task", "new", "-o", "{model}"],
    "freeze": ["freeze", "{model}", "learner", "-o", "{model}"],
    "unfreeze": ["unfreeze", "{model}", "task", "-o", "{model}"],
    "merge": ["merge", "{model}", "task", "-o", "{model}", "--into-base"],
    "unmerge": ["unmerge", "{merged}", "task", "-o", "{merged}"],
    "lower": ["lower", "{model}", "-o", "{model}"],
    "ungraft": ["ungraft", "{model}", "-o", "{model}"],
    "quantize": ["quantize", "{base}", "-o", "{base}"],
    "another file that is read": ["lower", "{model}", "-o", "{example}", "--example", "{example}"],
    "a picture": ["gates", "{model}", "--text", "a", "--adapter", "other", "-o", "{model}"],
}


@pytest.mark.parametrize("case", IN_PLACE)
def test_no_file_that_is_read_is_written_over(case: str, folder: Path, tmp_path: Path) -> None:
    files = {path.stem: tmp_path / path.name for path in folder.glob("*.pt")}
    for path in files.values():
        path.write_bytes((folder / path.name).read_bytes())
    arguments = [argument.format(folder=folder, **files) for argument in IN_PLACE[case]]
    contents = {path: path.read_bytes() for path in files.values()}
    done = run_here("graft.py", *arguments)
    assert done.returncode == 1 and "this is a file that is read; give the output another name" in done.stderr
    assert contents == {path: path.read_bytes() for path in files.values()}
    assert len(list(tmp_path.iterdir())) == len(files)
    if case not in ("a picture", "another file that is read"):
        assert "or --force to write over it" in done.stderr
        done = run_here("graft.py", *arguments, "--force")
        assert done.returncode == 0, done.stderr
        assert contents != {path: path.read_bytes() for path in files.values()}


@pytest.mark.quick
@pytest.mark.parametrize("safetensors", [True, False])
def test_a_directory_of_another_adapter_is_kept(safetensors: bool, folder: Path, tmp_path: Path) -> None:
    module = torch.jit.load(str(folder / "model.pt"))
    torchgraft.save_adapter(module, "other", tmp_path, safetensors)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(torchgraft.GraftError, match="holds the adapter 'other' already, not 'task'; .*overwrite=True"):
        torchgraft.save_adapter(module, "task", tmp_path, safetensors)
    assert files == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    torchgraft.save_adapter(module, "other", tmp_path, safetensors)  # a new version of the same
    torchgraft.save_adapter(module, "task", tmp_path, safetensors, overwrite=True)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["name"] == "task"


@pytest.mark.parametrize("content", ['{"peft_type": "LORA", "r": 8}', "not JSON", "[]", '{"name": 3}'])
def test_a_directory_of_something_else_is_kept(content: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(content)
    for options in ((), ("--bin",)):
        done = run_here("graft.py", "save", folder / "model.pt", "task", tmp_path, *options)
        assert done.returncode == 1 and "holds something other than an adapter of AdapterHub already" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_config.json"]
    assert (tmp_path / "adapter_config.json").read_text() == content
    assert run_here("graft.py", "save", folder / "model.pt", "task", tmp_path, "--force").returncode == 0


def _killed_save(module: torch.jit.ScriptModule, name: str, directory: Path) -> None:
    """What a save leaves that is killed between its renames: all in place but adapter_config.json."""
    torchgraft.save_adapter(module, name, directory, overwrite=True)
    (directory / "adapter_config.json").rename(directory / ".adapter_config.json.99.torchgraft-tmp")


@pytest.mark.parametrize("file", ADAPTER_FILES[1:])
def test_files_of_nobody_are_kept(file: str, folder: Path, tmp_path: Path) -> None:
    """A directory without adapter_config.json: nothing says that its files are this adapter's."""
    (tmp_path / file).write_text("another's")
    (tmp_path / "notes.txt").write_text("mine")
    for options in ((), ("--bin",)):
        done = run_here("graft.py", "save", folder / "model.pt", "task", tmp_path, *options)
        assert done.returncode == 1 and f"holds files of an adapter ({file}) without an adapter" in done.stderr, (
            done.stderr
        )
        assert {path.name for path in tmp_path.iterdir()} == {file, "notes.txt"}
        assert (tmp_path / file).read_text() == "another's"
    assert run_here("graft.py", "save", folder / "model.pt", "task", tmp_path, "--force").returncode == 0
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("safetensors", [True, False])
def test_a_killed_save_may_be_done_again(safetensors: bool, folder: Path, tmp_path: Path) -> None:
    """And by the same adapter only."""
    module = torch.jit.load(str(folder / "model.pt"))
    _killed_save(module, "other", tmp_path)
    with pytest.raises(torchgraft.GraftError, match="holds the adapter 'other' already, not 'task'"):
        torchgraft.save_adapter(module, "task", tmp_path, safetensors)
    torchgraft.save_adapter(module, "other", tmp_path, safetensors)
    assert torchgraft.load_adapter_directory(tmp_path).name == "other"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


INSIDE = {
    "load": ["load", "{base}", "{saved}", "-o", "{saved}/adapter.safetensors"],
    "add": ["add", "{base}", "--adapter", "t={saved}", "-o", "{saved}/adapter_config.json"],
    "a configuration": ["add", "{base}", "--config", "{saved}/adapter_config.json", "--name", "t",
                        "-o", "{saved}/adapter_config.json"],
    "save": ["save", "{saved}/adapter.safetensors", "task", "{saved}"],
    "save, which removes": ["save", "{saved}/pytorch_adapter.bin", "task", "{saved}"],
}  # fmt: skip


@pytest.mark.parametrize("what", INSIDE)
def test_files_of_an_adapter_that_is_read_are_not_written_over(what: str, folder: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    shutil.copytree(folder / "saved", saved)
    if what.startswith("save"):
        shutil.copy(folder / "model.pt", INSIDE[what][1].format(saved=saved))
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    command = [word.format(base=folder / "base.pt", saved=saved) for word in INSIDE[what]]
    done = run_here("graft.py", *command)
    assert done.returncode == 1 and "this is a file that is read" in done.stderr
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
