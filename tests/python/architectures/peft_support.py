"""Random adapters of Hugging Face PEFT."""

from pathlib import Path

import peft
import torch
from torch import nn


def save_random_lora(model: nn.Module, options: dict, folder: Path) -> None:
    """Gives `model` a LoRA with these options beside r and lora_alpha, moves what it trains, and saves it; the model
    keeps it, in float64 and eval mode."""
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, **options))
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.2)
    tuned.double().eval().save_pretrained(str(folder))
