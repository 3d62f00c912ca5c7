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


def randomised(module: torch.jit.ScriptModule, seed: int = 0) -> torch.jit.ScriptModule:
    """The module itself, with noise on the banks of its adapters: not on what makes an adapter none in a slot."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            is_open = tensor.is_floating_point() and tensor.isfinite().all() and not name.endswith("scaling")
            if name.startswith("adapters.") and is_open:
                tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator))
    return module
