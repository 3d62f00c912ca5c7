"""Parallel in modules whose masks have rows for each head."""

import pytest
import torch

import torchgraft
from torchgraft import Parallel


def results_of(module: torch.jit.ScriptModule, config: str, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of two adapters, and of both in a Parallel, whose rows are repeated at the top."""
    for name in ("a", "b"):
        module = torchgraft.graft(module, config, name, verify=False)
    module = torchgraft.compose(module, "both", Parallel("a", "b"), verify=False)
    results = {}
    for name in ("a", "b", "both"):
        module.activate(name)
        with torch.no_grad():
            results[name] = module(*inputs)
    return results


@pytest.mark.parametrize("kind", [torch.float32, torch.bool], ids=str)
def test_a_mask_for_each_head_is_repeated_with_its_row(kind: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """nn.MultiheadAttention takes masks [B * heads, S, S]."""
    monkeypatch.setattr(torch.backends.mha, "get_fastpath_enabled", lambda: False)
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0)
    encoder = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x, mask = torch.randn(5, 3, 16), torch.randn(6, 5, 5)
    mask = mask > 1 if kind is torch.bool else mask
    module = torch.jit.trace(encoder, (x, mask), check_trace=False)
    results = results_of(module, "double_seq_bn[scaling=200]", x, mask)
    assert (results["a"] - results["b"]).abs().max() > 1e-3
    torch.testing.assert_close(results["both"], torch.cat([results["a"], results["b"]], dim=1), atol=1e-5, rtol=0)


def test_a_bias_for_each_head_that_all_rows_share_is_not_repeated() -> None:
    """One row: the bias has as many matrices as a mask for each head of each row."""

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o, self.up, self.down = (torch.nn.Linear(16, 16) for _ in range(6))

        def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
            q, k, v = (m(x).view(x.size(0), x.size(1), 2, 8).transpose(1, 2) for m in (self.q, self.k, self.v))
            mask = bias.view(1, 2, x.size(1), x.size(1))
            mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)
            x = x + self.o(mixed.transpose(1, 2).flatten(2))
            return x + self.down(torch.relu(self.up(x)))

    torch.manual_seed(0)
    x, bias = torch.randn(1, 5, 16), torch.randn(2, 5, 5)
    module = torch.jit.trace(Layer().eval(), (torch.randn(3, 5, 16), bias), check_trace=False)
    results = results_of(module, "seq_bn[scaling=200]", x, bias)
    torch.testing.assert_close(results["both"], torch.cat([results["a"], results["b"]]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("form", ["added", "filled", "baddbmm"])
def test_a_mask_of_scores_of_rows_and_heads_is_repeated_with_its_row(form: str) -> None:
    """Scores [B * heads, S, S] meet such a mask, or [1, S, S], without a view."""

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o, self.up, self.down = (torch.nn.Linear(16, 16) for _ in range(6))

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            rows, tokens = x.size(0), x.size(1)
            q, k, v = (m(x).view(rows, tokens, 2, 8).transpose(1, 2) for m in (self.q, self.k, self.v))
            q, k, v = (x.reshape(rows * 2, tokens, 8) for x in (q, k, v))
            if form == "baddbmm":
                scores = torch.baddbmm(mask, q, k.transpose(1, 2))
            else:
                scores = torch.bmm(q, k.transpose(1, 2)) * 0.35
                scores = scores + mask if form == "added" else scores.masked_fill(mask > 1, float("-inf"))
            mixed = torch.bmm(torch.softmax(scores, -1), v).view(rows, 2, tokens, 8)
            x = x + self.o(mixed.transpose(1, 2).reshape(rows, tokens, 16))
            return x + self.down(torch.relu(self.up(x)))

    torch.manual_seed(0)
    x, mask = torch.randn(3, 5, 16), torch.randn(6, 5, 5)
    module = torch.jit.trace(Layer().eval(), (x, mask), check_trace=False)
    for name in ("a", "b"):
        module = torchgraft.graft(module, "double_seq_bn[scaling=200]", name, verify=False)
    module = torchgraft.compose(module, "both", Parallel("a", "b"), verify=False)
    for inputs in ((x, mask), (x[:1], mask[:2]), (x, mask[:1]), (x[:1], mask[:1])):
        results = {}
        for name in ("a", "b", "both"):
            module.activate(name)
            results[name] = module(*inputs)
        alone = torch.cat([results["a"], results["b"]])
        assert (results["a"] - results["b"]).abs().max() > 1e-3
        torch.testing.assert_close(results["both"], alone, atol=1e-5, rtol=0)
