"""Canonicalisation alone, grafting nothing, leaves every architecture as it was: results, gradients, dropout."""

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from all_cases import CASES, FORMS, QUICK, base, is_second_spelling
from grafted import canonicalised
from oracle import difference

# Float32 inside a float64 model: fused and unfused kernels round differently there.
_TOLERANCE = 1e-6
# A softmax over keys that are all masked gives nan in the model itself; the canonical attention gives zeros.
_NAN = {("modernbert_eager", "traced")}
_SAMPLES = 400


def _dtype(name: str) -> torch.dtype:
    return torch.float32 if name.startswith("clip_text") else torch.float64


@functools.cache
def _canonical(name: str, form: str) -> torch.jit.ScriptModule:
    return canonicalised(base(name, form, _dtype(name)))


def _parameters(forms: list[tuple[str, str]], is_slow: Callable[[str], bool] = lambda name: False) -> list:
    parameters = []
    for each in forms:
        marks = [pytest.mark.slow(seconds=2)] if is_slow(each[0]) else [pytest.mark.quick] * (each in QUICK)
        parameters.append(pytest.param(*each, id="-".join(each), marks=marks))
    return parameters


@pytest.mark.parametrize(("name", "form"), _parameters(FORMS))
def test_results_of_the_canonical_module_are_the_modules(name: str, form: str) -> None:
    case, dtype = CASES[name], _dtype(name)
    module, canonical = base(name, form, dtype), _canonical(name, form)
    for seed in (0, 1, 2):
        arguments = case.arguments(dtype, seed)
        with torch.no_grad():
            expected, actual = case.hidden(module(*arguments)), case.hidden(canonical(*arguments))
        known = torch.isfinite(expected)
        assert known.all() or (name, form) in _NAN
        assert difference(actual[known], expected[known]) <= (_TOLERANCE if dtype == torch.float64 else 5e-6)


def _real_tokens(hidden: Tensor, arguments: tuple) -> Tensor:
    """1 at real tokens, [B, S, 1], by the mask among the arguments. Values at padding are not compared: where DeBERTa
    masks all scores of a padded query, the canonical attention passes on a gradient that the model drops."""
    for mask in arguments[1:]:
        if mask.dtype == torch.int64 and mask.max() <= 1 and mask.shape == hidden.shape[:2]:
            return mask[:, :, None].to(hidden.dtype)
    return torch.ones((), dtype=hidden.dtype)


def _gradients(module: torch.jit.ScriptModule, case, arguments: tuple) -> dict[str, Tensor | None]:
    """Returns the gradient of every parameter for a loss that weighs the results at real tokens."""
    hidden = case.hidden(module(*arguments))
    weights = torch.arange(hidden.numel(), dtype=hidden.dtype).sin().view_as(hidden)
    loss = (hidden * weights * _real_tokens(hidden, arguments)).sum() / hidden.size(0)
    parameters = {path: value for path, value in module.named_parameters() if value.requires_grad}
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return dict(zip(parameters, gradients, strict=True))


_DIFFERENTIABLE = [each for each in FORMS if each[1] != "fused" and each not in _NAN]


@pytest.mark.parametrize(("name", "form"), _parameters(_DIFFERENTIABLE, is_second_spelling))
def test_gradients_of_the_canonical_module_are_the_modules(name: str, form: str) -> None:
    """A trace of torch.nn's fused kernels has no gradients."""
    case, dtype = CASES[name], _dtype(name)
    arguments = case.arguments(dtype, 1)
    modules = base(name, form, dtype), _canonical(name, form)
    expected, actual = (_gradients(module, case, arguments) for module in modules)
    assert sum(gradient is not None for gradient in expected.values()) > 8
    assert set(actual) == set(expected)
    for path, before in expected.items():
        after = actual[path]
        if before is not None:
            scale = max(1.0, before.abs().max().item())
            assert (after - before).abs().max().item() / scale <= (_TOLERANCE if dtype == torch.float64 else 2e-5)
        else:
            assert after is None or after.abs().max() == 0


_WITH_DROPOUT = [name for name, form in FORMS if name.startswith("torch_") and form == "scripted"]


def _samples(module: torch.jit.ScriptModule, arguments: tuple, seed: int) -> Tensor:
    """Results of module.train(), one by one: [samples, values]."""
    torch.manual_seed(seed)
    with torch.no_grad():
        return torch.stack([module(*arguments).flatten() for _ in range(_SAMPLES)])


@pytest.mark.parametrize("name", _WITH_DROPOUT)
def test_dropout_of_the_canonical_module_is_the_modules(name: str) -> None:
    """In training the canonical module draws from the same distribution as the scripted module: equal means and spreads
    of every value, as far as the samples can tell."""
    case = CASES[name]
    module = case.to_script("scripted", torch.float32)
    canonical = canonicalised(module)
    module.train(), canonical.train()
    arguments = case.arguments(torch.float32, 2)
    expected, actual = _samples(module, arguments, 1), _samples(canonical, arguments, 2)
    assert (actual.std(0) > 0).float().mean() > 0.99
    error = ((expected.var(0) + actual.var(0)) / _SAMPLES).sqrt()
    assert ((expected.mean(0) - actual.mean(0)).abs() / error.clamp_min(1e-6)).max() < 5.5
    assert abs((actual.std(0) / expected.std(0).clamp_min(1e-6)).mean().item() - 1) < 0.05
    module.eval(), canonical.eval()
    with torch.no_grad():
        assert difference(canonical(*arguments), module(*arguments)) <= 5e-6
