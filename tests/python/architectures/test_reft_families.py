"""ReFT on the families that the library supports, against the library live; and where it is refused."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import torchgraft
from hugging_face_models import FAMILIES
from oracle import TOLERANCE, difference
from reft_support import (
    CAUSAL,
    CONFIGS,
    FLOAT,
    IMAGES,
    MASKS,
    TEXT,
    Library,
    arguments_of,
    make_model,
    traced,
    write_library_adapter,
)  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("family", TEXT + CAUSAL + IMAGES)
def test_every_family_equals_the_library(family: str, config: str, tmp_path: Path) -> None:
    base = traced(make_model(family), arguments_of(family, "right"))
    model = make_model(family, Library)
    write_library_adapter(model.model, CONFIGS[config], tmp_path)
    plain = traced(make_model(family), arguments_of(family, "right"))
    for form in (base, torch.jit.freeze(plain.eval())):
        grafted = torchgraft.load_adapter(form, tmp_path)
        for seed, padding in enumerate(("right", "none") if family in IMAGES else MASKS):
            arguments = arguments_of(family, padding, seed)
            with torch.no_grad():
                expected, actual, plain = model(*arguments), grafted(*arguments), form(*arguments)
            if family in CAUSAL:  # what padding sees differs between ways of writing a mask
                expected, actual, plain = (result[arguments[1] == 1] for result in (expected, actual, plain))
            assert (expected - plain).abs().max() > 1e-3  # the adapter does something
            assert difference(actual, expected) <= TOLERANCE[FLOAT], padding


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_models_of_two_parts_are_refused(family: str) -> None:
    model = FAMILIES[family].make("eager", FLOAT)
    base = traced(model, FAMILIES[family].arguments(FLOAT, 0))
    reason = "ReFT cannot act on layer 0: the model has an encoder and a decoder, .* the encoder's mask; leave"
    with pytest.raises(torchgraft.GraftError, match=reason):
        torchgraft.graft(base, "loreft", "task")


def test_what_is_no_end_of_a_layer_is_refused() -> None:
    class Reads(nn.Module):
        """Beside the last layer it reads what its attention gave."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([
                nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True) for _ in range(2)
            ])  # fmt: skip

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                attended = layer.norm1(x + layer.self_attn(x, x, x, need_weights=False)[0])
                inner = layer.linear2(torch.relu(layer.linear1(attended)))
                x = layer.norm2(attended + inner)
            return x + attended

    base = torch.jit.trace(Reads().eval(), torch.randn(2, 5, 16), check_trace=False)
    with pytest.raises(torchgraft.GraftError, match="cannot act on layer 1: something other than its last sum or norm"):
        torchgraft.graft(base, "loreft", "task")
    torchgraft.graft(base, "loreft[layers=[0]]", "task")
