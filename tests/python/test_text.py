"""Which arguments of a forward a text gives, and one line of libtorch's errors."""

import pytest
import torch

from torchgraft import GraftError, forward_inputs, one_line
from torchgraft._text import text_arguments

VALUES = {kind: torch.full((1, 2), number) for number, kind in enumerate(("ids", "mask", "type"))}
FORWARDS = {
    "ids and mask": ("input_ids: Tensor, attention_mask: Tensor", [0, 1]),
    "no mask": ("input_ids: Tensor", [0]),
    "positions before the mask": ("input_ids: Tensor, position_ids: Optional[Tensor] = None, "
                                  "attention_mask: Optional[Tensor] = None", [0, None, 1]),
    "a mask before the ids": ("padding_mask: Tensor, input_ids: Tensor", [1, 0]),
    "an option between": ("tokens: Tensor, scale: float = 0.5, token_type_ids: Optional[Tensor] = None, "
                          "position_ids: Optional[Tensor] = None", [0, 0.5, 2]),
    "no tensor of that name": ("input_ids: Tensor, mask_value: int = 7, attention_mask: Optional[Tensor] = None",
                               [0, 7, 1]),
}  # fmt: skip


def method_with(arguments: str) -> torch.ScriptMethod:
    scripted = torch.jit.script(type("Encoder", (torch.nn.Module,), {})())  # methods are a class's: each has its own
    scripted.define(f"def forward(self, {arguments}) -> int:\n  return 1\n")
    return scripted.forward


@pytest.mark.parametrize("case", FORWARDS)
def test_every_argument_gets_what_it_is_named_for(case: str) -> None:
    arguments, expected = FORWARDS[case]
    method = method_with(arguments)
    found = text_arguments(method, VALUES, "test")
    assert [int(one[0, 0]) if isinstance(one, torch.Tensor) else one for one in found] == expected
    assert method(*found) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("input_ids: Tensor, pixels: Tensor", "forward's argument 'pixels' is none that a text gives"),
        ("attention_mask: Tensor", "forward takes no token ids"),
        ("attention_mask: Tensor, adapter_ids: Optional[Tensor] = None", "forward takes no token ids"),
        ("length: int, input_ids: Tensor", "forward's argument 'length'"),
    ],
)
def test_what_a_text_does_not_give(arguments: str, message: str) -> None:
    with pytest.raises(GraftError, match=f"test: {message}"):
        text_arguments(method_with(arguments), VALUES, "test")


def test_a_model_says_whether_it_takes_a_mask() -> None:
    assert forward_inputs(method_with("input_ids: Tensor, attention_mask: Optional[Tensor] = None")).takes_mask
    assert not forward_inputs(method_with("input_ids: Tensor, mask_value: int = 7")).takes_mask


def test_token_types_that_are_not_given_are_zero() -> None:
    ids = torch.full((1, 2), 5)
    found = forward_inputs(method_with("input_ids: Tensor, token_type_ids: Tensor")).arguments(ids)
    assert torch.equal(found[0], ids) and torch.equal(found[1], torch.zeros_like(ids))


def test_one_line_of_an_error_in_torchscript_is_what_it_raised() -> None:
    scripted = torch.jit.script(type("Encoder", (torch.nn.Module,), {})())
    scripted.define('def forward(self, x: Tensor) -> Tensor:\n  assert x.dim() == 2, "expected rank 2"\n  return x\n')
    with pytest.raises(torch.jit.Error) as raised:
        scripted(torch.zeros(3))
    assert str(raised.value).count("\n") > 1 and one_line(raised.value) == "expected rank 2"
    with pytest.raises(RuntimeError) as raised:
        torch.zeros(2) @ torch.zeros(3)
    assert one_line(raised.value) == str(raised.value).split("\n")[0]
    assert one_line(ValueError()) == "it did not say why"
