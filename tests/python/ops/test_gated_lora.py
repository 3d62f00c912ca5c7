import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import op_checks
import op_reference
from op_cases import Case, lora

op = torch.ops.torchgraft.gated_lora
FLOAT_TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def test_base_rows_are_exact_beside_non_finite_weights():
    args = lora(Case("", ids=(1, -1, 2)), torch.float32)
    args["lora_b"][0] = float("nan")  # no row uses adapter 0
    output, gate = op(**args)
    assert output.isfinite().all()
    assert torch.equal(output[1], args["base"][1])
    assert gate[1] == 0
    grads = op_checks.gradients(op, args)
    assert grads["x"].isfinite().all()
    assert not grads["x"][1].any()
    assert not grads["lora_a"][0].any()


@pytest.mark.parametrize("dtype", FLOAT_TYPES, ids=str)
def test_base_rows_of_no_columns(dtype):
    """Their bytes would be copied from null to null, which UBSan sees (scripts/test asan)."""
    args = lora(Case("", ids=(-1, 0, 2)), dtype, out_features=0)
    assert op(**args)[0].shape == (3, 5, 0)


def test_result_is_no_alias_and_is_dense():
    args = lora(Case("", adapter=-1), torch.float32)
    args["base"] = args["base"].transpose(0, 1).contiguous().transpose(0, 1)
    output, _ = op(**args)
    assert output.is_contiguous()
    assert output.data_ptr() != args["base"].data_ptr()
    assert torch.equal(output, args["base"])


@pytest.mark.parametrize("dtype", FLOAT_TYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 7, 49, 97])
@pytest.mark.parametrize("mask", [None, "ragged"])
def test_ungated_adapter_of_a_gated_bank_has_gate_exactly_one(dtype, tokens, mask):
    args = lora(Case("", tokens=tokens, gate="partly", token_mask=mask), dtype)
    _, gate = op(**args)
    # Short rows whose mask leaves no token have gate 0 like any other.
    expected = torch.ones(3, 1, dtype=dtype) if mask is None else args["token_mask"].any(1, keepdim=True).to(dtype)
    assert torch.equal(gate, expected)
    assert all(grad.isfinite().all() for grad in op_checks.gradients(op, args).values())


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 4),
    tokens=st.integers(1, 9),
    features=st.integers(1, 11),
    out_features=st.integers(1, 11),
    rank=st.integers(0, 5),
    gated=st.booleans(),
    data=st.data(),
)
def test_random_shapes_equal_the_reference(batch, tokens, features, out_features, rank, gated, data):
    ids = data.draw(st.none() | st.tuples(*[st.integers(-1, 1)] * batch))
    case = Case("", batch, tokens, 2, "gated" if gated else None, ids=ids, extra={"rank": rank})
    args = lora(case, torch.float64, features, out_features)
    op_checks.check_values(op, op_reference.gated_lora, args, torch.float64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(3, 8)}, r"gated_lora: expected x of shape \[B, S, I\], got \[3, 8\]"),
        (
            {"x": torch.zeros(3, 5, 8).long()},
            "gated_lora: expected x of dtype Float, Double, BFloat16 or Half, got Long",
        ),
        ({"base": torch.zeros(3, 4, 6)}, r"gated_lora: expected base of shape \[3, 5, O\], got \[3, 4, 6\]"),
        ({"lora_a": torch.zeros(3, 2, 7)}, r"gated_lora: expected lora_a of shape \[N, r, 8\], got \[3, 2, 7\]"),
        ({"lora_a": torch.zeros(0, 2, 8)}, r"gated_lora: expected lora_b of shape \[0, 6, 2\], got \[3, 6, 2\]"),
        ({"lora_b": torch.zeros(3, 6, 4)}, r"gated_lora: expected lora_b of shape \[3, 6, 2\], got \[3, 6, 4\]"),
        ({"lora_b": torch.zeros(3, 6, 2).double()}, "gated_lora: expected lora_b of dtype Float as x, got Double"),
        ({"scaling": torch.zeros(3, device="meta")}, "gated_lora: expected scaling on cpu as x, got meta"),
        ({"scaling": torch.zeros(3, 1)}, r"gated_lora: expected scaling of shape \[3\], got \[3, 1\]"),
        ({"gate_bias": None}, "gated_lora: expected gate_weight and gate_bias together, got only gate_weight"),
        ({"gate_weight": torch.zeros(3, 2, 8)}, r"gated_lora: expected gate_weight with G = 1 gates.*got \[3, 2, 8\]"),
        ({"gate_bias": torch.zeros(3)}, r"gated_lora: expected gate_bias of shape \[3, 1\], got \[3\]"),
        ({"adapter_ids": torch.tensor([0, 1])}, r"gated_lora: expected adapter_ids of shape \[3\], got \[2\]"),
        ({"adapter_ids": torch.tensor([0, 1, 2]).int()}, "gated_lora: expected adapter_ids of dtype Long, got Int"),
        ({"adapter_ids": torch.tensor([0, 3, 0])}, r"gated_lora: expected adapter_ids in \[-1, 3\), got 3 in row 1"),
        ({"adapter_ids": torch.tensor([0, 0, -2])}, r"gated_lora: expected adapter_ids in \[-1, 3\), got -2 in row 2"),
        ({"adapter": 3}, r"gated_lora: expected adapter in \[-1, 3\), got 3"),
        ({"adapter": -2}, r"gated_lora: expected adapter in \[-1, 3\), got -2"),
        ({"token_mask": torch.ones(3, 5)}, "gated_lora: expected token_mask of dtype Bool, got Float"),
        ({"token_mask": torch.ones(3, 4).bool()}, r"gated_lora: expected token_mask of shape \[3, 5\], got \[3, 4\]"),
    ],
)
@pytest.mark.parametrize("recording", [False, True], ids=["no_grad", "grad"])
def test_wrong_arguments_are_named(changes, message, recording):
    args = {**lora(Case("", gate="gated"), torch.float32), **changes}
    if recording:
        args["scaling"] = args["scaling"].clone().requires_grad_()
    with pytest.raises(RuntimeError, match=message):
        op(**args)


def test_empty_bank_is_refused():
    args = lora(Case("", adapters=0), torch.float32)
    with pytest.raises(RuntimeError, match="gated_lora: expected a bank of at least one adapter"):
        op(**args)


def test_double_backward_is_refused():
    args = op_checks.with_grad(lora(Case(""), torch.float64))
    (grad,) = torch.autograd.grad(op(**args)[0].square().sum(), args["x"])
    assert grad.isfinite().all()
    with pytest.raises(RuntimeError, match="gated_lora: expected create_graph=False, got a double backward"):
        torch.autograd.grad(op(**args)[0].square().sum(), args["x"], create_graph=True)
