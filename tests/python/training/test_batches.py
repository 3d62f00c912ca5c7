"""Which examples make a batch, and how a batch is padded."""

import math

import pytest
import torch

from tiny import LABELS, encoded, make_examples, make_tokenizer
from torchgraft.training.batches import collate, scoring_batches, training_batches
from torchgraft.training.metrics import confusion_matrix, scores_of
from torchgraft.training.schedule import learning_rate_factor

pytestmark = pytest.mark.quick

CPU = torch.device("cpu")
LENGTHS = [(7 * index) % 23 + 1 for index in range(1000)]


def test_an_epoch_has_every_example_once() -> None:
    batches = training_batches(LENGTHS, 16, seed=1, epoch=0)
    assert sorted(index for batch in batches for index in batch) == list(range(1000))
    assert sorted(map(len, batches), reverse=True) == [16] * 62 + [8]


def test_epochs_and_seeds_differ_and_repeat() -> None:
    first = training_batches(LENGTHS, 16, 1, 0)
    assert first == training_batches(LENGTHS, 16, 1, 0)
    assert first != training_batches(LENGTHS, 16, 1, 1) and first != training_batches(LENGTHS, 16, 2, 0)


def test_batches_hold_alike_lengths_in_no_order_of_length() -> None:
    batches = training_batches(LENGTHS, 16, 1, 0)
    padded = sum(len(batch) * max(LENGTHS[index] for index in batch) for batch in batches)
    assert padded < 1.1 * sum(LENGTHS)
    longest = [max(LENGTHS[index] for index in batch) for batch in batches]
    assert longest != sorted(longest) and len(set(longest[: len(longest) // 4])) > 4


def test_scoring_goes_by_length() -> None:
    batches = scoring_batches(LENGTHS, 64)
    assert sorted(index for batch in batches for index in batch) == list(range(1000))
    assert [LENGTHS[index] for batch in batches for index in batch] == sorted(LENGTHS)


def test_a_part_of_a_batch_is_padded_like_the_whole() -> None:
    examples = encoded(9)
    indices = [4, 0, 7, 2, 8]
    whole = collate(examples, indices, slice(None), CPU)
    width = max(examples.lengths()[index] for index in indices)
    for key, pad in (("ids", 0), ("mask", 0)):
        assert whole.values[key].shape == (5, width)
        for row, index in enumerate(indices):
            assert (whole.values[key][row, examples.lengths()[index] :] == pad).all()
    assert whole.values["mask"].sum(1).tolist() == [examples.lengths()[index] for index in indices]
    parts = [collate(examples, indices, slice(rank, None, 2), CPU) for rank in range(2)]
    for key, value in whole.values.items():
        assert torch.equal(torch.cat([part.values[key] for part in parts]), value[[0, 2, 4, 1, 3]])
    assert torch.cat([part.labels for part in parts]).tolist() == whole.labels[[0, 2, 4, 1, 3]].tolist()
    assert collate(examples, [3], slice(1, None, 2), CPU) is None


def test_tokens_are_the_tokenizers() -> None:
    tokenizer, one = make_tokenizer(), make_examples(1)[0]
    examples = encoded(1)
    assert examples.token_ids == [tokenizer.encode(one.text).ids]
    assert examples.labels.tolist() == [LABELS.index(one.label)]


@pytest.mark.parametrize(("schedule", "middle"), [("linear", 0.5), ("cosine", 0.5), ("constant", 1.0)])
def test_the_learning_rate_rises_and_falls(schedule: str, middle: float) -> None:
    factor = learning_rate_factor(schedule, 10, 110)
    assert [factor(step) for step in range(10)] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factor(10) == 1.0 and factor(60) == pytest.approx(middle)
    late = {"linear": 0.25, "cosine": 0.5 * (1 - math.cos(math.pi / 4)), "constant": 1.0}
    assert factor(85) == pytest.approx(late[schedule])
    assert factor(110) == (1.0 if schedule == "constant" else 0.0)


def test_scores_are_the_textbooks() -> None:
    """F1 from precision and recall, class by class; a class that nobody has or predicts does not count."""
    labels, predicted = torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([0, 0, 1, 1, 2, 2])
    scores = scores_of(confusion_matrix(predicted, labels, 4), 1.5)
    f1 = []
    for name in range(3):
        true = ((labels == name) & (predicted == name)).sum().item()
        precision, recall = true / (predicted == name).sum().item(), true / (labels == name).sum().item()
        f1.append(2 * precision * recall / (precision + recall))
    assert scores.accuracy == pytest.approx(4 / 6)
    assert scores.macro_f1 == pytest.approx(sum(f1) / 3)
    assert scores.loss == 1.5
