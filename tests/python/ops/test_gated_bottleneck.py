import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.activations import ACT2FN

import op_checks
import op_reference
from op_cases import Case, bottleneck

op = torch.ops.torchgraft.gated_bottleneck
# ACT2FN without the entries that hold parameters, and the adapters library's own spelling of leaky ReLU.
NON_LINEARITIES = sorted({*ACT2FN, "leakyrelu"} - {"prelu", "xielu"})


@pytest.mark.parametrize("name", NON_LINEARITIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_non_linearity_is_the_oracle_s(name, dtype):
    # gelu_fast and gelu_python_tanh of transformers write the tanh approximation's constants with ten digits or in
    # another order: the same function to about 1e-9.
    args = bottleneck(Case("", tokens=40, gate="gated", extra={"non_linearity": name, "size": 6}), dtype)
    args["down_weight"] *= 3  # reach both bounds of relu6 and gelu_10
    output, _ = op(**args)
    expected, _ = op_reference.gated_bottleneck(**op_checks.cast(args, torch.float64))
    rtol = 1e-7 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(output.double(), expected, rtol=rtol, atol=rtol)
    if dtype == torch.float64:
        op_checks.assert_same_gradients(
            op_checks.gradients(op, args),
            op_checks.gradients(op_reference.gated_bottleneck, args),
            rtol=1e-6,
            atol=1e-6,
        )


@pytest.mark.parametrize("name", ["prelu", "xielu", "elu", "", "relu ", "reluu"])
def test_unknown_non_linearity_lists_the_known(name):
    args = {**bottleneck(Case(""), torch.float32), "non_linearity": name}
    listed = ", ".join(NON_LINEARITIES)
    with pytest.raises(RuntimeError, match=f'expected non_linearity to be one of {listed}, got "{name}"'):
        op(**args)


def test_non_linearity_ignores_case_as_the_oracle_does():
    args = bottleneck(Case("", extra={"non_linearity": "ReLU"}), torch.float32)
    assert torch.equal(op(**args)[0], op(**{**args, "non_linearity": "relu"})[0])


def test_base_rows_are_exact_beside_non_finite_weights():
    args = bottleneck(Case("", ids=(1, -1, 2)), torch.float32)
    args["up_bias"][0] = float("inf")  # no row uses adapter 0
    args["down_weight"][0] = float("nan")
    output, gate = op(**args)
    assert output.isfinite().all()
    assert torch.equal(output[1], args["residual"][1])
    assert gate[1] == 0
    grads = op_checks.gradients(op, args)
    assert grads["x"].isfinite().all()
    assert not grads["x"][1].any()
    assert not grads["down_weight"][0].any()


def test_result_is_no_alias_and_is_dense():
    for adapter in (-1, 0):
        args = bottleneck(Case("", adapter=adapter), torch.float32)
        args["residual"] = args["residual"].transpose(0, 1).contiguous().transpose(0, 1)
        before = args["residual"].clone()
        output, _ = op(**args)
        assert output.is_contiguous()
        assert output.data_ptr() != args["residual"].data_ptr()
        assert torch.equal(args["residual"], before)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 4),
    tokens=st.integers(1, 9),
    features=st.integers(1, 11),
    size=st.integers(0, 5),
    gated=st.booleans(),
    channels=st.booleans(),
    name=st.sampled_from(["tanh", "gelu", "silu", "gelu_new"]),
    data=st.data(),
)
def test_random_shapes_equal_the_reference(batch, tokens, features, size, gated, channels, name, data):
    ids = data.draw(st.none() | st.tuples(*[st.integers(-1, 1)] * batch))
    extra = {"size": size, "channels": features if channels else 1, "non_linearity": name}
    case = Case("", batch, tokens, 2, "gated" if gated else None, ids=ids, extra=extra)
    op_checks.check_values(op, op_reference.gated_bottleneck, bottleneck(case, torch.float64, features), torch.float64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"residual": torch.zeros(3, 5, 7)}, r"expected residual of shape \[3, 5, 8\], got \[3, 5, 7\]"),
        ({"down_weight": torch.zeros(3, 3, 7)}, r"expected down_weight of shape \[N, R, 8\], got \[3, 3, 7\]"),
        ({"down_bias": torch.zeros(3, 4)}, r"expected down_bias of shape \[3, 3\], got \[3, 4\]"),
        ({"up_weight": torch.zeros(3, 3, 8)}, r"expected up_weight of shape \[3, 8, 3\], got \[3, 3, 8\]"),
        ({"up_bias": torch.zeros(3, 1)}, r"expected up_bias of shape \[3, 8\], got \[3, 1\]"),
        ({"scaling": torch.zeros(3, 2)}, r"expected scaling of shape \[3, 1\] or \[3, 8\], got \[3, 2\]"),
        ({"scaling": torch.zeros(3)}, r"expected scaling of shape \[3, 1 or H\], got \[3\]"),
        ({"up_bias": torch.zeros(3, 8).half()}, "expected up_bias of dtype Float as x, got Half"),
        ({"gate_weight": None}, "expected gate_weight and gate_bias together, got only gate_bias"),
        ({"adapter_ids": torch.tensor([9, 0, 0])}, r"expected adapter_ids in \[-1, 3\), got 9 in row 0"),
        ({"token_mask": torch.ones(5, dtype=torch.bool)}, r"expected token_mask of shape \[3, 5\], got \[5\]"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    args = {**bottleneck(Case("", gate="gated"), torch.float32), **changes}
    with pytest.raises(RuntimeError, match="gated_bottleneck: " + message):
        op(**args)
