import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import op_checks
import op_reference
from op_cases import Case, lora_linear

op = torch.ops.torchgraft.gated_lora_linear


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
