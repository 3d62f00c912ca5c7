"""Directories of `adapters==1.3.0`, unrepaired, on models of several parts and on families without a row in the table
of docs/models.md: equal, or refused by name."""

import functools
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import adapters
import oracle
import torchgraft
from hugging_face_models import (
    FAMILIES,
    Family,
    audio_arguments,
    encoder_decoder_arguments,
)

_BERT = FAMILIES["bert"].sizes
_BART = FAMILIES["bart"]
_T5 = FAMILIES["t5"]
_CONFIGS = {name: oracle.CONFIGS[name] for name in (
    "unipelt", "double_seq_bn_gated", "lora_all", "ia3_gated", "lora_k_leave_out", "prefix_leave_out", "seq_bn_map",
    "loreft")}  # fmt: skip


class _Whisper(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: Tensor, decoder_ids: Tensor, decoder_mask: Tensor) -> Tensor:
        return self.model(
            input_features=features, decoder_input_ids=decoder_ids, decoder_attention_mask=decoder_mask, use_cache=False
        )[0]


def _whisper_arguments(dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    """Sounds, ids of the decoder, and its mask [B, 1, S, S]: the model makes its own by torch.vmap, which cannot be
    traced."""
    features = audio_arguments(dtype, seed)[0]
    ids = encoder_decoder_arguments(dtype, seed)[2]
    hidden = torch.ones(ids.size(1), ids.size(1), dtype=torch.bool).triu(1)
    mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)
    return features, ids, mask.expand(ids.size(0), 1, *mask.shape)


_XMOD = _BERT | dict(languages=["en_XX", "de_DE"], default_language="en_XX")
_FAMILIES = {
    "whisper": Family(
        hf.WhisperConfig, hf.WhisperModel, FAMILIES["whisper_encoder"].sizes, _whisper_arguments, _Whisper
    ),
    "mt5": Family(hf.MT5Config, hf.MT5Model, _T5.sizes, _T5.arguments, _T5.wrapper, _T5.gains),
    "plbart": Family(hf.PLBartConfig, hf.PLBartModel, _BART.sizes, _BART.arguments, _BART.wrapper),
    "bert_generation": Family(hf.BertGenerationConfig, hf.BertGenerationEncoder, _BERT),
    "xmod": Family(hf.XmodConfig, hf.XmodModel, _XMOD),
}
_SHIFTS = "on T5 the adapters library moves the relative positions"
_PARTS = "ReFT cannot act on layer 0: the model has an encoder and a decoder"
_REFUSED = {
    ("whisper", "loreft"): _PARTS,
    ("mt5", "unipelt"): _SHIFTS,
    ("mt5", "prefix_leave_out"): _SHIFTS,
    # A trace holds which rows had which language.
    **{("xmod", config): "rows reach layer 1 in another order than the module gets them" for config in _CONFIGS},
}

# Both parts have to be of one length there.
_LIBRARY_FAILS = [("mt5", "loreft"), ("plbart", "loreft")]
_CASES = [(family, config) for family in _FAMILIES for config in _CONFIGS if (family, config) not in _LIBRARY_FAILS]


def _make(family: str) -> nn.Module:
    return _FAMILIES[family].make("eager", torch.float64)


@functools.cache
def _library(family: str) -> nn.Module:
    model = _make(family)
    adapters.init(model.model)
    return model


@functools.cache
def _base(family: str) -> torch.jit.ScriptModule:
    arguments = _FAMILIES[family].arguments(torch.float64, 0)
    return torch.jit.trace(_make(family), arguments, check_trace=False, strict=False)


def _write(family: str, config: str, folder: Path) -> tuple[tuple, Tensor]:
    """Arguments and what the library gives; the adapter, random, is saved in the folder."""
    library = _library(family)
    arguments = _FAMILIES[family].arguments(torch.float64, 1)
    try:
        oracle.make_oracle_adapter(library.model, _CONFIGS[config], "task", 3)
        library.model.eval().save_adapter(str(folder), "task")
        library.model.set_active_adapters("task")
        with torch.no_grad():
            expected = library(*arguments)
            library.model.set_active_adapters(None)
            assert oracle.difference(library(*arguments), expected) > 0.01
        return arguments, expected
    finally:
        library.model.set_active_adapters(None)
        library.model.delete_adapter("task")


@pytest.mark.parametrize(("family", "config"), _CASES)
def test_equal_or_refused(family: str, config: str, tmp_path: Path) -> None:
    arguments, expected = _write(family, config, tmp_path)
    if reason := _REFUSED.get((family, config)):
        with pytest.raises(torchgraft.GraftError, match=reason):
            torchgraft.load_adapter(_base(family), tmp_path)
        return
    grafted = torchgraft.load_adapter(_base(family), tmp_path)
    with torch.no_grad():
        assert oracle.difference(grafted(*arguments), expected) <= 1e-5
