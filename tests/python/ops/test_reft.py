from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import op_checks
import op_reference
from op_cases import Case, randn, row_arguments

op = torch.ops.torchgraft.reft
FLOAT_TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
CASES = [
    Case("plain"),
    Case("second_adapter", adapter=1),
    Case("base", adapter=-1),
    Case("tied", extra={"units": 1}),
    Case("ragged", token_mask="ragged"),
    Case("empty_row", token_mask="empty_row"),
    Case("left_padded", token_mask="ragged", extra={"flip": True}),
    Case("ids", ids=(2, 0, 1)),
    Case("ids_with_base", ids=(2, -1, 0)),
    Case("ids_all_base", ids=(-1, -1, -1)),
    Case("ids_all_equal", ids=(1, 1, 1)),
    Case("ids_ragged", ids=(2, -1, 1), token_mask="ragged"),
    Case("ids_left_padded", ids=(0, 2, 1), token_mask="ragged", extra={"flip": True, "units": 1}),
    Case("gelu", extra={"non_linearity": "gelu"}),
    Case("relu", ids=(0, 1, 2), extra={"non_linearity": "relu"}),
    Case("overlapping", tokens=4, extra={"positions": ((3, 3), (4, 4), (1, 4))}),
    Case("longer_prefix_than_row", batch=2, tokens=2, extra={"positions": ((3, 2), (5, 0), (0, 4))}),
    Case("without_positions", ids=(0, 1, 2), extra={"positions": ((0, 0), (0, 0), (0, 0))}),
    Case("bank_of_one", adapters=1, ids=(0, -1, 0), extra={"positions": ((1, 1),)}),
    Case("wide_rank", extra={"rank": 11}),
]
cases = pytest.mark.parametrize("case", CASES, ids=str)


def arguments(case, dtype, features=8):
    torch.manual_seed(0)
    units, rank = case.extra.get("units", 2), case.extra.get("rank", 2)
    positions = case.extra.get("positions", ((2, 1), (0, 3), (1, 0)))[: case.adapters]
    args = {
        "x": randn(case.batch, case.tokens, features, dtype=dtype),
        "source_weight": randn(case.adapters, units, rank, features, dtype=dtype) / 3,
        "source_bias": randn(case.adapters, units, rank, dtype=dtype),
        "projection": randn(case.adapters, units, rank, features, dtype=dtype) / 3,
        "subtraction": torch.tensor([1.0, 0.0, 1.0][: case.adapters], dtype=dtype),
        "positions": torch.tensor(positions),
        "non_linearity": case.extra.get("non_linearity", "linear"),
    }
    args |= row_arguments(case, features, dtype)
    if case.extra.get("flip"):
        args["token_mask"] = args["token_mask"].flip(1)
    return args


def pair(function):
    """op_checks expects several results."""
    return lambda **args: (function(**args),)


def reference(**args):
    return (op_reference.reft(**args),)


def gradients(function, args):
    return op_checks.gradients(function, args, weights=(1.0,))


@torch.jit.script
def scripted(
    x: torch.Tensor, source_weight: torch.Tensor, source_bias: torch.Tensor, projection: torch.Tensor,
    subtraction: torch.Tensor, positions: torch.Tensor, non_linearity: str, adapter: int,
    adapter_ids: torch.Tensor | None = None, token_mask: torch.Tensor | None = None,
):  # fmt: skip
    return torch.ops.torchgraft.reft(
        x,
        source_weight,
        source_bias,
        projection,
        subtraction,
        positions,
        non_linearity,
        adapter_ids,
        adapter,
        token_mask,
    )


@cases
@pytest.mark.parametrize("dtype", FLOAT_TYPES, ids=str)
def test_results_and_gradients_equal_the_reference(case, dtype):
    args = arguments(case, dtype)
    [expected] = reference(**op_checks.cast(args, torch.float64))
    actual = op(**args)
    assert actual.dtype == dtype and actual.is_contiguous()
    torch.testing.assert_close(actual.double(), expected, **op_checks.TOLERANCE[dtype])
    op_checks.assert_same_gradients(
        {key: None if grad is None else grad.double() for key, grad in gradients(pair(op), args).items()},
        gradients(reference, op_checks.cast(args, torch.float64)),
        **op_checks.TOLERANCE[dtype],
    )


@cases
def test_other_tokens_are_copied(case):
    args = arguments(case, torch.float32)
    changed = op_reference.reft_tokens(**args)
    output = op(**args)
    assert torch.equal(output[~changed], args["x"][~changed])
    assert output.data_ptr() != args["x"].data_ptr()
    assert not changed.any() or not torch.equal(output[changed], args["x"][changed])


@cases
def test_gradients_equal_finite_differences_twice(case):
    args = op_checks.with_grad(arguments(case, torch.float64))
    names = op_checks.differentiable(args)

    def function(*tensors):
        return op(**{**args, **dict(zip(names, tensors, strict=True))})

    inputs = [args[key] for key in names]
    assert torch.autograd.gradcheck(function, inputs, atol=1e-6, rtol=1e-5, check_forward_ad=True)
    if case.name in ("plain", "ids_ragged", "gelu"):
        assert torch.autograd.gradgradcheck(function, inputs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["plain", "base", "tied", "left_padded", "ids_ragged", "gelu", "without_positions"])
def test_opcheck_finds_nothing(name):
    [case] = [case for case in CASES if case.name == name]
    op_checks.check_opcheck(op, arguments(case, torch.float32))


@cases
def test_a_scripted_call_gives_the_same(case):
    args = arguments(case, torch.float32)
    assert torch.equal(scripted(**args), op(**args))


@cases
def test_a_row_does_not_depend_on_its_batch(case):
    args = arguments(case, torch.float32)
    ids = args.get("adapter_ids", torch.full([case.batch], case.adapter))
    together = op(**args)
    for row in range(case.batch):
        alone = args | {"x": args["x"][row : row + 1], "adapter_ids": None, "adapter": int(ids[row])}
        if case.token_mask:
            alone["token_mask"] = args["token_mask"][row : row + 1]
        torch.testing.assert_close(op(**alone)[0], together[row])


@pytest.mark.parametrize("case", [case for case in CASES if case.token_mask == "ragged"], ids=str)
def test_a_row_does_not_depend_on_its_padding(case):
    args = arguments(case, torch.float32)
    ids = args.get("adapter_ids", torch.full([case.batch], case.adapter))
    together = op(**args)
    for row in range(case.batch):
        real = args["token_mask"][row]
        alone = args | {"x": args["x"][row : row + 1, real], "token_mask": None, "adapter_ids": None}
        torch.testing.assert_close(op(**alone | {"adapter": int(ids[row])})[0], together[row, real])


@cases
def test_the_dense_composition_gives_the_same(case):
    """Where values cannot be read, all tokens are computed: under vmap, for one."""
    args = arguments(case, torch.float64)
    function = lambda x: op(**args | {"x": x})  # noqa: E731
    mapped = torch.func.vmap(function)(args["x"].unsqueeze(0))[0]
    torch.testing.assert_close(mapped, op(**args))


@cases
def test_autocast_inference_mode_and_meta_tensors(case):
    args = arguments(case, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert op(**args).dtype == torch.bfloat16
    op_checks.check_inference_modes(pair(op), args)
    op_checks.check_meta(pair(op), args)


@cases
def test_tangents_equal_the_reference(case):
    """Other operators refuse them (test_every_operator.py)."""
    args = arguments(case, torch.float64)
    for name in op_checks.differentiable(args):
        primal, tangent = (args[name],), (torch.ones_like(args[name]),)
        found, expected = (
            torch.func.jvp(lambda value, f=f, name=name: f(**args | {name: value}), primal, tangent)[1]
            for f in (op, op_reference.reft)
        )
        torch.testing.assert_close(found, expected)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_drawn_cases_equal_the_reference(data):
    batch, tokens, adapters = (data.draw(st.integers(1, most)) for most in (4, 7, 3))
    counts = st.tuples(st.integers(0, 4), st.integers(0, tokens))
    case = Case(
        "drawn", batch=batch, tokens=tokens, adapters=adapters,
        ids=tuple(data.draw(st.lists(st.integers(-1, adapters - 1), min_size=batch, max_size=batch))),
        extra={"positions": data.draw(st.lists(counts, min_size=adapters, max_size=adapters)),
               "units": data.draw(st.integers(1, 2)), "rank": data.draw(st.integers(1, 3))},
    )  # fmt: skip
    args = arguments(case, torch.float64, features=data.draw(st.integers(1, 9)))
    if data.draw(st.booleans()):
        rows = st.lists(st.booleans(), min_size=tokens, max_size=tokens)
        args["token_mask"] = torch.tensor(data.draw(st.lists(rows, min_size=batch, max_size=batch)))
    torch.testing.assert_close(op(**args), op_reference.reft(**args))


def test_more_last_positions_than_tokens_beside_first_ones_are_refused():
    case = replace(CASES[0], tokens=2, extra={"positions": ((1, 3), (0, 3), (3, 2))})
    args = arguments(case, torch.float32)
    with pytest.raises(RuntimeError, match="reft: expected at least 3 tokens, .* got 2: the adapters library mixes up"):
        op(**args)
    for adapter in (1, 2):
        torch.testing.assert_close(op(**args | {"adapter": adapter}), op_reference.reft(**args | {"adapter": adapter}))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", torch.zeros(3, 8), r"reft: expected x of shape \[B, S, H\], got \[3, 8\]"),
        ("source_weight", torch.zeros(3, 3, 2, 8), r"reft: expected source_weight with U = 1 or 2 units"),
        ("source_weight", torch.zeros(3, 2, 2, 7), r"reft: expected source_weight of shape \[N, U, r, 8\], got"),
        ("source_bias", torch.zeros(3, 2, 3), r"reft: expected source_bias of shape \[3, 2, 2\], got \[3, 2, 3\]"),
        ("projection", torch.zeros(3, 1, 2, 8), r"reft: expected projection of shape \[3, 2, 2, 8\], got"),
        ("projection", torch.zeros(3, 2, 2, 8).double(), "reft: expected projection of dtype Float as x, got Double"),
        ("subtraction", torch.zeros(2), r"reft: expected subtraction of shape \[3\], got \[2\]"),
        ("positions", torch.zeros(3, 2), "reft: expected positions of dtype Long, got Float"),
        ("positions", torch.zeros(3, 3, dtype=torch.long), r"reft: expected positions of shape \[3, 2\], got"),
        ("non_linearity", "wave", "reft: expected non_linearity to be one of .*, got \"wave\""),
        ("adapter_ids", torch.tensor([0, 3, 1]), r"reft: expected adapter_ids in \[-1, 3\), got 3 in row 1"),
        ("adapter", 3, r"reft: expected adapter in \[-1, 3\), got 3"),
        ("token_mask", torch.ones(3, 5), "reft: expected token_mask of dtype Bool, got Float"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(name, value, message):
    with pytest.raises(RuntimeError, match=message):
        op(**arguments(CASES[0], torch.float32) | {name: value})
