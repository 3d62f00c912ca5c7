"""A module with a Parallel is verified without example inputs."""

import warnings

import pytest

import torchgraft
from test_parallel import composed
from torchgraft import BatchSplit, Parallel, Stack


@pytest.mark.parametrize(
    ("variant", "block"),
    [
        ("bert_sdpa", Parallel("bn", BatchSplit("bn2", "bn", batch_sizes=[1, 1]))),
        ("encoder_slow_pre_seq_first", Parallel("bn", "bn2")),
    ],
)
def test_verified_on_inputs_that_are_made_up(variant: str, block: Parallel) -> None:
    """A warning would say what was not compared."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = composed(variant, block, verify=True)
        torchgraft.lower(torchgraft.rename_adapter(module, "bn", "en"))
        torchgraft.compose(module, "more", Stack("bn", "bn2"))
    assert not [each for each in caught if "not compared" in str(each.message)]
