"""Drawn invertible adapters of AdapterHub on many families: what the library gives, or refused with a reason."""

import random

import pytest

import adapters
from drawn_cases import FINE, DrawnCase, check_many_are_equal, draw_method, outcome

_SEED = 26
_CASES = 60


def _config(rng: random.Random) -> adapters.AdapterConfig:
    bottleneck = rng.choice((adapters.SeqBnInvConfig, adapters.DoubleSeqBnInvConfig))(
        non_linearity=rng.choice(("relu", "swish", "gelu", "leakyrelu")),
        reduction_factor=rng.choice((2, 16)),
        inv_adapter_reduction_factor=rng.choice((1, 2, 3.5, 8)),
        leave_out=rng.choice(([], [0], [1])),
        use_gating=rng.random() < 0.3,
        dropout=rng.choice((0.0, 0.1)),
    )
    if rng.random() < 0.3:
        return adapters.ConfigUnion(bottleneck, adapters.LoRAConfig(r=3, use_gating=rng.random() < 0.5))
    return bottleneck


def _case(number: int) -> DrawnCase:
    return draw_method(_SEED, number, _config)


@pytest.mark.parametrize("number", range(_CASES))
def test_equal_or_refused(number: int) -> None:
    case = _case(number)
    found = outcome(case)
    assert found.startswith(FINE), f"{case}: {found}"


def test_many_of_them_are_equal() -> None:
    check_many_are_equal([_case(number) for number in range(0, _CASES, 4)])
