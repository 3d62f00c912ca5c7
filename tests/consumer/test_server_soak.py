"""examples/server for a minute among vandals: it stays up, its answers stay right, and it keeps nothing."""

import concurrent.futures
import contextlib
import json
import os
import random
import shutil
import socket
import threading
import time
from pathlib import Path

import pytest
import torch

from server_support import ADAPTERS, CAPACITY, MOST_TOKENS, TOLERANCE, VOCABULARY, Server, connections_to, post

SECONDS = 60
STABLE, SHAKY = range(6), range(6, ADAPTERS)  # adapters whose files stay, and others
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


def client(server: Server, seed: int, stop: threading.Event) -> list[tuple]:
    source, answers = random.Random(seed), []
    while not stop.is_set():
        number = source.choice([-1, *range(ADAPTERS)])
        row = [source.randrange(1, VOCABULARY) for _ in range(source.randrange(1, 8))]
        name = None if number < 0 else f"task-{number}"
        answers.append((number, name, row, *server.predict(name, [row])))
    return answers


def held(server: Server) -> tuple[int, int, int]:
    """(open files, threads, bytes of memory) of the server."""
    process = Path(f"/proc/{server.pid}")
    pages = int((process / "statm").read_text().split()[1])
    return len(list((process / "fd").iterdir())), len(list((process / "task").iterdir())), pages * 4096


def live(server: Server, models: Path, folder: Path, seconds: float) -> list[tuple]:
    stop = threading.Event()
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        jobs = [pool.submit(vandal, server, models, folder, seed, stop) for seed in range(2)]
        jobs += [pool.submit(rude_client, server, seed, stop) for seed in range(3)]
        clients = [pool.submit(client, server, seed, stop) for seed in range(6)]
        end = time.monotonic() + seconds
        try:
            while time.monotonic() < end and not any(job.done() for job in [*jobs, *clients]):
                assert server.ask("GET", "/healthz") == (200, {"status": "ok"})
                time.sleep(0.05)
        finally:
            stop.set()
        for job in jobs:
            job.result(timeout=60)
        return [answer for each in clients for answer in each.result(timeout=60)]


@pytest.mark.slow(seconds=3 * SECONDS)
def test_among_vandals(server_program, models, own_adapters, expected):
    with Server(server_program, models / "base.pt", own_adapters, "--capacity", CAPACITY) as server:
        answers = live(server, models, own_adapters, SECONDS / 3)
        files, threads, memory = held(server)
        answers += live(server, models, own_adapters, SECONDS)
        time.sleep(1)  # connections close
        later_files, later_threads, later_memory = held(server)
        for number in range(ADAPTERS):
            assert server.predict(f"task-{number}", [[1]])[0] == 200
        assert server.stop() == 0
    assert later_files <= files + 8 and later_threads <= threads
    assert later_memory < memory + 200_000_000
    assert len(answers) > 200
    for number, name, row, status, answer in answers:
        if status == 200:
            torch.testing.assert_close(torch.tensor(answer["outputs"][0]), expected(name, row), **TOLERANCE)
        else:
            assert number in SHAKY and status in (404, 422), json.dumps(answer)
