"""The same graphs frozen, optimised for inference, saved and loaded, and inside other modules: results are those of the
plain grafted model, which test_architectures.py compares with references."""

import functools
from collections.abc import Callable

import pytest
import torch
from torch import nn

from all_cases import CASES, FORMS, FROZEN_NOT_YET, OPTIMIZED_NOT_YET, QUICK, base, is_second_spelling, methods
from grafted import reloaded
from oracle import difference

_FAMILIES = ["bert_sdpa", "gpt2_sdpa", "llama_sdpa", "t5_eager", "bart_eager", "vit_sdpa"]
_DTYPE = torch.float32  # in which torch optimises


class _Head(nn.Module):
    """A classification head on top; the hidden states come out too."""

    def __init__(self, body: nn.Module, width: int):
        super().__init__()
        self.body = body
        self.head = nn.Linear(width, 3)

    def forward(self, *arguments):
        result = self.body(*arguments)
        hidden = result[0] if isinstance(result, tuple) else result
        return hidden, self.head(hidden.mean(1))


@functools.cache
def _plain(name: str, form: str) -> tuple[torch.jit.ScriptModule, torch.jit.ScriptModule]:
    """(base, grafted with the reference's adapter)."""
    plain = base(name, form, _DTYPE)
    return plain, CASES[name].reference.graft(plain, methods(name)[:1], _DTYPE, verify=False)


def _assert_same(case, plain_model, other, hidden=None) -> None:
    hidden = hidden or case.hidden
    for seed in (1, 2):
        arguments = case.arguments(_DTYPE, seed)
        with torch.no_grad():
            expected, gates = plain_model.forward_with_gates(*arguments)
            result, other_gates = other.forward_with_gates(*arguments)
        assert difference(hidden(result), case.hidden(expected)) <= 1e-5
        assert list(gates) == list(other_gates)
        for method, layers in gates.items():
            for layer, locations in layers.items():
                for location, gate in locations.items():
                    assert difference(other_gates[method][layer][location], gate) <= 1e-5


@pytest.mark.parametrize("name", _FAMILIES)
def test_a_saved_and_reloaded_base_gives_the_same(name: str) -> None:
    case, (plain, grafted) = CASES[name], _plain(name, "traced")
    _assert_same(case, grafted, case.reference.graft(reloaded(plain), ["unipelt"], _DTYPE))
    _assert_same(case, grafted, reloaded(grafted))


@pytest.mark.parametrize("name", _FAMILIES)
def test_a_model_inside_another_gives_the_same(name: str) -> None:
    case, (plain, grafted) = CASES[name], _plain(name, "traced")
    arguments = case.arguments(_DTYPE, 0)
    width = case.hidden(plain(*arguments)).size(-1)
    wrapped = torch.jit.trace(_Head(case.make(_DTYPE), width), arguments, check_trace=False, strict=False)
    _assert_same(case, grafted, case.reference.graft(wrapped, ["unipelt"], _DTYPE), hidden=lambda result: result[0])


def _grafted(name: str, form: str, module: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    """Verified for one base of each kind: to verify takes half of the time, and results are compared here."""
    return CASES[name].reference.graft(module, methods(name)[:1], _DTYPE, verify=(name, form) in QUICK)


def _parameters(is_often: Callable[[str, str], bool], not_yet: dict[tuple[str, str], str]) -> list:
    parameters = []
    for name, form in FORMS:
        known = not_yet.get((name, form))
        marks = [pytest.mark.xfail(reason=known, strict=True)] if known else []
        if not is_often(name, form):
            marks.append(pytest.mark.slow(seconds=3))
        parameters.append(pytest.param(name, form, marks=marks, id=f"{name}-{form}"))
    return parameters


@pytest.mark.parametrize(("name", "form"), _parameters(lambda name, form: not is_second_spelling(name), FROZEN_NOT_YET))
def test_a_frozen_base_gives_the_same(name: str, form: str) -> None:
    """A frozen module has no module paths left: saved adapters find their layers by number."""
    case, (plain, grafted) = CASES[name], _plain(name, form)
    frozen = torch.jit.freeze(plain.eval())
    _assert_same(case, grafted, _grafted(name, form, frozen))


def _is_optimized_often(name: str, form: str) -> bool:
    """What torch optimises is frozen first, and every frozen base is in every run. It then rewrites convolutions and
    linear maps, which are the same in all models of a kind."""
    return (
        (name, form) in QUICK
        or (name, form) in OPTIMIZED_NOT_YET
        or name in ("vit_sdpa", "clip_vision_sdpa", "t5_eager")
    )


@pytest.mark.parametrize(("name", "form"), _parameters(_is_optimized_often, OPTIMIZED_NOT_YET))
def test_a_base_optimized_for_inference_gives_the_same(name: str, form: str) -> None:
    """torch rewrites linear maps, and convolutions into a layout that it cannot save. The result can be saved."""
    case, (plain, grafted) = CASES[name], _plain(name, form)
    optimized = torch.jit.optimize_for_inference(torch.jit.freeze(plain.eval()))
    _assert_same(case, grafted, reloaded(_grafted(name, form, optimized)))
