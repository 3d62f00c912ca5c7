"""Attention that writes in place, or masks by what is no mask: grafted exactly, or refused with the line that does it.

A fresh LoRA changes nothing, so a grafted module must give what its base gives. Every spelling stands in one attention of
one layer, scripted and traced.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import torchgraft

HIDDEN, HEADS = 32, 4
MASKED = "own rows have padding"

# name: (what happens to scores, keys `k` and queries `q` [B, h, S, d] before the softmax; `mask` [B, S], 0 = padding)
SPELLINGS = {
    "masked_fill_": "scores.masked_fill_(mask[:, None, None, :] == 0, -1e4)",
    "masked_fill_ in a branch": "if self.masks:\n    scores.masked_fill_(mask[:, None, None, :] == 0, -1e4)",
    "add_ of a mask": "scores.add_((1.0 - mask[:, None, None, :].float()) * -1e4)",
    "a column set to minus infinity": "scores[..., 0] = float('-inf')",
    "later tokens set in a loop": "for i in range(scores.size(2)):\n    scores[:, :, i, i + 1:] = float('-inf')",
    "keys scaled in place": "k *= 0.5",
    "half of the queries scaled in place": "q[:, :, :, :4] *= 0.25",
    "keys scaled through a view": "k.transpose(1, 2).mul_(0.5)",
    "keys scaled through select": "k.select(1, 0).mul_(0.5)",
    "keys scaled through detach": "k.detach().mul_(0.5)",
    "scores changed through a flat view": "scores.view(-1)[0:3] = 2.0",
    "scores multiplied into themselves": "torch.mul(scores, 0.5, out=scores)",
    "a mask that changes behind its use": "m = (1.0 - mask[:, None, None, :].float()) * -1e4\n"
    "scores = scores + m\nm.zero_()",
    "filled with 0": "scores = scores.masked_fill(mask[:, None, None, :] == 0, 0.0)",
    "filled with -10": "scores = scores.masked_fill(mask[:, None, None, :] == 0, -10.0)",
    "where of the scores themselves": "scores = torch.where(scores > 0, scores, torch.full_like(scores, -1e9))",
    "leaky relu by where": "scores = torch.where(scores > 0, scores, 0.1 * scores)",
    "filled with minus infinity": "scores = scores.masked_fill(mask[:, None, None, :] == 0, float('-inf'))",
    "filled with a tensor": "scores = torch.where(mask[:, None, None, :] == 0, torch.full([], -1e9), scores)",
    "where keeps the scores first": "scores = torch.where(mask[:, None, None, :] != 0, scores, torch.full([], -1e9))",
}
# These are taken; all others are refused, with a reason that holds the text.
EXACT = {"masked_fill_", "masked_fill_ in a branch", "add_ of a mask", "keys scaled in place", "filled with minus infinity",
         "half of the queries scaled in place", "keys scaled through a view", "keys scaled through select",
         "filled with a tensor", "where keeps the scores first"}  # fmt: skip
REFUSED = {
    "filled with 0": "sets scores to 0, which is no mask",
}

_SOURCE = """
class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.value, self.output = [nn.Linear(HIDDEN, HIDDEN) for _ in range(4)]
        self.norm = nn.LayerNorm(HIDDEN)
        self.masks: bool = True

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        rows, tokens, hidden = x.shape
        q = self.query(x).view(rows, tokens, {heads}, -1).transpose(1, 2)
        k = self.key(x).view(rows, tokens, {heads}, -1).transpose(1, 2)
        v = self.value(x).view(rows, tokens, {heads}, -1).transpose(1, 2)
{before}
        scores = torch.matmul(q, k.transpose(-1, -2)) / {scale}
{after}
        mixed = torch.matmul(torch.softmax(scores, -1), v).transpose(1, 2).reshape(rows, tokens, hidden)
        return self.norm(x + self.output(mixed))
"""


def indented(text: str) -> str:
    return "\n".join(" " * 8 + line for line in text.split("\n"))


@pytest.fixture
def make_layer(tmp_path, monkeypatch) -> Callable[[str], nn.Module]:
    """The layer with one spelling; torch.jit.script reads its source from a file."""

    def make(spelling: str) -> nn.Module:
        text = SPELLINGS[spelling]
        on_projections = text.startswith(("k", "q"))
        source = _SOURCE.format(
            heads=HEADS,
            scale=math.sqrt(HIDDEN / HEADS),
            before=indented(text) if on_projections else "",
            after="" if on_projections else indented(text),
        )
        path = tmp_path / "spelled_layer.py"
        path.write_text(f"import torch\nfrom torch import Tensor, nn\n\nHIDDEN = {HIDDEN}\n\n{source}")
        namespace: dict = {"__name__": "spelled_layer"}
        exec(compile(path.read_text(), str(path), "exec"), namespace)
        layer = namespace["Layer"]
        # inspect.getsource asks the module for its file.
        module = type(torch)("spelled_layer")
        module.__file__, module.Layer = str(path), layer
        monkeypatch.setitem(__import__("sys").modules, "spelled_layer", module)
        torch.manual_seed(0)
        return layer().eval()

    return make


@pytest.mark.parametrize("form", ["script", "trace"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_fresh_adapter_changes_nothing_or_the_layer_is_refused(
    spelling: str, form: str, make_layer: Callable[[str], nn.Module]
) -> None:
    layer = make_layer(spelling)
    torch.manual_seed(1)
    x = torch.randn(3, 7, HIDDEN)
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[0, 4:], mask[1, 2:] = 0, 0
    base = torch.jit.script(layer) if form == "script" else torch.jit.trace(layer, (x, mask))
    try:
        grafted = torchgraft.graft(base, config="lora", name="task")
    except torchgraft.GraftError as error:
        assert spelling not in EXACT, error
        expected = REFUSED.get(spelling, "in place" if "=" not in spelling else "")
        assert expected in str(error) or "by scaling and masking alone" in str(error)
        return
    assert spelling not in REFUSED
    with torch.no_grad():
        difference = (grafted(x, mask) - layer(x, mask)).abs().max().item()
        rows_of_the_base = (grafted(x, mask, adapter_ids=torch.full((3,), -1)) - layer(x, mask)).abs().max().item()
    assert max(difference, rows_of_the_base) < 1e-5
