"""Layers whose mathematics only look like what a pass rewrites: grafted exactly, or refused with a reason."""

import copy

import pytest
import torch
from torch import Tensor, nn

import torchgraft
from odd_layers import Plain, TwoLayers, batch


class WriteBeforeTheBias(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(32, 32) * 0.2), nn.Parameter(torch.randn(32))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = x @ self.w
        x *= 0.5
        return self.finish(
            x, self.attend(self.heads(h + self.b), self.heads(self.key(x)), self.heads(self.value(x)), mask)
        )


class WriteInsideANorm(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(32))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        n = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        x.mul_(0.5)
        x.add_(0.7)
        n = n * self.w
        return self.finish(
            x, self.attend(self.heads(self.query(n)), self.heads(self.key(n)), self.heads(self.value(n)), mask)
        )


class SoftmaxOverAllPairs(Plain):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        s = torch.matmul(q, k.transpose(-1, -2)) / 2.8284271247461903
        p = torch.softmax(s.flatten(2), -1).view(s.size(0), 4, s.size(2), s.size(3))
        return torch.matmul(p, v)


class SoftmaxOverQueries(Plain):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        b, n = q.size(0), q.size(2)
        s = torch.bmm(q.reshape(b * 4, n, 8), k.reshape(b * 4, n, 8).transpose(1, 2)) / 2.8284271247461903
        p = torch.softmax(s.view(b, 4, n, n), 2).view(b * 4, n, n)
        return torch.bmm(p, v.reshape(b * 4, n, 8)).view(b, 4, n, 8)


class SlicedGroupedHeads(Plain):
    def __init__(self) -> None:
        super().__init__(kv_heads=2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        b, n = k.size(0), k.size(2)
        k = k[:, :, None, 2:, :].expand(b, 2, 2, n - 2, 8).reshape(b, 4, n - 2, 8)
        v = v[:, :, None, 2:, :].expand(b, 2, 2, n - 2, 8).reshape(b, 4, n - 2, 8)
        return torch.matmul(torch.softmax(torch.matmul(q, k.transpose(-1, -2)) / 2.8, -1), v)


class UnevenGroupedHeads(Plain):
    def __init__(self) -> None:
        super().__init__(kv_heads=2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        repeats = torch.tensor([1, 3])
        k, v = torch.repeat_interleave(k, repeats, dim=1), torch.repeat_interleave(v, repeats, dim=1)
        return nn.functional.scaled_dot_product_attention(q, k, v)


class GroupedHeadsWrittenLater(Plain):
    def __init__(self) -> None:
        super().__init__(kv_heads=2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        repeated, values = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
        torch.mul(k, 3.0, out=k)
        return nn.functional.scaled_dot_product_attention(q, repeated, values) + k.sum()


class KeysWrittenBehindTheirScale(Plain):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        half = k * 0.5
        s = torch.matmul(q, half.transpose(-1, -2))
        torch.mul(k, 3.0, out=k)
        return torch.matmul(torch.softmax(s, -1), k)


class ProductsOfABranchThatWrites(Plain):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        b, n = q.size(0), q.size(2)
        q, k = q.reshape(b * 4, n, 8), k.reshape(b * 4, n, 8).transpose(1, 2)
        if bool(mask.sum() > 0):
            torch.mul(q, 3.0, out=q)
            s = torch.bmm(q, k)
        else:
            s = torch.baddbmm(torch.ones([1, 1, 1]), q, k)
        return torch.bmm(torch.softmax(s, -1), v.reshape(b * 4, n, 8)).view(b, 4, n, 8)


class WholeScores(Plain):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        s = (torch.matmul(q, k.transpose(-1, -2)) * 4).to(torch.int32).to(torch.float32)
        return torch.matmul(torch.softmax(s, -1), v)


class PermutedInPlace(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(32, 32) * 0.2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q = torch.matmul(x, self.same(self.w))
        return self.finish(x, self.attend(self.heads(q), self.heads(self.key(x)), self.heads(self.value(x)), mask))

    def same(self, w: Tensor) -> Tensor:
        return w.permute(0, 1)


class TransposedInPlace(PermutedInPlace):
    def same(self, w: Tensor) -> Tensor:
        return w.transpose(1, -1)


class ScoresMinusANumber(Plain):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        s = torch.matmul(q, k.transpose(-1, -2)) / 2.8284271247461903 - 5.0
        return torch.matmul(torch.softmax(s, -1), v)


class ScoresPlusANumber(Plain):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        b, n = q.size(0), q.size(2)
        s = torch.bmm(q.reshape(b * 4, n, 8), k.reshape(b * 4, n, 8).transpose(1, 2)) * 0.3 + 0.1
        return torch.bmm(torch.softmax(s, -1), v.reshape(b * 4, n, 8)).view(b, 4, n, 8)


class SpecialSoftmax(Plain):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return torch.matmul(torch.special.softmax(torch.matmul(q, k.transpose(-1, -2)) * 0.3, -1), v)


TAKEN = [Plain, PermutedInPlace, TransposedInPlace, ScoresMinusANumber, ScoresPlusANumber, SpecialSoftmax]
EITHER = [
    WriteBeforeTheBias, WriteInsideANorm, SoftmaxOverAllPairs, SoftmaxOverQueries, SlicedGroupedHeads,
    UnevenGroupedHeads, GroupedHeadsWrittenLater, KeysWrittenBehindTheirScale, ProductsOfABranchThatWrites, WholeScores,
]  # fmt: skip


def assert_exact(model: nn.Module, form: str, config: str) -> None:
    with torch.no_grad():
        base = torch.jit.script(model) if form == "script" else torch.jit.trace(copy.deepcopy(model), batch())
    grafted = torchgraft.graft(base, config=config, name="task", allow_partial=True)
    with torch.no_grad():
        expected = model(*batch())
        for ids in (torch.full((3,), -1), None) if config == "lora" else (torch.full((3,), -1),):
            assert (grafted(*batch(), adapter_ids=ids) - expected).abs().max().item() < 1e-5


@pytest.mark.parametrize("config", ["lora", "prefix_tuning"])
@pytest.mark.parametrize("form", ["script", "trace"])
@pytest.mark.parametrize("layer", [*TAKEN, *EITHER])
def test_a_layer_before_a_plain_one_is_exact_or_refused(layer: type[nn.Module], form: str, config: str) -> None:
    torch.manual_seed(0)
    try:
        assert_exact(TwoLayers(layer()).eval(), form, config)
    except torchgraft.GraftError as error:
        refused = str(error)
    else:
        return
    assert layer in EITHER and "layer 0: no LoRA on its key" in refused


@pytest.mark.parametrize("form", ["script", "trace"])
@pytest.mark.parametrize("layer", TAKEN)
def test_a_layer_that_can_be_had_is_taken(layer: type[nn.Module], form: str) -> None:
    torch.manual_seed(0)
    model = layer().eval()
    assert_exact(model, form, "lora")
    assert_exact(model, form, "prefix_tuning")


class Hooked(Plain):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.output(self.finish(x, self.heads(x)))


def pre_hook(self, args: tuple[Tensor]) -> tuple[Tensor]:
    return (args[0] * 2,)


def test_forward_hooks_are_refused() -> None:
    model = Hooked()
    model.output.register_forward_pre_hook(pre_hook)
    with pytest.raises(torchgraft.GraftError, match="the submodule output has forward hooks"):
        torchgraft.graft(torch.jit.script(model), config="lora", name="task")


class WithIds(Plain):
    def forward(self, x: Tensor, mask: Tensor, adapter_ids: Tensor | None = None) -> Tensor:
        mixed = self.attend(self.heads(self.query(x)), self.heads(self.key(x)), self.heads(self.value(x)), mask)
        return self.finish(x, mixed)


def test_an_argument_adapter_ids_is_refused() -> None:
    with pytest.raises(torchgraft.GraftError, match="forward has an argument 'adapter_ids' of its own"):
        torchgraft.graft(torch.jit.script(WithIds()), config="lora", name="task")


class Around(nn.Module):
    """What the error says to do for a file: names inside do not matter."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.inner(x, mask)


class WithAdapters(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.adapters = nn.Linear(1, 1)


class WithActivate(Plain):
    @torch.jit.export
    def activate(self, name: str) -> str:
        return name


@pytest.mark.parametrize("model", [WithIds, WithAdapters, WithActivate])
def test_names_of_ours_are_free_inside_another_module(model: type[nn.Module]) -> None:
    inner = torch.jit.script(model().eval())
    with pytest.raises(torchgraft.GraftError, match="give the base's another name in the result: rename="):
        torchgraft.graft(inner, config="lora", name="task")
    outer = torch.jit.script(Around(inner).eval())
    assert torchgraft.graft(outer, config="lora", name="task").adapter_names() == ["task"]


@pytest.mark.parametrize("layer", [1, -1])
def test_a_layer_to_leave_out_that_is_not_there_is_an_error(layer: int) -> None:
    config = torchgraft.LoRAConfig(leave_out=[layer])
    with pytest.raises(torchgraft.GraftError, match="leave_out"):
        torchgraft.graft(torch.jit.script(Plain().eval()), config=config, name="task")


class Forked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Plain(), Plain()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        future = torch.jit.fork(self.first, x, mask)
        return self.second(x + torch.jit.wait(future), mask)


class ForkedIntoAList(Forked):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        futures = [torch.jit.fork(self.first, x, mask)]
        return self.second(x + torch.jit.wait(futures[0]), mask)


def test_a_layer_in_a_fork_is_grafted() -> None:
    torch.manual_seed(0)
    model = Forked().eval()
    base = torch.jit.script(model)
    assert len(torchgraft.inspect(base)["layers"]) == 2
    assert_exact(model, "script", "lora")


def test_a_fork_that_is_kept_is_exact_and_named() -> None:
    torch.manual_seed(0)
    model = ForkedIntoAList().eval()
    structure = torchgraft.inspect(torch.jit.script(model))
    assert len(structure["layers"]) == 1 and "what torch.jit.fork runs was left out" in structure["near_misses"][0]
    with pytest.warns(UserWarning, match="what torch.jit.fork runs was left out"):
        assert_exact(model, "script", "lora")
