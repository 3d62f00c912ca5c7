"""Families whose attention is unusual: they run with adapters, or are refused by name."""

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import torchgraft
from hugging_face_models import FAMILIES, Family, encoder_decoder_arguments, text_arguments

_PROPHET = dict(
    vocab_size=97, hidden_size=48, encoder_ffn_dim=80, decoder_ffn_dim=80, max_position_embeddings=40, ngram=2,
    num_encoder_layers=2, num_decoder_layers=2, num_encoder_attention_heads=4, num_decoder_attention_heads=4,
)  # fmt: skip


@pytest.mark.parametrize("family", ["deberta", "deberta_v2"])
@pytest.mark.parametrize("config", ["unipelt", "mam"])
def test_deberta_without_relative_positions(family: str, config: str) -> None:
    """Its bias of positions is an int64 zero."""
    made = FAMILIES[family]
    sizes = made.sizes | dict(relative_attention=False)
    model = Family(made.config_class, made.model_class, sizes).make("eager", torch.float32)
    base = torch.jit.trace(model, text_arguments(torch.float32, 0), check_trace=False, strict=False)
    grafted = torchgraft.graft(base, config, "task")
    arguments = text_arguments(torch.float32, 1)
    ids = torch.full((len(arguments[0]),), -1)
    with torch.no_grad():
        assert grafted(*arguments).isfinite().all()
        torch.testing.assert_close(grafted(*arguments, adapter_ids=ids), base(*arguments), rtol=1e-4, atol=1e-5)


def test_prophetnet_is_refused_by_name() -> None:
    model = Family(
        hf.ProphetNetConfig, hf.ProphetNetModel, _PROPHET, encoder_decoder_arguments, FAMILIES["bart"].wrapper
    ).make("eager", torch.float32)
    arguments = encoder_decoder_arguments(torch.float32, 0)
    base = torch.jit.trace(model, arguments, check_trace=False, strict=False)
    with pytest.raises(torchgraft.GraftError, match="relative_pos_embeddings: a softmax was not taken for attention"):
        torchgraft.graft(base, "lora", "task")


class _Images(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model(pixel_values=pixels)[0]


def test_levit_is_refused_by_name() -> None:
    config = hf.LevitConfig(
        image_size=32, hidden_sizes=[16, 32, 48], num_attention_heads=[2, 2, 2], depths=[1, 1, 1], key_dim=[8, 8, 8],
        drop_path_rate=0, return_dict=False)  # fmt: skip
    model = _Images(hf.LevitModel(config)).eval()
    base = torch.jit.trace(model, torch.randn(2, 3, 32, 32), check_trace=False, strict=False)
    for method, message in (("lora", "no LoRA on its value"), ("mam", "hold queries, keys and values head by head")):
        with pytest.raises(torchgraft.GraftError, match=message):
            torchgraft.graft(base, method, "task")
