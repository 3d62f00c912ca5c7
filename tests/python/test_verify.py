"""graft(verify=True) runs the base and the result on inputs, made up or given, and refuses what differs."""

import math
import warnings

import pytest
import torch
from torch import Tensor, nn

import torchgraft
from models import build

pytestmark = pytest.mark.quick

HIDDEN = 32


class Layer(nn.Module):
    """One attention with its residual. `undo`: adds to masked scores what filling them took, which reads as a mask."""

    def __init__(self, undo: bool = False) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output = [nn.Linear(HIDDEN, HIDDEN) for _ in range(4)]
        self.norm = nn.LayerNorm(HIDDEN)
        self.dropout = nn.Dropout(0.1)
        self.undo: bool = undo

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        rows, tokens = x.size(0), x.size(1)
        q = self.query(x).view(rows, tokens, 4, 8).transpose(1, 2)
        k = self.key(x).view(rows, tokens, 4, 8).transpose(1, 2)
        v = self.value(x).view(rows, tokens, 4, 8).transpose(1, 2)
        hidden = (mask == 0)[:, None, None, :]
        scores = (q @ k.transpose(-1, -2) / math.sqrt(8)).masked_fill(hidden, -1e4)
        if self.undo:
            scores = scores + hidden.float() * 1e4
        context = (self.dropout(scores.softmax(-1)) @ v).transpose(1, 2).reshape(rows, tokens, 32)
        return self.norm(x + self.output(context))


def _inputs(padding: int = 2) -> tuple[Tensor, Tensor]:
    mask = torch.ones(3, 6, dtype=torch.long)
    mask[1, 6 - padding :] = 0
    return torch.randn(3, 6, HIDDEN, generator=torch.Generator().manual_seed(0)), mask


def _traced(layer: nn.Module) -> torch.jit.ScriptModule:
    return torch.jit.trace(layer.eval(), _inputs(), check_trace=False)


def _graft(module: torch.jit.ScriptModule, **options: object) -> torch.jit.ScriptModule:
    return torchgraft.graft(module, config="lora", name="task", **options)


@pytest.fixture
def misread() -> torch.jit.ScriptModule:
    """A module that the patcher reads as another: its mask is taken back."""
    return torch.jit.script(Layer(undo=True).eval())


def test_a_misread_module_is_refused_with_inputs_made_up(misread: torch.jit.ScriptModule) -> None:
    with pytest.raises(torchgraft.GraftError, match=r"the result of adapter_ids = -1 differs from the base's by 0\."):
        _graft(misread)


@pytest.mark.parametrize("form", [tuple, lambda inputs: dict(zip(("x", "mask"), inputs, strict=True))])
def test_a_misread_module_is_refused_with_inputs_given(misread: torch.jit.ScriptModule, form: type) -> None:
    with pytest.raises(torchgraft.GraftError, match="differs from the base's by"):
        _graft(misread, example=form(_inputs()))
    _graft(misread, example=form(_inputs(padding=0)))  # nothing masked, nothing to see


def test_without_verify_nothing_runs(misread: torch.jit.ScriptModule) -> None:
    _graft(misread, verify=False)


def test_inputs_on_which_the_base_fails_are_an_error() -> None:
    with pytest.raises(torchgraft.GraftError, match="the base fails on the example inputs: "):
        _graft(_traced(Layer()), example=(torch.randn(3, 6, HIDDEN + 1), _inputs()[1]))


def test_inputs_of_other_types_are_an_error_of_forward() -> None:
    with pytest.raises(RuntimeError, match="missing value for argument 'mask'"):
        _graft(_traced(Layer()), example=_inputs()[0])


class _Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Layer()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        self.calls.add_(1.0)
        return self.layer(x, mask)


class _ZeroesItsMask(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Layer()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        result = self.layer(x, mask)
        mask.zero_()
        return result


class _Flag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Layer()

    def forward(self, x: Tensor, mask: Tensor, times: int) -> Tensor:
        return self.layer(x, mask) * times


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Layer().train(), "the module is in training mode"),
        (_Counts().eval(), "its forward writes into its own tensors"),
        (_Flag().eval(), "what forward's argument 'times' takes is not known"),
    ],
)
def test_what_cannot_be_run_is_said(module: nn.Module, reason: str) -> None:
    with pytest.warns(UserWarning, match=f"the result was not compared with the base's: .*{reason}"):
        _graft(torch.jit.script(module))


def test_example_inputs_stand_in_for_what_is_not_known() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        _graft(torch.jit.script(_Flag().eval()), example=(*_inputs(), 2))


def test_nothing_is_left_of_a_run() -> None:
    module = torch.jit.script(_Counts().eval())
    with pytest.warns(UserWarning, match="not compared"):
        _graft(module, example=_inputs())
    assert module.calls.item() == 0
    inputs = _inputs()
    module = _traced(_ZeroesItsMask())
    generator = torch.get_rng_state()
    torchgraft.graft(module, adapters={}, config="prefix_tuning", name="task", example=inputs, verify=False)
    drawn = torch.get_rng_state()
    torch.set_rng_state(generator)
    torchgraft.graft(module, config="prefix_tuning", name="task", example=inputs)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert torch.equal(inputs[1], _inputs()[1])


@pytest.mark.parametrize("name", ["bert_sdpa", "own_pre_sdpa_bool", "own_post_packed_matmul", "encoder_script_post"])
def test_inputs_are_made_up_for_usual_models(name: str) -> None:
    module = build(name, torch.float32)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*was not compared.*")
        _graft(module)
