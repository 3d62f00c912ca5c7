"""LoRAs of PEFT on layers whose paths have no numbers."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import torchgraft
from peft_support import save_random_lora


class _Attention(nn.Module):
    def __init__(self, packed: bool = False) -> None:
        super().__init__()
        self.packed = packed
        self.query = nn.Linear(16, 48 if packed else 16)
        if not packed:
            self.key, self.value = nn.Linear(16, 16), nn.Linear(16, 16)
        self.out = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.query(x).chunk(3, -1) if self.packed else (self.query(x), self.key(x), self.value(x))
        q, k, v = (each.unflatten(-1, [2, 8]).transpose(1, 2) for each in maps)
        attended = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.out(attended.transpose(1, 2).flatten(2))


class _Named(nn.Module):
    """Two layers, each an attribute, of which the second packs its projections."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer_1 = _Attention(), _Attention(packed=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer_1(self.first(x))


class _One(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = _Attention()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


@pytest.mark.parametrize(
    ("make", "targets"),
    [
        (_Named, ["query", "value", "out"]),
        (_Named, ["layer_1.query"]),
        (_Named, ["first.key"]),
        (_One, ["block.query", "block.value"]),
        (_Attention, ["query", "out"]),
    ],
)
def test_a_lora_on_layers_without_numbers_is_exact(make: type, targets: list[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, x = make().double().eval(), torch.randn(2, 5, 16, dtype=torch.float64)
    traced = torch.jit.trace(copy.deepcopy(base), x)
    save_random_lora(base, {"target_modules": targets}, tmp_path)
    grafted = torchgraft.load_adapter(traced, tmp_path)
    torch.testing.assert_close(grafted(x), base(x), atol=1e-5, rtol=0)
    assert not torch.allclose(grafted(x), traced(x), atol=1e-3)


def test_an_adapter_of_one_layer_alone_is_refused_where_two_could_have_it(tmp_path: Path) -> None:
    x = torch.randn(2, 5, 16)
    save_random_lora(_Attention(), {"target_modules": ["out"]}, tmp_path)
    with pytest.raises(torchgraft.GraftError, match=r"out.*first\.out.*layer_1\.out|several|both"):
        torchgraft.load_adapter(torch.jit.trace(_Named().eval(), x), tmp_path)


class _ListOut(_Attention):
    """A number behind the layer's name is not the layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Sequential(nn.Linear(16, 16))


class _TwoListOut(_Named):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer_1 = _ListOut(), _ListOut()


class _ListQuery(_Attention):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Sequential(nn.Linear(16, 16))


class _OneListQuery(_Named):
    def __init__(self) -> None:
        super().__init__()
        self.first = _ListQuery()


@pytest.mark.parametrize(
    ("make", "targets"),
    [
        (_TwoListOut, ["query", "out.0"]),
        (_OneListQuery, ["query.0", "value"]),
        (_OneListQuery, ["query.0", "first.out"]),
    ],
)
def test_what_is_saved_of_them_loads_again(make: type, targets: list[str], tmp_path: Path) -> None:
    base, x = make().double().eval(), torch.randn(2, 5, 16, dtype=torch.float64)
    traced = torch.jit.trace(copy.deepcopy(base), x)
    save_random_lora(base, {"target_modules": targets}, tmp_path / "peft")
    grafted = torchgraft.load_adapter(traced, tmp_path / "peft", name="task")
    torchgraft.save_adapter(grafted, "task", tmp_path / "saved")
    again = torchgraft.load_adapter(traced, tmp_path / "saved")
    torch.testing.assert_close(grafted(x), base(x), atol=1e-5, rtol=0)
    torch.testing.assert_close(again(x), grafted(x), atol=1e-6, rtol=0)
