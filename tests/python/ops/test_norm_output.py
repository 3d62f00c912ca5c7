"""For the gradient, autograd computes the result of a layer norm again, unless saved tensors have hooks."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

lora = torch.ops.torchgraft.gated_lora


def step(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    normed = torch.nn.functional.layer_norm(x, (8,))
    first, _ = lora(normed, x, a, b, torch.ones(1))
    second, _ = lora(normed, first, a, b, torch.ones(1))
    return second


def gradients(run, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(run(*tensors).square().sum(), tensors)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    torch.manual_seed(0)
    tensors = [torch.randn(size, requires_grad=True) for size in ((2, 5, 8), (1, 3, 8), (1, 8, 3))]
    expected = gradients(step, *tensors)

    def loss(*given):
        return checkpoint(step, *given, use_reentrant=reentrant).square().sum()

    loss(*tensors).backward()
    torch.testing.assert_close([tensor.grad for tensor in tensors], list(expected))


def test_a_checkpointed_norm_outside_of_which_the_operator_stands():
    torch.manual_seed(0)
    x, a, b = (torch.randn(size, requires_grad=True) for size in ((2, 5, 8), (1, 3, 8), (1, 8, 3)))

    def outside(x, a, b):
        normed = checkpoint(torch.nn.functional.layer_norm, x, (8,), use_reentrant=False)
        return lora(normed, x, a, b, torch.ones(1))[0]

    def plain(x, a, b):
        return lora(torch.nn.functional.layer_norm(x, (8,)), x, a, b, torch.ones(1))[0]

    torch.testing.assert_close(gradients(outside, x, a, b), gradients(plain, x, a, b))


def test_what_is_saved_on_another_device():
    torch.manual_seed(0)
    tensors = [torch.randn(size, requires_grad=True) for size in ((2, 5, 8), (1, 3, 8), (1, 8, 3))]
    expected = gradients(step, *tensors)
    with torch.autograd.graph.save_on_cpu():
        torch.testing.assert_close(gradients(step, *tensors), expected)
