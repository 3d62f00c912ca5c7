"""examples/server among vandals: it stays up, each answer is of its adapter and version, and it keeps nothing.

TORCHGRAFT_SOAK_REQUESTS: that are answered and checked (20,000), besides those of the vandals. A million take a quarter
of an hour on two cores that others share.
"""

import collections
import concurrent.futures
import contextlib
import json
import os
import random
import shutil
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import torchgraft
from server_support import (
    ADAPTERS,
    CAPACITY,
    MOST_TOKENS,
    TOLERANCE,
    VOCABULARY,
    Server,
    connections_to,
    post,
    save_random_adapter,
)

REQUESTS = int(os.environ.get("TORCHGRAFT_SOAK_REQUESTS", "20000"))
CLIENTS = (
    24  # that ask and check: an answer waits for its batch and for adapters that are read, so few keep no core busy
)
STABLE, SHAKY = range(6), range(6, ADAPTERS)  # adapters whose files stay, and others
NEW = "renewed"  # an adapter whose files are replaced by another version all the time
DEEP = "[" * 500_000 + "]" * 500_000


def shaken(directory: Path, source: random.Random) -> None:
    """Puts something bad in the place of one of the adapter's files."""
    path = directory / source.choice(["adapter.safetensors", "adapter_config.json", "head_config.json"])
    beside = directory / "beside"
    kind = source.randrange(7)
    if kind == 0:
        os.mkfifo(beside)
    elif kind == 1:
        beside.symlink_to("/dev/zero")
    elif kind == 2:
        beside.symlink_to(path)
    elif kind == 3:
        beside.write_text('{"config": ' + DEEP + "}")
    elif kind == 4:
        beside.write_bytes(source.randbytes(1000))
    elif kind == 5:
        beside.write_text('{"config": {"architecture": "lora", "r": 1048576}, "name": "x"}')
    else:
        beside.touch()
        os.truncate(beside, 3 << 30)
    beside.rename(path)


def vandal(server: Server, models: Path, folder: Path, seed: int, stop: threading.Event) -> None:
    source = random.Random(seed)
    while not stop.is_set():
        name = f"task-{source.choice(list(SHAKY)[seed::2])}"
        with contextlib.suppress(FileNotFoundError):
            shaken(folder / name, source)
            server.ask(source.choice(["PUT", "GET", "DELETE"]), f"/v1/adapters/{name}")
        shutil.rmtree(folder / name, ignore_errors=True)
        server.ask("PUT", f"/v1/adapters/{name}")
        shutil.copytree(models / "adapters" / name, folder / name)
        assert server.ask("PUT", f"/v1/adapters/{name}")[0] == 200


def rude_client(server: Server, seed: int, stop: threading.Event) -> None:
    source = random.Random(seed)
    bodies = [
        post([[1]], padding=3_000_000)[:-1],
        b"POST /v1/predict HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
        b"POST /v1/predict HTTP/1.1\r\nHost: a\r\nContent-Length : 5\r\n\r\nhello",
        b"POST /v1/predict HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(DEEP) + DEEP.encode(),
        post([[VOCABULARY]]),
        post([[1] * (MOST_TOKENS + 1)], "task-0"),
        b"\0" * 1000,
        b"GET /metrics HTTP/1.1\r\n",
    ]
    while not stop.is_set():
        with contextlib.suppress(OSError), connections_to(server, 4) as clients:
            for client in clients:
                client.settimeout(0.2)
                client.sendall(source.choice(bodies))
            for client in clients:
                with contextlib.suppress(socket.timeout):
                    client.recv(1000)


class Renewal:
    """Replaces the adapter NEW by its other version again and again, and knows which one an answer may be of."""

    def __init__(self, models: Path, folder: Path):
        self._directory = folder / NEW
        self._versions = []
        for seed in range(2):
            other = models / f"version-{seed}" / NEW
            save_random_adapter(torch.jit.load(models / "base.pt"), other, "lora[r=4]", 100 + seed)
            self._versions.append(torchgraft.graft(torch.jit.load(models / "base.pt"), adapters={NEW: other}))
        self.renewals = 0
        self._now = (0, frozenset({0}))  # (changes so far, the versions that may be served)
        torchgraft.save_adapter(self._versions[0], NEW, self._directory)

    def answers(self, ids: list[int]) -> list[torch.Tensor]:
        row = torch.tensor([ids])
        with torch.inference_mode():
            return [module(row, torch.ones_like(row))[0, 0] for module in self._versions]

    def run(self, server: Server, stop: threading.Event) -> None:
        while not stop.is_set():
            version = self.renewals % 2
            self._now = (self._now[0] + 1, frozenset({0, 1}))
            torchgraft.save_adapter(self._versions[version], NEW, self._directory)
            assert server.ask("PUT", f"/v1/adapters/{NEW}")[0] == 200
            self._now = (self._now[0] + 1, frozenset({version}))
            self.renewals += 1
            stop.wait(0.05)

    def watch(self) -> Callable[[], frozenset[int]]:
        """To be called before a request; what it returns, after: the versions that the answer may be of."""
        before = self._now
        return lambda: before[1] if self._now[0] == before[0] else frozenset({0, 1})


class Questions:
    """Rows, each with the answers that it should get from each adapter: computed before, compared at once."""

    def __init__(self, expected, renewal: Renewal):
        source = random.Random(0)
        rows = [[source.randrange(1, VOCABULARY) for _ in range(source.randrange(1, 8))] for _ in range(20)]
        self._renewal = renewal
        names = [None, *(f"task-{number}" for number in range(ADAPTERS))]
        self._all = [(name, row, [expected(name, row).tolist()]) for name in names for row in rows]
        self._all += [(NEW, row, [answer.tolist() for answer in renewal.answers(row)]) for row in rows * 3]
        self._may_fail = {f"task-{number}" for number in SHAKY}

    def ask(self, connection, source: random.Random) -> int:
        """Returns the status of one answer."""
        name, row, answers = source.choice(self._all)
        versions = self._renewal.watch()
        connection.request("POST", "/v1/predict", json.dumps({"adapter": name, "input_ids": [row]}))
        response = connection.getresponse()
        answer = json.loads(response.read())
        if response.status != 200:
            assert name in self._may_fail and response.status in (404, 422), answer
            return response.status
        assert answer["adapter"] == name
        (got,) = answer["outputs"]
        allowed = [answers[version] for version in versions()] if name == NEW else answers
        assert any(self._equal(got, wanted) for wanted in allowed), f"{name}: {got}, expected one of {allowed}"
        return 200

    @staticmethod
    def _equal(got: list[float], wanted: list[float]) -> bool:
        return all(abs(a - b) <= TOLERANCE["atol"] for a, b in zip(got, wanted, strict=True))


class Count:
    """Of answers, by status."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.statuses: collections.Counter[int] = collections.Counter()

    def add(self, status: int) -> None:
        with self._lock:
            self.statuses[status] += 1


def client(server: Server, questions: Questions, seed: int, count: Count, stop: threading.Event) -> None:
    source, connection = random.Random(seed), server.connection()
    while not stop.is_set():
        count.add(questions.ask(connection, source))
        if source.random() < 0.01:
            connection.close()  # and opens anew
    connection.close()


def held(server: Server) -> tuple[int, int, int]:
    """(open files, threads, bytes of memory) of the server."""
    process = Path(f"/proc/{server.pid}")
    pages = int((process / "statm").read_text().split()[1])
    return len(list((process / "fd").iterdir())), len(list((process / "task").iterdir())), pages * 4096


def live(server: Server, models: Path, folder: Path, renewal: Renewal, questions: Questions, count: Count, requests):
    """Until so many requests are answered in all."""
    stop = threading.Event()
    with concurrent.futures.ThreadPoolExecutor(6 + CLIENTS) as pool:
        jobs = [pool.submit(vandal, server, models, folder, seed, stop) for seed in range(2)]
        jobs += [pool.submit(rude_client, server, seed, stop) for seed in range(3)]
        jobs += [pool.submit(renewal.run, server, stop)]
        jobs += [pool.submit(client, server, questions, seed, count, stop) for seed in range(CLIENTS)]
        try:
            while count.statuses.total() < requests and not any(job.done() for job in jobs):
                assert server.ask("GET", "/healthz") == (200, {"status": "ok"})
                time.sleep(0.05)
        finally:
            stop.set()
        for job in jobs:
            job.result(timeout=60)


@pytest.mark.slow(seconds=120)
def test_among_vandals(server_program, models, own_adapters, expected):
    renewal = Renewal(models, own_adapters)
    questions, count = Questions(expected, renewal), Count()
    with Server(server_program, models / "base.pt", own_adapters, "--capacity", CAPACITY) as server:
        everything = (server, models, own_adapters, renewal, questions, count)
        live(*everything, min(REQUESTS / 4, 50_000))
        files, threads, memory = held(server)
        live(*everything, REQUESTS)
        time.sleep(1)  # connections close
        later_files, later_threads, later_memory = held(server)
        for number in range(ADAPTERS):
            assert server.predict(f"task-{number}", [[1]])[0] == 200
        evictions = server.metric("torchgraft_adapter_evictions_total")
        assert server.stop() == 0
    print(f"answers by status: {dict(count.statuses)}; {renewal.renewals} renewals, {evictions:.0f} evictions; files "
          f"{files} then {later_files}, threads {threads} then {later_threads}, MiB {memory >> 20} then "
          f"{later_memory >> 20}")  # fmt: skip
    assert later_files <= files + 8 and later_threads <= threads
    assert later_memory < memory + 200_000_000
    assert count.statuses[200] > count.statuses.total() / 2 and renewal.renewals > 10
