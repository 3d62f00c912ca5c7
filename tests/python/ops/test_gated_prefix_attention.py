import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import op_checks
import op_reference
from op_cases import MASKS, PREFIX_CASES, Case, prefix

op = torch.ops.torchgraft.gated_prefix_attention
cases = pytest.mark.parametrize("case", PREFIX_CASES, ids=str)
FLOAT_TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@cases
def test_gradients_beside_a_mask_without_one_equal_the_reference(case):
    """Without a gradient for the mask torch takes its flash backward; the test of results and gradients needs one."""
    args = prefix(case, torch.float64)
    names = [name for name in op_checks.differentiable(args) if name != "attn_mask"]
    op_checks.assert_same_gradients(
        op_checks.gradients(op, args, names),
        op_checks.gradients(op_reference.gated_prefix_attention, args, names),
        rtol=1e-9,
        atol=1e-10,
    )


@pytest.mark.parametrize("mask", [None, *MASKS])
@pytest.mark.parametrize("ids", [None, (-1, -1, -1), (-1, 0, -1)])
@pytest.mark.parametrize("dtype", FLOAT_TYPES, ids=str)
def test_base_rows_are_plain_attention(mask, ids, dtype):
    extra = {} if mask is None else {"mask": mask}
    args = prefix(Case("", adapter=-1, gate="gated", ids=ids, extra=extra), dtype)
    output, gate = op(**args)
    mask = args.get("attn_mask")
    if mask is not None and mask.dim() == 3:
        mask = mask[None]  # the same to torch, but for three dimensions it takes another kernel with other roundings
    expected = F.scaled_dot_product_attention(args["query"], args["key"], args["value"], mask)
    rows = [0, 1, 2] if ids is None else [b for b, n in enumerate(ids) if n == -1]
    if dtype == torch.float32:  # has a kernel of its own: the same bits whatever else is in the batch
        alone, _ = op(**{**args, "adapter_ids": None, "adapter": -1})
        assert torch.equal(output[rows], alone[rows])
        torch.testing.assert_close(output[rows], expected[rows], rtol=1e-5, atol=1e-6)
    elif dtype == torch.bfloat16 and not torch.equal(output[rows], expected[rows]):
        # A kernel of its own where the processor has no products of bfloat16: torch's rounds its probabilities to
        # bfloat16, this one rounds its result, once.
        alone, _ = op(**{**args, "adapter_ids": None, "adapter": -1})
        assert torch.equal(output[rows], alone[rows])
        wide = [
            None if tensor is None else tensor if tensor.dtype == torch.bool else tensor.double()
            for tensor in (args["query"], args["key"], args["value"], mask)
        ]
        exact = F.scaled_dot_product_attention(*wide)
        torch.testing.assert_close(output[rows].double(), exact[rows], rtol=2.0**-8, atol=1e-6)
    else:
        assert torch.equal(output[rows], expected[rows])
    assert not gate[rows].any()


def test_output_is_token_major_in_every_path():
    for case in PREFIX_CASES:
        output, _ = op(**prefix(case, torch.float32))
        assert output.transpose(1, 2).is_contiguous(), case.name


@pytest.mark.parametrize("mask", MASKS)
def test_last_dimension_need_not_be_dense(mask):
    args = prefix(Case("", gate="gated", extra={"mask": mask}), torch.float64)
    strided = {**args, **{name: args[name].mT.contiguous().mT for name in ("query", "key", "value", "prefix_key")}}
    torch.testing.assert_close(op(**strided)[0], op(**args)[0])
    op_checks.assert_same_gradients(
        op_checks.gradients(op, strided), op_checks.gradients(op, args), rtol=1e-10, atol=1e-12
    )


def dropout_args(p, **changes):
    case = Case("", tokens=6, extra={"heads": 4, "kv_heads": 2, "mask": "float_blind"}, ids=(2, -1, 0), gate="gated")
    return {**prefix(case, torch.float64), "dropout_p": p, **changes}


def test_dropout_of_everything_gives_zero():
    args = dropout_args(1.0)
    output, gate = op(**args)
    assert not output.any()
    assert gate[0] > 0
    assert all(grad is None or grad.isfinite().all() for grad in op_checks.gradients(op, args).values())


def test_dropout_is_random_and_right_on_average():
    args = dropout_args(0.3)
    expected, _ = op(**{**args, "dropout_p": 0.0})
    torch.manual_seed(0)
    draws = torch.stack([op(**args)[0] for _ in range(4000)])
    assert not torch.equal(draws[0], draws[1])
    error = (draws.mean(0) - expected).abs()
    # Five standard errors, and a floor for entries that do not vary (queries that see nothing).
    assert (error <= 5 * draws.std(0) / len(draws) ** 0.5 + 1e-12).all()


def test_dropout_in_float32_gives_the_gradients_of_float64():
    """The gate's included: its kernel records no gradient in float32. One seed drops the same elements in both."""
    wide = dropout_args(0.3, attn_mask=None)
    narrow = {
        name: value.float() if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in wide.items()
    }
    found = []
    for args in (narrow, wide):
        torch.manual_seed(0)
        found.append(op_checks.gradients(op, args, weights=(1.0, None)))
    assert found[0]["gate_weight"].any() and found[0]["gate_bias"].any()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient.double(), found[1][name], rtol=1e-4, atol=1e-5, msg=name)


def test_dropout_hits_prefix_and_sequence_alike():
    args = dropout_args(0.5, prefix_value=torch.zeros(3, 2, 3, 4, dtype=torch.float64), attn_mask=None)
    args["value"] = torch.ones_like(args["value"])
    torch.manual_seed(0)
    sequence = op(**args)[0]
    args["prefix_value"], args["value"] = torch.ones_like(args["prefix_value"]), torch.zeros_like(args["value"])
    on_prefix = op(**args)[0]
    for part in (sequence[0], on_prefix[0]):
        assert part.unique().numel() > 3


def test_dropout_gradient_is_that_of_the_same_draw():
    args = dropout_args(0.4)
    args["attn_mask"] = args["attn_mask"].clamp_min(-1e3)

    def seeded(**kwargs):
        torch.manual_seed(3)
        return op(**kwargs)

    op_checks.check_gradcheck(seeded, args)


def test_dropout_leaves_a_causal_mask_as_it_is():
    """A dropout this rare drops nothing, but runs the code for dropout."""
    args = dropout_args(1e-12, attn_mask=None, is_causal=True)
    without = {**args, "dropout_p": 0.0}
    torch.testing.assert_close(op(**args)[0], op(**without)[0], rtol=1e-9, atol=1e-10)
    op_checks.assert_same_gradients(
        op_checks.gradients(op, args), op_checks.gradients(op, without), rtol=1e-9, atol=1e-10
    )


def test_dropout_of_base_is_torch_s():
    args = dropout_args(0.4, adapter_ids=None, adapter=-1)
    torch.manual_seed(5)
    output, _ = op(**args)
    torch.manual_seed(5)
    expected = F.scaled_dot_product_attention(
        args["query"], args["key"], args["value"], args["attn_mask"], dropout_p=0.4, enable_gqa=True
    )
    assert torch.equal(output, expected)


def test_prefix_ignores_positions_past_its_length():
    args = prefix(Case("", ids=(0, 1, 2), gate="gated", extra={"lengths": [2, 0, 3]}), torch.float64)
    expected = op(**args)[0]
    changed = {**args, "prefix_key": args["prefix_key"].clone(), "prefix_value": args["prefix_value"].clone()}
    for n, length in enumerate([2, 0, 3]):
        changed["prefix_key"][n, :, length:] = 1e4
        changed["prefix_value"][n, :, length:] = -1e4
    assert torch.equal(op(**changed)[0], expected)
    grads = op_checks.gradients(op, args)
    assert not grads["prefix_key"][0, :, 2:].any()
    assert not grads["prefix_value"][1].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("ids", [None, (0, 1, 2), (1, -1, 0)])
@pytest.mark.parametrize("way", ["plain", "mask", "dropout"])
def test_numbers_past_a_prefix_s_length_reach_no_row(ids, dtype, way):
    """Neither results nor gradients. A gradient of the mask and dropout run other code than what has neither."""
    lengths = [2, 0, 3]
    extra = {"lengths": lengths} | ({"mask": "float_2d"} if way == "mask" else {})
    args = prefix(Case("", ids=ids, gate="gated", extra=extra), dtype)
    if way == "dropout":
        args["dropout_p"] = 1e-12  # drops nothing
    changed = {**args, "prefix_key": args["prefix_key"].clone(), "prefix_value": args["prefix_value"].clone()}
    for n, length in enumerate(lengths):
        changed["prefix_key"][n, :, length:] = float("nan")
        changed["prefix_value"][n, :, length:] = float("inf")
    assert torch.equal(op(**changed)[0], op(**args)[0])
    found, expected = op_checks.gradients(op, changed), op_checks.gradients(op, args)
    op_checks.assert_same_gradients(found, expected, **op_checks.TOLERANCE[dtype])


@settings(max_examples=80, deadline=None)
@given(
    batch=st.integers(1, 3),
    queries=st.integers(1, 6),
    keys=st.integers(0, 7),
    kv_heads=st.integers(1, 3),
    repeats=st.integers(1, 3),
    positions=st.integers(0, 4),
    size=st.integers(1, 5),
    gates=st.sampled_from([0, 1, 2]),
    mask=st.sampled_from([None, "causal", *MASKS]),
    data=st.data(),
)
def test_random_shapes_equal_the_reference(batch, queries, keys, kv_heads, repeats, positions, size, gates, mask, data):
    if mask is not None and mask.endswith("blind") and queries < 2:
        queries = 2
    ids = data.draw(st.none() | st.tuples(*[st.integers(-1, 1)] * batch))
    lengths = data.draw(st.lists(st.integers(0, positions), min_size=2, max_size=2))
    extra = {"heads": kv_heads * repeats, "kv_heads": kv_heads, "keys": keys, "positions": positions}
    extra["lengths"] = lengths
    if mask == "causal":
        extra["is_causal"] = True
    elif mask is not None:
        extra["mask"] = mask
    case = Case("", batch, queries, 2, "gated" if gates else None, max(gates, 1), ids=ids, extra=extra)
    args = prefix(case, torch.float64, size)
    op_checks.check_values(op, op_reference.gated_prefix_attention, args, torch.float64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(3, 4, 6)}, r"expected query of shape \[3, h, 4, d\], got \[3, 2, 5, 4\]"),
        ({"key": torch.zeros(3, 2, 5, 3)}, r"expected key of shape \[3, h_kv, S_k, 4\], got \[3, 2, 5, 3\]"),
        ({"value": torch.zeros(3, 2, 4, 4)}, r"expected value of shape \[3, 2, 5, 4\], got \[3, 2, 4, 4\]"),
        (
            {"query": torch.zeros(3, 4, 5, 4)},
            r"expected key with the 4 heads of query, got 2 \(grouped-query attention needs enable_gqa=True\)",
        ),
        (
            {"query": torch.zeros(3, 3, 5, 4), "enable_gqa": True},
            "expected query heads that are a multiple of the 2 key/value heads, got 3",
        ),
        ({"prefix_key": torch.zeros(3, 4, 3, 4)}, r"expected prefix_key of shape \[N, 2, P, 4\], got \[3, 4, 3, 4\]"),
        ({"prefix_value": torch.zeros(3, 2, 2, 4)}, r"expected prefix_value of shape \[3, 2, 3, 4\]"),
        ({"prefix_length": torch.tensor([1, 2])}, r"expected prefix_length of shape \[3\], got \[2\]"),
        ({"prefix_length": torch.ones(3)}, "expected prefix_length of dtype Long, got Float"),
        ({"prefix_key": torch.zeros(3, 2, 3, 4).half()}, "expected prefix_key of dtype Float as x, got Half"),
        (
            {"attn_mask": torch.zeros(5, 4)},
            r"expected attn_mask that broadcasts to \[3, 2, 5, 5\], got \[5, 4\]",
        ),
        ({"attn_mask": torch.zeros(5)}, r"expected attn_mask of 2, 3 or 4 dimensions .* got \[5\]"),
        ({"attn_mask": torch.zeros(5, 5).long()}, "expected attn_mask of a floating dtype or Bool, got Long"),
        ({"attn_mask": torch.zeros(5, 5), "is_causal": True}, "expected is_causal=False beside an attn_mask"),
        ({"dropout_p": 1.5}, r"expected dropout_p in \[0, 1\], got 1.5"),
        ({"gate_weight": torch.zeros(3, 3, 6)}, r"expected gate_weight with G = 1 or 2 gates.*got \[3, 3, 6\]"),
        ({"adapter": 7}, r"expected adapter in \[-1, 3\), got 7"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    args = {**prefix(Case("", gate="gated"), torch.float32), **changes}
    with pytest.raises(RuntimeError, match="gated_prefix_attention: " + message):
        op(**args)
