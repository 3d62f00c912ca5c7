"""A small base, its size, and how weights of adapters become random."""

import torch
from torch import Tensor, nn

HIDDEN, HEADS = 16, 2


class Encoder(nn.Module):
    """One layer, post-norm."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(HIDDEN, HIDDEN) for _ in range(4))
        self.up, self.down = nn.Linear(HIDDEN, 24), nn.Linear(24, HIDDEN)
        self.first, self.second = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (each(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = self.first(x + self.o(mixed))
        return self.second(x + self.down(torch.relu(self.up(x))))


def randomised(module: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    """The module itself, all banks of its adapters random."""
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if name.startswith("adapters.") and tensor.is_floating_point() and "scaling" not in name:
                tensor.normal_()
    return module
