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
