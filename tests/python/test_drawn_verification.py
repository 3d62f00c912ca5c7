"""Verification draws the weights of fresh adapters, which change nothing and would hide what is wrong around them."""

import pytest
import torch
from torch import Tensor, nn

import torchgraft
from test_weight_uses import HIDDEN, attend, inputs, saved_and_loaded

CONFIGS = ["lora[r=4]", "seq_bn[reduction_factor=4]", "par_bn[reduction_factor=4]", "lora[r=4, use_gating=True]"]
ALL_CONFIGS = [
    *CONFIGS,
    "compacter[reduction_factor=4]",
    "lora[r=4, use_dora=True]",
    "unipelt",
    "seq_bn[ln_before=True, residual_before_ln=False, reduction_factor=4]",
]
OPERATORS = ("torchgraft::gated_lora", "torchgraft::gated_bottleneck")


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out, self.up, self.down = (nn.Linear(HIDDEN, HIDDEN) for _ in range(6))
        self.first, self.second = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x + self.out(attend(self.q(x), self.k(x), self.v(x))))
        return self.second(x + self.down(torch.relu(self.up(x))))


@pytest.fixture(scope="module")
def base() -> torch.jit.ScriptModule:
    torch.manual_seed(0)
    return torch.jit.trace(_Layer().double().eval(), inputs())


def _without_ids(module: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    """A file whose operators do not read adapter_ids: rows of the base run the active adapter."""
    result = saved_and_loaded(module)
    graph = result.whole_graphs.grafted_forward.graph
    given = list(graph.inputs())[-1].debugName()
    for node in [node for node in graph.nodes() if node.kind().startswith(OPERATORS)]:
        none = graph.create("prim::Constant")
        none.output().setType(torch._C.NoneType.get())
        none.insertBefore(node)
        ids = [i for i, value in enumerate(node.inputs()) if value.debugName() == given]
        assert len(ids) == 1
        node.replaceInput(ids[0], none.output())
    return saved_and_loaded(result)


@pytest.mark.parametrize("config", CONFIGS)
def test_rows_of_the_base_that_run_a_fresh_adapter_are_seen(base: torch.jit.ScriptModule, config: str) -> None:
    module = torchgraft.graft(base, config, "task")
    assert torchgraft.verify(module) == torchgraft.verify(module, inputs()) == []
    with pytest.raises(torchgraft.GraftError, match=r"adapter_ids = -1 differs from the base's"):
        torchgraft.verify(_without_ids(module))


def test_a_change_of_a_file_with_such_rows_is_refused(base: torch.jit.ScriptModule) -> None:
    module = _without_ids(torchgraft.graft(base, "lora[r=4]", "task"))
    with pytest.raises(torchgraft.GraftError, match=r"adapter_ids = -1 differs from the base's"):
        torchgraft.ungraft(module)
    torchgraft.ungraft(module, verify=False)


@pytest.mark.parametrize("config", ALL_CONFIGS)
@pytest.mark.parametrize("trainable", [False, pytest.param(True, marks=pytest.mark.slow(seconds=2))])
def test_every_change_of_fresh_adapters_is_verified(base: torch.jit.ScriptModule, config: str, trainable: bool) -> None:
    module = torchgraft.graft(base, config, "task", trainable=trainable)
    module = torchgraft.graft(module, "lora[r=2]", "plain")
    module = torchgraft.graft(module, "lora[r=2]", "other")
    weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    torchgraft.lower(module)
    torchgraft.ungraft(module)
    torchgraft.average_adapter(module, "mean", {"plain": 0.25, "other": 0.75})
    merged = torchgraft.merge_adapter(module, "plain", into_base=True)
    torchgraft.unmerge_adapter(merged, "plain")
    assert torchgraft.verify(merged) == torchgraft.verify(module) == []
    for name, tensor in module.state_dict().items():  # nothing drawn is left in what is given back
        assert torch.equal(tensor, weights[name]), name
