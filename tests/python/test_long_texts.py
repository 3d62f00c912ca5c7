"""Errors are for people: whatever text a stranger's file holds, a message shows its beginning only."""

import copy
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch

import torchgraft
from grafted import base
from torchgraft.peft import load_peft_directory
from torchgraft.peft_config import read_peft_config
from torchgraft.peft_weights import read_peft_weights

LONG = "long." + 20_000 * "x"
LONGEST_MESSAGE = 2_500  # of at most two texts of 1,000 characters


@pytest.fixture(scope="module")
def model() -> torch.jit.ScriptModule:
    return base("bert_sdpa", torch.float32)


@pytest.fixture(scope="module")
def saved(model: torch.jit.ScriptModule, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    grafted = torchgraft.graft(model, "unipelt", "task")
    head = torchgraft.HeadConfig(num_labels=2, labels=["bad", "good"])
    torchgraft.save_adapter(torchgraft.add_head(grafted, "task", head), "task", folder)
    return folder


def lengthened(value: Any, text: str) -> Iterator[Any]:
    """Copies of a JSON value, each with `text` in the place of one key or one text, or behind one."""
    if isinstance(value, dict):
        for key, inner in value.items():
            for new in (text, key + text):
                yield {new if other == key else other: kept for other, kept in value.items()}
            for other in lengthened(inner, text):
                yield {**value, key: other}
        yield {**value, text: 1}
    elif isinstance(value, list):
        for place, inner in enumerate(value[:2]):
            for other in lengthened(inner, text):
                yield [*value[:place], other, *value[place + 1 :]]
    else:
        yield text
        if isinstance(value, str):
            yield value + text


def check_short(error: BaseException, what: str) -> None:
    assert len(str(error)) < LONGEST_MESSAGE, f"{what}: {len(str(error))} characters: {str(error)[:300]}"


@pytest.mark.parametrize("file", ["adapter_config.json", "head_config.json"])
def test_of_a_configuration(file: str, model: torch.jit.ScriptModule, saved: Path, tmp_path: Path) -> None:
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    seen = 0
    for changed in lengthened(json.loads((saved / file).read_text()), LONG):
        (tmp_path / file).write_text(json.dumps(changed))
        try:
            torchgraft.load_adapter(model, tmp_path)
        except torchgraft.GraftError as error:
            check_short(error, file)
            seen += 1
    assert seen > 20


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("file", ["adapter.safetensors", "model_head.safetensors"])
def test_of_weights(file: str, pickled: bool, model: torch.jit.ScriptModule, saved: Path, tmp_path: Path) -> None:
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    name = file
    if pickled:
        (tmp_path / file).unlink()
        name = {"adapter.safetensors": "pytorch_adapter.bin"}.get(file, "pytorch_model_head.bin")
    tensors = safetensors.torch.load_file(saved / file)
    some = [key for index, key in enumerate(tensors) if index % 5 == 0 or "layer.0" in key]
    for changed in [key + LONG for key in some] + [LONG + key for key in some] + [LONG]:
        renamed = {changed if key in changed else key: tensor for key, tensor in tensors.items()}
        if changed == LONG:
            renamed[LONG] = torch.zeros(2)
        if pickled:
            torch.save(renamed, tmp_path / name)
        else:
            safetensors.torch.save_file(renamed, tmp_path / name)
        with pytest.raises(torchgraft.GraftError) as raised:
            torchgraft.load_adapter(model, tmp_path)
        check_short(raised.value, changed[:60])


@pytest.fixture
def of_peft(model: torch.jit.ScriptModule, tmp_path: Path) -> Path:
    """A LoRA of PEFT on all queries and values of the model."""
    peft.LoraConfig(r=2, target_modules=["query", "value"]).save_pretrained(str(tmp_path))
    weights = {}
    for layer in torchgraft.inspect(model)["layers"]:
        for place in (layer["query"], layer["value"]):
            path = f"base_model.model.{place['path']}"
            weights[f"{path}.lora_A.weight"] = torch.zeros(2, place["in_features"])
            weights[f"{path}.lora_B.weight"] = torch.zeros(place["out_features"], 2)
    safetensors.torch.save_file(weights, tmp_path / "adapter_model.safetensors")
    torchgraft.load_adapter(model, tmp_path)
    return tmp_path


def test_of_a_configuration_of_peft(model: torch.jit.ScriptModule, of_peft: Path) -> None:
    path = of_peft / "adapter_config.json"
    fields = json.loads(path.read_text())
    wrong = [
        {**fields, "target_modules": f"(?P<{LONG[5:]}>query|value)(?P={LONG[5:]}y)"},
        {**fields, "target_modules": LONG + "("},
        {**fields, "rank_pattern": {LONG: 3, "query": LONG}},
        {**fields, "exclude_modules": [LONG, {LONG: LONG}]},
    ]
    seen, seen_in = 0, (torchgraft.inspect(model), dict(model.named_parameters()))
    for changed in [*lengthened(fields, LONG), *wrong]:
        path.write_text(json.dumps(changed))
        try:
            with warnings.catch_warnings(record=True) as caught:
                load_peft_directory(of_peft, *seen_in)
        except torchgraft.GraftError as error:
            check_short(error, str(changed)[:60])
            seen += 1
        assert all(len(str(warning.message)) < LONGEST_MESSAGE for warning in caught)
    assert seen > 20


@pytest.mark.parametrize("saved_whole", [[], [LONG], ["classifier"]])
def test_of_weights_of_peft(saved_whole: list[str], model: torch.jit.ScriptModule, of_peft: Path) -> None:
    config, file = of_peft / "adapter_config.json", of_peft / "adapter_model.safetensors"
    config.write_text(json.dumps({**json.loads(config.read_text()), "modules_to_save": saved_whole}))
    weights = safetensors.torch.load_file(file)
    seen_in = torchgraft.inspect(model), dict(model.named_parameters())
    key = next(iter(weights))
    middle = key.replace(".lora_", f".{LONG}.lora_")
    shorter = [name.replace(LONG, LONG[:900]) for name in (key + LONG, LONG + key, middle)]
    for changed in (key + LONG, LONG + key, middle, *shorter):
        safetensors.torch.save_file({changed if name == key else name: each for name, each in weights.items()}, file)
        with pytest.raises(torchgraft.GraftError) as raised:
            load_peft_directory(of_peft, *seen_in)
        check_short(raised.value, changed[:60])
    heads = {f"base_model.model.classifier.{number}{LONG[:900]}.weight": torch.zeros(2, 2) for number in range(50)}
    safetensors.torch.save_file(weights | heads, file)
    with warnings.catch_warnings(record=True) as caught:
        try:
            load_peft_directory(of_peft, *seen_in)
        except torchgraft.GraftError as error:
            check_short(error, "fifty heads")
    assert all(len(str(warning.message)) < LONGEST_MESSAGE for warning in caught)


def test_of_pickled_weights_of_peft(tmp_path: Path) -> None:
    peft.LoraConfig(r=2, target_modules=["query"]).save_pretrained(str(tmp_path))
    torch.save({f"base_model.model.{LONG}.query.nothing": torch.zeros(2, 2)}, tmp_path / "adapter_model.bin")
    with pytest.raises(torchgraft.GraftError, match="names of at most 1000 bytes") as raised:
        read_peft_weights(read_peft_config(tmp_path))
    check_short(raised.value, "a pickled name")


def test_of_sites(model: torch.jit.ScriptModule) -> None:
    sites = torchgraft.inspect(model)
    seen = 0
    for changed in lengthened(sites["layers"][0], LONG):
        edited = copy.copy(sites)
        edited["layers"] = [changed, *sites["layers"][1:]]
        try:
            torchgraft.inspect(model, sites=edited)
        except torchgraft.GraftError as error:
            check_short(error, "sites")
            seen += 1
    assert seen > 40


def test_of_an_adapter_s_name(model: torch.jit.ScriptModule, saved: Path) -> None:
    """Every key of its weights has it, and what is saved has to be read again."""
    assert torchgraft.load_adapter(model, saved, 255 * "x").adapter_names() == [255 * "x"]
    for name in (256 * "x", LONG[5:], LONG):
        with pytest.raises(torchgraft.GraftError, match="cannot be an adapter's name: .*at most 255 bytes") as raised:
            torchgraft.load_adapter(model, saved, name)
        check_short(raised.value, "a name")
