"""Directories of `adapters==1.3.0` as it is: the same results, or refused with the reason, where it departs from its
own definitions."""

import json
import warnings
from pathlib import Path

import adapters
import pytest
import torch
from transformers import GPTJConfig, GPTJModel

import torchgraft
from all_cases import base
from hugging_face_cases import CASES
from oracle import difference

FLOAT = torch.float32
REFUSED = [
    ("albert_eager", "seq_bn_both", "on ALBERT the adapters library gives a bottleneck after attention what enters"),
    ("albert_sdpa", "mh_only", "on ALBERT"),
    ("t5_eager", "mam", "on T5 the adapters library moves the relative positions"),
    ("t5_eager", "unipelt", "on T5"),
]
TAKEN = [
    ("albert_eager", "seq_bn"),
    ("albert_eager", "lora_all"),
    ("t5_eager", "seq_bn_both"),
    ("t5_eager", "lora_all"),
]
WARNED = [
    ("distilbert_eager", "mam", "adds 1 to the scores of prefixes"),
    ("bart_eager", "mam", "takes prefixes for the first tokens"),
    ("deberta_eager", "lora", "adds a random bias"),
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


@pytest.mark.parametrize(("name", "method", "effect"), WARNED)
def test_what_the_directory_does_not_say_is_a_warning(name: str, method: str, effect: str) -> None:
    with pytest.warns(UserWarning, match=effect):
        torchgraft.load_adapter_directory(_directory(name, method))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torchgraft.load_adapter_directory(_directory(name, "seq_bn"))


@pytest.mark.parametrize("config", ["seq_bn", "par_bn", "mam", "lora"])
def test_feed_forward_bottlenecks_of_gptj_are_refused(config: str, tmp_path: Path) -> None:
    model = GPTJModel(GPTJConfig(n_embd=32, n_head=4, n_layer=2, rotary_dim=4, vocab_size=50, n_positions=16))
    adapters.init(model)
    model.add_adapter("task", config=config)
    model.save_adapter(tmp_path, "task")
    if config == "lora":
        torchgraft.load_adapter_directory(tmp_path)
        return
    with pytest.raises(torchgraft.GraftError, match="on GPT-J the adapters library adds the attention's output"):
        torchgraft.load_adapter_directory(tmp_path)
