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
NO_PLACE = "for which the config and the model have no site"
CASES = {
    "another hidden size": (EVERYWHERE, {"hidden": 48}, "was trained for hidden size 32, the model has 48"),
    "a smaller hidden size": (EVERYWHERE, {"hidden": 16}, "was trained for hidden size 32, the model has 16"),
    "more layers": (EVERYWHERE, {"layers": 4}, "nothing for layer 3 of the 4 that the configuration is for"),
    "fewer layers": (EVERYWHERE, {"layers": 2}, rf"layers\.2\..*{NO_PLACE} \(the model has 2 layers\)"),
    "fewer heads": ("prefix_tuning", {"heads": 2}, "for 4 heads of keys and values, self_prefix of layer 0 has 2"),
    "more heads": ("prefix_tuning[flat=True]", {"heads": 8}, "for 4 heads .*, self_prefix of layer 0 has 8"),
    "more heads, in a union": (EVERYWHERE, {"heads": 8}, "for 4 heads .*, self_prefix of layer 0 has 8"),
    "a wider block": ("lora[intermediate_lora=True]", {"inner": 96}, r"up.* of shape \[96, 8\], got \[64, 8\]"),
    "a narrower block": ("lora[output_lora=True]", {"inner": 48}, r"down.* of shape \[8, 48\], got \[8, 64\]"),
    "cross attention": (EVERYWHERE, {"cross": True}, NO_PLACE),
    "layers left out": ("seq_bn[leave_out=[1]]", {"layers": 2}, rf"layers\.2\..*{NO_PLACE}"),
    "layers left out of more": ("lora[leave_out=[0]]", {"layers": 5}, "nothing for layers 3, 4 of the 4 that the conf"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_means_other_places_is_refused(case: str, tmp_path: Path) -> None:
    config, sizes, reason = CASES[case]
    source = torchgraft.graft(_traced(), config, "task")
    torchgraft.save_adapter(source, "task", tmp_path)
    torchgraft.graft(_traced(), adapters={"task": tmp_path})
    other = _traced(**sizes)
    for take in (
        lambda: torchgraft.graft(other, adapters={"task": tmp_path}),
        lambda: torchgraft.load_adapter(other, tmp_path),
        lambda: torchgraft.match_adapter(other, tmp_path),
        lambda: torchgraft.AdapterPool(other, capacity=1).insert("task", tmp_path),
    ):
        with pytest.raises(torchgraft.GraftError, match=reason):
            take()


@pytest.mark.parametrize(
    "config", ["seq_bn_inv[leave_out=[0]]", "compacter[reduction_factor=4]|lora[leave_out=[0]]", "prefix_tuning"]
)
def test_what_needs_no_weights_of_a_layer_loads(config: str, tmp_path: Path) -> None:
    """The weights of invertible adapters, of prefixes and, where they are shared, of Compacters are of no layer."""
    source = torchgraft.graft(_traced(), config, "task")
    torchgraft.save_adapter(source, "task", tmp_path)
    assert torchgraft.graft(_traced(), adapters={"task": tmp_path}).adapter_names() == ["task"]
