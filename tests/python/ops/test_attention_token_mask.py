import math

import pytest
import torch

import op_reference
from op_cases import MASKS, attention_mask

op = torch.ops.torchgraft.attention_token_mask
BATCH, HEADS, QUERIES, TOKENS = 3, 2, 4, 5


def make(kind, dtype=torch.float32, queries=QUERIES):
    torch.manual_seed(0)
    x = torch.randn(BATCH, TOKENS, 6, dtype=dtype)
    mask = None if kind is None else attention_mask(kind, BATCH, HEADS, queries, TOKENS, dtype)
    return x, mask


@pytest.mark.parametrize("kind", [None, *MASKS])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_results_and_gradients_equal_the_reference(kind, dtype):
    x, mask = make(kind, dtype)
    actual = op(x, mask)
    assert actual.dtype == torch.bool
    assert actual.is_contiguous()
    assert torch.equal(actual, op_reference.attention_token_mask(x, mask))


def test_padding_is_found_whatever_its_spelling():
    x, mask = make("bool_padding")
    expected = mask[:, 0, 0]
    assert torch.equal(expected.sum(1), torch.tensor([5, 4, 3]))
    assert torch.equal(op(x, mask), expected)
    for fill in (-math.inf, torch.finfo(torch.float32).min, -1e9, -1e4):
        padded = torch.zeros(BATCH, 1, 1, TOKENS).masked_fill(~mask, fill)
        assert torch.equal(op(x, padded), expected)
        # A causal mask merged into it hides no key from the last query.
        causal = padded + torch.full((TOKENS, TOKENS), fill).triu(1)
        assert torch.equal(op(x, causal), expected)


REAL = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1], [0, 0, 0, 1, 1]], dtype=torch.bool)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("window", [5, 2])
@pytest.mark.parametrize("padding_sees", ["nothing", "itself", "everything"])
def test_padding_that_only_padding_sees_is_no_token(side, window, padding_sees):
    real = REAL if side == "left" else REAL.flip(1)
    causal = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril().triu(1 - window)
    mask = (causal & real[:, None, :])[:, None]
    if side == "left":  # on the right, padding that sees itself looks like a real token
        if padding_sees == "itself":
            mask = mask | (torch.eye(TOKENS, dtype=torch.bool) & ~real[:, None, :, None])
        elif padding_sees == "everything":  # transformers, for rows that would see nothing
            mask = mask | ~real[:, None, :, None]
    x = torch.zeros(BATCH, TOKENS, 6)
    assert torch.equal(op(x, mask), real)
    assert torch.equal(op(x, mask), op_reference.attention_token_mask(x, mask))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("padding_sees", ["nothing", "itself", "text", "itself and text"])
def test_padding_of_texts_that_see_both_ways(side, padding_sees):
    real = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1], [0, 0, 0, 1, 1]], dtype=torch.bool)
    real = real if side == "left" else real.flip(1)
    mask = real[:, None, :] & (real[:, :, None] | torch.tensor("text" in padding_sees))
    if "itself" in padding_sees:
        mask = mask | torch.eye(TOKENS, dtype=torch.bool)
    x = torch.zeros(BATCH, TOKENS, 6)
    assert torch.equal(op(x, mask[:, None]), real)
    assert torch.equal(op(x, mask[:, None]), op_reference.attention_token_mask(x, mask[:, None]))


@pytest.mark.parametrize(
    "segments",
    [[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 1, 2, 2, 2], [1, 1, 2, 2, 0]],
    ids=["padding right", "padding left", "two texts", "two texts and one of padding"],
)
@pytest.mark.parametrize("causal", [False, True])
def test_groups_of_tokens_that_do_not_see_each_other_are_refused(segments, causal):
    ids = torch.tensor([[1, 1, 1, 1, 1], segments])
    mask = ids[:, None, :] == ids[:, :, None]
    mask = mask.tril() if causal else mask
    x = torch.zeros(2, TOKENS, 6)
    with pytest.raises(RuntimeError, match=r"attention_token_mask: row 1 .* do not see each other.*gate_pooling"):
        op(x, mask[:, None])
    with pytest.raises(ValueError, match="each other|alone"):
        op_reference.attention_token_mask(x, mask[:, None])


@pytest.mark.parametrize("seed", range(200))
def test_drawn_masks_equal_the_reference_or_are_refused(seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = int(torch.randint(1, 7, (), generator=generator))
    mask = torch.rand(1, 1, tokens, tokens, generator=generator) < torch.rand((), generator=generator)
    x = torch.zeros(1, tokens, 6)
    try:
        expected = op_reference.attention_token_mask(x, mask)
    except ValueError:
        with pytest.raises(RuntimeError, match="do not see each other"):
            op(x, mask)
        return
    assert torch.equal(op(x, mask), expected)


@pytest.mark.parametrize("kind", MASKS)
def test_square_masks_equal_the_reference(kind):
    x, mask = make(kind, queries=TOKENS)
    assert torch.equal(op(x, mask), op_reference.attention_token_mask(x, mask))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_position_bias_is_no_mask(dtype):
    x = torch.zeros(1, 2, 3)
    mask = torch.tensor([[-2e3, torch.finfo(dtype).min]], dtype=dtype)
    assert torch.equal(op(x, mask), torch.tensor([[True, False]]))


def test_three_dimensional_mask_is_heads_first():
    x = torch.zeros(2, 3, 1)
    mask = torch.zeros(2, 1, 3, dtype=torch.bool)
    mask[1, 0, 2] = True  # only head 1 sees key 2, in every row
    assert torch.equal(op(x, mask), torch.tensor([[False, False, True]] * 2))


@pytest.mark.parametrize("kind", [None, *MASKS])
def test_opcheck_finds_nothing_and_meta_tensors_have_the_shape(kind):
    x, mask = make(kind)
    torch.library.opcheck(op, (x, mask))
    torch.library.opcheck(op, (x.requires_grad_(), mask))
    meta = op(x.to("meta"), None if mask is None else mask.to("meta"))
    assert (meta.shape, meta.dtype) == ((BATCH, TOKENS), torch.bool)


def test_result_needs_no_gradient():
    x, mask = make("float_4d")
    assert not op(x.requires_grad_(), mask.requires_grad_()).requires_grad


@pytest.mark.parametrize(
    ("x", "mask", "message"),
    [
        (torch.zeros(3, 5), None, r"expected x of shape \[B, S, H\], got \[3, 5\]"),
        (
            torch.zeros(3, 5, 2),
            torch.zeros(5, 4),
            r"expected attn_mask that broadcasts to \[3, h, S_q, 5\], got \[5, 4\]",
        ),
        (torch.zeros(3, 5, 2), torch.zeros(2, 1, 1, 5), r"broadcasts to \[3, h, S_q, 5\], got \[2, 1, 1, 5\]"),
        (torch.zeros(3, 5, 2), torch.zeros(5).bool(), r"expected attn_mask of 2, 3 or 4 dimensions"),
        (torch.zeros(3, 5, 2), torch.zeros(5, 5).int(), "expected attn_mask of a floating dtype or Bool, got Int"),
    ],
)
def test_wrong_arguments_are_named(x, mask, message):
    with pytest.raises(RuntimeError, match="attention_token_mask: .*" + message):
        op(x, mask)
