"""examples/ray_serve/encoder.py without Ray: bad adapters in the folder keep no replica from starting."""

import concurrent.futures
import fcntl
import json
import os
import sys
import time

import pytest
import torch

import torchgraft
from hosts_support import ROOT
from server_support import TOLERANCE


@pytest.fixture
def encoder_module(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "ray_serve"))
    yield __import__("encoder")
    del sys.modules["encoder"]


def test_bad_adapters_are_named_and_left_out(encoder_module, models, own_adapters, expected, capfd):
    bad = {
        "deep": "[" * 300_000 + "]" * 300_000,
        "half": "{",
        "huge": json.dumps({"config": {"architecture": "lora", "r": 2**20}, "name": "a"}),
        "nothing": json.dumps({"config": {"architecture": "lora", "leave_out": [0, 1]}, "name": "a"}),
    }
    for name, text in bad.items():
        (own_adapters / name).mkdir()
        (own_adapters / name / "adapter_config.json").write_text(text)
    (own_adapters / "fifo").mkdir()
    os.mkfifo(own_adapters / "fifo" / "adapter_config.json")
    encoder = encoder_module.Encoder(models / "base.pt", own_adapters, capacity=2, threads=1)
    lines = capfd.readouterr().err.splitlines()
    assert sorted(line.split()[1] for line in lines if line.startswith("adapter ")) == sorted([*bad, "fifo"])
    answers = encoder.run([encoder_module.Request(encoder.load("task-1", "0"), [[1, 2]], "first")])
    assert answers[0][0] == 200
    got = torch.tensor(answers[0][1]["outputs"][0])
    torch.testing.assert_close(got, expected("task-1", [1, 2]), **TOLERANCE)
    for name in [*bad, "fifo"]:
        with pytest.raises(torchgraft.GraftError):
            encoder.load(name, "0")


def composed(models, folder, text):
    """What a module with this composition answers to [1, 2]."""
    module = torch.jit.load(models / "base.pt")
    for name in torchgraft.composition.adapters_of(json.loads(torchgraft.composition.composition_to_json(text))):
        module = torchgraft.load_adapter(module, folder / name, name, verify=False)
    module = torchgraft.compose(module, "whole", text, verify=False)
    module.activate("whole")
    with torch.inference_mode():
        return module(torch.tensor([[1, 2]]), torch.ones(1, 2, dtype=torch.int64))[0, 0], module


def test_compositions_of_the_folder_and_of_requests_are_served(encoder_module, models, own_adapters, capfd):
    text = "Stack(task-4, task-9)"
    expected, module = composed(models, own_adapters, text)
    torchgraft.save_adapter_setup(module, "whole", own_adapters / "stack")
    (own_adapters / "damaged").mkdir()
    (own_adapters / "damaged" / "adapter_setup.json").write_text("{}")
    encoder = encoder_module.Encoder(models / "base.pt", own_adapters, capacity=2, threads=1)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("adapter damaged cannot be served: ") and "adapter_setup.json" in line
    average, _ = composed(models, own_adapters, "Average(task-4, task-9)")
    request = encoder_module.Request
    leases = [encoder.load("task-1", "0"), *map(encoder.composed, (text, "stack", "Average(task-4, task-9)"))]
    answers = encoder.run([request(lease, [[1, 2]], "first") for lease in leases])
    for (status, body), right in zip(answers[1:], (expected, expected, average), strict=True):
        assert status == 200
        torch.testing.assert_close(torch.tensor(body["outputs"][0]), right, **TOLERANCE)
    with pytest.raises(LookupError, match="no adapter is called 'none'"):
        encoder.composed("Stack(task-4, none)")
    with pytest.raises(LookupError, match="no adapter is called '../secret'"):
        encoder.composed("Stack(task-4, '../secret')")
    for name, fault in {"Fuse(task-4, task-9)": "AdapterFusion layers", "damaged": "adapter_setup"}.items():
        with pytest.raises(torchgraft.GraftError, match=fault):
            encoder.composed(name)
    assert encoder.has_setup("stack") and not encoder.has_setup("task-1")
    assert encoder_module.is_setup(own_adapters, "stack") and not encoder_module.is_setup(None, "stack")
    assert not any(encoder_module.is_setup(own_adapters, name) for name in ("task-1", "none", "../adapters/stack", ""))


def grafted_file(models, tmp_path):
    base = torch.jit.load(models / "base.pt")
    path = tmp_path / "grafted.pt"
    torchgraft.graft(base, adapters={"task-1": models / "adapters" / "task-0"}, gate_pooling="unpadded").save(path)
    return path


def test_an_adapter_of_the_folder_with_a_name_of_the_file_is_named(encoder_module, models, expected, tmp_path, capfd):
    """The file's is served."""
    path = grafted_file(models, tmp_path)
    encoder = encoder_module.Encoder(path, models / "adapters", capacity=1, threads=1)
    (line,) = capfd.readouterr().err.splitlines()
    assert line == (
        "adapter task-1 cannot be served: the model's file has an adapter of that name, which is served; rename one"
    )
    ((status, body),) = encoder.run([encoder_module.Request(encoder.resident("task-1"), [[1, 2]], "first")])
    assert status == 200
    torch.testing.assert_close(torch.tensor(body["outputs"][0]), expected("task-0", [1, 2]), **TOLERANCE)


def test_a_grafted_model_needs_no_folder(encoder_module, models, expected, tmp_path):
    encoder = encoder_module.Encoder(grafted_file(models, tmp_path), None, capacity=1, threads=1)
    assert encoder.own == {"task-1"}
    ((status, body),) = encoder.run([encoder_module.Request(encoder.resident("task-1"), [[1, 2]], "first")])
    assert status == 200
    torch.testing.assert_close(torch.tensor(body["outputs"][0]), expected("task-0", [1, 2]), **TOLERANCE)
    with pytest.raises(torchgraft.GraftError, match="base.pt has no adapters; give the folder of some with --adapters"):
        encoder_module.Encoder(models / "base.pt", None, capacity=1, threads=1)


def test_an_adapter_is_there_while_another_process_saves_it(encoder_module, own_adapters):
    """Its configuration is away for the instant of renaming: whoever looks then waits."""
    config = own_adapters / "task-1" / "adapter_config.json"
    there = encoder_module.model_id_of(own_adapters, "task-1")
    assert there.startswith("task-1@") and not there.endswith("@0")
    lock = os.open(config.parent, os.O_RDONLY)  # what save_adapter holds
    fcntl.flock(lock, fcntl.LOCK_EX)
    away = config.rename(config.with_name("away"))
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        found = pool.submit(encoder_module.model_id_of, own_adapters, "task-1")
        time.sleep(0.05)
        away.rename(config)
        os.close(lock)
        assert found.result() == there
    assert encoder_module.model_id_of(own_adapters, "none") == encoder_module.model_id_of(own_adapters, "") == ""
