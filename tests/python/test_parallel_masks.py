"""Parallel in modules whose masks have rows for each head."""

import pytest
import torch

import torchgraft
from torchgraft import Parallel


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
    for name in ("a", "b"):
        module = torchgraft.graft(module, "double_seq_bn[scaling=200]", name, verify=False)
    module = torchgraft.compose(module, "both", Parallel("a", "b"), verify=False)  # repeated at the top
    results = {}
    for name in ("a", "b", "both"):
        module.activate(name)
        with torch.no_grad():
            results[name] = module(x, mask)
    assert (results["a"] - results["b"]).abs().max() > 1e-3
    torch.testing.assert_close(results["both"], torch.cat([results["a"], results["b"]], dim=1), atol=1e-5, rtol=0)
