"""What holds of every operator on rows of adapters, whatever it computes: values, gradients, scripting, autocast, meta
tensors. What only one of them does has a file of its name."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

import op_checks
import op_reference
from op_cases import (
    BOTTLENECK_CASES,
    LORA_CASES,
    PREFIX_CASES,
    Case,
    bottleneck,
    bottleneck_linear,
    lora,
    lora_linear,
    prefix,
)

FLOAT_TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NO_BIAS = Case("no_bias", gate="gated", extra={"bias": False})
TYPICAL = ("plain", "base", "gated_ragged", "ids_all_base", "ids_partly_gated_empty_row", "one_token_one_row")


@dataclass(frozen=True)
class Operator:
    """
    arguments: makes keyword arguments of a case and a dtype.
    typical: names of cases for checks that take seconds and treat many alike; with the others these are slow.
    is_two: under autograd it is two operators, each of which has its own gradients tested.
    """

    name: str
    arguments: Callable
    cases: list[Case]
    typical: tuple[str, ...]
    is_two: bool = False

    @property
    def call(self) -> Callable:
        return getattr(torch.ops.torchgraft, self.name)

    @property
    def reference(self) -> Callable:
        return getattr(op_reference, self.name)


OPERATORS = [
    Operator("gated_lora", lora, LORA_CASES, (*TYPICAL, "rank_0", "no_tokens")),
    Operator("gated_bottleneck", bottleneck, BOTTLENECK_CASES, (*TYPICAL, "channel_scaling_ids", "gelu", "size_0")),
    Operator(
        "gated_prefix_attention",
        prefix,
        PREFIX_CASES,
        ("plain", "ids_partly_gated_empty_row", "two_gates_ids", "causal_more_keys_ids", "no_keys_ids", "grouped_ids",
         "mask_float_4d_ids"),
    ),
    Operator("gated_lora_linear", lora_linear, [*LORA_CASES, NO_BIAS],
             ("plain", "ids_partly_gated_empty_row", "no_bias"), is_two=True),
    Operator("gated_bottleneck_linear", bottleneck_linear, [*BOTTLENECK_CASES, NO_BIAS],
             ("plain", "channel_scaling_ids", "no_bias"), is_two=True),
]  # fmt: skip
SINGLE = [operator for operator in OPERATORS if not operator.is_two]


def cases_of(operators: list[Operator], is_slow: Callable[[Operator, Case], bool] = lambda operator, case: False):
    """Parametrizes over the cases of all operators."""
    slow = pytest.mark.slow(seconds=3)
    assert all(set(operator.typical) <= {case.name for case in operator.cases} for operator in operators)
    return pytest.mark.parametrize(
        ("operator", "case"),
        [
            pytest.param(operator, case, id=f"{operator.name}-{case}", marks=[slow] if is_slow(operator, case) else [])
            for operator in operators
            for case in operator.cases
        ],
    )


def is_alike(operator: Operator, case: Case) -> bool:
    return case.name not in operator.typical


every_case = cases_of(OPERATORS)
typical_cases = cases_of(OPERATORS, is_alike)
of_single_ones = cases_of(SINGLE)


@functools.cache
def scripted(name: str) -> Callable:
    """A TorchScript function that hands its arguments to the operator."""
    types = {"Tensor?": "Optional[Tensor]", "float?": "Optional[float]"}
    inside = str(getattr(torch.ops.torchgraft, name).default._schema).partition("(")[2].partition(") ->")[0]
    declared, given, by_name = [], [], False
    for argument in inside.split(", "):
        if argument == "*":
            declared, by_name = [*declared, "*"], True
            continue
        kind, _, rest = argument.partition(" ")
        variable, _, default = rest.partition("=")
        declared.append(f"{variable}: {types.get(kind, kind)}" + (f" = {default}" if default else ""))
        given.append(f"{variable}={variable}" if by_name else variable)
    code = f"def call({', '.join(declared)}):\n    return torch.ops.torchgraft.{name}({', '.join(given)})\n"
    return torch.jit.CompilationUnit(code).call


@every_case
@pytest.mark.parametrize("dtype", FLOAT_TYPES, ids=str)
def test_results_and_gradients_equal_the_reference(operator, case, dtype):
    op_checks.check_values(operator.call, operator.reference, operator.arguments(case, dtype), dtype)


@cases_of(OPERATORS, lambda operator, case: operator.is_two and is_alike(operator, case))
def test_gradients_equal_finite_differences(operator, case):
    arguments = operator.arguments(case, torch.float64)
    mask = arguments.get("attn_mask")
    if mask is not None and mask.is_floating_point():
        arguments["attn_mask"] = mask.clamp_min(-1e3)  # finite differences need numbers that they can move
    op_checks.check_gradcheck(operator.call, arguments)


@of_single_ones
def test_the_gradient_of_one_argument_is_that_of_all(operator, case):
    op_checks.check_needs_grad(operator.call, operator.arguments(case, torch.float64))


@of_single_ones
def test_gradients_of_one_result_equal_the_reference(operator, case):
    op_checks.check_one_result_used(operator.call, operator.arguments(case, torch.float64), operator.reference)


@typical_cases
def test_opcheck_finds_nothing(operator, case):
    op_checks.check_opcheck(operator.call, operator.arguments(case, torch.float32))


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_forward_mode_differentiation_is_refused(operator):
    arguments = operator.arguments(Case("", gate="gated"), torch.float32)
    op_checks.check_forward_mode(operator.call, arguments, operator.name)


@every_case
def test_a_scripted_call_gives_the_same(operator, case):
    op_checks.check_scripted(operator.call, scripted(operator.name), operator.arguments(case, torch.float32))


@every_case
def test_autocast_gives_the_low_dtype_and_gradients_in_float32(operator, case):
    if "lowest" in case.name:
        pytest.skip("as in scaled_dot_product_attention, a cast makes float32's lowest value -inf")
    op_checks.check_autocast(operator.call, operator.arguments(case, torch.float32))


@every_case
def test_inference_mode_and_meta_tensors_give_the_same(operator, case):
    arguments = operator.arguments(case, torch.float32)
    op_checks.check_inference_modes(operator.call, arguments)
    op_checks.check_meta(operator.call, arguments)
