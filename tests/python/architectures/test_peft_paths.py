"""Which linear map an update of PEFT is for: found by path, or refused. A directory that lost weights is refused."""

import copy
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import torchgraft
from torchgraft import _patterns
from torchgraft.peft_paths import match_paths

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_LAYERS = 3


def _bert(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=24,
        num_hidden_layers=_LAYERS,
        num_attention_heads=3,
        intermediate_size=48,
        max_position_embeddings=32,
        attn_implementation="sdpa",
    )
    return transformers.BertModel(config, add_pooling_layer=False).double().eval()


class Tower(torch.nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.bert = _bert(seed)

    def forward(self, ids: Tensor) -> Tensor:
        return self.bert(ids).last_hidden_state


class Renamed(torch.nn.Module):
    """A tower whose paths begin otherwise."""

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.backbone = tower.bert

    def forward(self, ids: Tensor) -> Tensor:
        return self.backbone(ids).last_hidden_state


class TwoTowers(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.text, self.vision = Tower(1), Tower(2)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.cat([self.text(ids), self.vision(ids)])


def _ids() -> Tensor:
    return torch.arange(14).view(2, 7)


def _traced(module: torch.nn.Module) -> torch.jit.ScriptModule:
    return torch.jit.trace(module.eval(), (_ids(),), check_trace=False)


def _train(module: torch.nn.Module, folder: Path, **options: object) -> Tensor:
    """Saves a random LoRA on `module`, which gets it. Returns what PEFT gives."""
    config = peft.LoraConfig(r=4, lora_alpha=6, **({"target_modules": ["query", "value"]} | options))
    tuned = peft.get_peft_model(module, config)
    torch.manual_seed(3)
    with torch.no_grad():
        for path, parameter in tuned.named_parameters():
            if "lora_" in path:
                parameter.normal_(std=0.5)
        tuned.eval().save_pretrained(str(folder))
        return tuned(_ids())


def _change_weights(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file(change(load_file(folder / _WEIGHTS)), folder / _WEIGHTS)


def _change_config(folder: Path, **fields: object) -> None:
    path = folder / _CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def _assert_equal(module: torch.jit.ScriptModule, expected: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(module(_ids()), expected, rtol=1e-10, atol=1e-10)


def test_a_path_that_begins_otherwise_is_found(tmp_path) -> None:
    base = _traced(Renamed(Tower(1)))
    expected = _train(Tower(1), tmp_path)  # bert.encoder.layer.0..., not backbone.encoder.layer.0...
    _assert_equal(torchgraft.load_adapter(base, tmp_path), expected)


def test_both_towers_of_a_whole_model(tmp_path) -> None:
    base = _traced(TwoTowers())
    expected = _train(TwoTowers(), tmp_path)
    _assert_equal(torchgraft.load_adapter(base, tmp_path), expected)


def test_one_tower_of_a_whole_model_is_excluded_by_name(tmp_path) -> None:
    base = _traced(TwoTowers())
    expected = _train(TwoTowers(), tmp_path, target_modules=r"text\..*\.(query|value)")
    _assert_equal(torchgraft.load_adapter(base, tmp_path), expected)


def test_updates_of_two_towers_on_one_of_them_are_refused(tmp_path) -> None:
    _train(TwoTowers(), tmp_path)
    with pytest.raises(torchgraft.GraftError, match=r"text\.bert\.\S+ and vision\.bert\.\S+ are both updates of"):
        torchgraft.load_adapter(_traced(Tower(1)), tmp_path)


def test_updates_of_different_layers_of_two_towers_are_refused(tmp_path) -> None:
    _train(
        TwoTowers(),
        tmp_path,
        target_modules=[
            "text.bert.encoder.layer.0.attention.self.query",
            "vision.bert.encoder.layer.1.attention.self.query",
        ],
    )
    with pytest.raises(torchgraft.GraftError, match="are of different parts"):
        torchgraft.load_adapter(_traced(Tower(1)), tmp_path)


def test_an_update_that_could_be_for_either_tower_is_refused(tmp_path) -> None:
    _train(Tower(1), tmp_path)
    with pytest.raises(torchgraft.GraftError, match=r"could be the model's text\.\S+ and its vision\."):
        torchgraft.load_adapter(_traced(TwoTowers()), tmp_path)


_LOSSES = {
    "a layer": lambda key: ".layer.1." in key,
    "the last layer": lambda key: f".layer.{_LAYERS - 1}." in key,
    "a projection": lambda key: ".layer.0.attention.self.value." in key,
    "a projection of all layers": lambda key: ".self.value." in key,
}


@pytest.mark.parametrize("targets", [["query", "value"], r".*\.(query|value)"], ids=["names", "expression"])
@pytest.mark.parametrize("loss", _LOSSES)
def test_lost_weights_are_named(loss: str, targets: list[str] | str, tmp_path) -> None:
    _train(Tower(1), tmp_path, target_modules=targets)
    _change_weights(tmp_path, lambda weights: {key: weights[key] for key in weights if not _LOSSES[loss](key)})
    with pytest.raises(torchgraft.GraftError, match=r"lack an update of bert\.encoder\.layer\.\d\.attention"):
        torchgraft.load_adapter(_traced(Tower(1)), tmp_path)


@pytest.mark.parametrize("side", ["lora_A", "lora_B"])
def test_half_an_update_is_refused(side: str, tmp_path) -> None:
    _train(Tower(1), tmp_path)
    lost = f"layer.1.attention.self.query.{side}"
    _change_weights(tmp_path, lambda weights: {key: weights[key] for key in weights if lost not in key})
    with pytest.raises(torchgraft.GraftError, match=r"expected lora_A \[r, in\] and lora_B \[out, r\] for bert"):
        torchgraft.load_adapter(_traced(Tower(1)), tmp_path)


def test_two_weights_for_one_matrix_are_refused(tmp_path) -> None:
    _train(Tower(1), tmp_path)

    def again(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        key = next(key for key in weights if "lora_A" in key)
        return weights | {key.replace("lora_A.weight", "lora_A.other.weight"): weights[key] + 1}

    _change_weights(tmp_path, again)
    with pytest.raises(torchgraft.GraftError, match="two weights are lora_A of bert"):
        torchgraft.load_adapter(_traced(Tower(1)), tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        dict(layers_to_transform=[0, 2]),
        dict(layers_to_transform=1, layers_pattern="layer"),
        dict(exclude_modules=["layer.1.attention.self.query"]),
        dict(exclude_modules=r".*layer\.[12].*"),
        dict(target_modules=["bert.encoder.layer.0.attention.self.key", "query"], layers_to_transform=[2]),
    ],
    ids=str,
)
def test_what_the_configuration_leaves_out_is_not_missed(options: dict, tmp_path) -> None:
    expected = _train(Tower(1), tmp_path, **options)
    _assert_equal(torchgraft.load_adapter(_traced(Tower(1)), tmp_path), expected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(bias="all"), 'bias="all" has trained the base\'s biases'),
        (dict(bias="lora_only"), 'bias="lora_only" has trained'),
        (dict(layer_replication=[[0, 2], [1, 3]]), "layer_replication .* is not supported"),
        (dict(trainable_token_indices=[3]), "trainable_token_indices .* is not supported"),
        (dict(alora_invocation_tokens=[1, 2]), "alora_invocation_tokens .activated LoRA. is not supported"),
        (dict(lora_bias=True), "expected lora_A .* and a bias of lora_B"),
        (dict(kasa_config={"x": 1}), "kasa_config .* is not supported"),
        (dict(init_lora_weights="lora_ga"), 'init_lora_weights="lora_ga" has changed the base'),
        (dict(init_lora_weights="corda"), "init_lora_weights"),
        (dict(init_lora_weights="of tomorrow"), "or is not known"),
        (dict(field_of_tomorrow=0), "the field field_of_tomorrow is not known"),
        (dict(peft_type="OFT"), "PEFT's OFT is not supported"),
        (dict(lora_alpha="16"), 'expected lora_alpha to be a number, got "16"'),
        (dict(r=True), "expected r to be a whole number from 1 to 2147483647, got true"),
        (dict(r=2), "of rank 2, as r and rank_pattern say, got 4"),
        (dict(rank_pattern={"query": 3}), "of rank 3, as r and rank_pattern say"),
        (
            dict(layers_to_transform=[True]),
            "expected layers_to_transform to be a layer or a list of layers, got .true.",
        ),
        (dict(r=10**400), "expected r to be a whole number from 1 to 2147483647, got 1000"),
        (dict(lora_alpha=10**400), "expected lora_alpha to be a number, got 1000"),
        (dict(alpha_pattern={"(": 3}), "'\\(' is no regular expression"),
        (dict(alpha_pattern={"(?i)q": 3}), "is no regular expression: global flags not at the start"),
        (dict(layers_pattern="(?P<number>h)"), "is no regular expression: redefinition of group name 'number'"),
        (dict(layers_pattern=["(" * 5000 + ")" * 5000]), "is no regular expression: maximum recursion depth"),
        (dict(rank_pattern={"q{99999999999}": 4}), "is no regular expression: the repetition number is too large"),
        (dict(exclude_modules="q[[a]"), "is no regular expression: Possible nested set"),
        (dict(target_modules="q{4294967294}"), "repeats too much"),
        (dict(target_modules="(?:q{65535}){65535}"), "repeats too much"),
        (dict(exclude_modules="q{2147483648,}?"), "repeats too much"),
        (dict(layers_pattern=["(?:(?:(?:(?:a{99}){99}){99}){99})"]), "repeats too much"),
        (dict(alpha_pattern={"(?=(?:|(q)(?(1)q{9999999}|))++)": 3}), "repeats too much"),
        (dict(rank_pattern={f"q{{5000}}{end}": 4 for end in "abc"}), r"'q\{5000\}c' repeats too much"),
        (dict(target_modules="(?:a|" * 300 + "b" + ")" * 300), "is no regular expression: maximum recursion depth"),
        (dict(exclude_modules="(q){e<=1}"), "has a brace that counts nothing"),
        (dict(target_modules=r"(.|\w|[a-z.])*[A-Z]"), "was matched with .* in vain: all .* have 1 seconds"),
        (dict(rank_pattern={r"(.|\w|[a-z.])*[A-Z]": 4}), "was matched with .* in vain: all .* have 1 seconds"),
        (dict(target_modules=None), "expected target_modules"),
        (dict(target_modules=7), "expected target_modules to be a text or a list of texts, got 7"),
    ],
    ids=str,
)
def test_fields_with_an_effect_that_is_not_had_are_refused(fields: dict, message: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(_patterns, "SECONDS", 1.0)
    _train(Tower(1), tmp_path)
    _change_config(tmp_path, **fields)
    with pytest.raises(torchgraft.GraftError, match=message):
        torchgraft.load_adapter(_traced(Tower(1)), tmp_path)


def test_all_expressions_of_a_directory_share_the_time(monkeypatch) -> None:
    """By a clock that goes on by a fourth of the time whenever somebody looks at it."""
    seconds = itertools.count(step=_patterns.SECONDS / 4)
    monkeypatch.setattr(_patterns.time, "monotonic", lambda: next(seconds))
    patterns = _patterns.Patterns("directory")
    patterns.add("q.*")
    for _ in range(3):
        assert patterns.match("q.*", "query")
    with pytest.raises(torchgraft.GraftError, match=r"directory: 'q\.\*' was matched with query in vain"):
        patterns.match("q.*", "query")


def test_counts_of_layers_and_long_lists_of_names_are_read() -> None:
    patterns = _patterns.Patterns("directory")
    names = "|".join(f"model.layers.{layer}.mlp.{name}_proj" for layer in range(200) for name in ("up", "gate", "down"))
    for pattern in (rf".*\.\d{{1,3}}\.(?:{names})", r"(?:[a-z_]{1,40}\.){1,20}q", "(?:q{9}){7}"):
        patterns.add(pattern)
    assert patterns.match("(?:q{9}){7}", "q" * 63, full=True)


def test_few_of_many_paths_are_shown() -> None:
    outside = [f"head_{number}" for number in range(1000)]
    with pytest.raises(torchgraft.GraftError, match=r"it has head_0, .*, head_9 and 990 more\)") as error:
        match_paths(Path("directory"), ["lm_head"], ["layer.0.query"], outside)
    assert "head_10" not in str(error.value)


@pytest.mark.parametrize(
    "fields",
    [
        dict(field_of_tomorrow=None, megatron_config=None, modules_to_save=None),
        dict(init_lora_weights="gaussian", lora_dropout=0.4, task_type="SEQ_CLS"),
        dict(init_lora_weights="eva", eva_config={"rho": 2.0}),
        dict(runtime_config={"ephemeral_gpu_offload": False}, revision="main"),
    ],
    ids=str,
)
def test_fields_without_effect_are_read_over(fields: dict, tmp_path) -> None:
    expected = _train(Tower(1), tmp_path)
    _change_config(tmp_path, **fields)
    _assert_equal(torchgraft.load_adapter(_traced(Tower(1)), tmp_path), expected)


def test_weights_of_the_base_in_the_file_must_be_the_models(tmp_path) -> None:
    """PEFT saves those of output embeddings beside their LoRA."""
    expected = _train(Tower(1), tmp_path)
    weight = Tower(1).bert.encoder.layer[0].attention.self.query.weight.detach()
    key = "base_model.model.bert.encoder.layer.0.attention.self.query.base_layer.weight"
    _change_weights(tmp_path, lambda weights: weights | {key: weight})
    _assert_equal(torchgraft.load_adapter(_traced(Tower(1)), tmp_path), expected)
    _change_weights(tmp_path, lambda weights: weights | {key: weight + 1})
    with pytest.raises(torchgraft.GraftError, match="query.weight of the base, and the model's is another"):
        torchgraft.load_adapter(_traced(Tower(1)), tmp_path)


class Nested(torch.nn.Module):
    """Its own layer and that of its part have projections of the same names; the part's paths end as its own do."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (torch.nn.Linear(16, 16).double() for _ in range(3))
        self.inner: torch.nn.Module = Inner()
        self.table = torch.nn.Embedding(20, 16).double()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.inner(self.table(ids))
        return attend(x, self.query(x), self.key(x), self.value(x))


class Inner(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (torch.nn.Linear(16, 16).double() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return attend(x, self.query(x), self.key(x), self.value(x))


def attend(x: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    heads = [each.unflatten(-1, [2, 8]).transpose(1, 2) for each in (query, key, value)]
    return x + torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("targets", [["query", "value"], "query|value", ["inner.query", "value"]], ids=str)
def test_a_path_that_is_the_end_of_another_is_itself(targets: list[str] | str, tmp_path) -> None:
    torch.manual_seed(0)
    module = Nested()
    base = _traced(copy.deepcopy(module))
    expected = _train(module, tmp_path, target_modules=targets)
    _assert_equal(torchgraft.load_adapter(base, tmp_path), expected)


def test_a_path_that_ends_two_and_is_none_is_refused(tmp_path) -> None:
    """Trained on a part of which the model has two."""
    _train(Nested(), tmp_path, target_modules=r"inner\.query")
    _change_weights(tmp_path, lambda weights: {key.replace("inner.", ""): weights[key] for key in weights})
    _change_config(tmp_path, target_modules=["query"])
    with pytest.raises(torchgraft.GraftError, match=r"could be the model's one\.query and its two\.query"):
        torchgraft.load_adapter(_traced(Twins()), tmp_path)


class Twins(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Inner(), Inner()
        self.table = torch.nn.Embedding(20, 16).double()

    def forward(self, ids: Tensor) -> Tensor:
        return self.two(self.one(self.table(ids)))
