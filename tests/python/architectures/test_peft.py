"""LoRA directories of PEFT give what peft gives."""

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from torch import nn

import torchgraft
from hugging_face_models import FAMILIES

CASES = {
    "bert-default": ("bert", dict()),
    "bert-all": ("bert", dict(target_modules=r".*(query|key|value|intermediate\.dense|layer\.\d\.output\.dense)")),
    "bert-patterns": ("bert", dict(target_modules=["query", "value"], rank_pattern={"layer.1.attention.self.query": 7},
                                   alpha_pattern={"value": 3})),
    "bert-rslora": ("bert", dict(target_modules=["key"], use_rslora=True)),
    "bert-some-layers": ("bert", dict(target_modules=["query"], layers_to_transform=[0, 2])),
    "bert-uneven": ("bert", dict(target_modules=["layer.0.attention.self.query", "layer.2.attention.self.value"])),
    "bert-dora": ("bert", dict(use_dora=True, rank_pattern={"key": 2}, target_modules=["query", "key", "output.dense"],
                               exclude_modules=["attention.output.dense"])),
    "gpt2-dora": ("gpt2", dict(use_dora=True, target_modules=["c_attn"], fan_in_fan_out=True)),
    "llama-dora": ("llama", dict(use_dora=True, target_modules=["v_proj", "up_proj"])),
    "llama-default": ("llama", dict()),
    "llama-mlp": ("llama", dict(target_modules=["q_proj", "up_proj", "down_proj"])),
    "bert-output-projection": ("bert", dict(target_modules=["attention.output.dense"], layers_to_transform=[1])),
    "bert-all-linear": ("bert", dict(target_modules="all-linear", exclude_modules=["pooler.dense"])),
    "llama-all-linear": ("llama", dict(target_modules="all-linear")),
    "llama-gate": ("llama", dict(target_modules=["gate_proj", "o_proj"], use_rslora=True)),
    "llama-dora-all-linear": ("llama", dict(target_modules="all-linear", use_dora=True)),
    "bart-all-linear": ("bart", dict(target_modules="all-linear")),
    "t5-all-linear": ("t5_gated", dict(target_modules="all-linear")),
    "gptj-all-linear": ("gptj", dict(target_modules="all-linear")),
    "deberta-all-linear": ("deberta_v2", dict(target_modules="all-linear",
                                              exclude_modules=["pos_key_proj", "pos_query_proj"])),
    "gpt2-all-linear": ("gpt2", dict(target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)),
    "gpt2-packed": ("gpt2", dict(target_modules=["c_attn"], fan_in_fan_out=True)),
}  # fmt: skip

_EAGER_ONLY = ("t5_gated", "gptj", "deberta_v2")
_ROUNDED = ("llama", "gptj", "t5_gated")  # they compute norms or scores in float32


def _prepared(
    family: str, options: dict, folder: Path
) -> tuple[torch.jit.ScriptModule, tuple, torch.Tensor, torch.Tensor]:
    """The traced base, arguments, what the base and what peft give; the adapter, random, is saved in the folder."""
    dtype = torch.float64
    positional = FAMILIES[family].make("eager" if family in _EAGER_ONLY else "sdpa", dtype)
    arguments = FAMILIES[family].arguments(dtype, 1)
    base = torch.jit.trace(positional, FAMILIES[family].arguments(dtype, 0), check_trace=False, strict=False)
    torch.manual_seed(0)
    with torch.no_grad():
        plain = positional(*arguments)
        # In place: the layers of `positional` get their updates.
        tuned = peft.get_peft_model(positional.model, peft.LoraConfig(r=4, lora_alpha=12, lora_dropout=0.1, **options))
        for path, parameter in tuned.named_parameters():
            if "lora_" in path:
                # LLaMA's norms compute in float32, and a steep random model multiplies their rounding.
                parameter.normal_(std=0.2 if family in _ROUNDED else 0.8)
                if "magnitude" in path:
                    parameter.add_(1)
        tuned.to(dtype).eval().save_pretrained(str(folder))
        return base, arguments, plain, positional(*arguments)


@pytest.mark.parametrize("case", CASES)
def test_equals_peft(case: str, tmp_path) -> None:
    family, options = CASES[case]
    base, arguments, plain, expected = _prepared(family, options, tmp_path)
    module = torchgraft.load_adapter(base, tmp_path, "task")
    tolerance = 3e-5 if family in _ROUNDED else 1e-10
    with torch.no_grad():
        assert (plain - expected).abs().max() > 1e-3
        torch.testing.assert_close(module(*arguments), expected, rtol=tolerance, atol=tolerance)
    grafted = torchgraft.graft(base, adapters={"a": tmp_path})
    assert grafted.adapter_names() == ["a"]
    if options.get("use_dora") and family != "llama":  # LLaMA's projections have no biases
        with pytest.raises(torchgraft.GraftError, match="a DoRA of PEFT on a projection with a bias"):
            torchgraft.save_adapter(module, "task", tmp_path / "again")
        return
    torchgraft.save_adapter(module, "task", tmp_path / "again")
    again = torchgraft.load_adapter(base, tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(again(*arguments), module(*arguments))


class _Logits(nn.Module):
    """A language model of token ids and an additive mask."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits


def _language_model(family: str, tied: bool) -> nn.Module:
    sizes = FAMILIES[family].sizes | dict(tie_word_embeddings=tied, attn_implementation="eager")
    models = {"gpt2": (hf.GPT2Config, hf.GPT2LMHeadModel), "llama": (hf.LlamaConfig, hf.LlamaForCausalLM)}
    config, model = models[family]
    return model(config(**sizes)).double().eval()


@pytest.mark.parametrize(("family", "projection"), [("gpt2", "c_attn"), ("llama", "q_proj")])
@pytest.mark.parametrize("tied", [False, True], ids=["own", "tied"])
def test_a_head_for_language_is_a_linear_map(family: str, projection: str, tied: bool, tmp_path) -> None:
    """GPT-2 views its token ids, of which the graph tells no rank, and its last hidden states."""
    torch.manual_seed(0)
    model = _language_model(family, tied)
    ids, mask = torch.randint(0, 30, (3, 7)), torch.full((7, 7), -torch.inf).triu(1).double().expand(3, 1, 7, 7)
    with torch.no_grad():
        base = torch.jit.trace(_Logits(model), (ids, mask), check_trace=False)
        like = peft.LoraConfig(r=4, target_modules=["lm_head", projection], init_lora_weights=False,
                               fan_in_fan_out=family == "gpt2")  # fmt: skip
        tuned = peft.get_peft_model(model, like)
        tuned.save_pretrained(str(tmp_path), save_embedding_layers=False)
        if tied:  # the graph knows the weight by the name that it has as an embedding
            with pytest.raises(
                torchgraft.GraftError, match=r"no linear map lm_head \(outside of its layers it has .*(wte|embed_to)"
            ):
                torchgraft.load_adapter(base, tmp_path)
            return
        module = torchgraft.load_adapter(base, tmp_path, "task")
        expected = _Logits(tuned)(ids, mask)
        assert (base(ids, mask) - expected).abs().max() > 1e-2
        torch.testing.assert_close(module(ids, mask), expected, rtol=3e-5, atol=3e-5)


@pytest.mark.parametrize("case", ["bert-all", "bert-uneven", "llama-all-linear", "gpt2-all-linear", "bart-all-linear"])
def test_equals_peft_on_a_frozen_module(case: str, tmp_path) -> None:
    """Its linear maps have no paths: layers are matched by number, projections by name."""
    family, options = CASES[case]
    base, arguments, _, expected = _prepared(family, options, tmp_path)
    module = torchgraft.load_adapter(torch.jit.freeze(base.eval()), tmp_path, "task")
    tolerance = 1e-5 if family in _ROUNDED else 1e-10
    with torch.no_grad():
        torch.testing.assert_close(module(*arguments), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(target_modules=["pooler.dense"]), "pooler.dense has no place in the module, which is frozen"),
        (dict(use_dora=True), "DoRA needs the biases of the module, which is frozen"),
    ],
)
def test_what_has_no_place_in_a_frozen_module_is_named(options: dict, message: str, tmp_path) -> None:
    base, *_ = _prepared("bert", dict(target_modules=["query"]) | options, tmp_path)
    with pytest.raises(torchgraft.GraftError, match=message):
        torchgraft.load_adapter(torch.jit.freeze(base.eval()), tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            dict(use_dora=True, target_modules=["layer.0.attention.self.query", "layer.1.attention.self.value"]),
            "DoRA on value of some layers, and in layer 0 on others",
        ),
        (
            dict(target_modules=["query", "position_embeddings"]),  # all rows share them
            r"embeddings.position_embeddings is the model's .*, and no linear map or embedding that is applied once",
        ),
    ],
)
def test_what_has_no_place_is_named(options: dict, message: str, tmp_path) -> None:
    base, *_ = _prepared("bert", dict(target_modules=["query"]) | options, tmp_path)
    with pytest.raises(torchgraft.GraftError, match=message):
        torchgraft.load_adapter(base, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LOHA"}, r"PEFT's LOHA is not supported, only LORA and IA3 are; merge .* merge_and_unload\(\)"),
        ({"peft_type": "IA3"}, "the field .* is not known|is no weight of the method"),
        ({"init_lora_weights": "pissa_niter_4"}, "has changed the base's weights"),
        ({"target_parameters": ["encoder.layer.0.output.dense.weight"]}, "target_parameters .* is not supported"),
    ],
)
def test_other_configurations_are_named(change: dict, message: str, tmp_path) -> None:
    base, *_ = _prepared("bert", dict(target_modules=["query"]), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(torchgraft.GraftError, match=message):
        torchgraft.load_adapter(base, tmp_path)
