"""Small random Hugging Face models of many families, and the arguments they are called with.

Hidden size 48, 4 heads, feed-forward 80: sizes that are free are chosen so that no two mean the same number. Weights do
not depend on the attention implementation or, up to rounding, on the dtype.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from models import FFN, HEADS, HIDDEN, POSITIONS, VOCABULARY, make_batch

# Lengths of the rows, by seed. Seed 0 is traced; the others have other batch sizes and widths.
_LENGTHS = ([9, 6], [11, 4, 8], [5], [7, 7, 2, 3])
_DECODER_WIDTHS = (7, 6, 3, 10)


class _TextModel(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask)[0]


class _ImageModel(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values=pixel_values)[0]


class _AudioEncoder(nn.Module):
    """The encoder alone of a model that has more parts."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_features: Tensor) -> Tensor:
        return self.model.encoder(input_features)[0]


class _EncoderDecoder(nn.Module):
    """Gives the decoder's last hidden states."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor) -> Tensor:
        return self.model(
            input_ids=input_ids, attention_mask=attention_mask, decoder_input_ids=decoder_input_ids, use_cache=False
        )[0]


def text_arguments(dtype: torch.dtype, seed: int) -> tuple:
    """ids [B, S] and mask [B, S] int64, padded on the right."""
    lengths = _LENGTHS[seed % len(_LENGTHS)]
    batch = make_batch(lengths, max(lengths), dtype, seed)
    return batch.ids, batch.mask


def causal_arguments(dtype: torch.dtype, seed: int) -> tuple:
    """ids [B, S] and an additive mask [B, 1, S, S]: causal, and padding on the right. No row is masked altogether."""
    ids, mask = text_arguments(dtype, seed)
    seen = mask[:, None, None, :].bool() & torch.ones(ids.size(1), ids.size(1), dtype=torch.bool).tril()
    return ids, torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


def encoder_decoder_arguments(dtype: torch.dtype, seed: int) -> tuple:
    """ids and mask of the source [B, S], ids of the target [B, T]."""
    ids, mask = text_arguments(dtype, seed)
    generator = torch.Generator().manual_seed(2000 + seed)
    width = _DECODER_WIDTHS[seed % len(_DECODER_WIDTHS)]
    return ids, mask, torch.randint(2, VOCABULARY, (ids.size(0), width), generator=generator)


def _normal(shape: tuple, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(3000 + seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def image_arguments(dtype: torch.dtype, seed: int) -> tuple:
    """Pixels [B, 3, 8, 8]. Position embeddings fix the size of the image: only batch sizes differ."""
    return (_normal((len(_LENGTHS[seed % len(_LENGTHS)]), 3, 8, 8), dtype, seed),)


def audio_arguments(dtype: torch.dtype, seed: int) -> tuple:
    """Features [B, mels, frames]. Whisper takes one number of frames only: batch sizes differ."""
    return (_normal((len(_LENGTHS[seed % len(_LENGTHS)]), 8, 22), dtype, seed),)


@dataclass(frozen=True, eq=False)
class Family:
    """How a model of one architecture is made and called."""

    config_class: type
    model_class: type
    sizes: dict[str, Any]
    arguments: Callable[[torch.dtype, int], tuple] = text_arguments
    wrapper: type = _TextModel
    # Factors on the weights of modules whose name ends so, where an architecture expects them to be smaller.
    gains: dict[str, float] = field(default_factory=dict)

    def make(self, attention: str, dtype: torch.dtype) -> nn.Module:
        """A fresh model in eval mode; its `model` is the Hugging Face model."""
        config = self.config_class(**self.sizes, return_dict=False)
        config.use_cache = False
        config._attn_implementation = attention
        model = self.model_class(config).eval()
        _randomise(model, self.gains)
        return self.wrapper(model.to(dtype)).eval()


def _randomise(model: nn.Module, gains: dict[str, float]) -> None:
    """Normal values, large enough that attention is far from uniform: a lost mask, prefix or bias is seen."""
    generator = torch.Generator().manual_seed(7)
    seen = set()  # tied parameters are met once
    with torch.no_grad():
        for path, module in model.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    value = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                    gain = next((gain for ending, gain in gains.items() if path.endswith(ending)), 1.0)
                    parameter.copy_(_scaled(module, name, value) * gain)


def _scaled(module: nn.Module, name: str, value: Tensor) -> Tensor:
    if value.dim() == 1:
        is_scale = name.startswith("lambda") or ("Norm" in type(module).__name__ and name == "weight")
        return value * 0.1 + (1.0 if is_scale else 0.0)
    if isinstance(module, Conv1D):  # [in, out], the transpose of a Linear's weight
        return value * 1.3 / value.size(0) ** 0.5
    if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
        return value * 1.3 / value[0].numel() ** 0.5
    return value  # embeddings


_SIZES = dict(hidden_size=HIDDEN, num_attention_heads=HEADS, num_hidden_layers=2, intermediate_size=FFN)
_TEXT = dict(vocab_size=VOCABULARY, max_position_embeddings=POSITIONS)
_IMAGE = dict(image_size=8, patch_size=4)
_DISTIL = dict(dim=HIDDEN, n_heads=HEADS, n_layers=2, hidden_dim=FFN)
_GPT = dict(n_embd=HIDDEN, n_head=HEADS, n_layer=2, n_inner=FFN, vocab_size=VOCABULARY, n_positions=POSITIONS)
# Encoder and decoder differ in depth and in the size of the feed-forward block.
_BART = dict(d_model=HIDDEN, encoder_layers=2, decoder_layers=3, encoder_attention_heads=HEADS) | dict(
    decoder_attention_heads=HEADS, encoder_ffn_dim=FFN, decoder_ffn_dim=72
)
_T5 = dict(d_model=HIDDEN, num_heads=HEADS, num_layers=2, num_decoder_layers=3, d_ff=FFN, vocab_size=VOCABULARY)
_DEBERTA = _SIZES | _TEXT | dict(relative_attention=True, pos_att_type=["c2p", "p2c"], num_hidden_layers=3)
_DEBERTA_V2 = _DEBERTA | dict(position_buckets=8, norm_rel_ebd="layer_norm")
_WHISPER = (
    _BART
    | dict(encoder_layers=3, vocab_size=VOCABULARY, num_mel_bins=8, max_source_positions=11)
    | dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)
)
# T5 divides no scores by the square root of the head width: its queries are that much smaller.
_T5_GAINS = {"SelfAttention.q": 12**-0.5, "EncDecAttention.q": 12**-0.5}

_PICTURES = dict(arguments=image_arguments, wrapper=_ImageModel)
_SEQ2SEQ = dict(arguments=encoder_decoder_arguments, wrapper=_EncoderDecoder)

FAMILIES = {
    "bert": Family(hf.BertConfig, hf.BertModel, _SIZES | _TEXT),
    "roberta": Family(hf.RobertaConfig, hf.RobertaModel, _SIZES | _TEXT),
    "xlm_roberta": Family(hf.XLMRobertaConfig, hf.XLMRobertaModel, _SIZES | _TEXT),
    "electra": Family(hf.ElectraConfig, hf.ElectraModel, _SIZES | _TEXT | dict(embedding_size=20)),
    "distilbert": Family(hf.DistilBertConfig, hf.DistilBertModel, _DISTIL | _TEXT),
    "albert": Family(hf.AlbertConfig, hf.AlbertModel, _SIZES | _TEXT | dict(embedding_size=20, num_hidden_layers=3)),
    # Two sets of weights for three layers: the first two share one.
    "albert_groups": Family(
        hf.AlbertConfig,
        hf.AlbertModel,
        _SIZES | _TEXT | dict(embedding_size=20, num_hidden_layers=3, num_hidden_groups=2),
    ),
    "deberta": Family(hf.DebertaConfig, hf.DebertaModel, _DEBERTA),
    "deberta_v2": Family(hf.DebertaV2Config, hf.DebertaV2Model, _DEBERTA_V2 | dict(share_att_key=False)),
    "deberta_v2_shared": Family(hf.DebertaV2Config, hf.DebertaV2Model, _DEBERTA_V2 | dict(share_att_key=True)),
    "vit": Family(hf.ViTConfig, hf.ViTModel, _SIZES | _IMAGE, **_PICTURES),
    "beit": Family(
        hf.BeitConfig, hf.BeitModel, _SIZES | _IMAGE | dict(use_absolute_position_embeddings=True), **_PICTURES
    ),
    "beit_relative": Family(
        hf.BeitConfig, hf.BeitModel, _SIZES | _IMAGE | dict(use_relative_position_bias=True), **_PICTURES
    ),
    "clip_text": Family(hf.CLIPTextConfig, hf.CLIPTextModel, _SIZES | _TEXT),
    "clip_vision": Family(hf.CLIPVisionConfig, hf.CLIPVisionModel, _SIZES | _IMAGE, **_PICTURES),
    "gpt2": Family(hf.GPT2Config, hf.GPT2Model, _GPT, causal_arguments),
    "gptj": Family(hf.GPTJConfig, hf.GPTJModel, _GPT | dict(rotary_dim=8), causal_arguments),
    "llama": Family(hf.LlamaConfig, hf.LlamaModel, _SIZES | _TEXT | dict(num_key_value_heads=2), causal_arguments),
    "mistral": Family(
        hf.MistralConfig, hf.MistralModel, _SIZES | _TEXT | dict(num_key_value_heads=2), causal_arguments
    ),
    "t5": Family(hf.T5Config, hf.T5Model, _T5 | dict(d_kv=12), gains=_T5_GAINS, **_SEQ2SEQ),
    # Heads that are together narrower than the hidden states: 4 x 10 of 48.
    "t5_gated": Family(
        hf.T5Config,
        hf.T5Model,
        _T5 | dict(d_kv=10, feed_forward_proj="gated-gelu"),
        gains=_T5_GAINS | {"wi_1": 0.2, "wo": 0.5},
        **_SEQ2SEQ,
    ),
    "bart": Family(hf.BartConfig, hf.BartModel, _BART | _TEXT, **_SEQ2SEQ),
    "mbart": Family(hf.MBartConfig, hf.MBartModel, _BART | _TEXT, **_SEQ2SEQ),
    "whisper_encoder": Family(
        hf.WhisperConfig, hf.WhisperForAudioClassification, _WHISPER, audio_arguments, _AudioEncoder
    ),
}
