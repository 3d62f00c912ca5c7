"""Scores of predictions."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """loss: the mean cross entropy; accuracy: the share of right answers; macro_f1: the mean F1 of the classes."""

    loss: float
    accuracy: float
    macro_f1: float


def confusion_matrix(predicted: Tensor, labels: Tensor, num_labels: int) -> Tensor:
    """Counts how often class i (row) was taken for class j (column).

    Args:
        predicted, labels: int64 [N].
        num_labels: the number L of classes.

    Returns:
        float64 [L, L].
    """
    counts = torch.bincount(labels * num_labels + predicted, minlength=num_labels**2)
    return counts.view(num_labels, num_labels).to(torch.float64)


def scores_of(confusion: Tensor, loss: float) -> Scores:
    """Computes scores from a confusion matrix [L, L] and the mean loss.

    The F1 of a class is 2 TP / (2 TP + FP + FN). A class that neither occurs nor is predicted does not count.
    """
    right, predicted, actual = confusion.diagonal(), confusion.sum(0), confusion.sum(1)
    occurring = predicted + actual > 0
    f1 = 2 * right[occurring] / (predicted + actual)[occurring]
    return Scores(loss, (right.sum() / confusion.sum()).item(), f1.mean().item())
