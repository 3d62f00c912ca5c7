"""A small layer that tests change, two of them in a row, and a batch for them."""

import torch
from torch import Tensor, nn

HIDDEN, HEADS, SIZE = 32, 4, 8


class Plain(nn.Module):
    """The layer that the others vary. Inputs may be written in place: callers pass copies."""

    def __init__(self, kv_heads: int = HEADS) -> None:
        super().__init__()
        self.query, self.output = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.key, self.value = nn.Linear(HIDDEN, kv_heads * SIZE), nn.Linear(HIDDEN, kv_heads * SIZE)
        self.norm = nn.LayerNorm(HIDDEN)

    def heads(self, x: Tensor) -> Tensor:
        return x.view(x.size(0), x.size(1), -1, 8).transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = torch.matmul(q, k.transpose(-1, -2)) / 2.8284271247461903
        scores = scores.masked_fill(mask[:, None, None, :] == 0, -1e9)
        return torch.matmul(torch.softmax(scores, -1), v)

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        return self.norm(x + self.output(mixed.transpose(1, 2).reshape(x.size(0), x.size(1), 32)))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        mixed = self.attend(self.heads(self.query(x)), self.heads(self.key(x)), self.heads(self.value(x)), mask)
        return self.finish(x, mixed)


class TwoLayers(nn.Module):
    """A layer behind another, which is plain: what is refused of the first must not change it either."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, Plain()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.second(self.first(x, mask), mask)


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[0, 4:], mask[1, 2:] = 0, 0
    return torch.randn(3, 7, HIDDEN), mask
