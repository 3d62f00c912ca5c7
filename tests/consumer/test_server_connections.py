"""examples/server and its connections: none stalls, and what a proxy may read in two ways is refused."""

import concurrent.futures
import os
import random
import signal
import socket
import time

import pytest
import torch

from server_support import (
    MOST_TOKENS,
    TOLERANCE,
    VOCABULARY,
    Server,
    allow_open_files,
    connections_to,
    post,
    read_answer,
    wait_until,
)

PREDICT = b"POST /v1/predict HTTP/1.1\r\nHost: a\r\n"
BODY = b'{"input_ids": [[1, 2]]}'
LENGTH = b"Content-Length: %d\r\n" % len(BODY)


def ask_all_at_once(server: Server, clients: list[socket.socket], requests: list[bytes]) -> None:
    """All requests lie in the sockets when the server looks the next time."""
    os.kill(server.pid, signal.SIGSTOP)
    try:
        for client, request in zip(clients, requests, strict=True):
            client.sendall(request)
    finally:
        os.kill(server.pid, signal.SIGCONT)


@pytest.mark.quick
def test_any_number_of_connections_that_are_ready_at_once(server_program, models):
    """libmicrohttpd takes 128 events at a time."""
    health = b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"
    options = ("--idle-seconds", 600)
    with (
        Server(server_program, models / "base.pt", models / "adapters", *options) as server,
        connections_to(server, 260) as clients,
    ):
        for client in clients:
            client.settimeout(20)
        for ready in (128, 127, 129, 256, 255, 128, 260, 1):
            ask_all_at_once(server, clients[:ready], [health] * ready)
            assert [read_answer(client) for client in clients[:ready]] == [(200, {"status": "ok"})] * ready


@pytest.mark.slow(seconds=180)
def test_a_thousand_connections_that_stay_open(server_program, models, expected):
    """Batches of 64 of them, and every answer is that of its row."""
    allow_open_files(1500)
    source = random.Random(5)
    rows = [[source.randrange(1, VOCABULARY) for _ in range(1 + index % MOST_TOKENS)] for index in range(50)]
    wanted = [expected("task-1", row) for row in rows]
    options = ("--max-queue", 4096, "--max-connections", 1100, "--idle-seconds", 600)
    with (
        Server(server_program, models / "base.pt", models / "adapters", *options) as server,
        connections_to(server, 1000) as clients,
    ):
        for turn in range(1000):
            some = source.sample(range(1000), 64)
            asked = [(clients[index], (index + turn) % len(rows)) for index in some]
            for client, row in asked:
                client.sendall(post([rows[row]], "task-1"))
            for client, row in asked:
                status, answer = read_answer(client)
                assert status == 200, answer
                torch.testing.assert_close(torch.tensor(answer["outputs"][0]), wanted[row], **TOLERANCE)


HIDDEN = b"GET /v1/adapters HTTP/1.1\r\nHost: a\r\n\r\n"
AMBIGUOUS = {
    "two lengths": LENGTH + b"Content-Length: %d\r\n" % (len(BODY) + len(HIDDEN)),
    "the same length twice": LENGTH + LENGTH,
    "a length and chunks": LENGTH + b"Transfer-Encoding: chunked\r\n",
    "chunks and a length": b"Transfer-Encoding: chunked\r\n" + LENGTH,
    "chunks twice": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
    "chunks of something": b"Transfer-Encoding: gzip, chunked\r\n",
    "not quite chunks": b"Transfer-Encoding: xchunked\r\n",
    "a space before the colon": LENGTH.replace(b":", b" :"),
    "a tab before the colon": LENGTH.replace(b":", b"\t:"),
    "chunks with a space": b"Transfer-Encoding : chunked\r\n" + LENGTH,
    "a length with a sign": LENGTH.replace(b": ", b": +"),
    "a list of lengths": LENGTH.replace(b"\r", b", %d\r" % len(BODY)),
    "a length in words": b"Content-Length: many\r\n",
    "a carriage return in a value": LENGTH + b"X-A: b\rTransfer-Encoding: chunked\r\n",
    "another control character": LENGTH + b"X-A: b\x01\r\n",
}


@pytest.mark.parametrize("headers", AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_a_body_whose_end_is_ambiguous_is_refused(server, headers):
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as client:
        client.sendall(PREDICT + headers + b"\r\n" + BODY + HIDDEN)
        client.shutdown(socket.SHUT_WR)
        answers = b""
        while part := client.recv(65536):
            answers += part
    # libmicrohttpd repeats the headers of what it refuses itself, so no count of answers.
    assert answers.startswith(b"HTTP/1.1 400 ") and b"HTTP/1.1 200" not in answers, answers
    assert b"Connection: close" in answers


def test_a_body_in_chunks_is_read(server, expected):
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (BODY[:7], BODY[7:])) + b"0\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as client:
        for _ in range(2):  # and the connection stays open
            client.sendall(PREDICT + b"Transfer-Encoding: chunked\r\n\r\n" + chunks)
            status, answer = read_answer(client)
            assert status == 200, answer
            torch.testing.assert_close(torch.tensor(answer["outputs"][0]), expected(None, [1, 2]), **TOLERANCE)


def test_bodies_that_never_end_take_little_memory(server_program, models):
    """Clients that hold 4 MB each: all but the first few get 503, and others are served."""
    padding, count = 3_900_000, 60
    options = ("--max-unfinished-bytes", 40_000_000)
    with (
        Server(server_program, models / "base.pt", models / "adapters", *options) as server,
        connections_to(server, count) as clients,
    ):
        server.ask("POST", "/v1/predict", b" " * padding)
        before = server.metric("process_resident_memory_bytes")
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda client: client.sendall(post([[1, 2]], padding=padding)[:-1]), clients))
        time.sleep(0.5)  # the server takes what is still in the sockets
        assert server.metric("process_resident_memory_bytes") < before + 100_000_000
        assert server.predict(None, [[1]])[0] == 200
        statuses = []
        for client in clients:
            client.sendall(b"}")
            statuses.append(read_answer(client)[0])
        assert set(statuses) == {200, 503} and statuses.count(200) <= 10
        # What was counted is given back.
        clients[0].sendall(post([[1, 2]], padding=padding))
        wait_until(lambda: read_answer(clients[0])[0] == 200, 30)
