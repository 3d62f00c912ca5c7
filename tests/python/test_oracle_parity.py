"""Models with one adapter equal the oracle: results and gates, for every kind of base and every method, in float32.

In float64: test_oracle_bank.py, many adapters in one bank; test_checkpoints.py, one adapter.
"""

import pytest
import torch

import torchgraft
from grafted import EVERY_WAY, grafted, saved_adapter
from models import VARIANTS
from oracle import CONFIGS, TOLERANCE, assert_gates_close, difference, oracle_for, runs_on, varied_batches

# Every base with the unions; every method on one base of each way of writing attention. Of these, each run has every
# method on one base in turn: test_oracle_bank.py has each on all of them, in float64.
_UNIONS = ["unipelt", "mam", "union_everything"]


def _marks(variant: str, config: str) -> list[pytest.MarkDecorator]:
    turn = list(CONFIGS).index(config) % len(EVERY_WAY)
    is_often = config in _UNIONS or sorted(EVERY_WAY).index(variant) == turn
    return [pytest.mark.quick] * (config == "unipelt") + [pytest.mark.slow(seconds=1)] * (not is_often)


_CASES = [
    pytest.param(variant, config, marks=_marks(variant, config))
    for variant in VARIANTS
    for config in (CONFIGS if variant in EVERY_WAY else _UNIONS)
    if runs_on(config, variant)  # the other case is below
]


@pytest.mark.parametrize(("name", "config"), _CASES)
def test_results_and_gates_of_one_adapter_equal_the_oracle(name: str, config: str) -> None:
    dtype = torch.float32
    variant = VARIANTS[name]
    module = grafted(name, dtype, config)
    saved = saved_adapter(variant, dtype, config)
    for batch in varied_batches(variant, dtype):
        expected = oracle_for(variant, dtype).run(variant, batch, saved)
        with torch.no_grad():
            result, gates = module.forward_with_gates(*variant.arguments(batch))
            alone = module(*variant.arguments(batch))
        actual = variant.compared(variant.hidden(result), batch)
        assert difference(actual, variant.compared(expected.hidden, batch)) <= TOLERANCE[dtype]
        # Not bit for bit: with one thread TorchScript fuses element-wise code from the third run on.
        assert difference(variant.compared(variant.hidden(alone), batch), actual) <= TOLERANCE[dtype] / 10
        if expected.gates:
            assert_gates_close(gates["task"], expected.gates, TOLERANCE[dtype])
        else:
            assert dict(gates["task"]) == {}


def test_a_sum_without_a_norm_behind_it_is_no_residual() -> None:
    """The library's first forward pass ends in an UnboundLocalError there."""
    variant = VARIANTS["own_pre_sdpa_bool"]
    saved = saved_adapter(variant, torch.float32, "bn_residual_post_add")
    batch = next(iter(varied_batches(variant, torch.float32)))
    with pytest.raises(UnboundLocalError):
        oracle_for(variant, torch.float32).run(variant, batch, saved)
    with pytest.raises(torchgraft.GraftError, match='residual_before_ln="post_add".*no norm behind'):
        grafted("own_pre_sdpa_bool", torch.float32, "bn_residual_post_add")
