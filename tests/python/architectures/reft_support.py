"""Models, masks and directories for the tests of ReFT."""

from pathlib import Path

import torch
from torch import Tensor, nn

import adapters
from hugging_face_models import FAMILIES
from oracle import make_oracle_adapter, say_subtraction

FLOAT = torch.float32
CONFIGS = {
    "loreft": adapters.LoReftConfig(r=2, suffix_positions=2),
    "noreft": adapters.NoReftConfig(r=3, prefix_positions=2, non_linearity="relu", layers=[0]),
    "direft": adapters.DiReftConfig(prefix_positions=1, suffix_positions=3, tied_weights=True),
}
TEXT = ["bert", "roberta", "xlm_roberta", "electra", "distilbert", "albert", "albert_groups", "deberta_v2", "clip_text"]
CAUSAL = ["gpt2", "gptj", "llama", "mistral"]
IMAGES = ["vit", "beit", "clip_vision"]
MASKS = {
    "right": [[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0]],
    "left": [[1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1]],
    "none": [[1, 1, 1, 1, 1], [1, 1, 1, 1, 1]],
}


class Causal(nn.Module):
    """Makes the causal mask, as the model does of a token mask in a way that cannot be traced."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        seen = attention_mask[:, None, None, :].bool() & torch.ones_like(input_ids[0, :, None] == input_ids[0]).tril()
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(FLOAT).min)
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
        return self.model(input_ids=input_ids, attention_mask=mask, position_ids=positions)[0]


class Library(nn.Module):
    """The same model, called as users of the library do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
        return self.model(input_ids=input_ids, attention_mask=attention_mask, position_ids=positions)[0]


def make_model(family: str, wrapper: type = Causal) -> nn.Module:
    made = FAMILIES[family].make("eager", FLOAT)
    return wrapper(made.model).eval() if family in CAUSAL else made


def text_arguments(padding: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    mask = torch.tensor(MASKS[padding])
    ids = torch.randint(2, 97, mask.shape, generator=torch.Generator().manual_seed(seed))
    return torch.where(mask == 1, ids, 1), mask


def arguments_of(family: str, padding: str, seed: int = 0) -> tuple:
    return FAMILIES[family].arguments(FLOAT, seed) if family in IMAGES else text_arguments(padding, seed)


def traced(model: nn.Module, arguments: tuple) -> torch.jit.ScriptModule:
    return torch.jit.trace(model, arguments, check_trace=False, strict=False)


def write_library_adapter(model: nn.Module, config: adapters.AdapterConfig, folder: Path, seed: int = 3) -> None:
    """Writes an adapter "task" of the library's, with drawn weights, and leaves it active."""
    adapters.init(model)
    make_oracle_adapter(model, config, "task", seed)
    model.eval().save_adapter(str(folder), "task")
    model.set_active_adapters("task")
    say_subtraction(folder, config)
