"""How good predictions are."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """loss: mean cross entropy. accuracy: share of right answers. macro_f1: mean over classes of F1."""

    loss: float
    accuracy: float
    macro_f1: float


def confusion_matrix(predicted: Tensor, labels: Tensor, num_labels: int) -> Tensor:
    """[L, L] float64: how often class i (row) was taken for class j (column). predicted, labels: [N] int64."""
    counts = torch.bincount(labels * num_labels + predicted, minlength=num_labels**2)
    return counts.view(num_labels, num_labels).to(torch.float64)


def scores_of(confusion: Tensor, loss: float) -> Scores:
    """F1 of a class is 2 TP / (2 TP + FP + FN). A class that neither occurs nor is predicted does not count."""
    right, predicted, actual = confusion.diagonal(), confusion.sum(0), confusion.sum(1)
    occurring = predicted + actual > 0
    f1 = 2 * right[occurring] / (predicted + actual)[occurring]
    return Scores(loss, (right.sum() / confusion.sum()).item(), f1.mean().item())
