import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import op_checks
import op_reference
from op_cases import randn

op = torch.ops.torchgraft.linear
FLOAT_TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Name: sizes of x, outputs, whether there is a bias, and the function.
CASES = {
    "plain": ((3, 5, 8), 6, True, "linear"),
    "no_bias": ((3, 5, 8), 6, False, "linear"),
    "gelu": ((2, 17, 8), 40, True, "gelu"),
    "gelu_tanh": ((2, 17, 8), 40, True, "gelu_new"),
    "relu": ((2, 17, 8), 40, False, "relu"),
    "silu": ((1, 64, 8), 33, True, "silu"),
    "tanh": ((1, 65, 8), 33, True, "tanh"),
    "only_aten_has_it": ((2, 17, 8), 40, True, "mish"),
    "one_vector": ((8,), 6, True, "gelu"),
    "one_matrix": ((20, 8), 40, True, "gelu"),
    "four_dimensions": ((2, 3, 17, 8), 40, True, "relu"),
    "no_tokens": ((2, 0, 8), 6, True, "gelu"),
    "no_outputs": ((2, 5, 8), 0, True, "gelu"),
    "no_inputs": ((2, 5, 0), 6, True, "gelu"),
}
cases = pytest.mark.parametrize("name", CASES)
# A kernel adds up 128 terms at a time for 64 tokens, 512 for 16.
DEPTHS = st.one_of(st.integers(1, 70), st.sampled_from([150, 600]))


def arguments(sizes, outputs, biased, function, dtype):
    torch.manual_seed(0)
    bias = randn(outputs, dtype=dtype) if biased else None
    weight = randn(outputs, sizes[-1], dtype=dtype)
    return {"x": randn(*sizes, dtype=dtype), "weight": weight, "bias": bias, "non_linearity": function}


def pair(function):
    """op_checks expects several results."""
    return lambda **args: (function(**args),)


def reference(x, weight, bias, non_linearity):
    return (op_reference.linear(x, weight, bias, non_linearity),)


def gradients(function, args):
    return op_checks.gradients(function, args, weights=(1.0,))


@torch.jit.script
def scripted(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, non_linearity: str):
    return torch.ops.torchgraft.linear(x, weight, bias, non_linearity)


@cases
@pytest.mark.parametrize("dtype", FLOAT_TYPES, ids=str)
def test_results_and_gradients_equal_the_reference(name, dtype):
    args = arguments(*CASES[name], dtype)
    [expected] = reference(**op_checks.cast(args, torch.float64))
    actual = op(**args)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, **op_checks.TOLERANCE[dtype])
    op_checks.assert_same_gradients(
        {key: None if grad is None else grad.double() for key, grad in gradients(pair(op), args).items()},
        gradients(reference, op_checks.cast(args, torch.float64)),
        **op_checks.TOLERANCE[dtype],
    )


@cases
def test_gradients_equal_finite_differences_twice(name):
    args = op_checks.with_grad(arguments(*CASES[name], torch.float64))
    names = op_checks.differentiable(args)

    def function(*tensors):
        return op(**{**args, **dict(zip(names, tensors, strict=True))})

    inputs = [args[key] for key in names]
    assert torch.autograd.gradcheck(function, inputs, atol=1e-6, rtol=1e-5, check_forward_ad=True)
    if CASES[name][3] != "relu":
        assert torch.autograd.gradgradcheck(function, inputs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["plain", "no_bias", "gelu", "one_matrix", "only_aten_has_it"])
def test_opcheck_finds_nothing(name):
    args = arguments(*CASES[name], torch.float32)
    op_checks.check_opcheck(op, args)


@cases
def test_a_scripted_call_gives_the_same(name):
    args = arguments(*CASES[name], torch.float32)
    assert torch.equal(scripted(**args), op(**args))


@cases
def test_autocast_gives_the_low_dtype(name):
    args = arguments(*CASES[name], torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = op(**args)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.float(), op(**args), **op_checks.TOLERANCE[torch.bfloat16])


@cases
def test_inference_mode_and_meta_tensors_give_the_same(name):
    args = arguments(*CASES[name], torch.float32)
    op_checks.check_inference_modes(pair(op), args)
    op_checks.check_meta(pair(op), args)


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 4), max_size=2).flatmap(
        lambda rows: st.tuples(*map(st.just, rows), st.integers(1, 140), DEPTHS)
    ),
    outputs=st.integers(1, 140),
    biased=st.booleans(),
    function=st.sampled_from(["linear", "gelu", "gelu_new", "relu", "silu", "tanh", "sigmoid", "mish"]),
    step=st.sampled_from([1, 2]),
)
def test_random_shapes_equal_the_reference(sizes, outputs, biased, function, step):
    args = arguments(sizes, outputs, biased, function, torch.float32)
    wide = randn(*sizes[:-1], step * sizes[-1], dtype=torch.float32)
    args["x"] = wide[..., ::step]  # also one that is not dense
    [expected] = reference(**op_checks.cast(args, torch.float64))
    torch.testing.assert_close(op(**args).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.zeros(6, 7)}, r"linear: expected weight of shape \[O, 8\], got \[6, 7\]"),
        ({"bias": torch.zeros(5)}, r"linear: expected bias of shape \[6\], got \[5\]"),
        ({"x": torch.tensor(1.0)}, r"linear: expected x of shape \[\.\.\., I\], got one number"),
        ({"x": torch.zeros(2, 8, dtype=torch.long)}, "linear: expected x of dtype Float, Double, BFloat16 or Half"),
        ({"x": torch.zeros(2, 8).to_sparse()}, "linear: expected x to be a dense tensor"),
        ({"weight": torch.zeros(6, 8).double()}, "linear: expected weight of dtype Float as x, got Double"),
        ({"non_linearity": "step"}, 'linear: expected non_linearity to be one of .*, got "step"'),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    args = arguments((3, 5, 8), 6, True, "linear", torch.float32) | changes
    with pytest.raises(RuntimeError, match=message):
        op(**args)
