"""graft(fuse=...): which operators compute a slot changes its results by rounding only."""

import re

import pytest
import torch

import torchgraft
from grafted import base

pytestmark = pytest.mark.quick


def results(config: str, fuse: bool) -> list[torch.Tensor]:
    """Hidden states of a batch with one adapter, and of the same with a row of the base model."""
    model = torchgraft.graft(base("bert_sdpa", torch.float32), config=config, name="task", fuse=fuse)
    assert bool(re.search(r"torchgraft::gated_\w+_linear\(", str(model.grafted_forward.inlined_graph))) == fuse
    torch.manual_seed(0)
    ids = torch.randint(5, 90, (3, 21))
    with torch.no_grad():
        for _, parameter in sorted(model.adapters.named_parameters()):  # a fresh adapter changes nothing
            parameter.copy_(0.3 * torch.randn_like(parameter))
        return [model(ids, torch.ones_like(ids), adapter_ids=torch.tensor(rows))[0] for rows in ([0, 0, 0], [0, -1, 0])]


@pytest.mark.parametrize("config", ["mam", "unipelt", "par_bn[use_gating=True]", "lora"])
def test_results_are_those_of_the_parts(config: str) -> None:
    fused, apart = results(config, True), results(config, False)
    assert (fused[0][1] - fused[1][1]).abs().max() > 0.1  # the adapter does something
    for one, other in zip(fused, apart, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
