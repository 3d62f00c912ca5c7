"""What save_adapter writes loads on the module that wrote it; else it is not written."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import torchgraft


def _layer() -> nn.Module:
    return nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, dropout=0.0)


class _Named(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.add_module(name, nn.ModuleList([_layer(), _layer()]))
        self.embedding, self.name = nn.Embedding(9, 16), name

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for layer in getattr(self, self.name):
            x = layer(x)
        return x


_MODELS = {
    "layers": lambda: _Named("layers"),
    "attention": lambda: _Named("attention"),
    "loras": lambda: _Named("loras"),
    "crossmodel": lambda: _Named("crossmodel"),
    "embedding_and_layers": lambda: nn.Sequential(nn.Embedding(9, 16), _layer(), _layer()),
    "sequence_in_sequence": lambda: nn.Sequential(nn.Embedding(9, 16), nn.Sequential(_layer(), _layer())),
}
_CONFIGS = {
    "lora": "lora[r=2,intermediate_lora=True,output_lora=True]",
    "unipelt": "unipelt[r=2,reduction_factor=4]",
    "double_seq_bn": "double_seq_bn[reduction_factor=4]",
    "loreft": "loreft[r=2]",
    "mam": "mam[bottleneck_size=4]",
}
# Names that the readers take for the library's, or numbers that they take for a layer's.
_BOTTLENECKS = {"unipelt", "double_seq_bn", "mam"}
_REFUSED = {
    "layers": set(),
    "attention": _BOTTLENECKS,
    "crossmodel": _BOTTLENECKS,
    "loras": set(_CONFIGS),
    "embedding_and_layers": set(_CONFIGS) - {"lora"},  # whose paths are the model's own
    "sequence_in_sequence": set(_CONFIGS) - {"lora"},
}


def _error_of(action: Callable[[], None]) -> str:
    try:
        action()
    except torchgraft.GraftError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("config", _CONFIGS)
@pytest.mark.parametrize("name", _MODELS)
def test_a_directory_loads_again_or_is_not_written(name: str, config: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 9, (2, 5))
    base = torch.jit.trace(_MODELS[name]().eval(), ids, check_trace=False)
    module = torchgraft.graft(base, _CONFIGS[config], "task")
    with torch.no_grad():
        for parameter in [*module.adapters.parameters(), *module.adapters.buffers()]:
            if parameter.is_floating_point() and parameter.numel() > 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    error = _error_of(lambda: torchgraft.save_adapter(module, "task", tmp_path / "saved"))
    if config in _REFUSED[name]:
        assert "could not be loaded onto this module again" in error and not (tmp_path / "saved").exists()
        return
    assert error == ""
    with torch.no_grad():
        torch.testing.assert_close(torchgraft.load_adapter(base, tmp_path / "saved")(ids), module(ids))
