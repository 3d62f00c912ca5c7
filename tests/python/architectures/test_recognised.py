"""Architectures that AdapterHub does not know: what inspect() reports, and that a fresh LoRA changes nothing."""

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import torchgraft
from grafted import canonicalised, reloaded
from oracle import difference
from restated_cases import WAVES, First

_SIZES = dict(hidden_size=48, num_attention_heads=4, num_hidden_layers=2)
_TEXT = dict(vocab_size=97, max_position_embeddings=64)
_BERT_TOKENS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)
_ALL = {"self_prefix", "selfattn_lora", "mh_adapter", "intermediate_lora", "output_lora", "output_adapter"}


def _text(rows: int, width: int) -> tuple:
    generator = torch.Generator().manual_seed(rows)
    mask = (torch.arange(width) < torch.tensor([[width]] + [[width - 2]] * (rows - 1))).to(torch.int64)
    return torch.randint(3, 97, (rows, width), generator=generator), mask


def _causal(rows: int, width: int) -> tuple:
    mask = torch.full((width, width), torch.finfo(torch.float32).min).triu(1)
    return _text(rows, width)[0], mask[None, None].expand(rows, 1, width, width).contiguous()


def _sound(rows: int, width: int) -> tuple:
    return (torch.randn(rows, 40 * width, generator=torch.Generator().manual_seed(rows)),)


def _pixels(rows: int, width: int) -> tuple:
    return (torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(rows)),)


_WINDOW = dict(intermediate_size=80, global_attn_every_n_layers=2, local_attention=4, reference_compile=False)
_GROUPED = dict(intermediate_size=80, num_key_value_heads=2)
_IMAGE = dict(image_size=8, patch_size=4)
_BOUNDS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
_NEO = dict(num_heads=4, num_layers=2, attention_types=[[["global", "local"], 1]], window_size=8)
_ESM = dict(pad_token_id=0, mask_token_id=4, position_embedding_type="rotary")

_SMALL = dict(intermediate_size=80)

# name -> (config class, model class, sizes, arguments, expected norm orders, key and value heads)
_MODELS = {
    "opt": (hf.OPTConfig, hf.OPTModel, _TEXT | dict(ffn_dim=80, word_embed_proj_dim=48), _text, ["pre", "pre"], 4),
    "bloom": (hf.BloomConfig, hf.BloomModel, dict(vocab_size=97, n_head=4, n_layer=2), _text, ["pre", "pre"], 4),
    "gpt_neox": (hf.GPTNeoXConfig, hf.GPTNeoXModel, _TEXT | _SMALL, _causal, ["pre", "pre"], 4),
    "gpt_neo": (hf.GPTNeoConfig, hf.GPTNeoModel, _TEXT | _SMALL | _NEO, _causal, ["pre", "pre"], 4),
    "phi": (hf.PhiConfig, hf.PhiModel, _TEXT | _SMALL, _causal, ["pre", "pre"], 4),
    "phi3": (hf.Phi3Config, hf.Phi3Model, _TEXT | _GROUPED | _BOUNDS, _causal, ["pre", "pre"], 2),
    "gemma": (hf.GemmaConfig, hf.GemmaModel, _TEXT | _GROUPED | dict(head_dim=12), _causal, ["pre", "pre"], 2),
    "qwen3": (hf.Qwen3Config, hf.Qwen3Model, _TEXT | _GROUPED | dict(head_dim=12), _causal, ["pre", "pre"], 2),
    "nemotron": (hf.NemotronConfig, hf.NemotronModel, _TEXT | _GROUPED, _causal, ["pre", "pre"], 2),
    "roformer": (hf.RoFormerConfig, hf.RoFormerModel, _TEXT | _SMALL, _text, ["post", "post"], 4),
    "esm": (hf.EsmConfig, hf.EsmModel, _TEXT | _SMALL | _ESM, _text, ["pre", "pre"], 4),
    "hubert": (hf.HubertConfig, hf.HubertModel, WAVES, _sound, ["post", "post"], 4),
    "dinov3": (hf.DINOv3ViTConfig, hf.DINOv3ViTModel, _SMALL | _IMAGE, _pixels, ["pre", "pre"], 4),
    "modernbert": (hf.ModernBertConfig, hf.ModernBertModel, _TEXT | _BERT_TOKENS | _WINDOW, _text, ["none", "pre"], 4),
    "qwen2": (hf.Qwen2Config, hf.Qwen2Model, _TEXT | _GROUPED, _causal, ["pre", "pre"], 2),
    "mpnet": (hf.MPNetConfig, hf.MPNetModel, _TEXT | dict(intermediate_size=80), _text, ["post", "post"], 4),
    "wav2vec2": (hf.Wav2Vec2Config, hf.Wav2Vec2Model, WAVES, _sound, ["post", "post"], 4),
    "dinov2": (hf.Dinov2Config, hf.Dinov2Model, _IMAGE, _pixels, ["pre", "pre"], 4),
}


_EAGER_ONLY = {"mpnet", "bloom", "gpt_neo", "roformer"}  # transformers has no other
# Their packed projections hold queries, keys and values head by head, which inspect notes.
_INTERLEAVED = {"bloom", "gpt_neox"}
_VARIANTS = [(name, "eager") for name in _MODELS] + [(name, "sdpa") for name in _MODELS if name not in _EAGER_ONLY]


@pytest.fixture(scope="module", params=_VARIANTS, ids=["_".join(variant) for variant in _VARIANTS])
def model(request):
    """(traced base, arguments(rows, width), expected norm orders, key and value heads, whether packed head by head)."""
    name, attention = request.param
    config_class, model_class, sizes, arguments, orders, kv_heads = _MODELS[name]
    torch.manual_seed(0)
    config = config_class(**_SIZES, **sizes, return_dict=False)
    config.use_cache = False
    config._attn_implementation = attention
    eager = First(model_class(config)).eval()
    with torch.no_grad():
        base = torch.jit.trace(eager, arguments(2, 9), check_trace=False, strict=False)
    return base, arguments, orders, kv_heads, name in _INTERLEAVED


def test_every_place_is_found(model) -> None:
    base, _, orders, kv_heads, interleaved = model
    structure = torchgraft.inspect(base)
    assert structure["near_misses"] == []
    assert [layer["norm_order"] for layer in structure["layers"]] == orders
    for number, layer in enumerate(structure["layers"]):
        assert (layer["layer"], layer["kind"], layer["shares"]) == (number, "self", None)
        assert (layer["num_heads"], layer["num_kv_heads"], layer["head_dim"]) == (4, kv_heads, 12)
        assert set(layer["locations"]) - {"output_reft"} == _ALL  # test_reft_families.py has the ends of layers
        assert all("head by head" in note for note in layer["notes"])
        assert (layer["notes"] != []) == interleaved


def test_the_canonical_graph_computes_the_same(model) -> None:
    base, arguments, *_ = model
    canonical = canonicalised(base)
    for rows, width in ((2, 9), (3, 7)):
        given = arguments(rows, width)
        with torch.no_grad():
            assert difference(canonical(*given), base(*given)) <= 2e-6


_LORA = torchgraft.LoRAConfig(r=3, alpha=6, attn_matrices=["q", "k", "v"], intermediate_lora=True, output_lora=True)
_SLOTS = {"query": "lora_q", "key": "lora_k", "value": "lora_v"}
_SLOTS |= {"ffn_in": "intermediate_lora", "ffn_out": "output_lora"}


def _lora_parameters(grafted: torch.jit.ScriptModule, layer: dict, role: str) -> tuple[Tensor, Tensor]:
    """lora_a [r, in] and lora_b [out, r] of a projection."""
    prefix = "" if role.startswith("ffn") else "crossattn_" if layer["kind"] == "cross" else "selfattn_"
    slot = f"adapters.layer_{layer['layer']}.{prefix}{_SLOTS[role]}"
    parameters = dict(grafted.named_parameters())
    return parameters[f"{slot}.lora_a"][0], parameters[f"{slot}.lora_b"][0]


def _assert_lora_equals_merged_weights(base: torch.jit.ScriptModule, given: tuple) -> None:
    """A LoRA without a gate is W + alpha / r B A: the base with such weights gives what the grafted model gives."""
    grafted = torchgraft.graft(base, config=_LORA, name="task")
    merged = reloaded(base)  # with weights of its own
    weights = dict(merged.named_parameters())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        plain = base(*given)
        assert difference(grafted(*given), plain) <= 5e-6  # lora_b starts at zero
        for layer in torchgraft.inspect(base)["layers"]:
            for role in _SLOTS:
                projection = layer[role]
                if projection is None:
                    continue
                a, b = _lora_parameters(grafted, layer, role)
                b.copy_(0.1 * torch.randn(b.shape, generator=generator))
                weight = weights.get(projection["path"] + ".weight", weights.get(projection["path"] + "_weight"))
                rows = slice(projection["offset"], projection["offset"] + projection["out_features"])
                weight[rows] += 2.0 * b @ a
        expected = merged(*given)
        assert difference(expected, plain) > 1e-2
        assert difference(grafted(*given), expected) <= 1e-5


def test_lora_equals_merged_weights(model) -> None:
    base, arguments, *_ = model
    _assert_lora_equals_merged_weights(base, arguments(3, 8))


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_torch_decoder(norm_first: bool, batch_first: bool) -> None:
    torch.manual_seed(0)
    sizes = dict(dropout=0.0, batch_first=batch_first, norm_first=norm_first)
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(48, 4, 80, **sizes), 2).eval()
    for parameter in decoder.parameters():  # its layers start as copies of one
        torch.nn.init.normal_(parameter, std=0.2)

    def arguments(rows: int, width: int) -> tuple:
        target, memory = torch.randn(rows, width, 48), torch.randn(rows, width + 3, 48)
        return (target, memory) if batch_first else (target.transpose(0, 1), memory.transpose(0, 1))

    base = torch.jit.trace(decoder, arguments(2, 5), check_trace=False)
    layers = torchgraft.inspect(base)["layers"]
    kinds = [(layer["layer"], layer["kind"]) for layer in layers]
    assert kinds == [(0, "self"), (0, "cross"), (1, "self"), (1, "cross")]
    assert {"cross_prefix", "cross_adapter", "output_adapter"} <= set(layers[1]["locations"])
    _assert_lora_equals_merged_weights(base, arguments(3, 7))
    grafted = torchgraft.graft(base, config="unipelt", name="task")
    with torch.no_grad():
        _, gates = grafted.forward_with_gates(*arguments(3, 7))
    assert {location: tuple(gate.shape) for location, gate in gates["task"][1].items()} == {
        "selfattn_lora": (3, 4),  # q and v of the self attention, then of the cross attention
        "self_prefix": (3, 1),
        "cross_prefix": (3, 1),
        "output_adapter": (3, 1),
    }
