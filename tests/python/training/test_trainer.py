"""A training run: what it computes, how it ends, and that it can be stopped anywhere and gone on with."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from tiny import LABELS, encoded, make_base, make_model
from torchgraft import GraftError, HeadConfig, add_head, graft, trainable_parameters
from torchgraft.training import EncodedExamples, Listener, Trainer, TrainingOptions, score
from torchgraft.training import trainer as trainer_module
from torchgraft.training.batches import collate, training_batches
from torchgraft.training.checkpoint import load_checkpoint
from torchgraft.training.metrics import Scores
from torchgraft.training.trainer import class_scores

UNKNOWN = 1  # the tokenizer's [UNK]
CPU = torch.device("cpu")
OPTIONS = TrainingOptions(epochs=2, batch_size=8, learning_rate=3e-3, seed=5, checkpoint_every=2)


class InterruptionError(Exception):
    """Stands for whatever ends a process between two steps."""


class Recorder(Listener):
    """Keeps what it is told, and interrupts after `stop` steps."""

    def __init__(self, stop: int = 0):
        self.stop, self.steps, self.epochs, self.ends = stop, [], [], 0

    def stepped(self, step: int, loss: float, learning_rate: float, gradient_norm: float) -> None:
        self.steps.append((step, loss, learning_rate, gradient_norm))
        if step == self.stop:
            raise InterruptionError

    def epoch_ended(self, record: dict[str, Any]) -> None:
        self.epochs.append(record)

    def ended(self) -> None:
        self.ends += 1


def weights_of(module: torch.jit.ScriptModule) -> dict[str, torch.Tensor]:
    return {key: value.detach().clone() for key, value in trainable_parameters(module, "task").items()}


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[key] - other[key]).abs().max().item() for key in one)


def train(options: TrainingOptions, module: Any = None, examples: int = 50, validation: int = 0, **more: Any) -> Any:
    """The module after a run on the tiny examples."""
    module = module or make_model()
    held_out = encoded(validation, 1) if validation else None
    resume = more.pop("resume", False)
    Trainer(module, "task", encoded(examples), held_out, len(LABELS), options, **more).run(resume)
    return module


@pytest.mark.quick
def test_steps_are_those_of_a_loop_written_out() -> None:
    """AdamW on the mean loss of all rows of the accumulated batches, clipped, with the rates of the schedule."""
    options = replace(
        OPTIONS,
        epochs=1,
        head_learning_rate=2e-2,
        prefix_learning_rate=1e-3,
        accumulate=2,
        schedule="cosine",
        warmup=0.5,
        clip=0.05,
    )
    recorder = Recorder()
    actual = weights_of(train(options, make_model(dropout=0.0), listeners=[recorder]))

    module, examples = make_model(dropout=0.0).train(), encoded(50)
    by_name = trainable_parameters(module, "task")
    parameters = list(by_name.values())
    parts: dict[float, list[torch.Tensor]] = {}
    for key, parameter in by_name.items():
        part = options.head_learning_rate if ".heads." in key else options.learning_rate
        parts.setdefault(options.prefix_learning_rate if ".self_prefix" in key else part, []).append(parameter)
    assert len(parts) == 3
    optimizers = {rate: torch.optim.AdamW(part, weight_decay=options.weight_decay) for rate, part in parts.items()}
    batches = training_batches(examples.lengths(), 8, options.seed, 0)
    pairs = [batches[at : at + 2] for at in range(0, len(batches), 2)]
    assert len(pairs) == 4 and len(pairs[-1]) == 1  # 50 rows: six batches of 8 and one of 2
    for step, (pair, rate) in enumerate(zip(pairs, [0.5, 1.0, 1.0, 0.5], strict=True)):
        losses = []
        for indices in pair:
            batch = collate(examples, indices, slice(None), CPU)
            losses.append(cross_entropy(class_scores(module, batch), batch.labels, reduction="none"))
        loss = torch.cat(losses).mean()
        for optimizer in optimizers.values():
            optimizer.zero_grad()
        loss.backward()
        norm = torch.sqrt(sum(parameter.grad.square().sum() for parameter in parameters)).item()
        for parameter in parameters:
            parameter.grad *= min(1.0, options.clip / norm)
        for highest, optimizer in optimizers.items():
            optimizer.param_groups[0]["lr"] = highest * rate
            optimizer.step()
        told = recorder.steps[step]
        assert told == (
            step + 1,
            pytest.approx(loss.item(), rel=1e-5),
            pytest.approx(options.learning_rate * rate),
            pytest.approx(norm, rel=1e-4),
        )
    assert largest_difference(actual, weights_of(module)) < 1e-6


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"head": 1e-2, "prefix": 5e-4, "parallel": 5e-4, "adapter": 3e-3}),
        ({"learning_rate": 2e-3}, {"head": 2e-3, "prefix": 2e-3, "parallel": 2e-3, "adapter": 2e-3}),
        (
            {"learning_rate": 2e-3, "parallel_learning_rate": 4e-4, "prefix_learning_rate": 7e-4},
            {"head": 2e-3, "prefix": 7e-4, "parallel": 4e-4, "adapter": 2e-3},
        ),
    ],
    ids=["none", "one", "some"],
)
def test_each_part_moves_with_its_rate(given: dict[str, float], expected: dict[str, float]) -> None:
    """The first step of AdamW moves every number with a gradient by its rate."""
    configs = {"prefix": "prefix_tuning[bottleneck_size=8]", "parallel": "par_bn", "adapter": "lora[r=2]"}
    moved = {}
    for part, config in configs.items():
        module = make_model(config)
        before = weights_of(module)
        options = TrainingOptions(epochs=1, batch_size=50, warmup=0.0, clip=0.0, weight_decay=0.0, **given)
        after = weights_of(train(options, module))
        heads = {key for key in before if ".heads." in key}
        for name, keys in (("head", heads), (part, before.keys() - heads)):
            moved[name] = max((after[key] - before[key]).abs().max().item() for key in keys)
    assert moved == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize(
    ("name", "config", "rate"),
    [
        ("x_adapter_par_prefix", "seq_bn[dropout=0.1]", 3e-3),
        ("task", "par_bn[phm_layer=true,init_weights=bert,phm_dim=2]", 5e-4),
        ("task", "compacter[phm_dim=2,reduction_factor=4]", 3e-3),
    ],
)
def test_the_rate_follows_the_method_and_not_the_name(name: str, config: str, rate: float) -> None:
    torch.manual_seed(1)
    module = add_head(graft(make_base(), config, name, trainable=True), name, HeadConfig(num_labels=len(LABELS)))
    before = {key: value.detach().clone() for key, value in trainable_parameters(module, name).items()}
    options = TrainingOptions(epochs=1, batch_size=50, warmup=0.0, clip=0.0, weight_decay=0.0)
    Trainer(module, name, encoded(50), None, len(LABELS), options).run()
    after = trainable_parameters(module, name)
    moved = max((after[key] - before[key]).abs().max().item() for key in before if ".heads." not in key)
    assert moved == pytest.approx(rate, rel=1e-2)


def test_the_loss_falls_and_the_base_stays() -> None:
    module = make_model()
    trained = {id(value) for value in trainable_parameters(module, "task").values()}
    before = {key: value.detach().clone() for key, value in module.named_parameters()}
    kept = {key for key, value in module.named_parameters() if not value.requires_grad}
    assert kept and len(kept) + len(trained) >= len(before)
    recorder = Recorder()
    train(replace(OPTIONS, epochs=12, learning_rate=2e-2), module, examples=150, validation=21, listeners=[recorder])
    assert recorder.epochs[-1]["train_loss"] < 0.3 * recorder.epochs[0]["train_loss"]
    assert max(record["validation_accuracy"] for record in recorder.epochs) > 0.8  # by chance: a third
    assert all(torch.equal(before[key], value) for key, value in module.named_parameters() if key in kept)
    assert recorder.ends == 1 and not module.training


# After which step the run is stopped; checkpoints are written after steps 2, 4, 6, 7 (end of epoch), 8, 10, 12, 14.
@pytest.mark.parametrize("stop", [5, 7])
def test_a_stopped_run_ends_with_the_same_weights(stop: int, tmp_path: Path) -> None:
    whole, interrupted, resumed = Recorder(), Recorder(stop), Recorder()
    expected = weights_of(train(OPTIONS, validation=21, listeners=[whole]))
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(InterruptionError):
        train(OPTIONS, validation=21, listeners=[interrupted], checkpoint=path)
    again = train(OPTIONS, validation=21, listeners=[resumed], checkpoint=path, resume=True)
    assert largest_difference(weights_of(again), expected) <= 1e-6
    assert resumed.steps[0][0] <= stop + 1
    for told, before in zip(resumed.steps, whole.steps[resumed.steps[0][0] - 1 :], strict=True):
        assert told == pytest.approx(before, rel=1e-5)
    assert resumed.epochs[-1]["train_loss"] == pytest.approx(whole.epochs[-1]["train_loss"], rel=1e-5)
    # A run that has ended is only read.
    finished = Recorder()
    resumed = train(OPTIONS, validation=21, listeners=[finished], checkpoint=path, resume=True)
    assert largest_difference(weights_of(resumed), expected) <= 1e-6
    assert finished.steps == []


def test_dropout_is_in_the_run_that_goes_on() -> None:
    """Otherwise the test above would not notice a generator that is not restored."""
    runs = [weights_of(train(replace(OPTIONS, epochs=1), make_model(dropout=dropout))) for dropout in (0.0, 0.1)]
    assert largest_difference(*runs) > 1e-4


def test_the_best_epoch_is_kept() -> None:
    """With labels that are noise the validation loss gets worse and worse: the first epochs are the best."""
    generator = torch.Generator().manual_seed(3)
    noise = replace(encoded(48), labels=torch.randint(3, (48,), generator=generator))
    options = replace(OPTIONS, epochs=12, learning_rate=2e-2, patience=2, best_by="loss", schedule="constant")
    module, held_out, recorder = make_model(dropout=0.0), encoded(21, 1), Recorder()
    result = Trainer(module, "task", noise, held_out, len(LABELS), options, listeners=[recorder]).run()
    losses = [record["validation_loss"] for record in result.history]
    assert result.stopped_early and len(losses) == result.best_epoch + 2 < 12
    assert losses[result.best_epoch - 1] == min(losses)
    assert score(module, held_out, len(LABELS)).loss == pytest.approx(min(losses), rel=1e-6)


def test_of_equal_accuracies_the_lower_loss_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = [Scores(loss, accuracy, 0.5) for loss, accuracy in ((0.9, 0.5), (0.7, 0.5), (0.8, 0.5), (0.1, 0.4))]
    recorder = Recorder()
    monkeypatch.setattr(trainer_module, "score", lambda *arguments, **options: scores[len(recorder.epochs)])
    options = replace(OPTIONS, epochs=4, checkpoint_every=100)
    result = Trainer(make_model(), "task", encoded(8), encoded(8, 1), 3, options, listeners=[recorder]).run()
    assert result.best_epoch == 2


def _checks_that_the_state_is_good(path: Path, step: int) -> None:
    state = load_checkpoint(path)
    assert state.step == step
    assert all(torch.isfinite(value).all() for value in state.parameters.values())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_the_run_before_the_step(value: float, tmp_path: Path) -> None:
    class Spoiled(Recorder):
        def stepped(self, step: int, *values: float) -> None:
            if step == 3:
                with torch.no_grad():
                    for parameter in trainable_parameters(module, "task").values():
                        parameter.fill_(value)

    module, path = make_model(dropout=0.0), tmp_path / "checkpoint.pt"
    with pytest.raises(GraftError) as caught:
        train(OPTIONS, module, checkpoint=path, listeners=[Spoiled()])
    assert "is nan" in str(caught.value) or "is inf" in str(caught.value)
    assert "in step 4 of 14 (examples: examples, line" in str(caught.value)
    assert f"{path} is from before that step" in str(caught.value)
    _checks_that_the_state_is_good(path, 2)


@pytest.mark.parametrize("validation", [0, 21])
@pytest.mark.parametrize("epochs", [1, 3])
def test_weights_after_a_step_that_was_too_large_are_not_written(epochs: int, validation: int, tmp_path: Path) -> None:
    """One step in each epoch: nothing but a forward pass after it sees what it has done."""
    options, path = replace(OPTIONS, epochs=epochs, learning_rate=1e30, warmup=0.0), tmp_path / "checkpoint.pt"
    with pytest.raises(GraftError, match=f"after step 1 of {epochs} the loss on its own examples is nan; .*Lower"):
        train(options, examples=8, validation=validation, checkpoint=path)
    _checks_that_the_state_is_good(path, 0)
    assert all(value.abs().max() < 100 for value in load_checkpoint(path).parameters.values())


@pytest.mark.parametrize("best_by", ["loss", "accuracy"])
def test_a_validation_loss_that_is_no_number_ends_the_run(best_by: str, tmp_path: Path) -> None:
    """It comes from a token that no training example has."""
    module, path, held_out = make_model(), tmp_path / "checkpoint.pt", encoded(21, 1)
    embedding = next(value for key, value in module.named_parameters() if "word_embeddings" in key)
    with torch.no_grad():
        embedding[UNKNOWN] = math.nan
    held_out.token_ids[4][1] = UNKNOWN
    trainer = Trainer(module, "task", encoded(50), held_out, 3, replace(OPTIONS, best_by=best_by), checkpoint=path)
    with pytest.raises(GraftError, match="after step 7 of 14 the loss on the validation examples is nan"):
        trainer.run()
    _checks_that_the_state_is_good(path, 6)
    assert load_checkpoint(path).best is None


def test_a_listener_that_fails_to_start_ends_those_before_it() -> None:
    class Failing(Recorder):
        def started(self, done_steps: int, total_steps: int) -> None:
            raise GraftError("no place for logs")

    bar, log = Recorder(), Failing()
    with pytest.raises(GraftError, match="no place for logs"):
        train(OPTIONS, listeners=[bar, log])
    assert (bar.ends, log.ends) == (1, 1) and bar.steps == []


def test_a_full_disk_ends_the_run_with_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchgraft.training import checkpoint

    written, path = [], tmp_path / "checkpoint.pt"
    write_whole = checkpoint.write_whole

    def write_twice(content: bytes, target: Path) -> None:
        if len(written) == 2:
            raise GraftError(f"{target}: cannot write (No space left on device)")
        written.append(target)
        write_whole(content, target)

    monkeypatch.setattr(checkpoint, "write_whole", write_twice)
    recorder = Recorder()
    with pytest.raises(GraftError, match="No space left on device"):
        train(OPTIONS, checkpoint=path, listeners=[recorder])
    _checks_that_the_state_is_good(path, 2)
    assert len(recorder.steps) == 4 and recorder.ends == 1


def test_a_run_with_other_settings_does_not_go_on(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    train(replace(OPTIONS, epochs=1), checkpoint=path)
    for changed, message in (
        (replace(OPTIONS, epochs=1, learning_rate=1.0), "learning_rate was 0.003, is 1.0"),
        (replace(OPTIONS, epochs=3), "epochs was 1, is 3"),
    ):
        with pytest.raises(GraftError, match=message):
            train(changed, checkpoint=path, resume=True)
    with pytest.raises(GraftError, match="examples was 50, is 40"):
        train(replace(OPTIONS, epochs=1), examples=40, checkpoint=path, resume=True)


def test_an_adapter_of_nothing_but_prefixes() -> None:
    """It has no parameters at the rate of the others."""
    before, module = weights_of(make_model("prefix_tuning")), make_model("prefix_tuning")
    train(replace(OPTIONS, epochs=1, prefix_learning_rate=1e-2), module)
    assert largest_difference(before, weights_of(module)) > 1e-3


def test_no_examples() -> None:
    empty = EncodedExamples([], [], torch.empty(0, dtype=torch.int64), [])
    with pytest.raises(GraftError, match="there are no training examples"):
        Trainer(make_model(), "task", empty, None, 3, OPTIONS)


@pytest.mark.parametrize(("field", "value"), [
    ("epochs", 0), ("batch_size", 0), ("accumulate", -1), ("learning_rate", 0.0), ("learning_rate", math.nan),
    ("head_learning_rate", -1.0), ("prefix_learning_rate", 0.0), ("warmup", 1.0), ("clip", -1.0), ("clip", math.nan),
    ("schedule", "step"), ("best_by", "f2"), ("patience", -1),
])  # fmt: skip
def test_options_that_make_no_sense(field: str, value: Any) -> None:
    with pytest.raises(GraftError, match=f"expected .*{field}"):
        replace(OPTIONS, **{field: value})


def test_scores_in_train_mode_leave_it_on() -> None:
    module = make_model().train()
    first = score(module, encoded(21, 1), len(LABELS))
    assert module.training and score(module, encoded(21, 1), len(LABELS), batch_size=64) == first
