"""Grafted models equal the oracle: results and gates, for every kind of base and every method."""

import pytest
import torch

import torchgraft
from grafted import EVERY_WAY, grafted, saved_adapter
from models import VARIANTS
from oracle import CONFIGS, TOLERANCE, assert_gates_close, difference, oracle_for, runs_on, varied_batches

# Every base with the unions; every method on one base of each way of writing attention.
_UNIONS = ["unipelt", "mam", "union_everything"]
_CASES = [
    (variant, config, dtype)
    for variant in VARIANTS
    for config in (CONFIGS if variant in EVERY_WAY else _UNIONS)
    for dtype in (torch.float32, torch.float64)
    if runs_on(config, variant)  # the other case is below
]


@pytest.mark.parametrize(
    ("name", "config", "dtype"), _CASES, ids=[f"{name}-{config}-{str(dtype)[6:]}" for name, config, dtype in _CASES]
)
def test_results_and_gates_equal_the_oracle(name: str, config: str, dtype: torch.dtype) -> None:
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
