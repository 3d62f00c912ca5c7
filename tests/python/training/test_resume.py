"""train --resume: a run goes on with the options that its checkpoint keeps; what is given besides must be the same."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

import torchgraft
from scripts_here import run_here
from test_train_command import largest_difference
from tiny import Files, make_examples, write_csv, write_files

WORDS = ["--config", "lora[r=2]", "--adapter", "mine", "--epochs", "2", "--batch-size", "8", "--learning-rate", "0.003",
         "--checkpoint-every", "2", "--max-length", "16", "--no-tensorboard", "--quiet"]  # fmt: skip
PATHS = ["base.pt", "--train", "train.csv", "--validation", "validation.csv"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return write_files(tmp_path_factory.mktemp("files"))


@contextlib.contextmanager
def _stopped_at(step: int) -> Iterator[None]:
    calls, original = [], torch.optim.AdamW.step

    def replacement(*arguments: object, **options: object) -> object:
        calls.append(None)
        if len(calls) == step:
            raise torchgraft.GraftError("stopped")
        return original(*arguments, **options)

    with mock.patch("torch.optim.AdamW.step", replacement):
        yield


@pytest.fixture
def stopped(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The output of a run that was stopped in its second epoch, and called with relative paths in another folder."""
    output = tmp_path / "out"
    monkeypatch.chdir(files.base.parent)
    with _stopped_at(10):
        done = run_here("train.py", *PATHS, "-o", output, *WORDS)
    assert (done.returncode, done.stderr) == (1, "train: error: stopped\n")
    monkeypatch.chdir(tmp_path)
    return output


def test_a_run_goes_on_with_the_options_of_its_checkpoint(
    stopped: Path, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = run_here("train.py", "-o", stopped, "--resume")
    assert done.returncode == 0, done.stderr
    assert f"checkpoint.pt: goes on with {files.base} and the options of its run" in done.stdout
    assert not (stopped / "logs").exists()
    monkeypatch.chdir(files.base.parent)
    assert run_here("train.py", *PATHS, "-o", tmp_path / "whole", *WORDS).returncode == 0
    assert largest_difference(stopped, tmp_path / "whole") == 0


def test_what_is_given_alike_or_changes_no_weight_is_fine(stopped: Path, files: Files, tmp_path: Path) -> None:
    (tmp_path / "moved.pt").write_bytes(files.base.read_bytes())
    (tmp_path / "tokenizer.json").write_bytes((files.base.parent / "tokenizer.json").read_bytes())
    done = run_here("train.py", "moved.pt", "-o", stopped, "--resume", "--epochs", 2, "--checkpoint-every", 5, "--test",
                    files.validation)  # fmt: skip
    assert done.returncode == 0 and "test: accuracy" in done.stdout, done.stderr
    kept = torch.load(stopped / "checkpoint.pt", weights_only=True)["arguments"]
    assert kept["model"] == str(tmp_path / "moved.pt") and kept["test"] == str(files.validation)
    assert kept["train"] == str(files.train) and kept["epochs"] == 2 and kept["checkpoint_every"] == 5


OTHERWISE = {
    "a number": (["--epochs", 3], "had --epochs 2, and the command line gives --epochs 3"),
    "two": (["--epochs", 3, "--seed", 1], "--epochs 2, --seed 0, and the command line gives --epochs 3, --seed 1"),
    "a default": (["--max-length", 128], "had --max-length 16, and the command line gives --max-length 128"),
    "a flag": (["--new-head"], "had no --new-head, and the command line gives --new-head"),
    "a name": (["--adapter", "other"], "had --adapter mine, and the command line gives --adapter other"),
    "a file for none": (["--start", "x"], "had no --start, and the command line gives --start x"),
    "a share beside a file": (["--validation-fraction", 0.2], "gives --validation-fraction 0.2"),
    "other examples": (["--train", "other.csv"], "training examples was"),
    "another configuration": (["--config", "lora"], "config was lora[r=2], is lora"),
    "other labels": (["--labels", "good,bad,so_so"], "classes was bad, good, so_so, is good, bad, so_so"),
}


@pytest.mark.parametrize("case", OTHERWISE)
def test_what_is_given_otherwise_is_refused(case: str, stopped: Path, tmp_path: Path) -> None:
    write_csv(tmp_path / "other.csv", make_examples(50, 3))
    before = (stopped / "checkpoint.pt").read_bytes()
    words, message = OTHERWISE[case]
    done = run_here("train.py", "-o", stopped, "--resume", *words)
    assert done.returncode == 1 and message in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and (stopped / "checkpoint.pt").read_bytes() == before


def test_a_configuration_may_be_spelled_otherwise(stopped: Path) -> None:
    done = run_here("train.py", "-o", stopped, "--resume", "--config", "LoRA[r=2]")
    assert done.returncode == 0, done.stderr


def test_a_checkpoint_of_before_says_what_to_give(stopped: Path, files: Files, tmp_path: Path) -> None:
    content = torch.load(stopped / "checkpoint.pt", weights_only=True)
    del content["arguments"]
    torch.save(content, stopped / "checkpoint.pt")
    done = run_here("train.py", "-o", stopped, "--resume")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert (
        "give them again: BASE.pt, --train FILE, --adapter mine, --config lora[r=2], --epochs 2, --batch-size 8, "
        "--learning-rate 0.003, --validation or --validation-fraction, and how texts and classes were read"
    ) in done.stderr
    given = [files.base, "--train", files.train, "--validation", files.validation, *WORDS]
    assert run_here("train.py", "-o", stopped, "--resume", *given, "--epochs", 3).returncode == 1
    done = run_here("train.py", "-o", stopped, "--resume", *given)
    assert done.returncode == 0, done.stderr
    assert torch.load(stopped / "checkpoint.pt", weights_only=True)["arguments"]["adapter"] == "mine"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": "two"}, "not a checkpoint: its option epochs is two"),
        ({"schedule": "steep"}, "not a checkpoint: its option schedule is steep"),
        ({"model": None}, "not a checkpoint: its option model is None"),
        ({"library": "harm.so"}, "those of another version of torchgraft"),
    ],
)
def test_a_stranger_s_options_are_checked(change: dict[str, object], message: str, stopped: Path) -> None:
    content = torch.load(stopped / "checkpoint.pt", weights_only=True)
    content["arguments"] |= change
    torch.save(content, stopped / "checkpoint.pt")
    done = run_here("train.py", "-o", stopped, "--resume")
    assert done.returncode == 1 and message in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.quick
def test_without_a_checkpoint_a_run_needs_its_files(tmp_path: Path) -> None:
    done = run_here("train.py", "-o", tmp_path / "none", "--resume")
    assert done.returncode == 2
    assert "checkpoint.pt is not there to go on from, and the following arguments are required: BASE.pt" in done.stderr
    assert not (tmp_path / "none").exists()
