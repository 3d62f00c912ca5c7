"""examples/train_cpp: learns, survives kills and bad input, and what it writes the library scores the same."""

import hashlib
import os
import pty
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

import adapters
import torchgraft
from hosts_support import ROOT, attempt, run

LABELS = ("bad", "good", "so_so")
WORDS = 40  # token ids; of them 1, 2 and 3 tell the class


def make_examples(count: int, seed: int) -> dict[str, torch.Tensor]:
    """Rows of 5 to 9 tokens, up to three of which tell the class."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, WORDS, (count, 9), generator=generator)
    labels = torch.arange(count) % len(LABELS)
    lengths = torch.randint(5, 10, (count,), generator=generator)
    mask = (torch.arange(9) < lengths[:, None]).long()
    for _ in range(3):
        ids[torch.arange(count), (torch.rand(count, generator=generator) * lengths).long()] = labels + 1
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def library_model() -> adapters.BertAdapterModel:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=WORDS, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.2,
        return_dict=False)  # fmt: skip
    plain = transformers.BertModel(config).eval()
    model = adapters.BertAdapterModel(config)
    model.bert.load_state_dict(plain.state_dict(), strict=False)
    model.plain = [plain]  # in a list: not a submodule
    return model.eval()


@pytest.fixture(scope="module")
def library() -> adapters.BertAdapterModel:
    return library_model()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, library) -> Path:
    """base.pt, train.safetensors and validation.safetensors."""
    folder = tmp_path_factory.mktemp("training")
    ids = torch.ones(2, 5, dtype=torch.int64)
    traced = torch.jit.trace(library.plain[0], (ids, torch.ones_like(ids)), check_trace=False, strict=False)
    traced.save(folder / "base.pt")
    save_file(make_examples(240, 0), folder / "train.safetensors")
    save_file(make_examples(60, 1), folder / "validation.safetensors")
    return folder


# UniPELT's methods, small and ungated but for one; dropout, so that the generator matters.
UNION = (
    "prefix_tuning[bottleneck_size=8, prefix_length=4, dropout=0.1]|seq_bn[reduction_factor=4]|"
    "lora[r=4, use_gating=True]"
)


def command(program, folder, output, *options, examples="train.safetensors", config=UNION) -> list[str]:
    fixed = ("-o", output, "--labels", ",".join(LABELS), "--config", config, "--threads", 1, "--learning-rate", 0.01)
    parts = (program, folder / "base.pt", folder / examples, *fixed, *options)
    return [str(part) for part in parts]


def weights(output: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file}/{key}": tensor
        for file in ("adapter.safetensors", "model_head.safetensors")
        for key, tensor in load_file(output / "adapter" / file).items()
    }


def check_equal_weights(found: Path, expected: Path, tolerance: float = 1e-6) -> None:
    found, expected = weights(found), weights(expected)
    assert found.keys() == expected.keys() and len(found) > 10
    for key in found:
        torch.testing.assert_close(found[key], expected[key], rtol=0, atol=tolerance, msg=lambda m, k=key: f"{k}: {m}")


LONG = ("--epochs", 14, "--batch-size", 12, "--accumulate", 2, "--head-dropout", 0.1, "--checkpoint-every", 3)


@pytest.fixture(scope="module")
def trained(train_program, folder, tmp_path_factory) -> Path:
    """The output of a run that nothing interrupted."""
    output = tmp_path_factory.mktemp("trained")
    run(*command(train_program, folder, output, *LONG, "--validation", folder / "validation.safetensors"))
    return output


def test_it_learns_and_the_library_scores_what_it_wrote_the_same(train_program, folder, trained, library) -> None:
    again = run(*command(train_program, folder, trained, *LONG, "--validation", folder / "validation.safetensors"))
    name = library.load_adapter(str(trained / "adapter"), use_safetensors=True, set_active=True)
    library.eval()
    assert library.config.prediction_heads[name]["label2id"] == {label: i for i, label in enumerate(LABELS)}
    data = load_file(folder / "validation.safetensors")
    with torch.no_grad():
        logits = library(data["input_ids"], data["attention_mask"], head=name)[0]
    accuracy = (logits.argmax(1) == data["labels"]).double().mean().item()
    assert accuracy > 0.9

    # What the program computes itself, in one batch as here: its loss of the finished run, on stdout.
    loss = torch.nn.functional.cross_entropy(logits, data["labels"]).item()
    printed = again.stdout.split("loss ")[1].split(",")[0]
    assert float(printed) == pytest.approx(loss, abs=1e-4)
    module = torchgraft.load_adapter(torch.jit.load(folder / "base.pt"), trained / "adapter")
    with torch.no_grad():
        mine = module.forward_with_head(data["input_ids"], data["attention_mask"])
    torch.testing.assert_close(mine, logits, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def accident(tmp_path_factory) -> dict[str, str]:
    """The environment in which a program's fourth rename() kills it: its fourth checkpoint does not get its name."""
    library = tmp_path_factory.mktemp("accident") / "kill_at_rename.so"
    source = ROOT / "tests" / "consumer" / "kill_at_rename.cpp"
    run(os.environ.get("CXX", "c++"), "-shared", "-fPIC", source, "-o", library, "-ldl")
    return os.environ | {"LD_PRELOAD": str(library), "KILL_AT_RENAME": "4"}


def test_killed_three_times_it_ends_with_the_same_weights(train_program, folder, trained, tmp_path, accident) -> None:
    arguments = command(train_program, folder, tmp_path, *LONG, "--validation", folder / "validation.safetensors")
    kept = [tmp_path / f".checkpoint.safetensors.{end}" for end in ("a1B2c3.tmp", "a1B2c3.torchgraft-tmp.old")]
    for path in kept:
        path.write_bytes(b"the user's")
    # Checkpoints: one before the first step, after each third, and after each epoch, which has ten. (Epoch, its step.)
    for place in ((0, 6), (1, 2), (2, 0)):
        killed = subprocess.run(arguments, env=accident, capture_output=True)
        assert killed.returncode == -signal.SIGKILL
        checkpoint = load_file(tmp_path / "checkpoint.safetensors")
        assert tuple(checkpoint["position"][:2].tolist()) == place
        assert len(list(tmp_path.glob(".checkpoint.safetensors.??????.torchgraft-tmp"))) == 1  # of this process only
    resumed = run(*arguments)
    assert "going on in epoch 3, step 1 of 10" in resumed.stderr
    assert not list(tmp_path.glob("*.torchgraft-tmp")) and all(path.read_bytes() == b"the user's" for path in kept)
    check_equal_weights(tmp_path, trained)


@pytest.mark.slow(seconds=60)
def test_killed_at_any_instant_it_ends_with_the_same_weights(train_program, folder, trained, tmp_path) -> None:
    arguments = command(train_program, folder, tmp_path, *LONG, "--validation", folder / "validation.safetensors")
    source, kills = random.Random(0), 0
    while kills < 30:
        try:  # a run that is over in time has ended well, and the next one begins anew
            subprocess.run(arguments, capture_output=True, check=True, timeout=source.uniform(0.3, 3))
            check_equal_weights(tmp_path, trained)
            shutil.rmtree(tmp_path)
        except subprocess.TimeoutExpired:  # run() has killed it
            kills += 1
    run(*arguments)
    assert not list(tmp_path.glob(".*"))
    check_equal_weights(tmp_path, trained)


def test_accumulated_batches_are_one_large_one(train_program, folder, tmp_path) -> None:
    """With gates over real tokens only: rows do not depend on the padding of their batch."""
    options = ("--gate-pooling", "unpadded", "--epochs", 1)
    config = "par_bn[use_gating=True]"
    for output, sizes in (("small", ("--batch-size", 16, "--accumulate", 3)), ("large", ("--batch-size", 48))):
        run(*command(train_program, folder, tmp_path / output, *options, *sizes, config=config))
    check_equal_weights(tmp_path / "small", tmp_path / "large", 1e-5)


def test_it_stops_early_and_keeps_the_best_epoch(train_program, folder, tmp_path) -> None:
    """Labels drawn by chance: the loss on other examples soon rises."""
    data = make_examples(60, 3)
    data["labels"] = data["labels"][torch.randperm(60, generator=torch.Generator().manual_seed(0))]
    save_file(data, tmp_path / "noise.safetensors")
    options = ("--validation-fraction", 0.3, "--epochs", 40, "--patience", 2, "--batch-size", 6)
    stopped = run(*command(train_program, folder, tmp_path, *options, examples=tmp_path / "noise.safetensors"))
    lines = [line for line in stopped.stderr.splitlines() if line.startswith("epoch ")]
    losses = [float(line.split("validation loss ")[1].split()[0]) for line in lines]
    assert "stopped early" in stopped.stderr and len(lines) < 40
    best = min(range(len(losses)), key=losses.__getitem__)
    assert len(lines) == best + 3
    assert float(stopped.stdout.split("loss ")[1].split(",")[0]) == pytest.approx(losses[best], abs=1e-4)


def test_a_grafted_model_and_its_own_adapter_are_trained_further(train_program, folder, trained, tmp_path) -> None:
    grafted = torchgraft.load_adapter(torch.jit.load(folder / "base.pt"), trained / "adapter", "task", trainable=True)
    grafted = torchgraft.graft(grafted, config="lora", name="other")
    grafted.save(tmp_path / "base.pt")
    arguments = command(train_program, tmp_path, tmp_path / "out", "--epochs", 1, examples=folder / "train.safetensors")
    arguments[arguments.index("--learning-rate") + 1] = "0"
    run(*arguments)
    check_equal_weights(tmp_path / "out", trained)  # a rate of 0 changes nothing
    arguments[arguments.index("--labels") + 1] = "good,bad,so_so"
    arguments[arguments.index("-o") + 1] = str(tmp_path / "other")
    refused = attempt(*arguments)
    assert refused.returncode == 1
    assert refused.stderr == "train_cpp: the head of 'task' has the label bad where --labels has good\n"


def on_terminal(arguments: list[str]) -> str:
    """What a program writes to stderr when that is a terminal."""
    terminal, end = pty.openpty()
    program = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=end)
    os.close(end)
    written = b""
    while True:
        try:
            written += os.read(terminal, 4096)
        except OSError:  # what Linux says when the other end is closed
            break
    os.close(terminal)
    assert program.wait() == 0
    return written.decode()


def test_a_terminal_gets_a_bar_and_a_file_lines(train_program, folder, tmp_path) -> None:
    options = ("--epochs", 4, "--batch-size", 4)
    shown = on_terminal(command(train_program, folder, tmp_path / "terminal", *options))
    assert "\r\x1b[K[" in shown and "#" in shown and "ETA " in shown and "loss " in shown
    plain = run(*command(train_program, folder, tmp_path / "file", *options)).stderr
    assert "\r" not in plain and "epoch 4/4  loss " in plain


def changed(**tensors) -> dict[str, torch.Tensor]:
    data = {**make_examples(24, 0), **tensors}
    return {key: value for key, value in data.items() if value is not None}


def label_of(row: int, label: int) -> torch.Tensor:
    labels = make_examples(24, 0)["labels"]
    labels[row] = label
    return labels


EMPTY = {key: value[:0] for key, value in make_examples(3, 0).items()}


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (changed(labels=label_of(17, 3)), (), "row 17: label 3 is out of range for 3 classes (0 to 2)"),
        (changed(labels=label_of(5, -1)), (), "row 5: label -1 is out of range"),
        (changed(labels=torch.arange(24) % 2), (), "none of the 24 training examples has the label so_so"),
        (EMPTY, (), "holds no examples"),
        (b"", (), "not a safetensors file"),
        (None, (), "cannot read"),
        (changed(labels=None), (), "no tensor 'labels'"),
        (changed(labels=torch.zeros(24)), (), "'labels': expected int64, got float"),
        (
            changed(labels=torch.zeros(23).long()),
            (),
            "'labels': expected one for each row of input_ids, [24], got [23]",
        ),
        (changed(input_ids=torch.zeros(24).long()), (), "'input_ids': expected shape [n, S], got [24]"),
        (changed(attention_mask=torch.ones(24, 8).long()), (), "'attention_mask': expected the shape of input_ids"),
        (changed(attention_mask=torch.zeros(24, 9).long()), (), "row 0: attention_mask says that it has no tokens"),
        (changed(input_ids=torch.full((24, 9), WORDS)), (), "index out of range"),
        (changed(), ("--validation-fraction", 0.01), "leaves one side of the split empty"),
        (changed(), ("--patience", 1), "--patience"),
        (changed(), ("--nosuch", 1), "(train_cpp --help)"),
        (changed(), ("--head-dropout", 1.5), "--head-dropout: expected a number from 0 to 0.99, got 1.5 ("),
        (changed(), ("--seed", -1), "--seed: expected an integer from 0, got -1 ("),
        (changed(), ("--adapter", "not.a.name"), "not.a.name"),
    ],
)
def test_errors_are_one_line(train_program, folder, tmp_path, data, options, message) -> None:
    examples = tmp_path / "examples.safetensors"
    if isinstance(data, bytes):
        examples.write_bytes(data)
    elif data is not None:
        save_file(data, examples)
    failed = attempt(*command(train_program, folder, tmp_path / "out", *options, examples=examples))
    assert failed.returncode == (2 if "(train_cpp --help)" in failed.stderr else 1), failed.stderr
    assert failed.stderr.startswith("train_cpp: ") and failed.stderr.count("\n") == 1
    assert message in failed.stderr
    assert not (tmp_path / "out" / "adapter").exists()


def check_that_nothing_was_learnt(output: Path) -> None:
    kept = load_file(output / "checkpoint.safetensors")
    assert kept["position"][:2].tolist() == [0, 0]
    assert all(tensor.abs().max() < 100 for key, tensor in kept.items() if key.startswith("parameters/"))
    assert not (output / "adapter").exists()


def test_a_loss_that_is_not_finite_ends_the_run_before_its_step(train_program, folder, tmp_path) -> None:
    arguments = command(train_program, folder, tmp_path, "--epochs", 9, "--checkpoint-every", 1, "--warmup", 0.5)
    arguments[arguments.index("--learning-rate") + 1] = "1e30"
    failed = attempt(*arguments)
    assert failed.returncode == 1
    assert re.search("in epoch 1, step 1 of 8: after the step the loss on its own examples is -?nan;", failed.stderr)
    assert "try a lower --learning-rate" in failed.stderr
    check_that_nothing_was_learnt(tmp_path)


@pytest.mark.parametrize("validation", [(), ("--validation-fraction", 0.2)])
def test_weights_after_a_last_step_that_was_too_large_are_not_written(
    train_program, folder, tmp_path, validation
) -> None:
    """Nothing but a forward pass after it sees what the only step has done."""
    arguments = command(train_program, folder, tmp_path, "--epochs", 1, "--batch-size", 240, *validation)
    arguments[arguments.index("--learning-rate") + 1] = "1e30"
    failed = attempt(*arguments)
    assert failed.returncode == 1
    assert re.search("in epoch 1, step 1 of 1: after the step the loss on its own examples is -?nan;", failed.stderr)
    check_that_nothing_was_learnt(tmp_path)


def test_a_full_disk_leaves_the_last_checkpoint(train_program, folder, trained, tmp_path) -> None:
    """The system lets no file grow beyond the limit: write() fails as it does on a full disk."""
    # The first checkpoint has no moments yet, the next ones are nearly three times as large.
    arguments = command(train_program, folder, tmp_path, "--epochs", 2, "--checkpoint-every", 1)
    parameters = sum(tensor.nbytes for tensor in weights(trained).values())
    size = 2 * parameters
    failed = attempt(*arguments, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))
    assert failed.returncode == 1
    assert "checkpoint.safetensors: cannot write (File too large)" in failed.stderr
    assert load_file(tmp_path / "checkpoint.safetensors")["position"].tolist()[:2] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.safetensors"]
    run(*arguments)  # there is room again: it goes on from there


def test_a_checkpoint_of_another_run_or_damaged_is_refused(train_program, folder, trained, tmp_path) -> None:
    output = tmp_path / "out"
    run(*command(train_program, folder, output, "--epochs", 1))
    other = command(train_program, folder, output, "--epochs", 2)
    half = output / ".checkpoint.safetensors.a1B2c3.torchgraft-tmp"  # of a process that may go on with those settings
    half.write_bytes(b"half")
    failed = attempt(*other)
    assert failed.returncode == 1 and "is of a run with --epochs 1, now it is 2" in failed.stderr
    assert half.exists()
    checkpoint = output / "checkpoint.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    failed = attempt(*command(train_program, folder, output, "--epochs", 1))
    assert failed.returncode == 1 and "checkpoint.safetensors" in failed.stderr
    run(*other, "--restart")


def digest(path: Path) -> str:
    """SHA-1 of each MiB behind the digest of what came before."""
    content, found = path.read_bytes(), ""
    for begin in range(0, len(content), 1 << 20):
        found = hashlib.sha1(found.encode() + content[begin : begin + (1 << 20)]).hexdigest()
    return found


def test_a_checkpoint_knows_its_files_by_their_content(train_program, folder, trained) -> None:
    """By a digest that is not the standard library's: that differs between builds of the program."""
    settings = bytes(load_file(trained / "checkpoint.safetensors")["settings"].tolist()).decode().splitlines()
    assert f"model={digest(folder / 'base.pt')}" in settings
    assert f"examples={digest(folder / 'train.safetensors')}" in settings


def test_tokenise_makes_what_the_program_reads(train_program, folder, tmp_path) -> None:
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "awful", "great", "usual", "[UNK]", "film"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    table = tmp_path / "table.csv"
    table.write_text('text,label\n"awful, awful film",bad\ngreat film,good\nusual,so_so\n')
    script = ROOT / "examples" / "train_cpp" / "tokenise.py"
    arguments = (
        sys.executable,
        script,
        table,
        "--tokenizer",
        tmp_path / "tokenizer.json",
        "--labels",
        ",".join(LABELS),
    )
    run(*arguments, "-o", tmp_path / "made.safetensors")
    data = load_file(tmp_path / "made.safetensors")
    assert data["input_ids"].tolist() == [[1, 4, 1, 5], [2, 5, 0, 0], [3, 0, 0, 0]]
    assert data["attention_mask"].sum(1).tolist() == [4, 2, 1] and data["labels"].tolist() == [0, 1, 2]
    run(*command(train_program, folder, tmp_path / "out", "--epochs", 1, examples=tmp_path / "made.safetensors"))

    for tokenizer_file, content in ((tmp_path / "none.json", None), (tmp_path / "broken.json", "{")):
        if content:
            tokenizer_file.write_text(content)
        failed = attempt(*arguments, "--tokenizer", tokenizer_file, "-o", tmp_path / "made.safetensors")
        assert failed.returncode == 1 and failed.stderr.count("\n") == 1
        assert failed.stderr.startswith(f"tokenise.py: {tokenizer_file}: not a tokenizer.json (")

    table.write_text("text,label\ngreat film,fine\n")
    failed = attempt(*arguments, "-o", tmp_path / "made.safetensors")
    assert failed.returncode == 1 and "line 2: label 'fine' is none of bad, good, so_so" in failed.stderr
    assert load_file(tmp_path / "made.safetensors")["labels"].tolist() == [0, 1, 2]  # as it was
