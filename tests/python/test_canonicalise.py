"""Canonicalisation alone, grafting nothing, leaves hand-written models as they were: results, gradients, dropout.

Hugging Face models and torch.nn's encoders: architectures/test_canonical.py.
"""

import pytest
import torch

from grafted import base, canonicalised
from models import VARIANTS, make_batch

pytestmark = pytest.mark.quick


_OWN = [name for name, variant in VARIANTS.items() if variant.own]


def _hidden(name: str, module: torch.jit.ScriptModule, arguments: tuple) -> torch.Tensor:
    return VARIANTS[name].hidden(module(*arguments))


@pytest.mark.parametrize("name", _OWN)
def test_results_of_the_canonical_module_are_the_modules(name: str) -> None:
    module = base(name, torch.float64)
    canonical = canonicalised(module)
    for lengths in ([9, 6], [4], [7, 7, 1]):
        if not VARIANTS[name].masked:
            lengths = [max(lengths)] * len(lengths)
        arguments = VARIANTS[name].arguments(make_batch(lengths, max(lengths), torch.float64))
        with torch.no_grad():
            assert torch.allclose(_hidden(name, canonical, arguments), _hidden(name, module, arguments), 0, 1e-10)


@pytest.mark.parametrize("name", _OWN)
def test_gradients_of_the_canonical_module_are_the_modules(name: str) -> None:
    module = base(name, torch.float64)
    arguments = VARIANTS[name].arguments(make_batch([9, 9], 9, torch.float64))
    gradients = []
    for each in (module, canonicalised(module)):
        parameters = list(each.parameters())
        loss = _hidden(name, each, arguments).square().sum()
        gradients.append(torch.autograd.grad(loss, parameters, allow_unused=True))
    for expected, actual in zip(*gradients, strict=True):
        if expected is not None:
            assert torch.allclose(actual, expected, 1e-8, 1e-8)


@pytest.mark.parametrize("name", ["own_post_packed_matmul", "own_pre_matmul"])
def test_dropout_of_scripted_modules_keeps_working(name: str) -> None:
    module = base(name, torch.float64)
    canonical = canonicalised(module)
    arguments = VARIANTS[name].arguments(make_batch([9, 9], 9, torch.float64))
    canonical.train()
    torch.manual_seed(0)
    first = _hidden(name, canonical, arguments)
    assert not torch.allclose(first, _hidden(name, canonical, arguments))  # random
    canonical.eval()
    assert torch.allclose(_hidden(name, canonical, arguments), _hidden(name, module, arguments), 0, 1e-8)


def test_dropout_of_a_scripted_torch_encoder_keeps_working() -> None:
    layer = torch.nn.TransformerEncoderLayer(16, 4, 32, dropout=0.5, batch_first=True)
    module = torch.jit.script(torch.nn.TransformerEncoder(layer, 2).train())
    canonical = canonicalised(module)
    x = torch.randn(2, 5, 16)
    torch.manual_seed(0)
    first = canonical(x)
    assert not torch.allclose(first, canonical(x))
    assert 0.2 < canonical(x).sub(first).abs().mean() < 5
    canonical.eval(), module.eval()
    assert torch.allclose(canonical(x), module(x), 0, 1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_attention_is_one_fused_call(name: str) -> None:
    graph = str(canonicalised(base(name, torch.float32)).graph)
    assert graph.count("aten::scaled_dot_product_attention") == 3
    for hidden_attention in ("aten::softmax", "_transformer_encoder_layer_fwd", "_native_multi_head_attention"):
        assert hidden_attention not in graph
