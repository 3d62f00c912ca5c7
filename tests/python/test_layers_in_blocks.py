"""Layers in loops, and parts of layers in branches, stop a fresh adapter; spellings of feed-forward blocks, masks."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import torchgraft
from odd_layers import HIDDEN, Plain, TwoLayers, batch

pytestmark = pytest.mark.quick


class _Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Plain(), Plain()


class ExitsEarly(_Two):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.first(x, mask)
        if bool(x.abs().mean() > 100.0):
            return x
        return self.second(x, mask)


class OptionalLast(_Two):
    def forward(self, x: Tensor, mask: Tensor, y: Tensor | None = None) -> Tensor:
        x = self.first(x, mask)
        if y is not None:
            x = self.second(x + y, mask)
        return x


class Chunks(_Two):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.first(x, mask)
        parts: list[Tensor] = []
        for row in range(x.size(0)):
            parts.append(self.second(x[row : row + 1], mask[row : row + 1]))
        return torch.cat(parts)


@pytest.mark.parametrize("model", [ExitsEarly, OptionalLast, Chunks])
def test_a_layer_in_a_block_is_named_and_stops_a_fresh_adapter(model: type[nn.Module]) -> None:
    base = torch.jit.script(model().eval())
    assert ["second" in text for text in torchgraft.inspect(base)["near_misses"]] == [True]
    where = "a loop" if model is Chunks else "a branch, and no whole layer is"
    message = f"at second.query: attention was left out: it is inside {where}"
    with pytest.raises(torchgraft.GraftError, match=message):
        torchgraft.graft(base, "lora", "task")
    with pytest.warns(UserWarning, match=message):
        torchgraft.graft(base, "lora", "task", allow_partial=True)


@pytest.mark.parametrize("model", [ExitsEarly, OptionalLast, Chunks])
def test_an_adapter_of_all_layers_does_not_fit_the_rest(model: type[nn.Module], tmp_path: Path) -> None:
    whole = torchgraft.graft(torch.jit.script(TwoLayers(Plain()).eval()), "lora", "task")
    torchgraft.save_adapter(whole, "task", tmp_path)
    with pytest.raises(torchgraft.GraftError, match="Some attention was not recognised:\n  at second.query"):
        torchgraft.load_adapter(torch.jit.script(model().eval()), tmp_path)


class BiasBehindTheSum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.inner, self.norm = Plain(), nn.Linear(HIDDEN, 48), nn.LayerNorm(HIDDEN)
        self.weight, self.bias = nn.Parameter(torch.randn(48, HIDDEN) * 0.2), nn.Parameter(torch.randn(HIDDEN))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.layer(x, mask)
        return self.norm((y + torch.matmul(torch.relu(self.inner(y)), self.weight)) + self.bias)


class BiasBeforeTheSum(BiasBehindTheSum):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.layer(x, mask)
        return self.norm(y + (torch.matmul(torch.relu(self.inner(y)), self.weight) + self.bias))


def _check_same_in_both(plain: nn.Module, odd: nn.Module, form: str, config: str, folder: Path, std: float) -> None:
    """Gives both modules the same weights, and one adapter, drawn."""
    odd.load_state_dict(plain.state_dict())
    base, other = (
        torch.jit.script(model) if form == "script" else torch.jit.trace(model, batch()) for model in (plain, odd)
    )
    grafted = torchgraft.graft(base, config, "task")
    for bank in grafted.adapters.parameters():
        bank.data.normal_(std=std)
    torchgraft.save_adapter(grafted, "task", folder)
    loaded = torchgraft.load_adapter(other, folder)
    with torch.no_grad():
        torch.testing.assert_close(loaded(*batch()), grafted(*batch()), rtol=1e-5, atol=1e-5)
        assert (grafted(*batch()) - plain(*batch())).abs().max() > 0.01


@pytest.mark.parametrize("form", ["script", "trace"])
@pytest.mark.parametrize("config", ["seq_bn", "par_bn", "lora[output_lora=True]"])
def test_a_bias_behind_the_residual_is_the_branch_s(config: str, form: str, tmp_path: Path) -> None:
    _check_same_in_both(BiasBeforeTheSum().eval(), BiasBehindTheSum().eval(), form, config, tmp_path, std=0.2)


class BiasOfRankThree(BiasBehindTheSum):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.layer(x, mask)
        return self.norm((y + torch.matmul(torch.relu(self.inner(y)), self.weight)) + self.bias.view(1, 1, -1))


class BiasBesideTheResidual(BiasBehindTheSum):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.layer(x, mask)
        return self.norm((y + self.bias) + torch.matmul(torch.relu(self.inner(y)), self.weight))


class BiasOfEitherBranch(nn.Module):
    """Parallel branches without biases, and a bias behind their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(HIDDEN, 48), nn.Linear(48, HIDDEN, bias=False)
        self.norm, self.bias = nn.LayerNorm(HIDDEN), nn.Parameter(torch.randn(HIDDEN))

    def attention(self, x: Tensor) -> Tensor:
        shape = (x.size(0), x.size(1), 4, HIDDEN // 4)
        q, k, v = self.q(x).view(shape), self.k(x).view(shape), self.v(x).view(shape)
        mixed = nn.functional.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.o(mixed.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.norm(x)
        return ((x + self.attention(y)) + self.down(torch.relu(self.up(y)))) + self.bias


class BiasOfBothBranches(BiasOfEitherBranch):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.norm(x)
        return ((self.attention(y) + self.down(torch.relu(self.up(y)))) + self.bias) + x


@pytest.mark.parametrize("model", [BiasOfEitherBranch, BiasOfBothBranches])
def test_a_bias_of_either_of_two_branches_is_refused(model: type[nn.Module]) -> None:
    base = torch.jit.trace(model().eval(), batch(), check_trace=False)
    for config in ("double_seq_bn", "seq_bn"):
        with pytest.raises(torchgraft.GraftError, match="layer 0: no"):
            torchgraft.graft(base, config, "task")


@pytest.mark.parametrize("model", [BiasOfRankThree, BiasBesideTheResidual])
def test_a_bias_that_stays_outside_of_the_branch_is_refused(model: type[nn.Module]) -> None:
    """A branch without its bias would be another one."""
    with pytest.raises(torchgraft.GraftError, match="layer 0: no feed-forward block"):
        torchgraft.graft(torch.jit.script(model().eval()), "seq_bn", "task")


class FlatMask(Plain):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        rows, heads, tokens, size = q.size(0), q.size(1), q.size(2), q.size(3)
        flat = rows * heads
        scores = torch.bmm(q.reshape(flat, tokens, size), k.reshape(flat, tokens, size).transpose(1, 2)) / size**0.5
        hidden = (mask == 0)[:, None, None, :].expand(rows, heads, tokens, tokens).reshape(flat, tokens, tokens)
        weights = torch.softmax(scores.masked_fill(hidden, -1e4), -1)
        return torch.bmm(weights, v.reshape(flat, tokens, size)).view(rows, heads, tokens, size)


@pytest.mark.parametrize("form", ["script", "trace"])
@pytest.mark.parametrize("config", ["prefix_tuning_flat[prefix_length=3]", "lora"])
def test_a_mask_of_rows_times_heads_is_read(config: str, form: str, tmp_path: Path) -> None:
    """As a mask that broadcasts is."""
    _check_same_in_both(Plain().eval(), FlatMask().eval(), form, config, tmp_path, std=1.0)
