"""LoRAs of PEFT on linear maps outside of the layers, and linear maps that were trained as a whole."""

from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import torchgraft
from hugging_face_models import FAMILIES, Family, text_arguments
from peft_support import save_random_lora

_SIZES = FAMILIES["bert"].sizes
_ALBERT = FAMILIES["albert"].sizes
_MODELS = {
    "bert": Family(hf.BertConfig, hf.BertForSequenceClassification, _SIZES | dict(num_labels=3)),
    "tokens": Family(hf.BertConfig, hf.BertForTokenClassification, _SIZES | dict(num_labels=5)),
    "roberta": Family(hf.RobertaConfig, hf.RobertaForSequenceClassification, _SIZES | dict(num_labels=3)),
    "albert": Family(hf.AlbertConfig, hf.AlbertForSequenceClassification, _ALBERT | dict(num_labels=3)),
    "words": Family(hf.BertConfig, hf.BertForMaskedLM, _SIZES),
}  # fmt: skip
_CASES = {
    "classifier trained as a whole": ("bert", dict(task_type="SEQ_CLS", target_modules=["query", "value"])),
    "tokens' classifier": ("tokens", dict(task_type="TOKEN_CLS", target_modules=["query"], use_rslora=True)),
    "two maps as a whole": ("roberta", dict(task_type="SEQ_CLS", target_modules=["key"])),
    "pooler and classifier": ("bert", dict(target_modules=["query", "pooler.dense", "classifier"])),
    "pooler alone": ("bert", dict(target_modules=["pooler.dense"], rank_pattern={"pooler.dense": 3})),
    "all of BERT": ("bert", dict(target_modules="all-linear", task_type="SEQ_CLS")),
    "DoRA": ("bert", dict(target_modules=["query", "pooler.dense"], use_dora=True)),
    "biases": ("bert", dict(target_modules=["query", "output.dense", "classifier"], lora_bias=True)),
    "embeddings' projection": ("albert", dict(target_modules=["embedding_hidden_mapping_in", "query"])),
    "language model's head": ("words", dict(target_modules=["predictions.transform.dense", "query"])),
}  # fmt: skip


class _Model(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask)[0]


def _make(name: str) -> _Model:
    return _Model(_MODELS[name].make("sdpa", torch.float64).model)


def _traced(name: str) -> torch.jit.ScriptModule:
    example = _MODELS[name].arguments(torch.float64, 0)
    return torch.jit.trace(_make(name), example, check_trace=False, strict=False)


def _train(name: str, options: dict, folder: Path) -> Tensor:
    """Saves a random adapter in the folder. Returns what PEFT gives."""
    model = _make(name)
    save_random_lora(model.model, options, folder)
    with torch.no_grad():
        return model(*_MODELS[name].arguments(torch.float64, 1))


@pytest.mark.parametrize("case", _CASES)
def test_equals_peft(case: str, tmp_path: Path) -> None:
    name, options = _CASES[case]
    base = _traced(name)
    expected = _train(name, options, tmp_path)
    module = torchgraft.load_adapter(base, tmp_path, "task")
    arguments = _MODELS[name].arguments(torch.float64, 1)
    tolerance = 1e-10
    with torch.no_grad():
        plain = base(*arguments)
        assert (plain - expected).abs().max() > 1e-3
        torch.testing.assert_close(module(*arguments), expected, rtol=tolerance, atol=tolerance)
        rows = torch.full((plain.size(0),), -1)
        rows[0] = 0
        mixed = module(*arguments, adapter_ids=rows)
        torch.testing.assert_close(mixed[0], expected[0], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(mixed[1:], plain[1:], rtol=tolerance, atol=tolerance)
    if not options.get("use_dora"):
        torchgraft.save_adapter(module, "task", tmp_path / "again")
        again = torchgraft.load_adapter(base, tmp_path / "again")
        with torch.no_grad():
            torch.testing.assert_close(again(*arguments), module(*arguments), rtol=0, atol=1e-12)


def test_the_loss_of_a_head_is_said_where_the_model_has_none(tmp_path: Path) -> None:
    model = _make("bert").model
    base = torch.jit.trace(_Model(model.bert), text_arguments(torch.float64, 0), check_trace=False, strict=False)
    _train("bert", _CASES["classifier trained as a whole"][1], tmp_path)
    with pytest.warns(UserWarning, match=r"classifier \(modules_to_save\) is not loaded"):
        module = torchgraft.load_adapter(base, tmp_path, "task")
    tuned = peft.PeftModel.from_pretrained(_make("bert").model, str(tmp_path)).double().eval()
    arguments = text_arguments(torch.float64, 1)
    with torch.no_grad():
        expected = tuned.base_model.model.bert(*arguments, return_dict=False)[0]
        torch.testing.assert_close(module(*arguments), expected, rtol=1e-10, atol=1e-10)


def test_a_tied_head_that_was_trained_as_a_whole_is_refused(tmp_path: Path) -> None:
    """The graph has it under the embedding's path."""
    model = hf.BertForMaskedLM(hf.BertConfig(**_SIZES, return_dict=False)).eval()
    base = torch.jit.trace(model, text_arguments(torch.float32, 0), check_trace=False, strict=False)
    options = dict(target_modules=["query"], modules_to_save=["decoder"])
    peft.get_peft_model(model, peft.LoraConfig(**options)).save_pretrained(str(tmp_path))
    wanted = r"decoder \(modules_to_save\) may be the model's bert.embeddings.word_embeddings, which has as many"
    with pytest.raises(torchgraft.GraftError, match=wanted):
        torchgraft.load_adapter(base, tmp_path)


def test_linear_maps_outside_of_the_layers_are_found_in_int8(tmp_path: Path) -> None:
    model = hf.BertModel(hf.BertConfig(**_MODELS["bert"].sizes, return_dict=False)).eval()
    arguments = text_arguments(torch.float32, 0)
    base = torch.jit.trace(model, arguments, check_trace=False, strict=False)
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", init_lora_weights=False))
    tuned.save_pretrained(str(tmp_path))
    with torch.no_grad():
        expected = tuned.eval()(*arguments)[1]
        result = torchgraft.load_adapter(torchgraft.quantize(base), tmp_path)(*arguments)[1]
        assert (base(*arguments)[1] - expected).abs().max() > 0.1
        assert (result - expected).abs().max() < 0.05  # the error of int8


def test_what_was_trained_as_a_whole_must_be_small_and_linear(tmp_path: Path) -> None:
    big = _MODELS["bert"].sizes | dict(num_labels=70, hidden_size=72)
    model = _Model(hf.BertForSequenceClassification(hf.BertConfig(**big, return_dict=False)).eval())
    base = torch.jit.trace(model, text_arguments(torch.float32, 0), check_trace=False, strict=False)
    tuned = peft.get_peft_model(model.model, peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    tuned.save_pretrained(str(tmp_path / "big"))
    with pytest.raises(torchgraft.GraftError, match="classifier was trained as a whole .* at most 64"):
        torchgraft.load_adapter(base, tmp_path / "big")
    _train("bert", dict(target_modules=["query"], modules_to_save=["LayerNorm"]), tmp_path / "norms")
    with pytest.raises(torchgraft.GraftError, match="of modules_to_save, is not of a linear map"):
        torchgraft.load_adapter(_traced("bert"), tmp_path / "norms")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        # torch.nn.MultiheadAttention applies out_proj to [tokens * rows, features].
        ("out_proj", "no LoRA can act on the attention's output projection of layer 0"),
        ("self_attn", "layers.0.self_attn is a torch.nn.MultiheadAttention, of which"),
    ],
)
def test_parts_of_a_multihead_attention_are_refused_by_name(target: str, message: str, tmp_path: Path) -> None:
    layer = nn.TransformerEncoderLayer(48, 4, 80, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    base = torch.jit.trace(encoder, torch.randn(2, 5, 48), check_trace=False)
    peft.get_peft_model(encoder, peft.LoraConfig(target_modules=[target])).save_pretrained(str(tmp_path))
    with pytest.raises(torchgraft.GraftError, match=message):
        torchgraft.load_adapter(base, tmp_path)


def test_a_packed_map_whose_columns_lie_in_groups_is_refused_by_name(tmp_path: Path) -> None:
    """Falcon's keys and values stand between groups of queries."""
    config = hf.FalconConfig(
        hidden_size=48, num_attention_heads=4, num_hidden_layers=1, vocab_size=97, new_decoder_architecture=True,
        num_kv_heads=2, ffn_hidden_size=80, return_dict=False, use_cache=False)  # fmt: skip
    model = hf.FalconModel(config).eval()
    base = torch.jit.trace(model, torch.ones(2, 7, dtype=torch.int64), check_trace=False, strict=False)
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["query_key_value"])).save_pretrained(str(tmp_path))
    with pytest.raises(torchgraft.GraftError, match="query_key_value, which is in no layer that was recognised"):
        torchgraft.load_adapter(base, tmp_path)
