"""A fresh adapter needs allow_partial=True where some attention is not recognised, and nowhere else."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import torchgraft
from odd_layers import HIDDEN, Plain, TwoLayers, batch

pytestmark = pytest.mark.quick


class NoAttentionProduct(Plain):
    """Its probabilities are squared, so that it is no attention that can be grafted."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2) / 3.0
        return scores.softmax(-1).square() @ v


class Chooses(nn.Module):
    """A softmax over classes, which is no attention."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.classes = Plain(), nn.Linear(HIDDEN, 5)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.classes(self.layer(x, mask)).softmax(-1)


def test_a_fresh_adapter_on_some_layers_is_refused_with_their_names(tmp_path: Path) -> None:
    base = torch.jit.script(TwoLayers(NoAttentionProduct()).eval())
    named = "1 attention is recognised, others are not .*\n  at .*: a softmax was not taken for attention: "
    with pytest.raises(torchgraft.GraftError, match=named):
        torchgraft.graft(base, config="lora", name="task")
    with pytest.warns(UserWarning, match=named):
        part = torchgraft.graft(base, config="lora", name="task", allow_partial=True)
    torchgraft.graft(part, config="lora", name="beside")  # it was accepted
    torchgraft.graft(base, config="lora", name="task", sites=torchgraft.inspect(base))  # it is what is wanted
    whole = torchgraft.graft(torch.jit.script(TwoLayers(Plain()).eval()), config="lora", name="task")
    torchgraft.save_adapter(whole, "task", tmp_path)
    with pytest.raises(torchgraft.GraftError, match="Some attention was not recognised:\n  at "):
        torchgraft.graft(base, adapters={"task": tmp_path})


def test_a_fresh_adapter_beside_a_loaded_one_is_refused_on_some_layers(tmp_path: Path) -> None:
    base = torch.jit.script(TwoLayers(NoAttentionProduct()).eval())
    part = torchgraft.graft(base, config="lora", name="task", allow_partial=True)
    torchgraft.save_adapter(part, "task", tmp_path)
    loaded = torchgraft.graft(base, adapters={"task": tmp_path})
    with pytest.raises(torchgraft.GraftError, match="1 attention is recognised"):
        torchgraft.graft(loaded, config="lora", name="beside")
    torchgraft.graft(loaded, config="lora", name="beside", allow_partial=True)


class _Behind(nn.Module):
    """A layer, and something with a softmax behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.linear = Plain(), nn.Linear(HIDDEN, HIDDEN)
        self.query = nn.Parameter(torch.randn(HIDDEN))
        self.table = nn.Parameter(torch.randn(HIDDEN, HIDDEN))


class Similarities(_Behind):
    """CLIP's probabilities: of one text for one image."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        pooled = self.linear(self.layer(x, mask).mean(1))
        return (pooled @ x.mean(1).t()).softmax(-1)


class PoolsByQuery(_Behind):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.layer(x, mask)
        weights = (self.linear(y).tanh() @ self.query).softmax(1)
        return self.linear((weights.unsqueeze(1) @ y).squeeze(1))


class PoolsByAttention(_Behind):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.layer(x, mask)
        query = self.query.view(1, 1, -1).expand(y.size(0), -1, -1)
        return ((query @ self.linear(y).transpose(1, 2) / 4.0).softmax(-1) @ y).squeeze(1)


class Transitions(_Behind):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.linear(self.layer(x, mask).softmax(-1) @ self.table.softmax(-1))


class SoftExperts(_Behind):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.layer(x, mask)
        logits = y @ self.table
        return logits.softmax(2) @ self.linear(logits.softmax(1).transpose(1, 2) @ y)


class Additive(_Behind):
    """Bahdanau's attention, which is not recognised."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.layer(x, mask)
        scores = (self.linear(y).unsqueeze(1) + self.linear(y).unsqueeze(2)).tanh() @ self.query
        return self.linear(scores.softmax(-1) @ y)


class TalkingHeads(_Behind):
    """A linear map over heads between scores and softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.layer(x, mask)
        heads = self.linear(y).view(y.size(0), y.size(1), 4, -1).transpose(1, 2)
        scores = self.mix((heads @ heads.transpose(-1, -2)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.linear((scores.softmax(-1) @ heads).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("form", ["script", "trace"])
@pytest.mark.parametrize("model", [Chooses, Similarities, PoolsByQuery, PoolsByAttention, Transitions, SoftExperts])
def test_a_softmax_that_is_no_layer_s_hinders_no_fresh_adapter(model: type[nn.Module], form: str) -> None:
    base = torch.jit.script(model().eval()) if form == "script" else torch.jit.trace(model().eval(), batch())
    torchgraft.graft(base, config="lora", name="task")


class OfOneRow(Additive):
    """Additive attention of the first row, by products of matrices."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.layer(x, mask)[0]
        scores = (self.linear(y).unsqueeze(0) + self.linear(y).unsqueeze(1)).tanh() @ self.query
        return torch.mm(scores.softmax(-1), y)


@pytest.mark.parametrize("form", ["script", "trace"])
@pytest.mark.parametrize("model", [Additive, TalkingHeads, OfOneRow])
def test_attention_of_another_kind_hinders_a_fresh_adapter(model: type[nn.Module], form: str) -> None:
    base = torch.jit.script(model().eval()) if form == "script" else torch.jit.trace(model().eval(), batch())
    with pytest.raises(torchgraft.GraftError, match="1 attention is recognised, others are not"):
        torchgraft.graft(base, config="lora", name="task")


class InBranches(Additive):
    """Probabilities leave the branches that make them."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.layer(x, mask)
        scores = (self.linear(y).unsqueeze(1) + self.linear(y).unsqueeze(2)).tanh() @ self.query
        probabilities = scores.softmax(-1) if x.size(1) > 3 else (2.0 * scores).softmax(-1)
        return self.linear(probabilities @ y)


class InALoop(Additive):
    """The next turn reads what this one makes."""

    def forward(self, x: Tensor, mask: Tensor, turns: int = 2) -> Tensor:
        y = self.layer(x, mask)
        mixed = torch.zeros(y.size(0), y.size(1), y.size(1))
        for _ in range(turns):
            y = torch.tanh(mixed @ y)
            scores = (self.linear(y).unsqueeze(1) + self.linear(y).unsqueeze(2)).tanh() @ self.query
            mixed = scores.softmax(-1)
        return y


@pytest.mark.parametrize("model", [InBranches, InALoop])
def test_attention_whose_probabilities_leave_a_block_hinders_a_fresh_adapter(model: type[nn.Module]) -> None:
    with pytest.raises(torchgraft.GraftError, match="1 attention is recognised, others are not"):
        torchgraft.graft(torch.jit.script(model().eval()), config="lora", name="task")
