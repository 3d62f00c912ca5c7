"""Drawn prompts of AdapterHub on many families: what the library gives, or refused with a reason.

More batches of several prompts than the test draws:

    .venv/bin/python tests/python/architectures/test_drawn_prompts.py --cases 200 --seed 7
"""

import argparse
import random
import tempfile
import warnings
from collections import Counter

import pytest
import torch
from torch import Tensor

import adapters
import drawn_cases
import oracle
import torchgraft
from drawn_cases import FINE, DrawnCase, check_many_are_equal, draw_method, outcome

_SEED = 31
_CASES = 40
_BATCHES = 12
_SUPPORTED = ("bert", "roberta", "xlm_roberta", "albert", "electra", "vit", "beit", "own")


def _prompt(rng: random.Random) -> adapters.PromptTuningConfig:
    return adapters.PromptTuningConfig(
        prompt_length=rng.choice((1, 3, 12)), combine=rng.choice(("prefix", "prefix_after_bos"))
    )


def _config(rng: random.Random) -> adapters.AdapterConfig:
    prompt = _prompt(rng)
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
    check_many_are_equal([case for number in range(_CASES) if (case := _case(number)).family in _SUPPORTED])


def _other(rng: random.Random) -> adapters.AdapterConfig:
    """An adapter without a prompt, with gates where it can have some."""
    return rng.choice(
        (
            adapters.LoRAConfig(r=3, use_gating=True),
            adapters.SeqBnConfig(use_gating=True),
            adapters.DoubleSeqBnInvConfig(reduction_factor=8),
            adapters.UniPELTConfig(),
            adapters.IA3Config(use_gating=rng.random() < 0.5),
            adapters.PrefixTuningConfig(prefix_length=4, bottleneck_size=8, use_gating=True),
        )
    )


def _draw_batch(seed: int, number: int) -> tuple[DrawnCase, list[adapters.AdapterConfig], random.Random]:
    rng = random.Random(f"batch {seed} {number}")
    case = drawn_cases.draw(seed, number)
    while case.family not in (*_SUPPORTED, "distilbert", "deberta", "deberta_v2", "xmod", "bert_generation"):
        case = drawn_cases.draw(seed, rng.randrange(1 << 30))
    configs = [_prompt(rng), _config(rng)] + [_other(rng) for _ in range(rng.choice((0, 1, 1, 2)))]
    return case, configs, rng


def _left(arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Ids and masks with their padding on the other side."""
    return tuple(each.flip(1) if each.dim() == 2 else each for each in arguments)


def _batch_outcome(seed: int, number: int) -> str:
    """As outcome(): each row of a batch of several adapters is what the library gives for the row alone."""
    case, configs, rng = _draw_batch(seed, number)
    arguments = drawn_cases._arguments(case.family, number)
    arguments = _left(arguments) if rng.random() < 0.4 else arguments
    names = [f"a{i}" for i in range(len(configs))]
    rows = [rng.choice([*names, None]) for _ in range(arguments[0].size(0))]
    library = drawn_cases._library(case.family, case.attention)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        directories = {name: f"{folder}/{name}" for name in names}
        try:
            for name, config in zip(names, configs, strict=True):
                oracle.make_oracle_adapter(library.model, config, name, number)
                library.model.eval().save_adapter(directories[name], name, use_safetensors=False)
            expected = []
            for row, name in enumerate(rows):
                library.model.set_active_adapters(name)
                expected.append(library(*[each[row : row + 1] for each in arguments]))
        except Exception as error:
            return f"library fails: {type(error).__name__}: {error}"
        finally:
            library.model.set_active_adapters(None)
            for name in names:
                if name in library.model.adapters_config:
                    library.model.delete_adapter(name)
            library.model.base_model.prefix_tuning.prefix_counts.clear()
        try:
            bank = torchgraft.graft(drawn_cases._base(case.family, case.attention, case.form), adapters=directories)
        except torchgraft.GraftError as error:
            return f"refused: {str(error).replace(folder, 'DIR')}"
        ids = torch.tensor([-1 if name is None else names.index(name) for name in rows])
        try:
            found = bank(*arguments, adapter_ids=ids)
        except Exception as error:
            text = str(error)[str(error).find("prompt_tuning: expected") :]
            return f"refused: {text}" if text else f"raises: {error}"
    found = found[0] if isinstance(found, tuple) else found
    if found.size(1) != max(wanted.size(1) for wanted in expected):
        return f"has {found.size(1)} tokens; {rows}"
    for row, wanted in enumerate(expected):
        apart = oracle.difference(found[row : row + 1, : wanted.size(1)], wanted)
        if not apart <= drawn_cases._TOLERANCE:
            return f"differs by {apart:.2g} in row {row} of {rows}"
    longer = {wanted.size(1) for wanted in expected}
    return "equal" if len(longer) > 1 else "equal in length"


@pytest.mark.parametrize("number", range(_BATCHES))
def test_rows_of_a_batch_are_equal_or_refused(number: int) -> None:
    found = _batch_outcome(_SEED, number)
    assert found.startswith(FINE), f"{_draw_batch(_SEED, number)}: {found}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    counts: Counter[str] = Counter()
    for number in range(options.cases):
        found = _batch_outcome(options.seed, number)
        counts[found[:210]] += 1
        if not found.startswith(FINE):
            print(number, _draw_batch(options.seed, number), found)
    for found, count in counts.most_common():
        print(count, found)


if __name__ == "__main__":
    main()
