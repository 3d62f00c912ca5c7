"""Prefixes of decoders whose mask is causal: equal to the library with eager attention. With sdpa it does otherwise, of
which loading warns."""

import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import adapters
import oracle
import torchgraft
from hugging_face_models import FAMILIES, Family, text_arguments

_TOKENS = dict(vocab_size=97, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)
_LAYERS = dict(encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4)
_SEQ2SEQ = _LAYERS | dict(d_model=48, encoder_ffn_dim=80, decoder_ffn_dim=72)
_BERT = FAMILIES["bert"].sizes | dict(is_decoder=True)


class _Decoder(nn.Module):
    """Calls a model without a mask; `first` is what else the model reads (ids of the source, sounds). Models that make
    their mask by torch.vmap, which cannot be traced, are given it as `mask`."""

    def __init__(self, model: nn.Module, first: str | None, mask: str | None) -> None:
        super().__init__()
        self.model = model
        self.first = first
        self.mask = mask

    def forward(self, ids: Tensor, first: Tensor, causal: Tensor) -> Tensor:
        named = {} if self.mask is None else {self.mask: causal}
        if self.first is None:
            return self.model(input_ids=ids, **named)[0]
        return self.model(**{self.first: first}, decoder_input_ids=ids, **named)[0]


@dataclass(frozen=True)
class _Model:
    family: Family
    first: str | None = None
    mask: str | None = None
    effect: str = "takes prefixes for the first tokens"


_MODELS = {
    "gpt2": _Model(FAMILIES["gpt2"], mask="attention_mask"),
    "llama": _Model(FAMILIES["llama"], mask="attention_mask"),
    "mistral": _Model(FAMILIES["mistral"], mask="attention_mask"),
    "bart": _Model(FAMILIES["bart"], "input_ids"),
    "mbart": _Model(FAMILIES["mbart"], "input_ids"),
    "plbart": _Model(Family(hf.PLBartConfig, hf.PLBartModel, _SEQ2SEQ | _TOKENS), "input_ids"),
    "whisper": _Model(
        Family(
            hf.WhisperConfig, hf.WhisperModel, _SEQ2SEQ | _TOKENS | dict(num_mel_bins=8, max_source_positions=11)
        ),
        "input_features",
        mask="decoder_attention_mask",
    ),
    "bert": _Model(Family(hf.BertConfig, hf.BertLMHeadModel, _BERT)),
    "roberta": _Model(Family(hf.RobertaConfig, hf.RobertaForCausalLM, _BERT)),
    "xlm_roberta": _Model(Family(hf.XLMRobertaConfig, hf.XLMRobertaForCausalLM, _BERT)),
}  # fmt: skip


def _make(name: str, attention: str, masked: bool = False) -> _Decoder:
    model = _MODELS[name]
    made = model.family.make(attention, torch.float32).model
    return _Decoder(made, model.first, model.mask if masked else None)


def _arguments(name: str, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    ids = torch.randint(3, 97, (rows, 7), generator=generator)
    sounds = torch.randn(rows, 8, 22, generator=generator)
    causal = torch.full((7, 7), torch.finfo(torch.float32).min).triu(1).expand(rows, 1, 7, 7)
    return ids, sounds if _MODELS[name].first == "input_features" else ids, causal


def _library(name: str, attention: str) -> _Decoder:
    model = _make(name, attention)
    adapters.init(model.model)
    return model


def _with_directory(name: str, folder: Path) -> _Decoder:
    """The library's model with eager attention and a random adapter, which is saved in the folder."""
    model = _library(name, "eager")
    oracle.make_oracle_adapter(model.model, oracle.CONFIGS["prefix_flat_gated"], "task", seed=1)
    model.model.save_adapter(str(folder), "task")
    model.model.eval().set_active_adapters("task")
    return model


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", _MODELS)
def test_without_a_mask_prefixes_equal_the_library_with_eager_attention(
    name: str, attention: str, tmp_path: Path
) -> None:
    base = torch.jit.trace(_make(name, attention, masked=True), _arguments(name, 2), check_trace=False, strict=False)
    library = _with_directory(name, tmp_path)
    with pytest.warns(UserWarning, match=_MODELS[name].effect):
        grafted = torchgraft.load_adapter(base, tmp_path)
    arguments = _arguments(name, 3)
    with torch.no_grad():
        assert oracle.difference(grafted(*arguments), library(*arguments)) <= 1e-5


@pytest.mark.parametrize("name", _MODELS)
def test_with_sdpa_the_library_does_otherwise(name: str, tmp_path: Path) -> None:
    """So the warning is true. The models themselves agree."""
    eager, sdpa = _with_directory(name, tmp_path), _library(name, "sdpa")
    sdpa.model.load_adapter(str(tmp_path), set_active=True)
    arguments = _arguments(name, 3)
    with torch.no_grad():
        assert oracle.difference(sdpa(*arguments), eager(*arguments)) > 0.05
        eager.model.set_active_adapters(None)
        sdpa.model.set_active_adapters(None)
        assert oracle.difference(sdpa(*arguments), eager(*arguments)) <= 1e-5


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral"])
def test_with_sdpa_and_padding_the_library_hides_prefixes(name: str, tmp_path: Path) -> None:
    _with_directory(name, tmp_path)
    model = _library(name, "sdpa").model
    ids, mask = text_arguments(torch.float32, 1)
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask)[0]
        model.load_adapter(str(tmp_path), set_active=True)
        found = model(input_ids=ids, attention_mask=mask)[0]
    assert oracle.difference(found, expected) <= 1e-5


@pytest.mark.parametrize("name", ["bert", "roberta", "xlm_roberta"])
def test_encoders_are_not_warned_of(name: str, tmp_path: Path) -> None:
    model = FAMILIES[name].make("eager", torch.float32).model
    adapters.init(model)
    model.add_adapter("task", config="mam")
    model.save_adapter(str(tmp_path), "task")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torchgraft.load_adapter_directory(tmp_path)
