"""Modules that are drawn in two spellings: grafted exactly, alike in both, or refused.

python tests/python/test_drawn_layers.py --cases 1000 --seed 7
"""

import argparse
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

import torchgraft
from drawn_layers import draw, inputs

CASES = 40
CONFIGS = ["lora[attn_matrices=['q','k','v'],init_weights='bert']", "prefix_tuning[flat=True]", "unipelt"]
TOLERANCE = 2e-4


def _grafted(module: torch.jit.ScriptModule, **adapter: object) -> torch.jit.ScriptModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torchgraft.graft(module, verify=False, **adapter)


def _off(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


def run_case(seed: int, folder: Path) -> str:
    """Returns "equal" or "refused"; raises AssertionError, with the source, for a difference."""
    pair = draw(seed, folder)
    config = CONFIGS[seed % len(CONFIGS)]
    is_script = seed % 2 == 0
    form = lambda m: torch.jit.script(m) if is_script else torch.jit.trace(m, inputs(), check_trace=False)  # noqa: E731
    context = f"{config}, {'scripted' if is_script else 'traced'}:\n{pair.source}"
    with torch.no_grad():
        expected = pair.plain(*inputs())
        assert _off(pair.odd(*inputs()), expected) < TOLERANCE, f"the generator's spellings differ, {context}"
        try:
            odd = _grafted(form(pair.odd), config=config, name="task")
        except torchgraft.GraftError:
            return "refused"
        ids = torch.full((3,), -1)
        assert _off(odd(*inputs(), adapter_ids=ids), expected) < TOLERANCE, f"-1 moves the base, {context}"
        generator = torch.Generator().manual_seed(2)
        for bank in odd.adapters.parameters():
            if bank.is_floating_point():
                bank += torch.randn(bank.shape, generator=generator) * 0.1
        torchgraft.save_adapter(odd, "task", folder / f"{seed}")
        assert _off(odd(*inputs(), adapter_ids=ids), expected) < TOLERANCE, f"-1 with other weights, {context}"
        try:
            plain = _grafted(form(pair.plain), adapters={"task": folder / f"{seed}"})
        except torchgraft.GraftError as error:
            return _of_plain(error, pair.plain, form)
        adapted = odd(*inputs())
        assert _off(plain(*inputs()), adapted) < TOLERANCE, f"the adapter computes another result, {context}"
    return "equal"


def _of_plain(error: Exception, plain: nn.Module, form) -> str:
    """The odd spelling was taken: the plain one may be refused as a whole, but must not have other places."""
    try:
        structure = torchgraft.inspect(form(plain))
    except torchgraft.GraftError:
        return "refused"
    assert structure["near_misses"], f"the two spellings have other places: {error}"
    return "refused"


def test_drawn_layers_are_exact_or_refused(tmp_path: Path) -> None:
    seen = Counter(run_case(seed, tmp_path) for seed in range(CASES))
    assert seen["equal"] >= CASES // 3


@pytest.mark.slow(seconds=240)
def test_many_drawn_layers_are_exact_or_refused(tmp_path: Path) -> None:
    for seed in range(CASES, 12 * CASES):
        run_case(seed, tmp_path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=CASES)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    seen = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(arguments.seed, arguments.seed + arguments.cases):
            try:
                seen[run_case(seed, Path(folder))] += 1
            except Exception as error:
                seen["wrong"] += 1
                print(f"python {sys.argv[0]} --cases 1 --seed {seed}\n  {error}\n")
    print(dict(seen))
    return 1 if seen["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
