"""Attention of rank 3, [rows and heads, tokens, head size]: prefixes go to their rows and heads, in either order."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchgraft

HEADS, SIZE, WIDTH = 4, 8, 32


class _Layer(nn.Module):
    """One post-norm layer. `split` makes [h B, S, d] or [B h, S, d] of [B, S, h d], `join` its inverse."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)

    def split(self, x: Tensor) -> Tensor:
        return x.view(x.size(0), x.size(1), 4, 8).permute(2, 0, 1, 3).reshape(-1, x.size(1), 8)

    def join(self, x: Tensor) -> Tensor:
        return x.view(4, -1, x.size(1), 8).permute(1, 2, 0, 3).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        weights = torch.softmax(torch.bmm(q, k.transpose(1, 2)) / 2.8284271247461903, -1)
        x = self.norm(x + self.o(self.join(torch.bmm(weights, v))))
        return x + self.down(F.gelu(self.up(x)))


class Permuted(_Layer):
    pass


class Joined(_Layer):
    """As in the Transformers of the TensorFlow tutorials."""

    def split(self, x: Tensor) -> Tensor:
        return torch.cat(x.split(8, -1), 0)

    def join(self, x: Tensor) -> Tensor:
        return torch.cat(x.chunk(4, 0), -1)


class Stacked(_Layer):
    def split(self, x: Tensor) -> Tensor:
        return torch.stack(x.split(8, -1), 0).flatten(0, 1)


class Unbound(_Layer):
    def split(self, x: Tensor) -> Tensor:
        return torch.cat(x.view(x.size(0), x.size(1), 4, 8).unbind(2), 0)

    def join(self, x: Tensor) -> Tensor:
        return torch.cat(x.chunk(4, 0), -1)


class ContiguousView(_Layer):
    def split(self, x: Tensor) -> Tensor:
        return x.view(x.size(0), x.size(1), 4, 8).permute(2, 0, 1, 3).contiguous().view(-1, x.size(1), 8)


class HeadsInRows(_Layer):
    def split(self, x: Tensor) -> Tensor:
        return x.view(x.size(0), x.size(1), 4, 8).transpose(1, 2).reshape(-1, x.size(1), 8)

    def join(self, x: Tensor) -> Tensor:
        return x.view(-1, 4, x.size(1), 8).transpose(1, 2).flatten(2)


class TokensFirst(_Layer):
    """As torch.nn.MultiheadAttention: [S, B, h d] viewed as [S, B h, d]."""

    def split(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1).contiguous().view(x.size(1), x.size(0) * 4, 8).transpose(0, 1)

    def join(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1).contiguous().view(x.size(1), -1, 32).transpose(0, 1)


def _with_prefix(model: _Layer, x: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None = None) -> Tensor:
    """The definition (Li and Liang 2021, section 4; He et al. 2021, equation 5), heads as a dimension of their own.
    `bias`, which broadcasts against [B, h, S, S], is added to the scores of the tokens' own keys."""

    def heads(y: Tensor) -> Tensor:
        return y.unflatten(-1, (HEADS, SIZE)).transpose(1, 2)

    rows = (x.size(0), -1, -1, -1)
    q, k, v = heads(model.q(x)), heads(model.k(x)), heads(model.v(x))
    k, v = torch.cat([keys.expand(rows), k], 2), torch.cat([values.expand(rows), v], 2)
    if bias is not None:
        bias = F.pad(bias.expand(x.size(0), HEADS, x.size(1), x.size(1)), (keys.size(-2), 0))
    mixed = F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2)
    x = model.norm(x + model.o(mixed))
    return x + model.down(F.gelu(model.up(x)))


_SPELLINGS = [Permuted, Joined, Stacked, Unbound, ContiguousView, HeadsInRows, TokensFirst]


@pytest.mark.parametrize("form", ["scripted", "traced"])
@pytest.mark.parametrize("spelling", _SPELLINGS)
def test_prefixes_are_of_their_rows_and_heads(spelling: type[_Layer], form: str) -> None:
    torch.manual_seed(0)
    model = spelling().double().eval()
    x = torch.randn(3, 5, WIDTH).double()
    base = torch.jit.script(model) if form == "scripted" else torch.jit.trace(model, torch.randn(2, 6, WIDTH).double())
    if form == "scripted" and spelling in (Joined, Stacked, Unbound):
        with pytest.raises(torchgraft.GraftError, match="is not known; view them"):
            torchgraft.graft(base, "prefix_tuning_flat[prefix_length=3]", "a")
        return
    grafted = torchgraft.graft(base, "prefix_tuning_flat[prefix_length=3]", "a", example=(x,))
    grafted = torchgraft.graft(grafted, "prefix_tuning_flat[prefix_length=2]", "b", example=(x,))
    slot = grafted.adapters.layer_0.self_prefix
    with torch.no_grad():
        slot.prefix_key.normal_()
        slot.prefix_value.normal_()
        ids = torch.tensor([1, -1, 0])
        mixed, plain = grafted(x, adapter_ids=ids), base(x)
        of_base = grafted(x, adapter_ids=torch.full((3,), -1))
        torch.testing.assert_close(of_base, plain, rtol=0, atol=1e-12)
        for number, (name, length) in enumerate({"a": 3, "b": 2}.items()):
            keys, values = slot.prefix_key[number, :, :length], slot.prefix_value[number, :, :length]
            expected = _with_prefix(model, x, keys, values)
            grafted.activate(name)
            torch.testing.assert_close(grafted(x), expected, rtol=0, atol=1e-12)
            row = ids.tolist().index(number)
            torch.testing.assert_close(mixed[row], expected[row], rtol=0, atol=1e-12)
        torch.testing.assert_close(mixed[1], plain[1], rtol=0, atol=1e-12)


class _Masked(_Layer):
    """`hide` hides keys in the scores [h B, S, S]."""

    def forward(self, x: Tensor, shown: Tensor) -> Tensor:
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        scores = torch.bmm(q, k.transpose(1, 2)) / 2.8284271247461903
        weights = torch.softmax(self.hide(scores, x, shown), -1)
        x = self.norm(x + self.o(self.join(torch.bmm(weights, v))))
        return x + self.down(F.gelu(self.up(x)))


class MaskedByHead(_Masked):
    """The mask has an entry for each head and row, in the order of the scores."""

    def hide(self, scores: Tensor, x: Tensor, shown: Tensor) -> Tensor:
        return scores + (1.0 - shown)[None, :, None, :].expand(4, x.size(0), x.size(1), x.size(1)).flatten(0, 1) * -1e9


class MaskedByRepeat(_Masked):
    """As in the Transformers of the TensorFlow tutorials: the mask is repeated for each head."""

    def hide(self, scores: Tensor, x: Tensor, shown: Tensor) -> Tensor:
        return scores.masked_fill(shown.repeat(4, 1)[:, None, :] == 0, -1e9)


class MaskedInRank4(_Masked):
    """The mask is added to [h, B, S, S]."""

    def hide(self, scores: Tensor, x: Tensor, shown: Tensor) -> Tensor:
        scores = scores.view(4, -1, x.size(1), x.size(1)) + (1.0 - shown)[None, :, None, :] * -1e9
        return scores.view(-1, x.size(1), x.size(1))


@pytest.mark.parametrize("spelling", [MaskedByHead, MaskedByRepeat, MaskedInRank4])
def test_masks_are_of_their_rows_or_refused(spelling: type[_Layer]) -> None:
    torch.manual_seed(0)
    model = spelling().double().eval()
    x, shown = torch.randn(3, 5, WIDTH).double(), torch.ones(3, 5).double()
    shown[1, 3:] = 0
    base = torch.jit.trace(model, (torch.randn(2, 6, WIDTH).double(), torch.ones(2, 6).double()))
    if spelling is MaskedInRank4:
        with pytest.raises(torchgraft.GraftError, match="put the heads behind the batch"):
            torchgraft.graft(base, "prefix_tuning_flat", "a")
        return
    grafted = torchgraft.graft(base, "prefix_tuning_flat[prefix_length=3]", "a", example=(x, shown))
    slot = grafted.adapters.layer_0.self_prefix
    with torch.no_grad():
        slot.prefix_key.normal_()
        slot.prefix_value.normal_()
        rows = grafted(x, shown, adapter_ids=torch.tensor([0, 0, -1]))
        torch.testing.assert_close(rows[2], base(x, shown)[2], rtol=0, atol=1e-12)
        torch.testing.assert_close(rows[1:2, :3], grafted(x[1:2, :3], shown[1:2, :3]), rtol=0, atol=1e-12)
        expected = _with_prefix(model, x[:1], slot.prefix_key[0], slot.prefix_value[0])
        torch.testing.assert_close(rows[:1], expected, rtol=0, atol=1e-12)


class _GivenBias(_Masked):
    """The bias is an argument, of which nothing tells the rank."""

    def hide(self, scores: Tensor, x: Tensor, shown: Tensor) -> Tensor:
        return scores + shown


class GivenHeadsInRows(HeadsInRows, _GivenBias):
    pass


class GivenRowsInHeads(_GivenBias):
    pass


def _in_heads(bias: Tensor, spelling: type[_Layer]) -> Tensor:
    """[3 h, S, S] as the scores of `spelling` count it, as [3, h, S, S]; others broadcast."""
    if bias.dim() < 3 or bias.size(0) == 1:
        return bias
    return (
        bias.unflatten(0, (3, HEADS)) if spelling is GivenHeadsInRows else bias.unflatten(0, (HEADS, 3)).transpose(0, 1)
    )


@pytest.mark.parametrize("form", ["scripted", "traced"])
@pytest.mark.parametrize("shape", [(5,), (5, 5), (1, 5, 5), (12, 1, 5), (12, 5, 5)])
@pytest.mark.parametrize("spelling", [GivenHeadsInRows, GivenRowsInHeads])
def test_a_mask_of_any_rank_that_broadcasts_is_of_its_rows_and_heads(
    spelling: type[_Layer], shape: tuple[int, ...], form: str
) -> None:
    torch.manual_seed(0)
    model = spelling().double().eval()
    x, bias = torch.randn(3, 5, WIDTH).double(), torch.randn(shape).double()
    example = (torch.randn(2, 6, WIDTH).double(), torch.randn(6, 6).double())
    base = torch.jit.script(model) if form == "scripted" else torch.jit.trace(model, example)
    grafted = torchgraft.graft(base, "prefix_tuning_flat[prefix_length=3]", "a", example=(x, bias))
    slot = grafted.adapters.layer_0.self_prefix
    with torch.no_grad():
        slot.prefix_key.normal_()
        slot.prefix_value.normal_()
        rows = grafted(x, bias, adapter_ids=torch.tensor([0, -1, 0]))
        expected = _with_prefix(model, x, slot.prefix_key[0], slot.prefix_value[0], _in_heads(bias, spelling))
        torch.testing.assert_close(rows[[0, 2]], expected[[0, 2]], rtol=0, atol=1e-12)
        torch.testing.assert_close(rows[1], base(x, bias)[1], rtol=0, atol=1e-12)
        with pytest.raises(RuntimeError):
            grafted(x, torch.randn(6, 5, 5).double())  # of other rows: an error of the base, too


class _TwoViews(_Layer):
    """Two views of each row, one below the other: no heads, though the rows are a multiple of the batch."""

    def forward(self, x: Tensor) -> Tensor:
        seen = self.o(x)
        both = torch.cat([seen, seen * 2.0], 0)
        weights = torch.softmax(torch.bmm(self.q(both), self.k(both).transpose(1, 2)) / 5.656854249492381, -1)
        both = self.norm(both + self.o(torch.bmm(weights, self.v(both))))
        return (both + self.down(F.gelu(self.up(both)))).chunk(2, 0)[0]


def test_rows_that_are_a_multiple_of_the_batch_are_no_heads() -> None:
    base = torch.jit.trace(_TwoViews().eval(), torch.randn(2, 5, WIDTH))
    with pytest.raises(torchgraft.GraftError, match="counts rows and heads is not known|is not of shape"):
        torchgraft.graft(base, "prefix_tuning", "a")


class Reversed(_Layer):
    """The last features are the first head, of which a prefix of the plain spelling knows nothing."""

    def split(self, x: Tensor) -> Tensor:
        return torch.cat(list(x.split(8, -1))[::-1], 0)

    def join(self, x: Tensor) -> Tensor:
        return torch.cat(list(x.chunk(4, 0))[::-1], -1)


class Windows(_Layer):
    """Halves of the tokens, as rows of one head."""

    def split(self, x: Tensor) -> Tensor:
        return torch.cat(x.chunk(2, 1), 0)

    def join(self, x: Tensor) -> Tensor:
        return torch.cat(x.chunk(2, 0), 1)


@pytest.mark.parametrize("spelling", [Reversed, Windows])
def test_pieces_that_are_no_heads_in_order_are_refused(spelling: type[_Layer]) -> None:
    base = torch.jit.trace(spelling().eval(), torch.randn(2, 6, WIDTH))
    with pytest.raises(torchgraft.GraftError, match="counts rows and heads is not known"):
        torchgraft.graft(base, "prefix_tuning", "a")
