"""One attention layer whose cache may be None, in the ways in which TorchScript's compiler learns that it is not."""

from typing import Optional

import torch
from torch import Tensor, nn

HIDDEN, HEADS = 32, 4


class Layer(nn.Module):
    limit: Optional[float]

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(HIDDEN, HIDDEN) for _ in range(4))
        self.norm, self.ffn_norm = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.up, self.down = nn.Linear(HIDDEN, 64), nn.Linear(64, HIDDEN)
        self.heads, self.limit = HEADS, 0.5

    def split(self, x: Tensor) -> Tensor:
        return x.view(x.size(0), x.size(1), self.heads, -1).transpose(1, 2)

    def new(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))

    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = self.norm(x + self.o(mixed))
        return self.ffn_norm(x + self.down(torch.relu(self.up(x))))


class TupleOrNone(Layer):
    def forward(self, x: Tensor, past: Optional[tuple[Tensor, Tensor]] = None) -> Tensor:
        q, k, v = self.new(x)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        return self.attend(x, q, k, v)


class UnpackedTuple(Layer):
    def forward(self, x: Tensor, past: Optional[tuple[Tensor, Tensor]] = None) -> Tensor:
        q, k, v = self.new(x)
        if past is not None:
            old_k, old_v = past
            k, v = torch.cat([old_k, k], 2), torch.cat([old_v, v], 2)
        return self.attend(x, q, k, v)


class TupleOfOptional(Layer):
    def forward(self, x: Tensor, past: Optional[tuple[Tensor, Optional[Tensor]]] = None) -> Tensor:
        q, k, v = self.new(x)
        if past is not None:
            old_k, old_v = past
            k = torch.cat([old_k, k], 2)
            v = torch.cat([old_v if old_v is not None else old_k, v], 2)
        return self.attend(x, q, k, v)


class InOneLine(Layer):
    def forward(self, x: Tensor, past: Optional[tuple[Tensor, Tensor]] = None) -> Tensor:
        q, k, v = self.new(x)
        k = torch.cat([past[0], k], 2) if past is not None else k
        v = torch.cat([past[1], v], 2) if past is not None else v
        length = past[0].size(2) if past is not None else 0
        return self.attend(x, q, k, v) + length


class IsInstance(Layer):
    def forward(self, x: Tensor, past: Optional[tuple[Tensor, Tensor]] = None) -> Tensor:
        q, k, v = self.new(x)
        if torch.jit.isinstance(past, tuple[Tensor, Tensor]):
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        return self.attend(x, q, k, v)


class ElseSide(Layer):
    def forward(self, x: Tensor, past: Optional[tuple[Tensor, Tensor]] = None) -> Tensor:
        q, k, v = self.new(x)
        if past is None:
            pass
        else:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        return self.attend(x, q, k, v)


class Asserted(Layer):
    def forward(self, x: Tensor, past: Optional[tuple[Tensor, Tensor]]) -> Tensor:
        assert past is not None
        q, k, v = self.new(x)
        return self.attend(x, q, torch.cat([past[0], k], 2), torch.cat([past[1], v], 2))


class ListOrNone(Layer):
    def forward(self, x: Tensor, past: Optional[list[Tensor]] = None) -> Tensor:
        q, k, v = self.new(x)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        return self.attend(x, q, k, v)


class DictOrNone(Layer):
    def forward(self, x: Tensor, past: Optional[dict[str, Tensor]] = None) -> Tensor:
        q, k, v = self.new(x)
        if past is not None and len(past) > 0:
            k, v = torch.cat([past["k"], k], 2), torch.cat([past["v"], v], 2)
        return self.attend(x, q, k, v)


class UnionWithInt(Layer):
    def forward(self, x: Tensor, past: int | list[Tensor] | None = None) -> Tensor:
        q, k, v = self.new(x)
        if isinstance(past, list):
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        return self.attend(x, q, k, v)


class ListOfOptional(Layer):
    def forward(self, x: Tensor, past: list[Optional[tuple[Tensor, Tensor]]]) -> Tensor:
        q, k, v = self.new(x)
        mine = past[0]
        if mine is not None:
            k, v = torch.cat([mine[0], k], 2), torch.cat([mine[1], v], 2)
        return self.attend(x, q, k, v)


class OptionalNumber(Layer):
    def forward(self, x: Tensor, shown: Optional[int] = None) -> Tensor:
        y = self.attend(x, *self.new(x))
        limit = self.limit
        if limit is not None:
            y = y * limit
        return y[:, : shown + 1] if shown is not None else y


class EarlyReturn(Layer):
    """No adapter can be put into two branches with an attention each; int8 can."""

    def forward(self, x: Tensor, past: Optional[tuple[Tensor, Tensor]] = None) -> Tensor:
        q, k, v = self.new(x)
        if past is None:
            return self.attend(x, q, k, v)
        return self.attend(x, q, torch.cat([past[0], k], 2), torch.cat([past[1], v], 2))
