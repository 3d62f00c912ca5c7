"""examples/server and its folder: a thousand adapters, files replaced under load, and what /metrics says of it all."""

import concurrent.futures
import fcntl
import os
import random
import re
import shutil
import threading
import time

import pytest
import torch

from hosts_support import ROOT, run
from server_support import CONFIGS, Expected, Server, save_models, save_random_adapter, wait_until

KINDS = 10
TOLERANCE = dict(rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    base = save_models(folder, KINDS, "kinds/kind-{}")
    save_random_adapter(base, folder / "twins" / "kind-0", CONFIGS[0], KINDS)
    return folder


@pytest.fixture(scope="module")
def expected(models):
    return Expected(torch.jit.load(models / "base.pt"), models / "kinds")


@pytest.mark.slow(seconds=60)
def test_a_thousand_adapters_in_64_rows(server_program, models, tmp_path, expected):
    """Neighbours differ in kind, so that a row which is not whole, or another's, shows."""
    for index in range(1000):
        shutil.copytree(
            models / "kinds" / f"kind-{index % KINDS}", tmp_path / f"task-{index}", copy_function=shutil.copy
        )

    def ask(index: int) -> tuple:
        row = [1 + index % 40, 2, 3 + index % 7]
        return index, row, server.outputs(f"task-{index}", [row])[0]

    with Server(server_program, models / "base.pt", tmp_path, "--capacity", 64) as server:
        assert len(server.ask("GET", "/v1/adapters")[1]["adapters"]) == 1000
        order = [*range(0, 1000, 4), *range(0, 1000, 20)]
        random.Random(0).shuffle(order)
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(ask, order))
        resident = [adapter for adapter in server.ask("GET", "/v1/adapters")[1]["adapters"] if adapter["resident"]]
        assert len(resident) == server.metric("torchgraft_resident_adapters") == 64
        assert server.metric("torchgraft_bank_rebuilds_total") == 0
        assert server.metric("torchgraft_adapter_bytes") == 64 * server.metric("torchgraft_adapter_row_bytes")
    for index, row, got in answers:
        torch.testing.assert_close(got, expected(f"kind-{index % KINDS}", row), **TOLERANCE)


@pytest.fixture(scope="module")
def goes_after_a_look(tmp_path_factory) -> dict[str, str]:
    library = tmp_path_factory.mktemp("preload") / "away_after_stat.so"
    run("g++", "-shared", "-fPIC", "-o", library, ROOT / "tests" / "consumer" / "away_after_stat.cpp", "-ldl")
    return {"LD_PRELOAD": str(library)}


def test_an_adapter_is_there_while_another_process_saves_it(server_program, models, tmp_path, goes_after_a_look):
    """Its configuration is away for the instant of renaming, which may come between two looks at it."""
    directory = shutil.copytree(models / "kinds" / "kind-1", tmp_path / "kind-1")
    config = directory / "adapter_config.json"
    away = config.with_name(f"{config.name}.away")
    with Server(server_program, models / "base.pt", tmp_path, environment=goes_after_a_look) as server:
        lock = os.open(directory, os.O_RDONLY)  # what save_adapter holds
        fcntl.flock(lock, fcntl.LOCK_EX)
        config.with_name(f"{config.name}.leaves").touch()
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            answer = pool.submit(server.ask, "PUT", "/v1/adapters/kind-1")
            wait_until(away.exists)
            away.rename(config)
            os.close(lock)
            assert answer.result()[0] == 200


def test_an_adapter_is_replaced_under_load(server_program, models, tmp_path):
    """Every request is answered, by the old weights or the new ones; after the PUT's answer by the new ones only."""
    folders = [models / "kinds", models / "twins"]
    shutil.copytree(folders[0] / "kind-0", tmp_path / "task")
    row = [4, 5, 6, 7]
    stop, newest, answers = threading.Event(), [0], []

    def ask(server: Server) -> None:
        while not stop.is_set():
            since = newest[0]
            answers.append((since, server.outputs("task", [row])[0], newest[0]))

    def wait_for_answers(count: int) -> None:
        deadline = time.monotonic() + 60
        while len(answers) < count:
            assert time.monotonic() < deadline, "clients get no answers"
            time.sleep(0.005)

    with Server(server_program, models / "base.pt", tmp_path, "--max-wait-us", 200) as server:
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            clients = [pool.submit(ask, server) for _ in range(6)]
            try:
                for turn in range(1, 16):
                    new = tmp_path / "task" / "new"
                    shutil.copy(folders[turn % 2] / "kind-0" / "adapter.safetensors", new)
                    new.rename(tmp_path / "task" / "adapter.safetensors")
                    assert server.ask("PUT", "/v1/adapters/task")[0] == 200
                    newest[0] = turn
                    wait_for_answers(len(answers) + 12)  # the six under way, and six that began after it
            finally:
                stop.set()
        for client in clients:
            client.result()
    base = torch.jit.load(models / "base.pt")
    wanted = [Expected(base, folder)("kind-0", row) for folder in folders]
    assert not torch.allclose(*wanted, **TOLERANCE)
    assert {since for since, _, _ in answers} >= set(range(1, 15))
    for since, got, now in answers:
        # The server had stored `since` before the request began. It may have stored the next one before it answered.
        possible = {turn % 2 for turn in range(since, now + 2)}
        assert any(torch.allclose(got, wanted[turn], **TOLERANCE) for turn in possible)


def test_metrics_count_what_was_asked(server_program, models, tmp_path):
    shutil.copytree(models / "kinds" / "kind-0", tmp_path / "task")
    with Server(server_program, models / "base.pt", tmp_path, "--max-wait-us", 0) as server:
        for _ in range(3):
            server.outputs("task", [[1, 2], [3]])
        server.outputs(None, [[1]])
        assert server.predict("nobody", [[1]])[0] == 404
        assert server.metric('torchgraft_adapter_requests_total{adapter="task"}') == 3
        assert server.metric('torchgraft_adapter_requests_total{adapter=""}') == 1
        assert server.metric('torchgraft_responses_total{status="200"}') >= 4
        assert server.metric('torchgraft_responses_total{status="404"}') == 1
        assert server.metric("torchgraft_batch_rows_sum") == 3 * 2 + 1
        assert server.metric("torchgraft_batch_rows_count") == 4
        assert server.metric('torchgraft_batch_rows_bucket{le="1"}') == 1
        assert server.metric('torchgraft_batch_rows_bucket{le="2"}') == 4
        assert server.metric("torchgraft_predict_seconds_count") == 4
        assert server.metric('torchgraft_predict_seconds_bucket{le="+Inf"}') == 4
        assert server.metric("torchgraft_predict_seconds_sum") > 0
        assert server.metric("torchgraft_queue_rows") == 0
        assert server.metric("process_resident_memory_bytes") > 10_000_000
        text = server.ask("GET", "/metrics")[1]
    for line in text.splitlines():
        if not line.startswith("#"):
            assert re.fullmatch(r'[a-z_]+(\{[a-z]+="[^"]*"\})? [-+0-9.e]+', line), line
    names = {line.split("{")[0].split(" ")[0] for line in text.splitlines() if not line.startswith("#")}
    described = set(re.findall(r"^# TYPE ([a-z_]+) (?:gauge|counter|histogram)$", text, re.MULTILINE))
    assert {re.sub("_(bucket|sum|count)$", "", name) for name in names} == described
