"""examples/ray_serve: two replicas on this machine answer as each adapter does alone."""

import concurrent.futures
import json
import os
import random
import shutil
import sys

import psutil
import pytest
import torch

from hosts_support import ROOT
from server_support import MOST_TOKENS, VOCABULARY, Expected, Server, save_models

pytestmark = pytest.mark.slow(seconds=60)  # Ray is a dozen processes

ADAPTERS, CAPACITY = 6, 3  # of each replica: less than there are
TOLERANCE = dict(rtol=0, atol=1e-5)
PROGRAM = [sys.executable, "-W", "ignore", ROOT / "examples" / "ray_serve" / "main.py"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_models(folder, ADAPTERS)
    return folder


@pytest.fixture(scope="module")
def expected(models):
    return Expected(torch.jit.load(models / "base.pt"), models / "adapters")


@pytest.fixture(scope="module")
def server(models):
    # Half a minute where the cores are free: Ray is a dozen processes.
    with Server(PROGRAM, models / "base.pt", models / "adapters", "--capacity", CAPACITY, "--replicas", 2) as running:
        yield running
        assert running.stop() == 0


def replicas(server: Server) -> list[psutil.Process]:
    children = psutil.Process(server.pid).children(recursive=True)
    return [child for child in children if " ".join(child.cmdline()).startswith("ray::ServeReplica:default:EncoderRep")]


def seconds_of(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def test_two_replicas_answer_as_each_adapter_alone(server, expected):
    """Requests for more adapters than a replica holds, eight at a time."""
    before = {process.pid: seconds_of(process) for process in replicas(server)}
    assert len(before) == 2

    def ask(seed: int) -> tuple:
        source = random.Random(seed)
        name = source.choice([None, *(f"task-{index}" for index in range(ADAPTERS))])
        row = [source.randrange(1, VOCABULARY) for _ in range(source.randrange(1, MOST_TOKENS + 1))]
        pooling = source.choice(["first", "mean"])
        return name, row, pooling, server.outputs(name, [row], pooling=pooling)[0]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(200)))
    for name, row, pooling, got in answers:
        torch.testing.assert_close(got, expected(name, row, pooling), **TOLERANCE)
    after = {process.pid: seconds_of(process) for process in replicas(server)}
    assert all(after[pid] > before[pid] for pid in before), "a replica did nothing"


def test_rows_of_one_request(server, expected):
    rows = [[7], list(range(1, MOST_TOKENS + 1)), [3, 4, 5]]
    for got, row in zip(server.outputs("task-0", rows), rows, strict=True):
        torch.testing.assert_close(got, expected("task-0", row), **TOLERANCE)


def test_changed_files_are_served(server, models, expected):
    target = models / "adapters" / "late"
    assert server.predict("late", [[1, 2]])[0] == 404
    for source in ("task-0", "task-1"):
        shutil.copytree(models / "adapters" / source, target, dirs_exist_ok=True)
        os.utime(target / "adapter.safetensors")  # copytree keeps times
        for _ in range(4):  # whichever replica
            torch.testing.assert_close(server.outputs("late", [[1, 2]])[0], expected(source, [1, 2]), **TOLERANCE)
    (target / "adapter.safetensors").write_bytes(b"garbage")
    status, answer = server.predict("late", [[1, 2]])
    assert status == 422 and "'late' cannot be loaded" in answer["error"]["message"]
    assert server.predict("task-0", [[1, 2]])[0] == 200


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ("{", 400, "not JSON"),
        ("[" * 100_000, 400, "nested too deeply"),
        ([1], 400, "expected {"),
        ({"adapter": None}, 400, "expected {"),
        ({"input_ids": [[1]], "temperature": 1}, 400, "expected {"),
        ({"adapter": 3, "input_ids": [[1]]}, 400, '"adapter"'),
        ({"adapter": "nobody", "input_ids": [[1]]}, 404, "no adapter is called 'nobody'"),
        ({"adapter": "../adapters/task-0", "input_ids": [[1]]}, 404, "letters, digits"),
        ({"adapter": "task-0@1", "input_ids": [[1]]}, 404, "letters, digits"),
        ({"input_ids": []}, 400, "1 to 64 lists"),
        ({"input_ids": [[1] * 513]}, 400, "1 to 512 token ids"),
        ({"input_ids": [[True]]}, 400, "integers from 0"),
        ({"input_ids": [[1, -2]]}, 400, "integers from 0"),
        ({"input_ids": [[VOCABULARY]]}, 400, "below 50, which the model has, got 50"),
        ({"input_ids": [[1]], "pooling": "max"}, 400, '"first" or "mean"'),
    ],
)
def test_what_is_wrong_is_said(server, body, status, message):
    got, answer = server.ask("POST", "/v1/predict", body)
    assert got == status
    assert answer["error"]["status"] == status and message in answer["error"]["message"], json.dumps(answer)


def test_other_addresses(server):
    assert server.ask("GET", "/healthz") == (200, {"status": "ok"})
    assert server.ask("GET", "/v1/predict")[0] == 404


def test_only_this_machine_is_listened_to(server):
    """All but one port of each replica, which Ray opens on every interface (examples/ray_serve/README.md)."""
    processes = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
    open_ports = 0
    for process in processes:
        for connection in process.net_connections(kind="inet"):
            if connection.status == psutil.CONN_LISTEN and not connection.laddr.ip.endswith("127.0.0.1"):
                assert " ".join(process.cmdline()).startswith("ray::ServeReplica"), process.cmdline()
                open_ports += 1
    assert open_ports <= 3
