"""Gradients of grafted models equal the oracle's: of every adapter parameter and of the input."""

import pytest
import torch
from torch import Tensor

import torchgraft
from grafted import base, saved_adapter
from models import VARIANTS, Batch, Variant, make_batch
from oracle import CONFIGS, Saved, adapter_parameters, oracle_for, runs_on

DOUBLE = torch.float64
_NAMES = [
    "bert_sdpa",
    "bert_eager",
    "own_pre_matmul",
    "own_post_packed_matmul",
    "encoder_fast_post",
    "encoder_slow_post_seq_first",
]


def _close(actual: Tensor, expected: Tensor) -> bool:
    """To 1e-10 of the largest entry."""
    assert actual.shape == expected.shape
    return (actual - expected).abs().max().item() <= 1e-10 * max(1.0, expected.abs().max().item())


def _batch(variant: Variant) -> Batch:
    batch = make_batch([7, 4] if variant.masked else [7, 7], 7, DOUBLE, seed=6)
    batch.embeddings.requires_grad_(variant.inputs == "embeddings")
    return batch


def _loss(hidden: Tensor) -> Tensor:
    """A weighted sum, so that no two entries of the result count alike (and a layer norm's sum is not constant)."""
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(8), dtype=DOUBLE)
    return (hidden * weights).sum()


def _oracle_gradients(variant: Variant, saved: Saved) -> tuple[list[tuple[str, Tensor, Tensor]], Tensor | None]:
    """(path, value, gradient) of each of the adapter's parameters, and the gradient of the embeddings."""
    library = oracle_for(variant, DOUBLE)
    batch = _batch(variant)
    unique = {id(parameter): (path, parameter) for path, parameter in adapter_parameters(library.model, saved.name)}
    named = list(unique.values())
    inputs = [parameter for _, parameter in named] + [batch.embeddings] * batch.embeddings.requires_grad
    for tensor in inputs:
        tensor.requires_grad_()
    gradients = torch.autograd.grad(_loss(library.run_with_grad(variant, batch, saved).hidden), inputs)
    triples = [(path, value.detach(), grad) for (path, value), grad in zip(named, gradients, strict=False)]
    return triples, gradients[len(named)] if len(gradients) > len(named) else None


def _cases() -> list:
    """Every method on BERT, on one of the other bases in turn, and the rest when there is time."""
    cases = []
    # ReFT's parameters are those of several of the library's modules: architectures/test_reft_layers.py compares
    # training.
    for index, config in enumerate(config for config in CONFIGS if "reft" not in config):
        others = [name for name in _NAMES[1:] if runs_on(config, name)]
        chosen = {_NAMES[0], others[index % len(others)]}
        for name in [_NAMES[0], *others]:
            marks = [] if name in chosen else [pytest.mark.slow(seconds=2)]
            cases.append(pytest.param(name, config, marks=marks + [pytest.mark.quick] * (config == "unipelt")))
    return cases


@pytest.mark.parametrize(("name", "config"), _cases())
def test_gradients_of_parameters_and_input_equal_the_oracle(name: str, config: str) -> None:
    variant = VARIANTS[name]
    saved = saved_adapter(variant, DOUBLE, config)
    module = torchgraft.graft(base(name, DOUBLE), adapters={"task": saved.directory}, trainable=True)
    batch = _batch(variant)
    named = torchgraft.trainable_parameters(module, "task")
    assert not any(p.requires_grad for key, p in module.named_parameters() if key not in named)
    inputs = [*named.values()] + [batch.embeddings] * batch.embeddings.requires_grad
    result = torch.autograd.grad(_loss(variant.hidden(module(*variant.arguments(batch)))), inputs)
    grads = dict(zip(named, result, strict=False))

    expected, of_embeddings = _oracle_gradients(variant, saved)
    if of_embeddings is not None:
        assert _close(result[-1], of_embeddings)
    found = set()
    for path, value, gradient in expected:
        # Parameters are paired by their values, which are random and kept by grafting; a flat prefix is one tensor.
        if path.endswith(".control_trans"):
            continue
        if path.endswith(".m.weight"):  # DoRA's magnitude is the weight [out, 1] of a Linear there
            value, gradient = value.squeeze(-1), gradient.squeeze(-1)
        pairs = [key for key, ours in named.items() if ours.shape == value.shape and torch.equal(ours, value)]
        assert len(pairs) == 1, f"{path} is held by {pairs}"
        found.add(pairs[0])
        assert _close(grads[pairs[0]], gradient), path
    flat = [(value, gradient) for path, value, gradient in expected if path.endswith(".control_trans")]
    if flat:
        keys = [key for key in named if key.endswith(("prefix_key", "prefix_value"))]
        slots = [key.rsplit(".", 1)[0] for key in keys if key.endswith("prefix_key")]
        ours = torch.stack(
            [torch.stack([grads[f"{slot}.prefix_{which}"] for which in ("key", "value")]) for slot in slots]
        )  # [L, 2, h, P, d]
        assert _close(ours.permute(3, 0, 1, 2, 4).flatten(), flat[0][1])
        found.update(keys)
    assert found == set(named)


def test_in_a_mixed_batch_rows_do_not_share_gradients() -> None:
    """Each adapter's gradient is that of its own rows; an adapter that no row uses gets zero."""
    variant = VARIANTS["own_post_sdpa"]
    configs = ["unipelt", "lora", "prefix_two_gates", "par_bn"]
    directories = {config: saved_adapter(variant, DOUBLE, config).directory for config in configs}
    bank = torchgraft.graft(base(variant.name, DOUBLE), adapters=directories)
    named = {key: value.requires_grad_() for key, value in bank.named_parameters() if key.startswith("adapters.")}
    batch = make_batch([6, 4, 6, 5, 6], 6, DOUBLE, seed=2)
    ids = [1, -1, 0, 2, 0]

    def gradients(rows: list[int], adapters: list[int]) -> dict[str, Tensor]:
        arguments = [tensor[rows] for tensor in variant.arguments(batch)]
        hidden = variant.hidden(bank(*arguments, adapter_ids=torch.tensor(adapters)))
        return dict(zip(named, torch.autograd.grad(hidden.pow(3).sum(), [*named.values()]), strict=True))

    together = gradients([0, 1, 2, 3, 4], ids)
    alone = {
        adapter: gradients([i for i in range(5) if ids[i] == adapter], [adapter] * ids.count(adapter))
        for adapter in (0, 1, 2)
    }
    for name, gradient in together.items():
        assert bool(gradient.isfinite().all()), name
        for adapter in (0, 1, 2):
            assert _close(gradient[adapter], alone[adapter][name][adapter]), (name, adapter)
        assert bool((gradient[3] == 0).all()), name  # par_bn: no row
    assert any(bool((gradient[0] != 0).any()) for gradient in together.values())
