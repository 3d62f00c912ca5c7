import pytest
import torch

import op_checks
import op_reference
from op_cases import randn

op = torch.ops.torchgraft.residual_norm
FLOAT_TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Name: sizes of x and of the residual, dimensions that are normalised, whether there are a weight and a bias.
CASES = {
    "plain": ((3, 5, 8), (3, 5, 8), 1, True, True),
    "no_bias": ((3, 5, 8), (3, 5, 8), 1, True, False),
    "no_weight": ((3, 5, 8), (3, 5, 8), 1, False, False),
    "wide": ((2, 4, 385), (2, 4, 385), 1, True, True),
    "one_vector": ((40,), (40,), 1, True, True),
    "one_feature": ((3, 5, 1), (3, 5, 1), 1, True, True),
    "broadcast": ((3, 5, 8), (8,), 1, True, True),
    "broadcast_other": ((1, 8), (3, 5, 8), 1, True, True),
    "two_dimensions": ((3, 5, 8), (3, 5, 8), 2, True, True),
    "no_tokens": ((2, 0, 8), (2, 0, 8), 1, True, True),
}
cases = pytest.mark.parametrize("name", CASES)


def arguments(name, dtype):
    torch.manual_seed(0)
    sizes, residual, count, weighted, biased = CASES[name]
    shape = list(max(sizes, residual, key=len)[-count:])
    return {
        "x": randn(*sizes, dtype=dtype),
        "residual": randn(*residual, dtype=dtype),
        "normalized_shape": shape,
        "weight": randn(*shape, dtype=dtype) if weighted else None,
        "bias": randn(*shape, dtype=dtype) if biased else None,
        "eps": 1e-3,
    }


@torch.jit.script
def scripted(
    x: torch.Tensor,
    residual: torch.Tensor,
    normalized_shape: list[int],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
):
    return torch.ops.torchgraft.residual_norm(x, residual, normalized_shape, weight, bias, eps)


@cases
@pytest.mark.parametrize("dtype", FLOAT_TYPES, ids=str)
def test_results_and_gradients_equal_the_reference(name, dtype):
    args = arguments(name, dtype)
    expected = op_reference.residual_norm(**op_checks.cast(args, torch.float64))
    for actual, wanted in zip(op(**args), expected, strict=True):
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.double(), wanted, **op_checks.TOLERANCE[dtype])
    op_checks.assert_same_gradients(
        {key: None if grad is None else grad.double() for key, grad in op_checks.gradients(op, args).items()},
        op_checks.gradients(op_reference.residual_norm, op_checks.cast(args, torch.float64)),
        **op_checks.TOLERANCE[dtype],
    )


@cases
def test_without_gradients_the_fused_kernel_gives_the_same(name):
    args = arguments(name, torch.float32)
    wanted = op_reference.residual_norm(**op_checks.cast(args, torch.float64))
    with torch.no_grad():
        for actual, expected in zip(op(**args), wanted, strict=True):
            torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["plain", "broadcast", "two_dimensions"])
def test_opcheck_finds_nothing(name):
    op_checks.check_opcheck(op, arguments(name, torch.float32))


@cases
def test_a_scripted_call_gives_the_same(name):
    args = arguments(name, torch.float32)
    for actual, wanted in zip(scripted(**args), op(**args), strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("name", ["plain", "broadcast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_gives_what_atens_calls_give(name, dtype):
    args = arguments(name, dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, total = op(**args)
        wanted = args["x"] + args["residual"]
        normed = torch.nn.functional.layer_norm(
            wanted, args["normalized_shape"], args["weight"], args["bias"], args["eps"]
        )
    assert torch.equal(total, wanted) and torch.equal(output, normed) and output.dtype == normed.dtype


@cases
def test_inference_mode_and_meta_tensors_give_the_same(name):
    args = arguments(name, torch.float32)
    op_checks.check_inference_modes(op, args)
    op_checks.check_meta(op, args)


def test_a_sum_that_is_not_contiguous_lies_as_atens():
    """A model may view the sum: its strides are those of ATen's."""
    x, residual = (randn(5, 3, 8, dtype=torch.float32).transpose(0, 1) for _ in range(2))
    with torch.no_grad():
        output, total = op(x, residual, [8])
    assert total.stride() == (x + residual).stride() and output.is_contiguous()


@pytest.mark.parametrize("others", [torch.long, torch.bool, torch.float64], ids=str)
def test_sums_of_several_dtypes_are_those_of_aten(others):
    x, residual = randn(3, 5, 8, dtype=torch.float32), torch.ones(3, 5, 8, dtype=others)
    for operands in ((x, residual), (residual, x)):
        output, total = op(*operands, [8])
        assert torch.equal(total, operands[0] + operands[1]) and total.dtype == (x + residual).dtype
        torch.testing.assert_close(output, torch.nn.functional.layer_norm(total, [8]))
        op_checks.check_meta(op, {"x": operands[0], "residual": operands[1], "normalized_shape": [8]})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.zeros(7)}, r"residual_norm: expected weight of shape \[8\], as normalized_shape, got \[7\]"),
        (
            {"bias": torch.zeros(3, 8)},
            r"residual_norm: expected bias of shape \[8\], as normalized_shape, got \[3, 8\]",
        ),
        (
            {"normalized_shape": [5], "weight": None, "bias": None},
            r"to end in the sizes of normalized_shape, \[5\], got",
        ),
        ({"normalized_shape": []}, "residual_norm: expected normalized_shape of one number or more, got none"),
        (
            {"x": torch.zeros(3, 5, 8, dtype=torch.long), "residual": torch.zeros(8, dtype=torch.bool)},
            "residual_norm: expected x or residual of a floating dtype, got Long and Bool",
        ),
        ({"residual": torch.zeros(3, 5, 8).to_sparse()}, "residual_norm: expected residual to be a dense tensor"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    with pytest.raises(RuntimeError, match=message):
        op(**arguments("plain", torch.float32) | changes)
