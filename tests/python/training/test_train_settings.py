"""What training says of settings that it cannot, or does not, use as they are given."""

import argparse
from pathlib import Path

import pytest
import torch

import torchgraft
from scripts_here import run_here
from tiny import LABELS, Files, make_tokenizer, write_files
from torchgraft.errors import CommandLineError
from torchgraft.training import _command, encode_examples, read_examples
from torchgraft_command.train_arguments import make_parser


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return write_files(tmp_path_factory.mktemp("settings"))


@pytest.fixture(scope="module")
def there(files: Files, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[object]]:
    """Arguments to go on with an adapter 'task' of a directory, or of the model."""
    folder = tmp_path_factory.mktemp("there")
    module = torchgraft.graft(torch.jit.load(str(files.base)), "unipelt", "task", trainable=True)
    torchgraft.save_adapter(module, "task", folder / "adapter")
    module.save(str(folder / "grafted.pt"))
    (folder / "tokenizer.json").write_bytes((files.base.parent / "tokenizer.json").read_bytes())
    return {"--start": [files.base, "--train", files.train, "--start", folder / "adapter"],
            "in the model": [folder / "grafted.pt", "--train", files.train]}  # fmt: skip


def parsed(*arguments: object) -> argparse.Namespace:
    return make_parser().parse_args([str(part) for part in arguments])


def trainable(arguments: argparse.Namespace) -> torch.jit.ScriptModule:
    return _command._trainable(torch.jit.load(str(arguments.model)), arguments, LABELS)


@pytest.mark.parametrize("where", ["--start", "in the model"])
def test_another_configuration_than_the_adapters_is_refused(where: str, there: dict, tmp_path: Path) -> None:
    given = [*there[where], "-o", tmp_path / "out"]
    for config, told in (("lora", "architecture union and not lora"), ("unipelt[r=4]", "r 8 and not 4")):
        with pytest.raises(CommandLineError, match=f"'task' of .* has another configuration .*{told}"):
            trainable(parsed(*given, "--config", config))
    for config in (None, "UniPELT", there["--start"][-1] / "adapter_config.json"):
        module = trainable(parsed(*given, *(["--config", config] if config else [])))
        assert [info.trainable for info in torchgraft.list_adapters(module)] == [True]


def test_that_is_a_wrong_command_line(there: dict, tmp_path: Path) -> None:
    done = run_here("train.py", *there["--start"], "-o", tmp_path / "out", "--config", "lora")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("train: error: --config lora: 'task' of ")
    assert "leave --config out to train it further" in done.stderr and not (tmp_path / "out").exists()


def test_cut_texts_are_counted(files: Files, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    whole = encode_examples(make_tokenizer(), read_examples(files.train), LABELS)
    for length, is_told in ((2, True), (64, False)):
        data = _command._load_data(parsed(files.base, "-o", tmp_path, "--train", files.train, "--max-length", length))
        assert data.training.cut == sum(count > length for count in whole.lengths())
        _command._say_cut(argparse.Namespace(max_length=length, quiet=False), data)
        told = f"{data.training.cut} of {len(whole)} training texts were cut to {length} tokens (--max-length)\n"
        assert capsys.readouterr().out == (told if is_told else "")


@pytest.mark.quick
@pytest.mark.parametrize("option", ["--seed", "--max-length"])
@pytest.mark.parametrize("value", ["-1", "9" * 30])
def test_numbers_out_of_range_are_one_line(option: str, value: str, files: Files, tmp_path: Path) -> None:
    done = run_here("train.py", files.base, "-o", tmp_path / "out", "--train", files.train, option, value)
    assert done.returncode == 2 and f"{option} must be at least" in done.stderr and done.stderr.count("\n") == 1
