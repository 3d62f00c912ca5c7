"""Hugging Face and timm models that AdapterHub does not know, restated by hooks on the eager model itself.

Attention is F.scaled_dot_product_attention in every eager model that a reference runs on, also when the case is traced
from an eager attention. Sizes as in hugging_face_models.py: hidden 48, 4 heads, feed-forward 80, 2 layers.
"""

import functools
import importlib.machinery
import sys
from collections.abc import Callable
from unittest import mock

import torch
import transformers as hf
from torch import Tensor, nn
from transformers.models.gptj.modeling_gptj import GPTJAttention
from transformers.models.mpnet.modeling_mpnet import MPNetSelfAttention

from case import Case
from hugging_face_models import causal_arguments, text_arguments
from restated_reference import Attention, FeedForward, Layer, RestatedReference

_SIZES = dict(hidden_size=48, num_attention_heads=4, num_hidden_layers=2)
_TEXT = dict(vocab_size=97, max_position_embeddings=64, intermediate_size=80)
_TOKENS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)
WAVES = dict(conv_dim=(16, 16), conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2)
WAVES |= dict(num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, vocab_size=32, intermediate_size=80)


class First(nn.Module):
    """The first result of a Hugging Face model on (input, mask) or (input)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.model(inputs)[0] if mask is None else self.model(inputs, attention_mask=mask)[0]


class _RestatedMPNetAttention(MPNetSelfAttention):
    """transformers spells MPNet's attention with softmax only. Here the position bias joins the additive mask."""

    def forward(self, hidden_states, attention_mask=None, head_mask=None, position_bias=None, **options):
        heads = [
            projection(hidden_states).unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)
            for projection in (self.q, self.k, self.v)
        ]
        context = nn.functional.scaled_dot_product_attention(*heads, attn_mask=position_bias + attention_mask)
        return (self.o(context.transpose(1, 2).flatten(2)),)


class _RestatedGptjAttention(GPTJAttention):
    """transformers spells GPT-J's attention with softmax only, its scores in float32."""

    def _attn(self, query, key, value, attention_mask=None, head_mask=None):
        query, key = query.to(value.dtype), key.to(value.dtype)
        return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask), None


_RESTATED = {MPNetSelfAttention: _RestatedMPNetAttention, GPTJAttention: _RestatedGptjAttention}


def _make(config_class, model_class, sizes: dict, attention: str, restated: bool, dtype: torch.dtype) -> nn.Module:
    """The same values whatever the attention and dtype."""
    torch.manual_seed(0)
    config = config_class(**_SIZES, **sizes, return_dict=False)
    config.use_cache = False
    config._attn_implementation = attention
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():  # initialisation is too tame: norms of 1, biases of 0
            parameter.add_(0.1 * torch.randn(parameter.shape))
    for module in model.modules():
        if restated and type(module) in _RESTATED:
            module.__class__ = _RESTATED[type(module)]
    return First(model).to(dtype).eval()


def _sound(dtype: torch.dtype, seed: int) -> tuple:
    shape = ((2, 360), (3, 280), (1, 440))[seed]
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype),)


def _pixels(dtype: torch.dtype, seed: int) -> tuple:
    return (torch.randn((2, 3, 1)[seed], 3, 8, 8, generator=torch.Generator().manual_seed(seed)).to(dtype),)


def pre_norm(layer: str, attention: str, qkv: tuple[str, str, str], branches: tuple[str, str], norms, feeds) -> dict:
    """Places of a pre-norm layer, by paths below `layer`."""
    query, key, value = (f"{layer}.{attention}.{name}" for name in qkv)
    return dict(
        attentions=(Attention(query, key, value, f"{layer}.{branches[0]}", f"{layer}.{norms[0]}"),),
        feed_forward=FeedForward(
            f"{layer}.{feeds[0]}", f"{layer}.{feeds[1]}", f"{layer}.{branches[1]}", f"{layer}.{norms[1]}"
        ),
    )


def post_norm(layer: str, qkv: tuple[str, str, str], branches: tuple[str, str], norms, feeds) -> dict:
    """Places of a post-norm layer: what a block reads is its residual."""
    query, key, value = (f"{layer}.{name}" for name in qkv)
    up, down = (f"{layer}.{name}" for name in feeds)
    return dict(
        attentions=(Attention(query, key, value, f"{layer}.{branches[0]}", query, f"{layer}.{norms[0]}"),),
        feed_forward=FeedForward(up, down, f"{layer}.{branches[1]}", up, f"{layer}.{norms[1]}"),
    )


_PLACES: dict[str, Callable[[int], dict]] = {
    "modernbert": lambda i: pre_norm(
        f"model.layers.{i}", "attn", ("Wqkv",) * 3, ("attn.out_drop", "mlp.Wo"), ("attn_norm", "mlp_norm"),
        ("mlp.Wi", "mlp.Wo"),
    ),
    "qwen2": lambda i: pre_norm(
        f"model.layers.{i}", "self_attn", ("q_proj", "k_proj", "v_proj"), ("self_attn.o_proj", "mlp.down_proj"),
        ("input_layernorm", "post_attention_layernorm"), ("mlp.up_proj", "mlp.down_proj"),
    ),
    "mpnet": lambda i: post_norm(
        f"model.encoder.layer.{i}", ("attention.attn.q", "attention.attn.k", "attention.attn.v"),
        ("attention.attn.o", "output.dense"), ("attention.LayerNorm", "output.LayerNorm"),
        ("intermediate.dense", "output.dense"),
    ),
    "wav2vec2": lambda i: post_norm(
        f"model.encoder.layers.{i}", ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        ("attention.out_proj", "feed_forward.output_dense"), ("layer_norm", "final_layer_norm"),
        ("feed_forward.intermediate_dense", "feed_forward.output_dense"),
    ),
    "dinov2": lambda i: pre_norm(
        f"model.encoder.layer.{i}", "attention.attention", ("query", "key", "value"), ("layer_scale1", "layer_scale2"),
        ("norm1", "norm2"), ("mlp.fc1", "mlp.fc2"),
    ),
    "timm_vit": lambda i: pre_norm(
        f"blocks.{i}", "attn", ("qkv",) * 3, ("ls1", "ls2"), ("norm1", "norm2"), ("mlp.fc1", "mlp.fc2")
    ),
}  # fmt: skip


def _layers(family: str, model: nn.Module) -> list[Layer]:
    return [Layer(number, **_PLACES[family](number)) for number in range(2)]


_MODERN = _TEXT | _TOKENS | dict(global_attn_every_n_layers=2, local_attention=4, reference_compile=False)
_FAMILIES = {
    "modernbert": (hf.ModernBertConfig, hf.ModernBertModel, _MODERN, text_arguments),
    "qwen2": (hf.Qwen2Config, hf.Qwen2Model, _TEXT | dict(num_key_value_heads=2), causal_arguments),
    "mpnet": (hf.MPNetConfig, hf.MPNetModel, _TEXT, text_arguments),
    "wav2vec2": (hf.Wav2Vec2Config, hf.Wav2Vec2Model, WAVES, _sound),
    "dinov2": (hf.Dinov2Config, hf.Dinov2Model, dict(image_size=8, patch_size=4), _pixels),
}
_EAGER_ONLY = {"mpnet"}


def _hugging_face_case(family: str, attention: str) -> Case:
    config_class, model_class, sizes, arguments = _FAMILIES[family]
    make = functools.partial(_make, config_class, model_class, sizes)
    own = "eager" if family in _EAGER_ONLY else "sdpa"
    return Case(
        name=f"{family}_{attention}",
        make=functools.partial(make, attention, False),
        arguments=arguments,
        reference=RestatedReference(functools.partial(make, own, True), functools.partial(_layers, family)),
    )


_IMAGE_PACKAGES = {"torchvision", "PIL"}


class _ImagePackages:
    """A finder and loader of modules in which every name can be had, for all modules of _IMAGE_PACKAGES."""

    @staticmethod
    def find_spec(name: str, path=None, target=None) -> importlib.machinery.ModuleSpec | None:
        if name.split(".")[0] not in _IMAGE_PACKAGES:
            return None
        return importlib.machinery.ModuleSpec(name, _ImagePackages, is_package=True)

    @staticmethod
    def create_module(spec: importlib.machinery.ModuleSpec) -> mock.MagicMock:
        return mock.MagicMock(__spec__=spec, __path__=[], __version__="0")

    @staticmethod
    def exec_module(module: mock.MagicMock) -> None:
        """Nothing to run."""


@functools.cache
def _vision_transformer() -> type[nn.Module]:
    """timm's. It imports torchvision and PIL for image transforms, which are not used here; and the torchvision that
    the package index has for this torch does not load beside torch's CPU build."""
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] in _IMAGE_PACKAGES}
    with mock.patch.object(sys, "meta_path", [_ImagePackages, *sys.meta_path]):
        from timm.models.vision_transformer import VisionTransformer
    for name in [name for name in sys.modules if name.split(".")[0] in _IMAGE_PACKAGES]:
        del sys.modules[name]
    sys.modules.update(hidden)
    return VisionTransformer


def _make_timm(options: dict, fused: bool, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    sizes = dict(img_size=8, patch_size=4, embed_dim=48, depth=2, num_heads=4, mlp_ratio=80 / 48, num_classes=5)
    model = _vision_transformer()(**sizes, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    for block in model.blocks:
        block.attn.fused_attn = fused
    return model.to(dtype).eval()


def _timm_case(name: str, options: dict, fused: bool) -> Case:
    make = functools.partial(_make_timm, options)
    return Case(
        name=name,
        make=functools.partial(make, fused),
        arguments=_pixels,
        reference=RestatedReference(functools.partial(make, True), functools.partial(_layers, "timm_vit")),
        forms=("traced", "scripted"),
    )


_LIST = [
    _hugging_face_case(family, attention)
    for family in _FAMILIES
    for attention in ("sdpa", "eager")
    if attention == "eager" or family not in _EAGER_ONLY
]
_LIST += [
    _timm_case("timm_vit_fused", {}, True),
    _timm_case("timm_vit_explicit", {}, False),
    _timm_case("timm_vit_qk_norm_layer_scale_fused", dict(qk_norm=True, init_values=0.5), True),
    _timm_case("timm_vit_qk_norm_layer_scale_explicit", dict(qk_norm=True, init_values=0.5), False),
]

CASES: dict[str, Case] = {case.name: case for case in _LIST}
