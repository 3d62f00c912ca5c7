"""Results that hold integers or booleans: they must be equal, but for what rounding may move."""

import pytest
import torch
from torch import Tensor, nn

import torchgraft
from misread_layer import Layer

pytestmark = pytest.mark.quick


def _graft(model: nn.Module) -> torch.jit.ScriptModule:
    return torchgraft.graft(torch.jit.script(model.eval()), config="lora", name="task")


class _Rounded(nn.Module):
    """The misread module, of whose result only integers are seen, and a number that is always the same."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Layer(undo=True)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones(1), (self.layer(x, mask) * 100).long()


def test_booleans_and_integers_must_be_equal() -> None:
    with pytest.raises(torchgraft.GraftError, match="adapter_ids = -1 differs from the base's in its integers or bool"):
        _graft(_Rounded())


class _RoundedInFloat(_Rounded):
    """Names its dtype, so that it does not run in float64."""

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones(1), (self.layer(x.float(), mask) * 100).long()


def test_integers_that_rounding_may_have_moved_are_said() -> None:
    with pytest.warns(UserWarning, match="not compared with the base's: its integers or booleans differ"):
        _graft(_RoundedInFloat())
