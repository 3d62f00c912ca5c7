"""Training AdapterFusion layers with the trainer, and with scripts/train.py."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

import torchgraft
from test_train_command import QUICKLY, train
from tiny import LABELS, Files, encoded, make_base, make_tokenizer, write_files
from torchgraft import Fuse, HeadConfig, Stack
from torchgraft.training import Trainer, TrainingOptions, encode_examples, read_examples, score
from torchgraft.training.batches import collate
from torchgraft.training.trainer import class_scores

NAMES = ["films", "books"]


def two_adapters() -> torch.jit.ScriptModule:
    """The tiny base with two adapters that change something."""
    torch.manual_seed(2)
    module = make_base()
    for name in NAMES:
        module = torchgraft.graft(module, "seq_bn[reduction_factor=4]", name)
        module = torchgraft.unfreeze_adapter(module, name)
        with torch.no_grad():
            for value in torchgraft.trainable_parameters(module, name).values():
                value.add_(torch.randn_like(value) * 0.2)
        module = torchgraft.freeze_adapter(module, name)
    return module


def fused() -> torch.jit.ScriptModule:
    module = two_adapters()
    torch.manual_seed(3)
    module = torchgraft.add_adapter_fusion(module, NAMES, trainable=True)
    module = torchgraft.compose(module, "fused", Fuse(*NAMES))
    return torchgraft.add_head(module, "fused", HeadConfig(num_labels=len(LABELS), layers=1, pooling="mean"))


def test_a_step_minimises_the_loss_with_the_regularisation() -> None:
    rates = {"fusion": 4e-3, "head": 2e-2}
    options = TrainingOptions(epochs=1, batch_size=24, learning_rate=rates["fusion"], clip=0, schedule="constant",
                              head_learning_rate=rates["head"], warmup=0, seed=5)  # fmt: skip
    module, examples = fused(), encoded(24)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    Trainer(module, "fused", examples, None, len(LABELS), options).run()

    expected = fused()
    expected.activate("fused")
    expected.train()
    parameters = torchgraft.trainable_parameters(expected, "fused")
    groups = [{"params": [value for key, value in parameters.items() if ("heads" in key) == (part == "head")],
               "lr": rate} for part, rate in rates.items()]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, weight_decay=options.weight_decay)
    batch = collate(examples, range(24), slice(None), torch.device("cpu"))
    values = [value for key, value in parameters.items() if key.endswith("value_weight")]
    unit = torch.eye(32)
    regularisation = 0.01 * sum((unit - value).pow(2).sum() for value in values)
    (cross_entropy(class_scores(expected, batch), batch.labels) + regularisation).backward()
    optimizer.step()
    for key, value in torchgraft.trainable_parameters(module, "fused").items():
        assert (value - parameters[key]).abs().max() <= 1e-5, key
    changed = {key for key, value in module.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == set(parameters) and len(values) == 2


def test_the_regularisation_keeps_values_near_the_unit_matrix() -> None:
    """By its gradient alone: the classes tell nothing here."""
    module, examples = fused(), encoded(24)
    parameters = torchgraft.trainable_parameters(module, "fused")
    values = [value for key, value in parameters.items() if key.endswith("value_weight")]
    with torch.no_grad():
        for value in values:
            value.add_(0.5)
    start = torchgraft.fusion_regularization_loss(module, "fused").item()
    options = TrainingOptions(epochs=30, batch_size=24, learning_rate=2e-2, weight_decay=0.0, schedule="constant")
    Trainer(module, "fused", examples, None, len(LABELS), options).run()
    assert torchgraft.fusion_regularization_loss(module, "fused").item() < 0.3 * start


def test_an_adapter_is_trained_on_a_stack() -> None:
    """MAD-X: the language stays, and the task learns above it."""
    module = two_adapters()
    torch.manual_seed(3)
    module = torchgraft.graft(module, "seq_bn[reduction_factor=4]", "task", trainable=True)
    module = torchgraft.add_head(module, "task", HeadConfig(num_labels=len(LABELS), layers=1, pooling="mean"))
    module = torchgraft.compose(module, "stack", Stack(NAMES[0], "task"))
    parameters = torchgraft.trainable_parameters(module, "stack")
    assert list(parameters) == list(torchgraft.trainable_parameters(module, "task"))
    before, examples = {key: value.clone() for key, value in module.state_dict().items()}, encoded(48)
    module.activate("stack")
    start = score(module, examples, len(LABELS))
    options = TrainingOptions(epochs=25, batch_size=8, learning_rate=2e-2)
    Trainer(module, "stack", examples, None, len(LABELS), options).run()
    after = score(module, examples, len(LABELS))
    assert after.loss < 0.7 * start.loss
    module.activate("task")  # without the language below it
    assert score(module, examples, len(LABELS)).loss > after.loss
    changed = {key for key, value in module.state_dict().items() if not torch.equal(value, before[key])}
    assert changed <= set(parameters) and any("down_weight" in key for key in changed)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("files")
    made = write_files(folder)
    two_adapters().save(str(made.base))
    return made


def test_the_command_trains_a_fusion(files: Files, tmp_path: Path) -> None:
    done = train(files.base, "-o", tmp_path / "out", "--train", files.train, "--validation", files.validation,
                 "--fuse", "films,books", "--adapter", "fused", "--save-model", *QUICKLY)  # fmt: skip
    assert done.returncode == 0, done.stderr
    setup = json.loads((tmp_path / "out" / "adapter" / "adapter_setup.json").read_text())
    assert setup["adapter_setup"] == Fuse(*NAMES).to_dict() and setup["head_setup"] == "fused"
    expected = json.loads((tmp_path / "out" / "scores.json").read_text())["scores"]["validation"]
    examples = encode_examples(make_tokenizer(), read_examples(files.validation), LABELS)
    loaded = torchgraft.load_adapter_setup(make_base(), tmp_path / "out" / "adapter", "fused")
    loaded.activate("fused")
    for module in (loaded, torch.jit.load(str(tmp_path / "out" / "model.pt"))):
        scores = score(module, examples, len(LABELS))
        assert scores.accuracy == expected["accuracy"]
        assert scores.loss == pytest.approx(expected["loss"], abs=1e-5)

    # Its adapters are those of the model, and it can be trained further.
    held, base = (
        module.state_dict() for module in (torch.jit.load(str(tmp_path / "out" / "model.pt")), two_adapters())
    )
    assert all(torch.equal(held[key], base[key]) for key in base if key.startswith("adapters.layer_"))
    tokenizer = files.base.parent / "tokenizer.json"
    again = train(tmp_path / "out" / "model.pt", "-o", tmp_path / "more", "--train", files.train, "--tokenizer",
                  tokenizer, "--fuse", "films,books", "--adapter", "fused", *QUICKLY)  # fmt: skip
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fuse", "films,none"], "no adapter is called 'none'"),
        (["--fuse", "films"], "at least two adapters"),
        (["--fuse", "films,books", "--adapter", "films"], "'films' is an adapter, not Fuse"),
        (["--fuse", "films,books", "--start", "here"], "give one"),
    ],
    ids=["unknown", "one", "taken", "start"],
)
def test_what_the_command_refuses(files: Files, tmp_path: Path, arguments: list[str], message: str) -> None:
    named = [] if "--adapter" in arguments else ["--adapter", "fused"]
    done = train(files.base, "-o", tmp_path / "out", "--train", files.train, *arguments, *named, *QUICKLY)
    assert done.returncode in (1, 2) and message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def _another_setup(folder: Path) -> None:
    module = torchgraft.compose(two_adapters(), "stack", Stack(*NAMES))
    torchgraft.save_adapter_setup(module, "stack", folder)


def _another_head(folder: Path) -> None:
    (folder / "fused").mkdir(parents=True)
    (folder / "fused" / "head_config.json").write_text('{"name": "other"}')


def _another_adapter(folder: Path) -> None:
    module = torchgraft.graft(make_base(), "seq_bn", "others")
    torchgraft.save_adapter(module, "others", folder / "films")


@pytest.mark.parametrize(
    "there",
    [
        _another_setup,
        *(pytest.param(each, marks=pytest.mark.slow(seconds=6)) for each in (_another_head, _another_adapter)),
    ],
)
def test_what_it_would_write_over_is_seen_before_training(there, files: Files, tmp_path: Path) -> None:
    out = tmp_path / "out"
    there(out / "adapter")
    before = sorted((path, path.read_bytes()) for path in out.rglob("*") if path.is_file())
    command = [files.base, "-o", out, "--train", files.train, "--fuse", "films,books", "--adapter", "fused", *QUICKLY]
    done = train(*command)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "already" in done.stderr and "give another --output, or --restart to replace it" in done.stderr
    assert sorted((path, path.read_bytes()) for path in out.rglob("*") if path.is_file()) == before  # no checkpoint
    assert train(*command, "--restart").returncode == 0
    assert (out / "checkpoint.pt").exists()


def test_an_adapter_whose_name_is_no_folder_is_seen_before_training(files: Files, tmp_path: Path) -> None:
    module = torchgraft.rename_adapter(torch.jit.load(str(files.base)), "films", "films/new")
    module.save(str(tmp_path / "base.pt"))
    (tmp_path / "tokenizer.json").write_bytes((files.base.parent / "tokenizer.json").read_bytes())
    done = train(tmp_path / "base.pt", "-o", tmp_path / "out", "--train", files.train, "--fuse", "films/new,books",
                 "--adapter", "fused", *QUICKLY)  # fmt: skip
    assert done.returncode == 1 and "'films/new' cannot have a directory of its name; rename it" in done.stderr
    assert not (tmp_path / "out").exists()
