import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import op_checks
import op_reference
from op_cases import Case, bottleneck_linear

op = torch.ops.torchgraft.gated_bottleneck_linear


def test_base_rows_are_exact_beside_non_finite_weights():
    args = bottleneck_linear(Case("", ids=(1, -1, 2)), torch.float32)
    args["up_bias"][0] = float("inf")  # no row uses adapter 0
    args["down_weight"][0] = float("nan")
    output, gate = op(**args)
    assert output.isfinite().all()
    expected = torch.nn.functional.linear(args["input"][1], args["weight"], args["bias"])
    torch.testing.assert_close(output[1], expected)
    assert gate[1] == 0


@settings(max_examples=100, deadline=None)
@given(
    batch=st.integers(1, 4),
    tokens=st.integers(0, 40),
    features=st.integers(1, 70),
    in_features=st.integers(1, 70),
    size=st.integers(0, 40),
    gated=st.booleans(),
    channels=st.booleans(),
    name=st.sampled_from(["tanh", "gelu", "relu", "mish"]),
    data=st.data(),
)
def test_random_shapes_equal_the_reference(batch, tokens, features, in_features, size, gated, channels, name, data):
    ids = data.draw(st.none() | st.tuples(*[st.integers(-1, 1)] * batch))
    extra = {"size": size, "channels": features if channels else 1, "non_linearity": name}
    case = Case("", batch, tokens, 2, "gated" if gated else None, ids=ids, extra=extra)
    args = bottleneck_linear(case, torch.float32, features, in_features)
    # As trained weights are: results in the hundreds, which cancel, have no five digits in float32.
    args |= {name: args[name] * 0.2 for name in ("down_weight", "up_weight")}
    op_checks.check_values(op, op_reference.gated_bottleneck_linear, args, torch.float32)


@pytest.mark.parametrize("recording", [False, True])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input": torch.zeros(3, 4, 5)}, r"expected input of shape \[3, 5, I\], got \[3, 4, 5\]"),
        ({"weight": torch.zeros(7, 5)}, r"expected weight of shape \[8, 5\], got \[7, 5\]"),
        ({"bias": torch.zeros(5)}, r"expected bias of shape \[8\], got \[5\]"),
        ({"weight": torch.zeros(8, 5).half()}, "expected weight of dtype Float as x, got Half"),
        ({"up_bias": torch.zeros(3, 1)}, r"expected up_bias of shape \[3, 8\], got \[3, 1\]"),
        ({"scaling": torch.zeros(3, 2)}, r"expected scaling of shape \[3, 1\] or \[3, 8\], got \[3, 2\]"),
        ({"non_linearity": "elu"}, "expected non_linearity to be one of "),
        ({"adapter_ids": torch.tensor([9, 0, 0])}, r"expected adapter_ids in \[-1, 3\), got 9 in row 0"),
    ],
)
def test_wrong_arguments_are_named(changes, message, recording):
    args = {**bottleneck_linear(Case("", gate="gated"), torch.float32), **changes}
    args["x"].requires_grad_(recording)
    with pytest.raises(RuntimeError, match="gated_bottleneck_linear: " + message):
        op(**args)
