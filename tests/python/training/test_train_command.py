"""scripts/train.py: what it writes, that it survives being killed, several processes, and what bad input is told."""

import argparse
import json
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn.functional import cross_entropy

import adapters
import torchgraft
from tiny import LABELS, Files, encoded, make_bert, make_examples, make_tokenizer, write_csv, write_files
from torchgraft.training import _command, encode_examples, read_examples, score
from torchgraft.training._command import Data
from torchgraft.training.batches import collate

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "scripts" / "train.py"
QUICKLY = ["--epochs", "2", "--batch-size", "8", "--learning-rate", "0.003", "--checkpoint-every", "2"]


def execute(*command: object, **environment: str) -> subprocess.CompletedProcess:
    variables = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300, env=variables)


def train(*arguments: object) -> subprocess.CompletedProcess:
    return execute(sys.executable, SCRIPT, *arguments)


def weights_in(output: Path) -> dict[str, torch.Tensor]:
    """Of the adapter and of its head."""
    files = sorted((output / "adapter").glob("*.safetensors"))
    assert len(files) == 2
    return {f"{path.name} {key}": value for path in files for key, value in load_file(path).items()}


def largest_difference(one: Path, other: Path) -> float:
    first, second = weights_in(one), weights_in(other)
    assert first.keys() == second.keys()
    return max((first[key] - second[key]).abs().max().item() for key in first)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return write_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def whole(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run that nothing disturbed."""
    output = tmp_path_factory.mktemp("whole") / "out"
    done = train(files.base, "-o", output, "--train", files.train, "--validation", files.validation, "--test",
                 files.validation, "--save-model", *QUICKLY)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "epoch 2: loss" in done.stderr and "test: accuracy" in done.stdout
    return output


def test_what_is_written(whole: Path, files: Files) -> None:
    written = sorted(path.name for path in whole.iterdir())
    assert written == ["adapter", "checkpoint.pt", "logs", "model.pt", "scores.json"]
    report = json.loads((whole / "scores.json").read_text())
    assert report["labels"] == LABELS and report["steps"] == 14
    assert [record["step"] for record in report["history"]] == [7, 14]
    assert report["scores"]["validation"] == report["scores"]["test"]


def test_the_adapter_scores_the_same_on_the_base(whole: Path, files: Files) -> None:
    """The adapter's directory, and the whole model, hold what was scored."""
    examples = encode_examples(make_tokenizer(), read_examples(files.validation), LABELS)
    expected = json.loads((whole / "scores.json").read_text())["scores"]["validation"]
    loaded = torchgraft.load_adapter(torch.jit.load(str(files.base)), whole / "adapter")
    for module in (loaded, torch.jit.load(str(whole / "model.pt"))):
        scores = score(module, examples, len(LABELS))
        assert (scores.accuracy, scores.macro_f1) == (expected["accuracy"], expected["macro_f1"])
        assert scores.loss == pytest.approx(expected["loss"], abs=1e-5)


def test_the_library_loads_the_adapter_and_scores_the_same(files: Files, tmp_path: Path) -> None:
    """With its head: the library's pools by the first token."""
    done = train(files.base, "-o", tmp_path, "--train", files.train, "--validation", files.validation, "--pooling",
                 "first", "--head-layers", 2, "--model-class", "BertAdapterModel", *QUICKLY)  # fmt: skip
    assert done.returncode == 0, done.stderr
    expected = json.loads((tmp_path / "scores.json").read_text())["scores"]["validation"]
    bert = make_bert()
    library = adapters.BertAdapterModel(bert.config)
    library.bert.load_state_dict(bert.state_dict(), strict=False)
    library.set_active_adapters(library.load_adapter(str(tmp_path / "adapter"), use_safetensors=True))
    examples = encode_examples(make_tokenizer(), read_examples(files.validation), LABELS)
    batch = collate(examples, range(len(examples)), slice(None), torch.device("cpu"))
    with torch.no_grad():
        logits = library.eval()(batch.values["ids"], batch.values["mask"]).logits
    assert cross_entropy(logits, batch.labels).item() == pytest.approx(expected["loss"], abs=1e-5)
    assert (logits.argmax(-1) == batch.labels).double().mean().item() == pytest.approx(expected["accuracy"])


def test_the_logs_hold_every_step(whole: Path) -> None:
    events = EventAccumulator(str(whole / "logs"))
    events.Reload()
    expected = {"train/loss", "train/learning_rate", "train/gradient_norm", "validation/accuracy"}
    assert expected <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 15))
    report = json.loads((whole / "scores.json").read_text())
    assert [event.value for event in events.Scalars("validation/loss")] == pytest.approx(
        [record["validation_loss"] for record in report["history"]]
    )


# When something happens, counted in steps or in files that are written, what, and the exit status.
KILL = "os.kill(os.getpid(), signal.SIGKILL)"
ACCIDENTS = {
    "killed while a checkpoint is written": ("files.TemporaryFile.keep", 3, KILL, -9),
    "killed when a checkpoint has just its name": ("files.TemporaryFile.keep", 4, f"original(*arguments); {KILL}", -9),
    "killed between two checkpoints": ("torch.optim.AdamW.step", 10, KILL, -9),
    "disk full": ("files.TemporaryFile.write", 5, "resource.setrlimit(resource.RLIMIT_FSIZE, (99, 99))", 1),
    "terminated": ("torch.optim.AdamW.step", 6, "os.kill(os.getpid(), signal.SIGTERM)", 143),
}
OFTEN = ("killed while a checkpoint is written", "disk full")
RARELY = sorted({*ACCIDENTS} - {*OFTEN})


@pytest.mark.parametrize("case", [*OFTEN, *(pytest.param(each, marks=pytest.mark.slow(seconds=6)) for each in RARELY)])
def test_after_an_accident_resume_gives_the_same_weights(case: str, files: Files, whole: Path, tmp_path: Path) -> None:
    function, count, accident, status = ACCIDENTS[case]
    output = tmp_path / "out"
    arguments = [
        str(part)
        for part in (files.base, "-o", output, "--train", files.train, "--validation", files.validation, *QUICKLY)
    ]
    place, name = function.rsplit(".", 1)
    program = f"""
import os, resource, runpy, signal, sys
import torch
sys.path.insert(0, {str(ROOT / "python")!r})
from torchgraft._libraries import patcher

files = patcher()
calls, original = [], {function}

def replacement(*arguments, **options):
    calls.append(None)
    if len(calls) == {count}:
        {accident}
    return original(*arguments, **options)

{place}.{name} = replacement
sys.argv = {[str(SCRIPT), *arguments]!r}
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""
    done = execute(sys.executable, "-c", program)
    assert done.returncode == status, done.stderr
    if case == "disk full":
        assert "checkpoint.pt: cannot write (File too large)" in done.stderr
    assert not (output / "adapter").exists()
    done = train(*arguments, "--resume")
    assert done.returncode == 0, done.stderr
    assert largest_difference(output, whole) <= 1e-6
    assert not list(output.glob(".*.torchgraft-tmp"))


def test_ctrl_c_while_torch_is_loaded_is_one_line(files: Files, tmp_path: Path) -> None:
    arguments = [str(part) for part in (SCRIPT, files.base, "-o", tmp_path / "out", "--train", files.train)]
    program = f"""
import os, runpy, signal, sys

class Interrupts:
    def find_spec(self, name, *others):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupts())
sys.argv = {arguments!r}
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""
    done = execute(sys.executable, "-c", program)
    assert done.returncode == 130 and done.stderr.startswith("train: error: interrupted"), done.stderr
    assert done.stderr.count("\n") == 1


def test_two_processes_end_with_the_weights_of_one(files: Files, tmp_path: Path) -> None:
    """50 examples in batches of 7: parts of 4 and 3, and of 1 and none. Without dropout, which each process draws."""
    for processes in (1, 2):
        done = execute(
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", processes, "--standalone",
            "--local-addr", "127.0.0.1", SCRIPT, files.base, "-o", tmp_path / str(processes), "--train", files.train,
            "--validation", files.validation, *QUICKLY, "--batch-size", 7, "--accumulate", 2, "--head-dropout", 0,
            GLOO_SOCKET_IFNAME="lo",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("validation: accuracy") == 1
    assert largest_difference(tmp_path / "1", tmp_path / "2") <= 1e-5
    scores = [json.loads((tmp_path / count / "scores.json").read_text())["scores"]["validation"] for count in "12"]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)


# Arguments after the model, what is said. {f}: the folder of the files. First what is known before anything is loaded
# (status 2), then what the files hold (status 1).
_TRAIN = ["--train", "{f}/train.csv", "-o", "{f}/out"]
WRONG = {
    "no output": (["--train", "{f}/train.csv"], "-o/--output"),
    "no data": (["-o", "{f}/out"], "--train"),
    "two validations": ([*_TRAIN, "--validation", "x.csv", "--validation-fraction", "0.1"], "not both"),
    "patience for nothing": ([*_TRAIN, "--patience", "2"], "--patience needs --validation"),
    "a fraction of 1": ([*_TRAIN, "--validation-fraction", "1"], "at least 0 and below 1"),
    "resume and restart": ([*_TRAIN, "--resume", "--restart"], "not allowed with"),
}
FAILING = {
    "no file": (["--train", "{f}/none.csv", "-o", "{f}/out"], "none.csv: cannot read"),
    "an empty file": (["--train", "{f}/empty.csv", "-o", "{f}/out"], "empty.csv: holds no examples"),
    "an unknown label": ([*_TRAIN, "--labels", "bad,good"], "train.csv, line 4: label 'so_so' is unknown"),
    "a label out of range": (
        ["--train", "{f}/numbers.csv", "--labels", "a,b", "-o", "{f}/out"],
        "numbers.csv, line 3: label 2 is out of range for 2 classes",
    ),
    "an unknown label in the validation file": (
        [*_TRAIN, "--validation", "{f}/numbers.csv"],
        "numbers.csv, line 3: label 3 is out of range",
    ),
    "a class without examples": (
        [*_TRAIN, "--labels", "bad,good,so_so,fine"],
        "no training example has the label fine",
    ),
    "one class only": (["--train", "{f}/one.csv", "-o", "{f}/out"], "at least two different classes, got bad"),
    "no tokenizer": ([*_TRAIN, "--tokenizer", "{f}/none.json"], "none.json: no such file"),
    "an unknown configuration": ([*_TRAIN, "--config", "unipel"], "no configuration is called 'unipel'"),
    "a batch of none": ([*_TRAIN, "--batch-size", "0"], "expected batch_size >= 1, got 0"),
    "an unknown device": ([*_TRAIN, "--device", "abacus"], "device 'abacus'"),
}


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[object]], int]:
    """The script in this process, where torch is loaded already: arguments in, exit status out."""
    module = runpy.run_path(str(SCRIPT))
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)

    def call(arguments: list[object]) -> int:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            module["main"]()
        return ended.value.code

    return call


def test_other_validation_examples_are_another_run(
    whole: Path, files: Files, tmp_path: Path, main: Callable, capsys: pytest.CaptureFixture
) -> None:
    other = write_csv(tmp_path / "other.csv", make_examples(21, 2))
    assert main([files.base, "-o", whole, "--train", files.train, "--validation", other, *QUICKLY, "--resume"]) == 1
    assert "checkpoint.pt: the checkpoint is of another run: validation examples was" in capsys.readouterr().err


def test_a_run_of_all_tokens_goes_on_however_that_is_said(
    whole: Path, files: Files, tmp_path: Path, main: Callable, capsys: pytest.CaptureFixture
) -> None:
    """Checkpoints hold the pooling that the adapter has, as those of before the default was None do."""
    arguments = [files.base, "-o", whole, "--train", files.train, "--validation", files.validation, "--test",
                 files.validation, "--save-model", *QUICKLY]  # fmt: skip
    checkpoint = torch.load(whole / "checkpoint.pt", weights_only=True)
    assert checkpoint["settings"]["gate_pooling"] == "all"
    for wanted in ([], ["--gate-pooling", "all"]):
        again = parsed(*arguments, "--resume", *wanted)
        again.library, again.quiet, again.verbose = [], True, False
        _command.run(again)
    code = main([*arguments, "--resume", "--gate-pooling", "unpadded"])
    assert code == 1 and "gate_pooling was all, is unpadded" in capsys.readouterr().err


def test_a_pooling_for_no_gates_is_refused(
    files: Files, tmp_path: Path, main: Callable, capsys: pytest.CaptureFixture
) -> None:
    arguments = [files.base, "-o", tmp_path / "out", "--train", files.train, "--config", "lora", *QUICKLY]
    assert main([*arguments, "--gate-pooling", "unpadded"]) == 1
    assert "'task' has no gates, over whose tokens --gate-pooling could decide" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_train_has_what_every_command_has(
    files: Files, tmp_path: Path, main: Callable, capsys: pytest.CaptureFixture
) -> None:
    arguments = [files.base, "-o", tmp_path / "out", "--train", files.train, *QUICKLY]
    assert main([*arguments, "--quiet", "--library", tmp_path / "none.so"]) == 1
    assert "none.so: no such file" in capsys.readouterr().err


def parsed(*arguments: object) -> argparse.Namespace:
    return runpy.run_path(str(SCRIPT))["make_parser"]().parse_args([str(part) for part in arguments])


@pytest.mark.quick
@pytest.mark.parametrize("validation", [("--validation", "x.csv"), ("--validation-fraction", "0.1")])
def test_patience_goes_with_either_kind_of_validation(validation: tuple[str, str]) -> None:
    script = runpy.run_path(str(SCRIPT))
    parser = script["make_parser"]()
    arguments = parser.parse_args(["base.pt", "-o", "out", "--train", "x.csv", "--patience", "2", *validation])
    script["check"](parser, arguments)


def test_a_run_is_known_by_the_content_of_its_files(tmp_path: Path) -> None:
    model, config, start = (tmp_path / name for name in ("base.pt", "config.json", "start"))
    start.mkdir()
    content = {model: b"model", config: b"{}", start / "adapter.safetensors": b"1"}
    for path, written in content.items():
        path.write_bytes(written)
    arguments = parsed(model, "-o", tmp_path, "--train", "train.csv", "--config", config, "--start", start)
    data = Data(LABELS, encoded(9), encoded(6, 1), None)

    def changed(data: Data = data) -> set[str]:
        now = _command._identity(arguments, data, "all")
        return {key for key in before | now if before.get(key) != now.get(key)}

    before = _command._identity(arguments, data, "all")
    for path, key in ((model, "model"), (config, "config"), (start / "adapter.safetensors", "start")):
        path.write_bytes(b"other")
        assert changed() == {key}
        path.write_bytes(content[path])
    assert changed() == set()
    types = replace(data.training, type_ids=[[1] * length for length in data.training.lengths()])
    labels = replace(data.validation, labels=data.validation.labels.flip(0))
    assert changed(replace(data, training=types)) == {"training examples"}
    for validation in (labels, None):
        assert changed(replace(data, validation=validation)) == {"validation examples"}


@pytest.fixture(params=["--start", "in the model"])
def trained_before(request: pytest.FixtureRequest, whole: Path, files: Files, tmp_path: Path) -> list[object]:
    """Arguments to go on with the adapter, and its head, of another run."""
    if request.param == "--start":
        return [files.base, "-o", tmp_path / "out", "--train", files.train, "--start", whole / "adapter"]
    module = torchgraft.load_adapter(torch.jit.load(str(files.base)), whole / "adapter", "task")
    module.save(str(tmp_path / "grafted.pt"))
    (tmp_path / "tokenizer.json").write_bytes((files.base.parent / "tokenizer.json").read_bytes())
    return [tmp_path / "grafted.pt", "-o", tmp_path / "out", "--train", files.train]


def test_a_head_that_was_trained_is_kept(trained_before: list[object], whole: Path, files: Files) -> None:
    examples = encode_examples(make_tokenizer(), read_examples(files.validation), LABELS)
    expected = json.loads((whole / "scores.json").read_text())["scores"]["validation"]["loss"]
    base = torch.jit.load(str(trained_before[0]))
    kept = _command._trainable(base, parsed(*trained_before), LABELS)
    assert score(kept, examples, len(LABELS)).loss == pytest.approx(expected, abs=1e-5)
    assert any(value.requires_grad for key, value in kept.named_parameters() if "head" in key)
    fresh = _command._trainable(base, parsed(*trained_before, "--new-head"), LABELS)
    assert score(fresh, examples, len(LABELS)).loss != pytest.approx(expected, abs=1e-4)


def test_a_head_with_other_labels_is_not_trained_further(
    trained_before: list[object], main: Callable, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    assert main([*trained_before, "--labels", "good,bad,so_so"]) == 1
    assert (
        "'task' has a head for classification of bad, good, so_so; the classes here are good, bad, so_so. Give "
        "those in --labels, or --new-head for a fresh one"
    ) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.quick
@pytest.mark.parametrize("case", [*WRONG, *FAILING])
def test_bad_input_is_one_line(case: str, files: Files, main: Callable, capsys: pytest.CaptureFixture) -> None:
    folder = files.base.parent
    write_csv(folder / "one.csv", [one for one in make_examples(9) if one.label == "bad"])
    (folder / "empty.csv").write_text("")
    (folder / "numbers.csv").write_text(
        "text,label\na film,0\nthe film,2\n" if "validation" not in case else "text,label\na film,0\nthe film,3\n"
    )
    arguments, message = (WRONG | FAILING)[case]
    status = main([files.base, *(argument.format(f=folder) for argument in arguments)])
    told = capsys.readouterr().err
    assert status == (2 if case in WRONG else 1), told
    assert told.startswith("train: error: ") and told.count("\n") == 1
    assert message in told
    assert not (folder / "out").exists()


def test_a_checkpoint_is_not_overwritten_unasked(
    whole: Path, files: Files, main: Callable, capsys: pytest.CaptureFixture
) -> None:
    before = (whole / "checkpoint.pt").read_bytes()
    assert main([files.base, "-o", whole, "--train", files.train, *QUICKLY]) == 1
    assert "give --resume to go on, --restart to start anew" in capsys.readouterr().err
    assert (whole / "checkpoint.pt").read_bytes() == before


def test_an_adapter_is_trained_further_with_the_gates_that_it_has(whole: Path, files: Files, tmp_path: Path) -> None:
    done = train(files.base, "-o", tmp_path / "out", "--train", files.train, "--start", whole / "adapter",
                 "--gate-pooling", "unpadded", *QUICKLY)  # fmt: skip
    assert done.returncode == 1 and "the gates of 'task' are means over all tokens; leave --gate-pooling" in done.stderr
