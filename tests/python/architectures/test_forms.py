"""The same graphs frozen, saved and loaded, and inside other modules: results are those of the plain grafted model."""

import io

import pytest
import torch
from hugging_face_cases import CASES
from oracle import difference
from torch import nn

_NAMES = ["bert_sdpa", "gpt2_sdpa", "llama_sdpa", "t5_eager", "bart_eager", "vit_sdpa"]
_DTYPE = torch.float64


def _frozen(base: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    return torch.jit.freeze(base.eval())


def _loaded(base: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    file = io.BytesIO()
    torch.jit.save(base, file)
    file.seek(0)
    return torch.jit.load(file)


class _Head(nn.Module):
    """A classification head on top; the hidden states come out too."""

    def __init__(self, body: nn.Module, width: int):
        super().__init__()
        self.body = body
        self.head = nn.Linear(width, 3, dtype=_DTYPE)

    def forward(self, *arguments):
        result = self.body(*arguments)
        hidden = result[0] if isinstance(result, tuple) else result
        return hidden, self.head(hidden.mean(1))


@pytest.fixture(scope="module", params=_NAMES)
def plain(request):
    """(case, base, grafted): the plain grafted model, with the oracle's UniPELT adapter."""
    case = CASES[request.param]
    base = case.to_script("traced", _DTYPE)
    return case, base, case.reference.graft(base, "unipelt", _DTYPE)


def _assert_same(case, plain_model, other, hidden=None) -> None:
    hidden = hidden or case.hidden
    for seed in (1, 2):
        arguments = case.arguments(_DTYPE, seed)
        with torch.no_grad():
            expected, gates = plain_model.forward_with_gates(*arguments)
            result, other_gates = other.forward_with_gates(*arguments)
        assert difference(hidden(result), case.hidden(expected)) <= 1e-10
        for layer, locations in gates["task"].items():
            for location, gate in locations.items():
                assert difference(other_gates["task"][layer][location], gate) <= 1e-10


def test_saved_and_loaded(plain) -> None:
    case, base, grafted = plain
    _assert_same(case, grafted, case.reference.graft(_loaded(base), "unipelt", _DTYPE))
    _assert_same(case, grafted, _loaded(grafted))


def test_with_a_head_on_top(plain) -> None:
    case, base, grafted = plain
    arguments = case.arguments(_DTYPE, 0)
    width = case.hidden(base(*arguments)).size(-1)
    wrapped = torch.jit.trace(_Head(case.make(_DTYPE), width), arguments, check_trace=False, strict=False)
    _assert_same(case, grafted, case.reference.graft(wrapped, "unipelt", _DTYPE), hidden=lambda result: result[0])


def test_frozen(plain) -> None:
    """A frozen module has no module paths left: saved adapters find their layers by number."""
    case, base, grafted = plain
    _assert_same(case, grafted, case.reference.graft(_frozen(base), "unipelt", _DTYPE))
