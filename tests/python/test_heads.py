"""Task heads: against the library's, pooling against its definition, mixed batches, files."""

import json
import tempfile
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

import adapters
import torchgraft
from grafted import reloaded
from torchgraft import HeadConfig

pytestmark = pytest.mark.quick


@pytest.fixture(scope="module")
def library() -> tuple[torch.nn.Module, torch.jit.ScriptModule]:
    """A small BertAdapterModel of the library, and its base model traced."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, return_dict=False)  # fmt: skip
    plain = transformers.BertModel(config).eval()
    batch = _inputs()
    with torch.no_grad():
        traced = torch.jit.trace(plain, batch, check_trace=False, strict=False)
    model = adapters.BertAdapterModel(config)
    model.bert.load_state_dict(plain.state_dict(), strict=False)
    return model.eval(), traced


def _inputs() -> tuple[Tensor, Tensor]:
    ids = torch.randint(1, 50, (3, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    mask[2, 1:] = 0
    return ids, mask


_HEADS = {
    "classification": dict(num_labels=4, layers=2),
    "one_layer": dict(num_labels=2, layers=1),
    "deep": dict(num_labels=3, layers=3, activation_function="gelu"),
    "regression": dict(num_labels=1, layers=2),
    "multilabel": dict(num_labels=5, multilabel=True),
    "tagging": dict(num_labels=6, layers=1),
}


@pytest.mark.parametrize("kind", _HEADS)
@pytest.mark.parametrize("safetensors", [True, False], ids=["safetensors", "bin"])
def test_a_head_of_the_library_gives_the_same_logits_here_and_back(library, tmp_path: Path, kind, safetensors) -> None:
    model, traced = library
    name = f"{kind}_{safetensors}"
    model.add_adapter(name, config="seq_bn")
    add = model.add_tagging_head if kind == "tagging" else model.add_classification_head
    labels = {i: f"label {i}" for i in range(_HEADS[kind]["num_labels"])}
    add(name, id2label=labels, **_HEADS[kind])
    model.set_active_adapters(name)
    model.eval()
    with torch.no_grad():
        for parameter in model.heads[name].parameters():
            parameter.normal_(std=0.3)
        expected = model(*_inputs(), head=name)[0]
    model.save_adapter(str(tmp_path / "a"), name, use_safetensors=safetensors)

    module = torchgraft.load_adapter(traced, tmp_path / "a")
    with torch.no_grad():
        torch.testing.assert_close(module.forward_with_head(*_inputs()), expected, rtol=0, atol=1e-5)
    config = torchgraft.head_config(module, name)
    assert config.num_labels == len(labels) and list(config.labels) == list(labels.values())

    torchgraft.save_adapter(module, name, tmp_path / "b", safetensors, model_class="BertAdapterModel")
    model.load_adapter(str(tmp_path / "b"), load_as=f"{name}_back", set_active=True, use_safetensors=safetensors)
    model.eval()
    with torch.no_grad():
        again = model(*_inputs(), head=f"{name}_back")[0]
    torch.testing.assert_close(again, expected, rtol=0, atol=1e-5)


def _linear_head(name: str, pooling: str, base_module) -> torch.jit.ScriptModule:
    module = torchgraft.graft(base_module, "lora", name, trainable=True)
    torch.manual_seed(2)
    return torchgraft.add_head(module, name, HeadConfig(num_labels=3, layers=1, pooling=pooling))


@pytest.mark.parametrize("pooling", ["first", "mean", "last"])
def test_pooling_is_what_it_says(library, pooling: str) -> None:
    module = _linear_head("task", pooling, library[1])
    ids, mask = _inputs()
    with torch.no_grad():
        hidden = module(ids, mask)[0]
        rows = []
        for row, count in zip(hidden, mask.sum(1).tolist(), strict=True):
            rows.append({"first": row[0], "mean": row[:count].mean(0), "last": row[count - 1]}[pooling])
        weights = module.adapters.heads.adapter_task
        expected = torch.nn.functional.linear(torch.stack(rows), weights.out_weight, weights.out_bias)
        torch.testing.assert_close(module.forward_with_head(ids, mask), expected, rtol=0, atol=1e-6)


def test_sequence_first_modules_are_pooled_over_tokens() -> None:
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0)
    plain = torch.jit.script(torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval())
    module = _linear_head("task", "mean", plain)
    x = torch.randn(5, 3, 16)
    with torch.no_grad():
        weights = module.adapters.heads.adapter_task
        expected = torch.nn.functional.linear(module(x).mean(0), weights.out_weight, weights.out_bias)
        torch.testing.assert_close(module.forward_with_head(x), expected, rtol=0, atol=1e-6)


def test_rows_of_a_mixed_batch_get_their_own_heads(library) -> None:
    module = torchgraft.graft(library[1], "lora", "a")
    module = torchgraft.graft(module, "unipelt", "b", trainable=True)
    module = torchgraft.graft(module, "seq_bn", "headless")
    module = torchgraft.add_head(module, "a", HeadConfig(num_labels=2, pooling="mean"))
    module = torchgraft.add_head(module, "b", HeadConfig(num_labels=5, layers=1))
    inputs = _inputs()
    with torch.no_grad():
        mixed = module.forward_with_head(*inputs, adapter_ids=torch.tensor([1, 0, 1]))
        assert mixed.shape == (3, 5) and bool(mixed[1, 2:].isneginf().all())
        for row, (index, labels) in enumerate([(1, 5), (0, 2), (1, 5)]):
            module.activate("ab"[index])
            alone = module.forward_with_head(*(tensor[row : row + 1] for tensor in inputs))
            torch.testing.assert_close(mixed[row : row + 1, :labels], alone, rtol=0, atol=1e-5)
        with pytest.raises(torch.jit.Error, match="the adapter 'headless' has no head"):
            module.forward_with_head(*inputs, adapter_ids=torch.tensor([2, 0, 1]))
        with pytest.raises(torch.jit.Error, match="base model"):
            module.forward_with_head(*inputs, adapter_ids=torch.tensor([-1, 0, 1]))
    again = reloaded(module)
    with torch.no_grad():
        assert torch.equal(again.forward_with_head(*inputs, adapter_ids=torch.tensor([1, 0, 1])), mixed)


def test_a_head_is_trained_with_its_adapter_and_kept_by_the_life_of_adapters(library, tmp_path: Path) -> None:
    module = _linear_head("task", "mean", library[1])
    named = torchgraft.trainable_parameters(module, "task")
    loss = torch.nn.functional.cross_entropy(module.forward_with_head(*_inputs()), torch.tensor([0, 2, 1]))
    loss.backward()
    heads = [key for key in named if ".heads." in key]
    assert len(heads) >= 2 and all(bool(named[key].grad.ne(0).any()) for key in heads if named[key].numel())
    with torch.no_grad():
        expected = module.forward_with_head(*_inputs())
        changed = torchgraft.graft(
            torchgraft.rename_adapter(torchgraft.freeze_adapter(module, "task"), "task", "t"), "lora", "x"
        )
        changed.activate("t")
        torch.testing.assert_close(changed.forward_with_head(*_inputs()), expected, rtol=0, atol=1e-6)
        torchgraft.save_adapter(changed, "t", tmp_path)
        assert json.loads((tmp_path / "head_config.json").read_text())["pooling"] == "mean"
        loaded = torchgraft.load_adapter(library[1], tmp_path)
        torch.testing.assert_close(loaded.forward_with_head(*_inputs()), expected, rtol=0, atol=1e-6)
    bare = torchgraft.remove_head(changed, "t")
    assert not hasattr(bare, "forward_with_head") and torchgraft.head_config(bare, "t") is None
    torchgraft.save_adapter(bare, "t", tmp_path)
    assert not (tmp_path / "head_config.json").exists() and not (tmp_path / "model_head.safetensors").exists()
    assert not hasattr(torchgraft.ungraft(changed), "forward_with_head")


def test_wrong_heads_are_refused(library) -> None:
    module = torchgraft.graft(library[1], "lora", "task")
    for config, reason in (
        (HeadConfig(head_type="question_answering"), 'head_type="question_answering" is not supported'),
        (HeadConfig(pooling="max"), 'pooling="max"'),
        (HeadConfig(num_labels=0), "num_labels of at least 1"),
        (HeadConfig(num_labels=3, labels=["a", "b", "c", "d"]), "expected 3 different labels"),
        (HeadConfig(dropout_prob=1.0), "below 1"),
    ):
        with pytest.raises(torchgraft.GraftError, match=reason):
            torchgraft.add_head(module, "task", config)
    with pytest.raises(torchgraft.GraftError, match="no Tensor argument 'mask'"):
        torchgraft.add_head(module, "task", HeadConfig(), token_mask="mask")
    with pytest.raises(torchgraft.GraftError, match="no adapter is called 'other'"):
        torchgraft.add_head(module, "other", HeadConfig())


def test_a_damaged_head_is_an_error_and_a_foreign_one_is_left_out(library, tmp_path: Path) -> None:
    module = torchgraft.add_head(torchgraft.graft(library[1], "lora", "task"), "task", HeadConfig())
    torchgraft.save_adapter(module, "task", tmp_path)
    weights = tmp_path / "model_head.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(torchgraft.GraftError, match="model_head.safetensors"):
        torchgraft.load_adapter(library[1], tmp_path)
    weights.write_bytes(whole)
    config = json.loads((tmp_path / "head_config.json").read_text())
    config["config"]["num_labels"] = 7
    (tmp_path / "head_config.json").write_text(json.dumps(config))
    with pytest.raises(torchgraft.GraftError, match=r"expected heads.task.4.weight of shape \[7, 24\], got \[2, 24\]"):
        torchgraft.load_adapter(library[1], tmp_path)
    config["config"] = {"head_type": "question_answering", "num_labels": 2}
    (tmp_path / "head_config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match=r"the adapter's head \(question_answering\) is not loaded"):
        loaded = torchgraft.load_adapter(library[1], tmp_path)
    assert torchgraft.head_config(loaded, "task") is None
    for damaged in ("[]", '{"config": {'):
        (tmp_path / "head_config.json").write_text(damaged)
        with pytest.raises(torchgraft.GraftError, match="head"):
            torchgraft.load_adapter(library[1], tmp_path)


def test_a_head_behind_the_pooler_is_left_out_with_a_warning(library, tmp_path: Path) -> None:
    """The adapter itself is loaded."""
    model = library[0]
    model.add_adapter("pooled", config="lora")
    model.add_classification_head("pooled", num_labels=3, use_pooler=True)
    model.save_adapter(str(tmp_path), "pooled")
    with pytest.warns(UserWarning, match=r"the adapter's head \(classification, use_pooler=True\) is not loaded"):
        loaded = torchgraft.load_adapter(library[1], tmp_path)
    assert loaded.adapter_names() == ["pooled"] and torchgraft.head_config(loaded, "pooled") is None


def _headless_copy(module: torch.jit.ScriptModule) -> str:
    """A directory with the adapter "a" alone."""
    directory = tempfile.mkdtemp()
    torchgraft.save_adapter(torchgraft.remove_head(module, "a"), "a", directory)
    return directory


def test_labels_are_as_many_as_the_logits(library) -> None:
    for labels, number in ((["bad", "bad"], 2), (["bad", "good"], 3)):
        with pytest.raises(torchgraft.GraftError, match=f"expected {number} different labels"):
            HeadConfig(num_labels=number, labels=labels).to_json()


def test_what_becomes_of_heads_when_adapters_are_averaged_replaced_and_counted(library) -> None:
    module = torchgraft.graft(library[1], "seq_bn", "a")
    plain = torchgraft.list_adapters(module)[0].parameters
    module = torchgraft.add_head(module, "a", HeadConfig(num_labels=3, layers=2))
    info = torchgraft.list_adapters(module)[0]
    assert info.parameters - plain == info.by_location["head"] == 24 * 24 + 24 + 3 * 24 + 3
    module = torchgraft.load_adapter(module, _headless_copy(module), "b")
    average = torchgraft.average_adapter(module, "c", ["a", "b"])
    assert [torchgraft.head_config(average, name) is None for name in "abc"] == [False, True, True]
    assert torchgraft.head_config(torchgraft.load_adapter(module, _headless_copy(module), "a"), "a") is None


def test_loading_a_head_draws_no_random_numbers(library, tmp_path: Path) -> None:
    module = torchgraft.add_head(torchgraft.graft(library[1], "seq_bn", "a"), "a", HeadConfig())
    torchgraft.save_adapter(module, "a", tmp_path)
    state = torch.get_rng_state()
    torchgraft.load_adapter(library[1], tmp_path)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_decoders_head_pools_the_decoders_tokens() -> None:
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, dropout=0.0, return_dict=False,
        use_cache=False, attn_implementation="eager")  # fmt: skip
    ids, mask = torch.randint(4, 40, (2, 5)), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    decoder_mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    model = transformers.BartModel(config).eval()
    inputs = (ids, mask, ids[:, :4].contiguous(), decoder_mask)
    with torch.no_grad():
        traced = torch.jit.trace(model, inputs, check_trace=False, strict=False)
        module = torchgraft.add_head(
            torchgraft.graft(traced, "lora", "a"), "a", HeadConfig(layers=1, activation_function=None, pooling="mean")
        )
        weights = module.adapters.heads
        hidden = module(*inputs)[0]
        pooled = (hidden * decoder_mask.unsqueeze(-1)).sum(1) / decoder_mask.sum(1, keepdim=True)
        expected = torch.nn.functional.linear(pooled, weights.out_weight[0], weights.out_bias[0])
        torch.testing.assert_close(module.forward_with_head(*inputs), expected)


def test_a_method_of_the_name_is_refused() -> None:
    class Named(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

        @torch.jit.export
        def forward_with_head(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(torchgraft.GraftError, match="already has a method 'forward_with_head'"):
        torchgraft.graft(torch.jit.script(Named().eval()), "lora", "a")
