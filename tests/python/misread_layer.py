"""A layer whose scripted form the patcher reads as another one, so that only running it shows the difference."""

import math

import torch
from torch import Tensor, nn

HIDDEN = 32


class Layer(nn.Module):
    """One attention with its residual. `undo`: adds to masked scores what filling them took, which reads as a mask."""

    def __init__(self, undo: bool = False) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output = [nn.Linear(HIDDEN, HIDDEN) for _ in range(4)]
        self.norm = nn.LayerNorm(HIDDEN)
        self.dropout = nn.Dropout(0.1)
        self.undo: bool = undo

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        rows, tokens = x.size(0), x.size(1)
        q = self.query(x).view(rows, tokens, 4, 8).transpose(1, 2)
        k = self.key(x).view(rows, tokens, 4, 8).transpose(1, 2)
        v = self.value(x).view(rows, tokens, 4, 8).transpose(1, 2)
        hidden = (mask == 0)[:, None, None, :]
        scores = (q @ k.transpose(-1, -2) / math.sqrt(8)).masked_fill(hidden, -1e4)
        if self.undo:
            scores = scores + hidden.float() * 1e4
        context = (self.dropout(scores.softmax(-1)) @ v).transpose(1, 2).reshape(rows, tokens, 32)
        return self.norm(x + self.output(context))


def inputs(padding: int = 2) -> tuple[Tensor, Tensor]:
    mask = torch.ones(3, 6, dtype=torch.long)
    mask[1, 6 - padding :] = 0
    return torch.randn(3, 6, HIDDEN, generator=torch.Generator().manual_seed(0)), mask
