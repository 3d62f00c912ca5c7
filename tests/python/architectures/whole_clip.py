"""Both towers of a CLIP in one module, as a family: its vision tower runs first, and the library counts it last."""

from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from hugging_face_models import FAMILIES, Family, image_arguments, text_arguments

TEXT_LAYERS, VISION_LAYERS = 2, 3


class _Clip(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor, pixels: Tensor) -> Tensor:
        result = self.model(input_ids=ids, attention_mask=mask, pixel_values=pixels, return_dict=True)
        return torch.cat([result.text_embeds, result.image_embeds])


def _arguments(dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    return *text_arguments(dtype, seed), *image_arguments(dtype, seed)


def _config(**sizes: Any) -> hf.CLIPConfig:
    vision = dict(num_hidden_layers=VISION_LAYERS, hidden_size=40, num_attention_heads=2, intermediate_size=56)
    parts = dict(
        text_config=FAMILIES["clip_text"].sizes | dict(num_hidden_layers=TEXT_LAYERS, eos_token_id=2),
        vision_config=FAMILIES["clip_vision"].sizes | vision,
    )
    config = hf.CLIPConfig(**parts, projection_dim=20)
    for part in (config, config.text_config, config.vision_config):
        part._attn_implementation = "eager"
    return config


# In float32: it writes float64's lowest number into a float32 mask.
CLIP = Family(_config, hf.CLIPModel, {}, _arguments, _Clip)
