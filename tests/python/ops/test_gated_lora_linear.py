import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import op_checks
import op_reference
from op_cases import LORA_CASES, Case, lora_linear

op = torch.ops.torchgraft.gated_lora_linear
CASES = [*LORA_CASES, Case("no_bias", gate="gated", extra={"bias": False})]
cases = pytest.mark.parametrize("case", CASES, ids=str)
# Under autograd these are two operators; each has its own tests.
one_of_each = op_checks.one_of_each(CASES, "plain", "ids_partly_gated_empty_row", "no_bias")
FLOAT_TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@torch.jit.script
def scripted(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: torch.Tensor,
    gate_weight: torch.Tensor | None = None,
    gate_bias: torch.Tensor | None = None,
    adapter_ids: torch.Tensor | None = None,
    adapter: int = 0,
    token_mask: torch.Tensor | None = None,
):
    return torch.ops.torchgraft.gated_lora_linear(
        x, weight, bias, lora_a, lora_b, scaling, gate_weight, gate_bias, adapter_ids, adapter, token_mask
    )


@cases
@pytest.mark.parametrize("dtype", FLOAT_TYPES, ids=str)
def test_results_and_gradients_equal_the_reference(case, dtype):
    op_checks.check_values(op, op_reference.gated_lora_linear, lora_linear(case, dtype), dtype)


@one_of_each
def test_gradients_equal_finite_differences(case):
    op_checks.check_gradcheck(op, lora_linear(case, torch.float64))


@one_of_each
def test_opcheck_finds_nothing(case):
    op_checks.check_opcheck(op, lora_linear(case, torch.float32))


def test_forward_mode_differentiation_is_refused():
    op_checks.check_forward_mode(op, lora_linear(Case("", gate="gated"), torch.float32), "gated_lora_linear")


@cases
def test_a_scripted_call_gives_the_same(case):
    op_checks.check_scripted(op, scripted, lora_linear(case, torch.float32))


@cases
def test_autocast_gives_the_low_dtype_and_gradients_in_float32(case):
    op_checks.check_autocast(op, lora_linear(case, torch.float32))


@cases
def test_inference_mode_and_meta_tensors_give_the_same(case):
    args = lora_linear(case, torch.float32)
    op_checks.check_inference_modes(op, args)
    op_checks.check_meta(op, args)


@settings(max_examples=100, deadline=None)
@given(
    batch=st.integers(0, 4),
    tokens=st.integers(0, 40),
    features=st.integers(1, 70),
    out_features=st.integers(0, 70),
    rank=st.integers(0, 20),
    gated=st.booleans(),
    data=st.data(),
)
def test_random_shapes_equal_the_reference(batch, tokens, features, out_features, rank, gated, data):
    ids = data.draw(st.none() | st.tuples(*[st.integers(-1, 1)] * batch))
    case = Case("", batch, tokens, 2, "gated" if gated else None, ids=ids, extra={"rank": rank})
    if batch == 0:
        return
    args = lora_linear(case, torch.float32, features, out_features)
    op_checks.check_values(op, op_reference.gated_lora_linear, args, torch.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.zeros(6, 7)}, r"gated_lora_linear: expected weight of shape \[O, 8\], got \[6, 7\]"),
        ({"bias": torch.zeros(5)}, r"gated_lora_linear: expected bias of shape \[6\], got \[5\]"),
        ({"lora_b": torch.zeros(3, 5, 2)}, r"gated_lora_linear: expected lora_b of shape \[3, 6, 2\], got \[3, 5, 2\]"),
        (
            {"adapter_ids": torch.tensor([0, 3, 0])},
            r"gated_lora_linear: expected adapter_ids in \[-1, 3\), got 3 in row 1",
        ),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    with pytest.raises(RuntimeError, match=message):
        op(**{**lora_linear(Case("", gate="gated"), torch.float32), **changes})
