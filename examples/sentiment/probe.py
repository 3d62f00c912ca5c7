"""The linear probe: a linear map on the frozen base's features, which are masked means of its last hidden states."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from torchgraft.training import EncodedExamples
from torchgraft.training.batches import collate, scoring_batches

PENALTIES = (0.01, 0.1, 0.3, 1.0)  # of the weights' squared norm; the validation examples choose


def features(base: torch.jit.ScriptModule, examples: EncodedExamples, batch_size: int = 64) -> Tensor:
    """[N, H], in the order of the examples."""
    rows: list[Tensor] = [torch.empty(0)] * len(examples)
    with torch.no_grad():
        for indices in scoring_batches(examples.lengths(), batch_size):
            batch = collate(examples, indices, slice(None), torch.device("cpu"))
            hidden = base(batch.values["ids"], batch.values["mask"])
            mask = batch.values["mask"].unsqueeze(-1).to(hidden.dtype)
            for index, row in zip(indices, (hidden * mask).sum(1) / mask.sum(1), strict=True):
                rows[index] = row
    return torch.stack(rows)


class Probe:
    """A linear map on standardised features. L-BFGS fits it to its optimum: there is no learning rate to get wrong."""

    def __init__(self, x: Tensor, labels: Tensor, num_labels: int, penalty: float):
        """x: [N, H]; labels: [N] int64."""
        self._mean, self._scale = x.mean(0), x.std(0).clamp_min(1e-6)
        self._weight = torch.zeros(x.size(1), num_labels, requires_grad=True)
        self._bias = torch.zeros(num_labels, requires_grad=True)
        optimizer = torch.optim.LBFGS([self._weight, self._bias], max_iter=200, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = cross_entropy(self.logits(x), labels) + penalty * self._weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)

    def logits(self, x: Tensor) -> Tensor:
        return (x - self._mean) / self._scale @ self._weight + self._bias

    def parameters(self) -> int:
        return self._weight.numel() + self._bias.numel()


def best_probe(x: Tensor, labels: Tensor, validation_x: Tensor, validation_labels: Tensor, num_labels: int) -> Probe:
    """The probe whose penalty does best on the validation examples."""

    def right(probe: Probe) -> int:
        with torch.no_grad():
            return int((probe.logits(validation_x).argmax(-1) == validation_labels).sum())

    return max((Probe(x, labels, num_labels, penalty) for penalty in PENALTIES), key=right)
