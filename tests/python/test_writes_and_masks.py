"""Attention that writes in place, or sets scores to what is no mask: exact, or refused with the line that does it.

A fresh LoRA changes nothing, so a grafted module must give what its base gives. Every spelling stands in one
attention of one layer, scripted and traced.
"""

import math
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import torchgraft

HIDDEN, HEADS = 32, 4

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
    "an integer added, then filled": "scores = scores + torch.tensor(0)\n"
    "scores = scores.masked_fill(mask[:, None, None, :] == 0, -3.4e38)",
    "filled with a tensor": "scores = torch.where(mask[:, None, None, :] == 0, torch.full([], -1e9), scores)",
    "a mask as large as scores": "scores = scores.masked_fill((mask[:, None, None, :] == 0).expand_as(scores), -1e9)",
    "filled, then negated": "scores = scores.masked_fill(mask[:, None, None, :] == 0, -1e4) * -1.0",
    "filled, then scaled down": "scores = scores.masked_fill(mask[:, None, None, :] == 0, -1e4) / 1000.0",
    "filled with much, then scaled": "scores = scores.masked_fill(mask[:, None, None, :] == 0, -1e9) / 1000.0",
    "two writes through one view": "k0 = k[:, :, :, :4]\nk0.mul_(0.5)\nk0.mul_(6.0)",
    "a view, the whole, the view": "q0 = q[:, :, :, :4]\nq0.mul_(0.5)\nq.mul_(2.0)\nq0.add_(1.0)",
    "keys written behind their scale": "pieces = k.chunk(1, dim=1)\nk0 = pieces[0]\nk = k0 / 2.0\nk0.mul_(5.0)",
    "an input that is zeroed behind a branch": "if tokens > 1:\n"
    "    scores = scores + (1.0 - mask[:, None, None, :].float()) * -1e4\nmask.zero_()",
    "their own top-k by where": "least = torch.topk(scores, 3)[0][..., -1:]\n"
    "scores = torch.where(scores < least, torch.full([], -1e9), scores)",
    "their own top-k by a scattered bias": "scores = scores + torch.full_like(scores, float('-inf')).scatter(\n"
    "    -1, torch.topk(scores, 3)[1], 0.0)",
    "their own top-k by a factor": "scores = scores - (scores < torch.topk(scores, 3)[0][..., -1:]).float() * 1e9",
    "their largest subtracted": "scores = scores - scores.amax(-1, keepdim=True)",
    "filled by two masks": "scores = scores.masked_fill(mask[:, None, None, :] == 0, -1e4)\n"
    "scores = scores.masked_fill(torch.ones(7, 7).triu(1) > 0, -1e4)",
    "filled by where with a number": "scores = torch.where(mask[:, None, None, :] == 0, -1e5, scores)",
    "where keeps the scores first": "scores = torch.where(mask[:, None, None, :] != 0, scores, torch.full([], -1e9))",
}
# These are refused, with a reason that holds the text; all others are taken.
_NO_PATH = "its input does not come from a product of queries and keys by scaling and masking alone"
REFUSED = {
    "a column set to minus infinity": _NO_PATH,
    "later tokens set in a loop": "",  # a trace has no loop: another reason
    "scores changed through a flat view": _NO_PATH,
    "scores multiplied into themselves": "",
    "filled with 0": "sets scores to 0, which is no mask: expected -inf, or at most -9000",
    "filled with -10": "sets scores to -10, which is no mask: expected -inf, or at most -9000",
    "where of the scores themselves": "decides by the scores themselves which of them it replaces",
    "leaky relu by where": "decides by the scores themselves which of them it replaces",
    "their own top-k by where": "decides by the scores themselves which of them it replaces",
    "their own top-k by a scattered bias": "changes the scores by what is computed from the scores themselves",
    "their own top-k by a factor": "changes the scores by what is computed from the scores themselves",
    "filled, then negated": "sets scores to -10000, and scales them by -1, which is no mask",
    "filled, then scaled down": "sets scores to -10000, and scales them by 0.001, which is no mask",
}
# A script and a trace need not come to the same: each is taken, or refused.
EITHER = {
    "a view, the whole, the view",
    "keys written behind their scale",
    "an input that is zeroed behind a branch",
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
        monkeypatch.setitem(sys.modules, "spelled_layer", module)
        torch.manual_seed(0)
        return layer().eval()

    return make


def batch(tokens_of_second: int = 2) -> tuple[Tensor, Tensor]:
    """Hidden states and a mask with padding, but in the last row."""
    torch.manual_seed(1)
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[0, 4:], mask[1, tokens_of_second:] = 0, 0
    return torch.randn(3, 7, HIDDEN), mask


def scripted_or_traced(layer: nn.Module, form: str) -> torch.jit.ScriptModule:
    with torch.no_grad():
        return torch.jit.script(layer) if form == "script" else torch.jit.trace(layer, batch())


@pytest.mark.parametrize("form", ["script", "trace"])
@pytest.mark.parametrize("spelling", [name for name in SPELLINGS if name not in REFUSED and name not in EITHER])
def test_a_fresh_adapter_changes_nothing(spelling: str, form: str, make_layer: Callable[[str], nn.Module]) -> None:
    layer = make_layer(spelling)
    assert_equal(torchgraft.graft(scripted_or_traced(layer, form), config="lora", name="task"), layer)


def assert_equal(grafted: torch.jit.ScriptModule, layer: nn.Module) -> None:
    """With padding in a row, and with a row of padding, which is NaN where scores are -inf."""
    for tokens in (2, 0):
        with torch.no_grad():
            expected = layer(*batch(tokens))
            rows = [row for row in range(3) if tokens > 0 or expected[row].isfinite().all()]
            for ids in (None, torch.full((3,), -1)):
                assert (grafted(*batch(tokens), adapter_ids=ids) - expected)[rows].abs().max().item() < 1e-5


@pytest.mark.parametrize("form", ["script", "trace"])
@pytest.mark.parametrize("spelling", sorted(EITHER))
def test_it_is_equal_or_refused(spelling: str, form: str, make_layer: Callable[[str], nn.Module]) -> None:
    layer = make_layer(spelling)
    try:
        grafted = torchgraft.graft(scripted_or_traced(layer, form), config="lora", name="task")
    except torchgraft.GraftError as error:
        refused = str(error)
    else:
        assert_equal(grafted, layer)
        return
    assert "writes into its queries, keys, scores or mask in place" in refused


@pytest.mark.parametrize("form", ["script", "trace"])
@pytest.mark.parametrize("spelling", REFUSED)
def test_what_cannot_be_proven_is_refused(spelling: str, form: str, make_layer: Callable[[str], nn.Module]) -> None:
    base = scripted_or_traced(make_layer(spelling), form)
    with pytest.raises(torchgraft.GraftError, match="no attention was found") as refused:
        torchgraft.graft(base, config="lora", name="task")
    assert REFUSED[spelling] in str(refused.value)


@pytest.mark.parametrize("spelling", ["later tokens set in a loop", "scores multiplied into themselves"])
def test_a_write_that_stays_is_named_with_its_line(spelling: str, make_layer: Callable[[str], nn.Module]) -> None:
    base = scripted_or_traced(make_layer(spelling), "script")
    with pytest.raises(torchgraft.GraftError, match=r"aten::\w+ at \S+spelled_layer.py:\d+ writes into its queries"):
        torchgraft.graft(base, config="lora", name="task")
