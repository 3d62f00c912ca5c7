"""Drawn prompts of AdapterHub on many families: what the library gives, or refused with a reason."""

import random

import pytest

import adapters
from drawn_cases import FINE, DrawnCase, check_many_are_equal, draw_method, outcome

_SEED = 31
_CASES = 40


def _config(rng: random.Random) -> adapters.AdapterConfig:
    prompt = adapters.PromptTuningConfig(
        prompt_length=rng.choice((1, 3, 12)), combine=rng.choice(("prefix", "prefix_after_bos"))
    )
    other = rng.choice((None, None, adapters.LoRAConfig(r=3, use_gating=True), adapters.SeqBnInvConfig()))
    return adapters.ConfigUnion(prompt, other) if other else prompt


def _case(number: int) -> DrawnCase:
    return draw_method(_SEED, number, _config)


@pytest.mark.parametrize("number", range(_CASES))
def test_equal_or_refused(number: int) -> None:
    case = _case(number)
    found = outcome(case)
    assert found.startswith(FINE), f"{case}: {found}"


def test_many_of_them_are_equal() -> None:
    supported = ("bert", "roberta", "xlm_roberta", "albert", "electra", "vit", "beit", "own")
    check_many_are_equal([case for number in range(_CASES) if (case := _case(number)).family in supported])
