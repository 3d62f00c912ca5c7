"""A directory whose shapes, layers or heads do not mean the same places is refused, with the place and the reason."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import torchgraft


class _Layer(nn.Module):
    def __init__(self, hidden: int, heads: int, inner: int, cross: bool, has_norms: bool) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(hidden, hidden) for _ in range(4))
        self.up, self.down = nn.Linear(hidden, inner), nn.Linear(inner, hidden)
        self.first, self.second = (nn.LayerNorm(hidden) if has_norms else nn.Identity() for _ in range(2))
        self.cross = cross

    def split(self, x: Tensor) -> Tensor:
        return x.view(x.size(0), x.size(1), self.heads, x.size(2) // self.heads).transpose(1, 2)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        source = memory if self.cross else x
        mixed = nn.functional.scaled_dot_product_attention(
            *(map(self.split, (self.q(x), self.k(source), self.v(source))))
        )
        x = self.first(x + self.out(mixed.transpose(1, 2).flatten(2)))
        return self.second(x + self.down(torch.relu(self.up(x))))


class _Model(nn.Module):
    def __init__(
        self, hidden: int = 32, heads: int = 4, inner: int = 64, layers: int = 3, cross: bool = False,
        has_norms: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.layers = nn.ModuleList([_Layer(hidden, heads, inner, cross, has_norms) for _ in range(layers)])

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, memory)
        return x


def _traced(**sizes: int) -> torch.jit.ScriptModule:
    torch.manual_seed(0)
    hidden = sizes.get("hidden", 32)
    example = torch.randn(2, 5, hidden), torch.randn(2, 7, hidden)
    return torch.jit.trace(_Model(**sizes).eval(), example, check_trace=False)


EVERYWHERE = "unipelt"
CASES = {
    "another hidden size": (EVERYWHERE, {"hidden": 48}),
    "a smaller hidden size": (EVERYWHERE, {"hidden": 16}),
    "more layers": (EVERYWHERE, {"layers": 4}),
    "fewer layers": (EVERYWHERE, {"layers": 2}),
    "fewer heads": ("prefix_tuning", {"heads": 2}),
    "more heads": ("prefix_tuning[flat=True]", {"heads": 8}),
    "more heads, in a union": (EVERYWHERE, {"heads": 8}),
    "a wider feed-forward block": ("lora[intermediate_lora=True]", {"inner": 96}),
    "a narrower feed-forward block": ("lora[output_lora=True]", {"inner": 48}),
    "cross attention": (EVERYWHERE, {"cross": True}),
    "layers left out": ("seq_bn[leave_out=[1]]", {"layers": 2}),
    "layers left out of more": ("lora[leave_out=[0]]", {"layers": 5}),
}


@pytest.mark.parametrize("case", CASES)
def test_what_means_other_places_is_refused(case: str, tmp_path: Path) -> None:
    config, sizes = CASES[case]
    source = torchgraft.graft(_traced(), config, "task")
    torchgraft.save_adapter(source, "task", tmp_path)
    torchgraft.graft(_traced(), adapters={"task": tmp_path})
    other = _traced(**sizes)
    messages = []
    for take in (
        lambda: torchgraft.graft(other, adapters={"task": tmp_path}),
        lambda: torchgraft.load_adapter(other, tmp_path),
        lambda: torchgraft.match_adapter(other, tmp_path),
        lambda: torchgraft.AdapterPool(other, capacity=1).insert("task", tmp_path),
    ):
        with pytest.raises(torchgraft.GraftError) as error:
            take()
        messages.append(str(error.value))
    with open("/tmp/hb_places.txt", "a") as file:
        file.write(f"{case} -> {messages[0]} | {messages[3]}\n")
