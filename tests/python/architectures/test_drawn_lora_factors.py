"""Drawn VeRA, DvoRA and MTL-LoRA of AdapterHub on many families: what the library gives, or refused with a reason."""

import random

import pytest

import adapters
from drawn_cases import DrawnCase, draw, outcome

_SEED = 25
_CASES = 60
_FINE = ("equal", "refused: ", "warned: ", "library fails: ")


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
    """A family and a form as draw() gives them, with a configuration of these methods."""
    model = draw(_SEED, number)
    return DrawnCase(_SEED, number, model.family, model.attention, model.form, "AdapterHub",
                     _config(random.Random(f"{_SEED} {number}")), model.safetensors)  # fmt: skip


@pytest.mark.parametrize("number", range(_CASES))
def test_equal_or_refused(number: int) -> None:
    case = _case(number)
    found = outcome(case)
    if case.family.startswith("t5") and found.startswith("differs by"):
        # Its norms round float64 to float32, and the stack enlarges it: a plain LoRA differs by 1.5e-4 there.
        assert float(found.split()[-1]) <= 5e-4
        return
    assert found.startswith(_FINE), f"{case}: {found}"
