"""examples/server: answers are those of each adapter alone, whatever shares the batch, and faults are answered."""

import concurrent.futures
import json
import random
import shutil
import socket
import threading
import time

import pytest
import torch

import torchgraft
from server_support import ADAPTERS, CAPACITY, MOST_TOKENS, TOLERANCE, VOCABULARY, Server, allow_open_files, wait_until

DEEP = "[" * 1_000_000 + "]" * 1_000_000


def random_row(source: random.Random) -> list[int]:
    return [source.randrange(1, VOCABULARY) for _ in range(source.randrange(1, MOST_TOKENS + 1))]


def name_of(index: int) -> str | None:
    return f"task-{index}" if index >= 0 else None


@pytest.mark.quick
@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_each_adapter_alone(server, expected, pooling):
    source = random.Random(0)
    for index in range(-1, ADAPTERS):
        row = random_row(source)
        answer = server.outputs(name_of(index), [row], pooling=pooling)
        torch.testing.assert_close(answer[0], expected(name_of(index), row, pooling), **TOLERANCE)


@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_rows_of_one_request_are_padded_without_effect(server, expected, pooling):
    rows = [[7], list(range(1, MOST_TOKENS + 1)), [3, 4, 5]]
    answer = server.outputs("task-0", rows, pooling=pooling)
    for got, row in zip(answer, rows, strict=True):
        torch.testing.assert_close(got, expected("task-0", row, pooling), **TOLERANCE)


def test_requests_of_all_adapters_at_once(server, expected):
    """Each answer is as alone, though batches mix adapters and lengths, and adapters leave and come back."""
    evicted = server.metric("torchgraft_adapter_evictions_total")

    def client(seed: int) -> list[tuple]:
        source = random.Random(seed)
        requests = [(name_of(source.randrange(-1, ADAPTERS)), random_row(source)) for _ in range(40)]
        return [(name, row, server.outputs(name, [row])[0]) for name, row in requests]

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        answers = [answer for client_answers in pool.map(client, range(16)) for answer in client_answers]
    assert len(answers) == 16 * 40
    for name, row, got in answers:
        torch.testing.assert_close(got, expected(name, row), **TOLERANCE)
    assert server.metric("torchgraft_adapter_evictions_total") > evicted
    assert server.metric("torchgraft_resident_adapters") <= CAPACITY
    assert server.metric("torchgraft_bank_rebuilds_total") == 0
    batches = server.metric("torchgraft_batch_rows_count")
    assert server.metric("torchgraft_batch_rows_sum") > batches, "no two requests shared a batch"


def test_adapters_come_and_go_without_a_restart(server_program, models, own_adapters, expected):
    row = [1, 2, 3]
    source, target = own_adapters / "task-0", own_adapters / "late"
    with Server(server_program, models / "base.pt", own_adapters) as server:
        assert server.predict("late", [row])[0] == 404
        shutil.copytree(source, target)
        assert server.ask("PUT", "/v1/adapters/late") == (200, {"name": "late", "resident": True})
        torch.testing.assert_close(server.outputs("late", [row])[0], expected("task-0", row), **TOLERANCE)

        shutil.copytree(own_adapters / "task-1", target, dirs_exist_ok=True)  # another method in its place
        torch.testing.assert_close(server.outputs("late", [row])[0], expected("task-0", row), **TOLERANCE)
        assert server.ask("PUT", "/v1/adapters/late")[0] == 200
        torch.testing.assert_close(server.outputs("late", [row])[0], expected("task-1", row), **TOLERANCE)

        assert server.ask("DELETE", "/v1/adapters/late")[0] == 200
        assert server.predict("late", [row])[0] == 404
        assert server.ask("GET", "/v1/adapters/late")[0] == 404
        assert target.is_dir()
        assert server.ask("PUT", "/v1/adapters/late")[0] == 200
        assert server.predict("late", [row])[0] == 200
        names = [adapter["name"] for adapter in server.ask("GET", "/v1/adapters")[1]["adapters"]]
        assert names == sorted(["late", *(name_of(index) for index in range(ADAPTERS))])
        status, answer = server.ask("GET", "/v1/adapters/task-1")
        assert status == 200 and answer["config"]["architecture"] == "lora"


@pytest.mark.parametrize(
    ("head", "labels"),
    [
        (torchgraft.HeadConfig(num_labels=3, labels=["bad", "fair", "good"], pooling="mean"), ["bad", "fair", "good"]),
        (torchgraft.HeadConfig(head_type="tagging", num_labels=4, layers=1), None),
    ],
    ids=["classification", "tagging"],
)
def test_an_adapter_with_a_head_answers_logits(server_program, models, own_adapters, head, labels):
    base = torch.jit.load(models / "base.pt")
    directory = {"headed": models / "adapters" / "task-0"}
    model = torchgraft.graft(base, adapters=directory, gate_pooling="unpadded")
    model = torchgraft.add_head(model, "headed", head)
    torchgraft.save_adapter(model, "headed", own_adapters / "headed")
    rows = [[3, 4, 5], list(range(1, 20)), [9]]
    with Server(server_program, models / "base.pt", own_adapters) as server:
        status, answer = server.predict("headed", rows)
        assert status == 200 and answer.get("labels") == labels and "outputs" not in answer
        for got, row in zip(answer["logits"], rows, strict=True):
            ids = torch.tensor([row])
            with torch.no_grad():
                expected = model.forward_with_head(ids, torch.ones_like(ids))[0]
            torch.testing.assert_close(torch.tensor(got), expected, **TOLERANCE)
        # Its hidden states are there for the asking, and other adapters answer theirs.
        assert "outputs" in server.predict("headed", rows, pooling="first")[1]
        assert "outputs" in server.predict("task-1", rows)[1]


def test_an_adapter_that_needs_more_than_the_banks_have(server_program, models, tmp_path, expected):
    folder = tmp_path / "adapters"
    shutil.copytree(models / "adapters" / "task-1", folder / "task-1")  # a LoRA alone
    row = [5, 6, 7]
    with Server(server_program, models / "base.pt", folder) as server:
        server.outputs("task-1", [row])
        shutil.copytree(models / "adapters" / "task-0", folder / "task-0")  # UniPELT
        torch.testing.assert_close(server.outputs("task-0", [row])[0], expected("task-0", row), **TOLERANCE)
        torch.testing.assert_close(server.outputs("task-1", [row])[0], expected("task-1", row), **TOLERANCE)
        assert server.metric("torchgraft_bank_rebuilds_total") == 1


def test_a_grafted_model_keeps_its_own_adapters(server_program, models, own_adapters, expected, tmp_path):
    base = torch.jit.load(models / "base.pt")
    directory = {"own": models / "adapters" / "task-0"}
    torchgraft.graft(base, adapters=directory, gate_pooling="unpadded").save(tmp_path / "grafted.pt")
    row = [9, 8, 7, 6]
    with Server(server_program, tmp_path / "grafted.pt", own_adapters, "--capacity", 2) as server:
        for name in ("task-1", "task-2", "task-3"):
            torch.testing.assert_close(server.outputs(name, [row])[0], expected(name, row), **TOLERANCE)
        torch.testing.assert_close(server.outputs("own", [row])[0], expected("task-0", row), **TOLERANCE)
        assert server.ask("DELETE", "/v1/adapters/own")[0] == 409
        assert server.ask("PUT", "/v1/adapters/own")[0] == 409


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ("{", 400, "not JSON"),
        pytest.param("[" * 100_000, 400, "nested too deeply", id="open brackets"),
        pytest.param(DEEP, 400, "nested too deeply", id="deep"),
        pytest.param('{"input_ids": ' + DEEP + "}", 400, "nested too deeply", id="deep ids"),
        pytest.param('{"adapter":' * 100_000 + "1" + "}" * 100_000, 400, "nested too deeply", id="deep name"),
        ({"input_ids": [[[[1]]]]}, 400, "nested too deeply, expected JSON of at most 4 levels"),
        ({"input_ids": [[[1]]]}, 400, "integers from 0, got a list"),
        ({"adapter": {"a": 1}, "input_ids": [[1]]}, 400, "null for the base model, got an object"),
        (b"\xff\xfe", 400, "not JSON"),
        ([1], 400, 'expected {"adapter"'),
        ({"adapter": None}, 400, '"input_ids" is missing'),
        ({"adapter": 3, "input_ids": [[1]]}, 400, '"adapter": expected a name'),
        ({"adapter": "", "input_ids": [[1]]}, 400, '"adapter": expected a name'),
        ({"adapter": "nobody", "input_ids": [[1]]}, 404, "no adapter is called 'nobody'"),
        ({"input_ids": []}, 400, "expected 1 to 64 rows, got 0"),
        ({"input_ids": [[1]] * 65}, 400, "expected 1 to 64 rows, got 65"),
        ({"input_ids": [[1], []]}, 400, "at least one token"),
        (
            {"input_ids": [[1] * 513]},
            413,
            f"at most {MOST_TOKENS} tokens in a row, which the model has positions for, got",
        ),
        ({"input_ids": [[1] * (MOST_TOKENS + 1)]}, 413, f"at most {MOST_TOKENS} tokens in a row, which the model has"),
        ({"input_ids": [[1, 2.0]]}, 400, "integers from 0, got 2.0"),
        ({"input_ids": [[1, "2"]]}, 400, 'integers from 0, got "2"'),
        ({"input_ids": [[1, -2]]}, 400, "integers from 0, got -2"),
        ({"input_ids": [[2**63]]}, 400, "integers from 0, got 9223372036854775808"),
        ({"input_ids": [[VOCABULARY]]}, 400, f"below {VOCABULARY}, which the model has, got {VOCABULARY}"),
        ({"input_ids": [1, 2]}, 400, "expected a list of integers, got 1"),
        ({"input_ids": "text"}, 400, "expected a list of lists"),
        ({"input_ids": [[1]], "pooling": "max"}, 400, '"first" or "mean", got "max"'),
        ({"texts": ["hello"]}, 400, "torchgraft serve"),
        ('{"input_ids": [[1]], "adapter": "task-0", "adapter": "task-1"}', 400, 'the body has "adapter" twice'),
        ('{"input_ids": [[1]], "input_ids": [[2]]}', 400, 'the body has "input_ids" twice'),
        ({"input_ids": [[1]], "temperature": 1}, 400, 'unknown field "temperature"'),
    ],
)
def test_what_is_wrong_is_said(server, body, status, message):
    got, answer = server.ask("POST", "/v1/predict", body)
    assert got == status
    assert answer["error"]["status"] == status and message in answer["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v1/predict", 405),
        ("POST", "/v1/adapters", 405),
        ("POST", "/v1/adapters/task-0", 405),
        ("POST", "/healthz", 405),
    ],
)
def test_other_addresses(server, method, path, status):
    got, answer = server.ask(method, path)
    assert got == status and answer["error"]["message"]


@pytest.mark.parametrize(
    "name",
    ["..", ".", "/etc", "../secret", "../adapters/task-0", "task-0/../task-1", "%2e%2e%2fsecret", "task-0%00"]
    + ["a" * 200, "ä"],
)
def test_names_are_never_paths(server, models, name):
    """models/secret lies beside the folder of adapters, and could be loaded."""
    assert (models / "secret" / "adapter_config.json").is_file()
    assert server.predict(name, [[1]])[0] == 404
    for method in ("GET", "PUT", "DELETE"):
        status, answer = server.ask(method, f"/v1/adapters/{name.replace('ä', '%C3%A4')}")
        assert status == 404, answer


def test_one_request_that_fails_spoils_no_other(server, expected):
    """More tokens than the model has positions, asked at the same time as good rows."""
    source = random.Random(1)
    rows = [random_row(source) for _ in range(24)]

    def ask(index: int):
        return server.predict("task-0", [[1] * (MOST_TOKENS + 1)] if index % 4 == 0 else [rows[index]])

    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(ask, range(24)))
    for index, (status, answer) in enumerate(answers):
        assert status == (413 if index % 4 == 0 else 200)
        if status == 200:
            torch.testing.assert_close(torch.tensor(answer["outputs"][0]), expected("task-0", rows[index]), **TOLERANCE)


def test_a_body_of_100_megabytes(server):
    before = server.metric("process_resident_memory_bytes")
    status, answer = server.ask("POST", "/v1/predict", b" " * 100_000_000)
    assert status == 413 and "at most" in answer["error"]["message"]
    assert server.metric("process_resident_memory_bytes") < before + 50_000_000


def test_a_body_that_says_it_is_endless_is_not_read(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as client:
        client.sendall(b"POST /v1/predict HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999999\r\n\r\n")
        assert client.recv(1000).startswith(b"HTTP/1.1 413")


def test_too_many_headers(server):
    assert server.ask("GET", "/healthz", headers={f"X-{i}": "1" for i in range(100)})[0] == 431
    assert server.ask("GET", "/healthz", headers={"X": "1" * 100_000})[0] in (413, 431)


def test_a_thousand_idle_connections(server, expected):
    allow_open_files(1500)
    connections = [socket.create_connection(("127.0.0.1", server.port), timeout=30) for _ in range(1000)]
    try:
        answer = server.outputs("task-2", [[1, 2, 3]])
        torch.testing.assert_close(answer[0], expected("task-2", [1, 2, 3]), **TOLERANCE)
        for connection in connections[::100]:  # half a request and silence
            connection.sendall(b"POST /v1/predict HTTP/1.1\r\nHost: a\r\nContent-Length: 50\r\n\r\n{")
        assert server.predict("task-3", [[1]])[0] == 200
    finally:
        for connection in connections:
            connection.close()


def test_clients_that_go_away(server, expected):
    content = json.dumps({"adapter": "task-0", "input_ids": [[1] * MOST_TOKENS] * 16}).encode()
    head = f"POST /v1/predict HTTP/1.1\r\nHost: a\r\nContent-Length: {len(content)}\r\n\r\n".encode()
    for cut in (len(content), len(content) // 2):
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", server.port), timeout=30) as client:
                client.sendall(head + content[:cut])
    torch.testing.assert_close(server.outputs("task-4", [[4, 5]])[0], expected("task-4", [4, 5]), **TOLERANCE)


def test_more_than_the_queue_holds_is_refused(server_program, models):
    options = ("--max-queue", 4, "--max-batch", 4, "--max-wait-us", 3_000_000)
    with Server(server_program, models / "base.pt", models / "adapters", *options) as server:

        def ask(*_) -> int:
            return server.predict(None, [[1, 2], [3, 4], [5, 6]])[0]

        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            waiting = pool.submit(ask)
            wait_until(lambda: server.metric("torchgraft_queue_rows") == 3)
            assert ask() == 503  # 3 rows fit in an empty queue of 4, not beside 3 others
            assert waiting.result() == 200
            assert set(pool.map(ask, range(12))) == {200, 503}
        assert server.predict(None, [[1, 2]])[0] == 200


def garble(directory, source: random.Random) -> None:
    """Replaces an adapter's weights by something that is not safetensors, or is another adapter's half."""
    path = directory / "adapter.safetensors"
    content = path.read_bytes()
    kinds = [b"", b"garbage", content[: len(content) // 2], source.randbytes(len(content)), content + b"x"]
    broken = directory / "broken"
    broken.write_bytes(source.choice(kinds))
    broken.rename(path)


def test_files_that_turn_into_garbage_under_load(server_program, models, own_adapters, expected):
    """While adapters are read, some of their files are bad: those requests fail, and no other answer is wrong."""
    stop = threading.Event()
    good = {path: path.read_bytes() for path in own_adapters.glob("task-[0-5]/adapter.safetensors")}

    def vandal() -> None:
        source = random.Random(2)
        while not stop.is_set():
            path = source.choice(list(good))
            garble(path.parent, source)
            time.sleep(0.002)
            whole = path.parent / "whole"
            whole.write_bytes(good[path])
            whole.rename(path)

    def client(seed: int) -> list[tuple]:
        source = random.Random(seed)
        requests = [(name_of(source.randrange(ADAPTERS)), random_row(source)) for _ in range(40)]
        return [(name, row, *server.predict(name, [row])) for name, row in requests]

    with Server(server_program, models / "base.pt", own_adapters, "--capacity", 3) as server:
        thread = threading.Thread(target=vandal)
        thread.start()
        try:
            with concurrent.futures.ThreadPoolExecutor(8) as pool:
                answers = [answer for some in pool.map(client, range(8)) for answer in some]
        finally:
            stop.set()
            thread.join()
        for name, row, status, answer in answers:
            if status == 200:
                torch.testing.assert_close(torch.tensor(answer["outputs"][0]), expected(name, row), **TOLERANCE)
            else:
                assert status == 422 and "cannot be loaded" in answer["error"]["message"]
                assert int(name.removeprefix("task-")) < 6
        assert {status for _, _, status, _ in answers} == {200, 422}
        for index in range(ADAPTERS):
            assert server.predict(name_of(index), [[1]])[0] == 200


def test_sigterm_under_load_loses_nothing(server_program, models, expected):
    """A client that has a connection gets whole, correct answers, and a closed connection after the last."""
    options = ("--capacity", CAPACITY, "--max-wait-us", 20_000)
    with Server(server_program, models / "base.pt", models / "adapters", *options) as server:
        answers: list[tuple] = []
        stopping = threading.Event()

        def client(seed: int) -> None:
            source = random.Random(seed)
            connection = server.connection()
            answered = time.monotonic()
            while True:
                name, row = name_of(source.randrange(ADAPTERS)), random_row(source)
                fresh = connection.sock is None
                try:
                    connection.request("POST", "/v1/predict", json.dumps({"adapter": name, "input_ids": [row]}))
                    response = connection.getresponse()
                except OSError:
                    # Only a connection that was not accepted any more, or one that was told to close, or one that
                    # this client left idle for so long that draining was over.
                    assert stopping.is_set() and (fresh or time.monotonic() - answered > 0.4)
                    return
                answers.append((name, row, response.status, json.loads(response.read())))
                answered = time.monotonic()

        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            clients = [pool.submit(client, seed) for seed in range(12)]
            wait_until(lambda: len(answers) >= 100 or any(client.done() for client in clients))
            stopping.set()
            server.terminate()
            for finished in clients:
                finished.result(timeout=60)
        assert server.wait() == 0
    assert len(answers) >= 100
    for name, row, status, answer in answers:
        assert status == 200, answer
        torch.testing.assert_close(torch.tensor(answer["outputs"][0]), expected(name, row), **TOLERANCE)


def test_head_is_get_without_its_text(server):
    for path, status in (("/healthz", 200), ("/metrics", 200), ("/nothing", 404), ("/v1/predict", 405)):
        connection = server.connection()
        connection.request("HEAD", path)
        answer = connection.getresponse()
        assert (answer.status, answer.read()) == (status, b""), path
        connection.close()
