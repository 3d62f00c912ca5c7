import functools
import itertools
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


def _text_sees(kind: str, tokens: int) -> torch.Tensor:
    """Whether each token of a text of `tokens` sees each other one."""
    both = torch.ones(tokens, tokens, dtype=torch.bool)
    window = both.triu(-1).tril(1)
    if kind in ("both ways", "window both ways"):
        return both if kind == "both ways" else window
    if kind.startswith("summary of "):  # the last token sees all; no other one sees it
        result = _text_sees(kind.removeprefix("summary of "), tokens).clone()
        result[:-1, -1], result[-1] = False, True
        return result
    causal = both.tril()
    if kind == "window":
        return causal.triu(-1)
    if kind == "prefix and causal":
        causal[: (tokens + 1) // 2, : (tokens + 1) // 2] = True
    return causal


KINDS = ["causal", "window", "prefix and causal", "both ways", "window both ways"]
# What queries of padding see; that of "everything" is transformers' for rows that would see nothing.
PADDING_SEES = ["nothing", "text", "itself", "text and itself", "everything"]


def _padded(kind: str, side: str, padding_sees: str, text: int, padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A mask [S, S] of a text with padding on one side, and which tokens [S] are real."""
    real = torch.tensor([False] * padding * (side == "left") + [True] * text + [False] * padding * (side == "right"))
    mask = torch.zeros(text + padding, text + padding, dtype=torch.bool)
    mask[real.nonzero(), real.nonzero().T] = _text_sees(kind, text)
    if "text" in padding_sees:
        mask |= ~real[:, None] & real
    if "itself" in padding_sees:
        mask |= torch.eye(text + padding, dtype=torch.bool) & ~real
    if padding_sees == "everything":
        mask |= ~real[:, None]
    return mask, real


def _key(mask: torch.Tensor) -> tuple:
    return mask.shape[0], tuple(mask.flatten().tolist())


@functools.cache
def _readings() -> dict[tuple, set[tuple]]:
    """By mask: all that its real tokens may be. Texts may have a summary, and padding may see padding as texts do."""
    result: dict[tuple, set[tuple]] = {}

    def add(mask: torch.Tensor, real: torch.Tensor) -> None:
        result.setdefault(_key(mask), set()).add(tuple(real.tolist()))

    for case in itertools.product(KINDS, ["left", "right"], PADDING_SEES, range(1, 9), range(4)):
        add(*_padded(*case))
    for kind, text in itertools.product(KINDS, range(1, 9)):
        whole = torch.ones(text, dtype=torch.bool)
        add(_text_sees(f"summary of {kind}", text), whole)
        for prefix in range(text):
            mask = _text_sees("causal", text)
            mask[:prefix, :prefix] = True
            add(mask, whole)
        for other in range(2, 6):
            mask = torch.block_diag(_text_sees(kind, other), _text_sees(kind, text))
            real = torch.arange(other + text) >= other
            if text > 1:
                add(mask, ~real)
            if text > 1 or "both ways" not in kind:  # else the one token is padding that sees itself
                add(mask, real)
    return result


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("padding_sees", PADDING_SEES)
def test_the_text_is_found_or_the_mask_has_two_readings(kind: str, side: str, padding_sees: str) -> None:
    """Of two readings the operator takes the one without padding, or none."""
    readings = _readings()
    for text, padding in itertools.product(range(1, 6), range(4)):
        mask, real = _padded(kind, side, padding_sees, text, padding)
        possible = readings[_key(mask)]
        try:
            actual = tuple(op(torch.zeros(1, text + padding, 6), mask)[0].tolist())
        except RuntimeError as error:
            assert "row 0 are padding cannot be told" in str(error)  # noqa: PT017
            assert len(possible) > 1 or len(readings[_key(_text_sees(kind, text))]) > 1, (text, padding)
            continue
        wanted = tuple(real.tolist()) if len(possible) == 1 else (True,) * (text + padding)
        assert actual == wanted, (text, padding, possible)


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
    with pytest.raises(RuntimeError, match=r"attention_token_mask: which tokens of row 1 are padding .*gate_pooling"):
        op(torch.zeros(2, TOKENS, 6), mask[:, None])


@pytest.mark.parametrize("order", [[4, 3, 2, 1, 0], [3, 0, 4, 1, 2], [1, 4, 0, 2, 3]])
def test_orders_that_are_no_text_s_are_refused(order):
    rank = torch.tensor(order)  # each token sees those before it in the order
    with pytest.raises(RuntimeError, match="cannot be told"):
        op(torch.zeros(1, TOKENS, 6), rank[:, None] >= rank[None, :])


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
