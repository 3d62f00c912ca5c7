"""Drawn VeRA, DvoRA and MTL-LoRA of AdapterHub on many families: what the library gives, or refused with a reason."""

import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers.models.t5.modeling_t5 import T5LayerNorm

import adapters
import drawn_cases
from drawn_cases import FINE, DrawnCase, check_many_are_equal, draw_method, outcome

_SEED = 25
_CASES = 60


def _config(rng: random.Random) -> adapters.AdapterConfig:
    common = dict(
        selfattn_lora=rng.random() < 0.9,
        output_lora=rng.random() < 0.15,
        leave_out=rng.choice(([], [], [0], [1])),
        r=rng.choice((1, 3, 8)),
        alpha=rng.choice((1, 4, 8)),
        dropout=rng.choice((0.0, 0.1)),
        attn_matrices=rng.choice((["q"], ["q", "v"], ["k", "v"], ["q", "k", "v"])),
        use_gating=rng.random() < 0.3,
    )
    if rng.random() < 0.4:
        kind = dict(n_up_projection=rng.choice((1, 3)), weights_sharpness=rng.choice((0.05, 1.0)))
        lora = adapters.MTLLoRAConfig(**common, **kind)
    else:
        values = dict(vera_d=rng.choice((0.1, 1.0)), vera_b=rng.choice((0.0, 0.5)), use_dora=rng.random() < 0.4)
        lora = adapters.VeraConfig(**common, **values)
    if rng.random() < 0.3:
        return adapters.ConfigUnion(lora, adapters.SeqBnConfig(reduction_factor=6, use_gating=rng.random() < 0.5))
    return lora


def _case(number: int) -> DrawnCase:
    return draw_method(_SEED, number, _config)


def _wide_norm(norm: nn.Module, x: Tensor) -> Tensor:
    return norm.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon))


@pytest.fixture
def wide_t5(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """T5 in float64 throughout: transformers and the library compute its norms' variance and its softmax in float32,
    and the stack enlarges their rounding to more than 1e-5."""
    narrow = Tensor.float
    monkeypatch.setattr(T5LayerNorm, "forward", _wide_norm)
    monkeypatch.setattr(Tensor, "float", lambda x: x if x.dtype == torch.float64 else narrow(x))
    monkeypatch.setattr(drawn_cases, "_TOLERANCE", 1e-10)
    for made in (drawn_cases._base, drawn_cases._library):
        made.cache_clear()
    yield
    for made in (drawn_cases._base, drawn_cases._library):
        made.cache_clear()


_NUMBERS = {is_t5: [number for number in range(_CASES) if _case(number).family.startswith("t5") == is_t5]
            for is_t5 in (False, True)}  # fmt: skip


def _check(number: int) -> None:
    case = _case(number)
    found = outcome(case)
    assert found.startswith(FINE), f"{case}: {found}"


@pytest.mark.parametrize("number", _NUMBERS[False])
def test_equal_or_refused(number: int) -> None:
    _check(number)


@pytest.mark.usefixtures("wide_t5")
@pytest.mark.parametrize("number", _NUMBERS[True])
def test_t5_is_equal_or_refused(number: int) -> None:
    _check(number)


def test_many_of_them_are_equal() -> None:
    check_many_are_equal([_case(number) for number in range(0, _CASES, 4)])
