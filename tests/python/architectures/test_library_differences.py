"""Directories of `adapters==1.3.0` as it is: the same results, or refused with the reason, where it departs from its
own definitions."""

import json
import warnings
from pathlib import Path

import pytest
import torch
import transformers

import adapters
import torchgraft
from all_cases import base
from hugging_face_cases import CASES
from oracle import difference

FLOAT = torch.float32
REFUSED = [
    ("t5_eager", "mam", "on T5 the adapters library moves the relative positions"),
    ("t5_eager", "unipelt", "on T5"),
]
TAKEN = [
    # ALBERT: after attention, what enters the block is the branch, the attention's output the residual.
    *[("albert_eager", method) for method in ("seq_bn", "lora_all", "seq_bn_both", "par_bn_both", "bn_norms")],
    *[("albert_groups_sdpa", method) for method in ("mh_only", "bn_residual_normed", "bn_last_parallel")],
    *[("albert_sdpa", method) for method in ("bn_residual_post_add", "union_everything")],
    # GPT-J: behind the feed-forward block, the attention's output is a part of the residual.
    *[("gptj_eager", method) for method in ("seq_bn", "par_bn", "mam", "unipelt", "seq_bn_both", "bn_norms", "lora")],
    ("gptj_eager", "bn_residual_normed"),
    ("t5_eager", "seq_bn_both"),
    ("t5_eager", "lora_all"),
]
WARNED = [
    ("distilbert_eager", "mam", "adds 1 to the scores of prefixes"),
    ("bart_eager", "mam", "takes prefixes for the first tokens"),
    ("deberta_eager", "lora", "adds a random bias"),
    ("deberta_eager", "seq_bn", "adds a random bias"),
]


def _directory(name: str, method: str) -> str:
    """What the unrepaired library wrote."""
    return CASES[name].reference.unrepaired().directory(method, FLOAT)


def _config(directory: str) -> dict:
    return json.loads((Path(directory) / "adapter_config.json").read_text())


@pytest.mark.parametrize(("name", "method", "reason"), REFUSED)
def test_what_the_library_computes_otherwise_is_refused(name: str, method: str, reason: str) -> None:
    directory = _directory(name, method)
    with pytest.raises(torchgraft.GraftError, match=f"^{directory}: {reason}.*to accept the difference"):
        torchgraft.load_adapter_directory(directory)


@pytest.mark.parametrize(("name", "method", "reason"), REFUSED)
def test_without_model_type_the_difference_is_accepted(name: str, method: str, reason: str, tmp_path: Path) -> None:
    directory = Path(_directory(name, method))
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    content = _config(directory)
    del content["model_type"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    torchgraft.graft(base(name, "traced", FLOAT), adapters={"task": tmp_path})


@pytest.mark.parametrize(("name", "method"), TAKEN)
def test_other_methods_equal_the_library_unrepaired(name: str, method: str) -> None:
    directory = _directory(name, method)
    assert _config(directory)["model_type"] in name
    grafted = torchgraft.graft(base(name, "traced", FLOAT), adapters={"task": directory})
    arguments = CASES[name].arguments(FLOAT, 1)
    expected, _ = CASES[name].reference.unrepaired().expected(method, FLOAT, arguments)
    with torch.no_grad():
        result = CASES[name].hidden(grafted(*arguments))
    assert difference(result, expected) <= 1e-5


@pytest.mark.parametrize(("name", "method"), [("albert_eager", "double_seq_bn"), ("gptj_eager", "par_bn")])
def test_the_wiring_survives_a_directory_of_ours(name: str, method: str, tmp_path: Path) -> None:
    """Also beside an adapter of the same configuration that is wired as defined."""
    grafted = torchgraft.graft(base(name, "traced", FLOAT), _config(_directory(name, method))["config"], "fresh")
    grafted = torchgraft.load_adapter(grafted, _directory(name, method), "task")
    grafted.activate("task")
    torchgraft.save_adapter(grafted, "task", tmp_path)
    assert _config(str(tmp_path))["model_type"] in name
    again = torchgraft.load_adapter(base(name, "traced", FLOAT), tmp_path)
    arguments = CASES[name].arguments(FLOAT, 1)
    expected, _ = CASES[name].reference.expected(method, FLOAT, arguments)
    with torch.no_grad():
        assert difference(CASES[name].hidden(grafted(*arguments)), expected) <= 1e-5
        assert difference(CASES[name].hidden(again(*arguments)), expected) <= 1e-5


@pytest.mark.parametrize(("name", "method"), [("albert_eager", "double_seq_bn"), ("gptj_eager", "par_bn")])
def test_a_fresh_adapter_is_wired_as_defined(name: str, method: str) -> None:
    config = Path(_directory(name, method)) / "adapter_config.json"
    fresh = torchgraft.graft(base(name, "traced", FLOAT), config, "task")
    assert "model_type" not in json.loads(fresh.adapter_config("task"))


@pytest.mark.parametrize("safetensors", [True, False])
@pytest.mark.parametrize(("name", "method"), [("albert_eager", "double_seq_bn"), ("gptj_eager", "par_bn")])
def test_saving_warns_where_the_library_would_wire_otherwise(
    name: str, method: str, safetensors: bool, tmp_path: Path
) -> None:
    """Not of the library's own adapters, nor where the model has no such wiring."""
    fresh = torchgraft.graft(base(name, "traced", FLOAT), method, "task")
    with pytest.warns(UserWarning, match="save_adapter: 'task' has bottlenecks which the adapters library wires other"):
        torchgraft.save_adapter(fresh, "task", tmp_path / "fresh", safetensors)
    trained = torchgraft.load_adapter(base(name, "traced", FLOAT), _directory(name, method), "task")
    lora = torchgraft.graft(base(name, "traced", FLOAT), "lora", "task")
    elsewhere = torchgraft.graft(base("distilbert_eager", "traced", FLOAT), method, "task")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for index, module in enumerate((trained, lora, elsewhere)):
            torchgraft.save_adapter(module, "task", tmp_path / str(index), safetensors)


_SIZES = dict(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=64, vocab_size=50)
_IDS = torch.arange(12).reshape(2, 6) + 4
_SHOWN = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
_RELATIVE = [
    (transformers.BertModel, transformers.BertConfig, "relative_key"),
    (transformers.BertModel, transformers.BertConfig, "relative_key_query"),
    (transformers.ElectraModel, transformers.ElectraConfig, "relative_key"),
]


class _Relative:
    """A model whose scores have a term of queries and distances; traced, and under the library."""

    def __init__(self, model: type, config: type, positions: str) -> None:
        torch.manual_seed(0)
        settings = config(**_SIZES, position_embedding_type=positions, attn_implementation="eager", return_dict=False)
        self.model = model(settings).eval()
        with torch.no_grad():
            self.base = torch.jit.trace(self.model, (_IDS, _SHOWN))

    def library(self, method: str, directory: Path) -> torch.Tensor:
        """Saves an adapter of drawn weights; returns what the library computes with it."""
        adapters.init(self.model)
        self.model.add_adapter("task", config=method)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if "task" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        self.model.save_adapter(str(directory), "task")
        self.model.set_active_adapters("task")
        with torch.no_grad():
            return self.model(_IDS, _SHOWN)[0]


@pytest.mark.parametrize("form", ["traced", "frozen"])
@pytest.mark.parametrize(("model", "config", "positions"), _RELATIVE)
def test_prefixes_that_move_relative_positions_are_refused(
    model: type, config: type, positions: str, form: str, tmp_path: Path
) -> None:
    relative = _Relative(model, config, positions)
    base = torch.jit.freeze(relative.base) if form == "frozen" else relative.base
    for method in ("prefix_tuning", "mam", "unipelt"):
        relative.library(method, tmp_path / method)
        relative.model.delete_adapter("task")
        with pytest.raises(torchgraft.GraftError, match="layer 0 adds a term of relative positions to its scores"):
            torchgraft.load_adapter(base, tmp_path / method)
    content = _config(str(tmp_path / "mam"))
    del content["model_type"]
    (tmp_path / "mam" / "adapter_config.json").write_text(json.dumps(content))
    torchgraft.load_adapter(base, tmp_path / "mam")
    expected = relative.library("double_seq_bn", tmp_path / "double_seq_bn")
    with torch.no_grad():
        result = torchgraft.load_adapter(base, tmp_path / "double_seq_bn")(_IDS, _SHOWN)[0]
    assert difference(result, expected) <= 1e-5


def test_saving_a_fresh_prefix_warns_where_the_library_moves_positions(tmp_path: Path) -> None:
    fresh = torchgraft.graft(_Relative(*_RELATIVE[0]).base, "prefix_tuning", "task")
    with pytest.warns(UserWarning, match="save_adapter: 'task' has prefixes, and the adapters library moves"):
        torchgraft.save_adapter(fresh, "task", tmp_path / "relative")
    fresh = torchgraft.graft(base("t5_eager", "traced", FLOAT), "prefix_tuning", "task")
    with pytest.warns(UserWarning, match="save_adapter: 'task' has prefixes, and the adapters library moves"):
        torchgraft.save_adapter(fresh, "task", tmp_path / "t5")


@pytest.mark.parametrize(("name", "method", "effect"), WARNED)
def test_what_the_directory_does_not_say_is_a_warning(name: str, method: str, effect: str) -> None:
    with pytest.warns(UserWarning, match=effect):
        torchgraft.load_adapter_directory(_directory(name, method))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torchgraft.load_adapter_directory(_directory("distilbert_eager", "seq_bn"))
