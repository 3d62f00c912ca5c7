"""examples/server at its limits: memory, files and queues are bounded, models may be odd, and it ends when told to."""

import concurrent.futures
import contextlib
import json
import random
import shutil
import signal
import subprocess

import pytest
import torch

import torchgraft
from server_support import (
    ADAPTERS,
    MOST_TOKENS,
    TOLERANCE,
    VOCABULARY,
    Server,
    allow_open_files,
    connections_to,
    post,
    wait_until,
)

WAITS = 600_000_000  # microseconds: a batch that is not full waits for longer than any test


class WithoutMask(torch.nn.Module):
    def __init__(self, encoder: torch.jit.ScriptModule):
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.encoder(input_ids, torch.ones_like(input_ids))


class FailsInSilence(torch.nn.Module):
    def __init__(self, encoder: torch.jit.ScriptModule):
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        assert input_ids.size(1) <= 16
        return self.encoder(input_ids, attention_mask)


def scripted(wrapper: type[torch.nn.Module], models, path):
    torch.jit.script(wrapper(torch.jit.load(models / "base.pt")).eval()).save(path)
    return path


@contextlib.contextmanager
def endless_reading(directory):
    """Inside the context, reading the adapter does not end."""
    gate = directory / "adapter.safetensors.wait"
    gate.touch()
    try:
        yield
    finally:
        gate.unlink()


def test_a_model_that_fails_without_a_word(server_program, models, tmp_path, expected):
    model = scripted(FailsInSilence, models, tmp_path / "model.pt")
    with Server(server_program, model, models / "adapters", "--max-wait-us", 300_000) as server:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            rows = [[1] * (20 if index == 3 else 5) for index in range(8)]
            answers = list(pool.map(lambda row: server.predict("task-1", [row]), rows))
        for index, (status, answer) in enumerate(answers):
            if index == 3:
                assert status == 500 and answer["error"]["message"] == "the model failed: it did not say why"
            else:
                got = torch.tensor(answer["outputs"][0])
                torch.testing.assert_close(got, expected("task-1", rows[index]), **TOLERANCE)


def test_a_model_without_a_mask_never_sees_padding(server_program, models, tmp_path, expected):
    model = scripted(WithoutMask, models, tmp_path / "model.pt")
    source = random.Random(3)
    rows = [[source.randrange(1, VOCABULARY) for _ in range(length)] for length in (3, MOST_TOKENS, 7, 3, 1)]
    with Server(server_program, model, models / "adapters") as server:
        for adapter in ("task-0", "task-1", None):
            for pooling in ("first", "mean"):
                answer = server.outputs(adapter, rows, pooling=pooling)
                for got, row in zip(answer, rows, strict=True):
                    torch.testing.assert_close(got, expected(adapter, row, pooling), **TOLERANCE)


@pytest.mark.parametrize("kind", ["scripted", "grafted", "told"])
def test_tokens_that_a_model_does_not_have_are_refused(server_program, models, tmp_path, kind):
    known, options, model = VOCABULARY, (), tmp_path / "model.pt"
    if kind == "scripted":
        scripted(FailsInSilence, models, model)
    else:
        base = torch.jit.load(models / "base.pt")
        own = {"own": models / "adapters" / "task-0"}
        torchgraft.graft(base, adapters=own, gate_pooling="unpadded").save(model)
    if kind == "told":
        known, options = 40, ("--vocabulary", 40)
    with Server(server_program, model, models / "adapters", *options) as server:
        assert server.predict(None, [[known - 1]])[0] == 200
        passes = server.metric("torchgraft_batch_rows_count")
        status, answer = server.predict(None, [[1, known, 2]])
        assert status == 400 and f"below {known}, which the model has, got {known}" in answer["error"]["message"]
        assert server.metric("torchgraft_batch_rows_count") == passes


def test_rows_that_wait_for_an_adapter_count_as_queued(server_program, models, own_adapters, waits_at_open):
    options = ("--max-queue", 4, "--max-batch", 4)
    with Server(server_program, models / "base.pt", own_adapters, *options, environment=waits_at_open) as server:
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            with endless_reading(own_adapters / "task-1"):
                asked = [pool.submit(server.predict, "task-1", [[1, 2]]) for _ in range(6)]
                wait_until(lambda: sum(request.done() for request in asked) >= 2)
                assert server.metric("torchgraft_queue_rows") == 4
                assert server.predict("task-2", [[1, 2]])[0] == 503
            statuses = sorted(request.result(timeout=60)[0] for request in asked)
        assert statuses == [200, 200, 200, 200, 503, 503]
        assert server.metric("torchgraft_queue_rows") == 0
        assert server.predict("task-2", [[1, 2]])[0] == 200


def test_a_request_that_waits_keeps_no_body(server_program, models):
    count, padding = 40, 4_000_000
    with Server(server_program, models / "base.pt", models / "adapters", "--max-wait-us", WAITS) as server:
        server.ask("POST", "/v1/predict", b" " * padding)  # what reading one takes
        before = server.metric("process_resident_memory_bytes")
        with connections_to(server, count) as clients:
            for number, client in enumerate(clients):
                client.sendall(post([[1, 2]], padding=padding))
                wait_until(lambda rows=number + 1: server.metric("torchgraft_queue_rows") == rows)
            assert server.metric("process_resident_memory_bytes") < before + count * padding / 2


def test_more_connections_than_files_at_first(server_program, models):
    """The limit of open files is raised."""
    with (
        Server(server_program, models / "base.pt", models / "adapters", open_files=(128, 4096)) as server,
        connections_to(server, 300),
    ):
        assert server.predict("task-0", [[1]])[0] == 200


def test_connections_leave_files_for_adapters(server_program, models):
    allow_open_files(1500)
    with Server(server_program, models / "base.pt", models / "adapters", open_files=(200, 200)) as server:
        first = server.connection()
        first.request("GET", "/healthz")
        first.getresponse().read()
        with connections_to(server, 300):
            for index in range(3):
                first.request("POST", "/v1/predict", json.dumps({"adapter": f"task-{index}", "input_ids": [[1]]}))
                response = first.getresponse()
                assert response.status == 200, response.read()
                response.read()


def test_long_rows_do_not_make_batches_large(server_program, models):
    options = ("--max-batch-tokens", 2 * MOST_TOKENS, "--max-wait-us", 300_000)
    with Server(server_program, models / "base.pt", models / "adapters", *options) as server:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            rows = [[1] * (MOST_TOKENS if index % 2 else 1) for index in range(8)]
            assert all(status == 200 for status, _ in pool.map(lambda row: server.predict(None, [row]), rows))
        most = server.metric('torchgraft_batch_rows_bucket{le="2"}')
        assert most == server.metric("torchgraft_batch_rows_count") >= 4
        assert server.predict(None, [[1] * MOST_TOKENS] * 3)[0] == 200  # one request stays together


def test_a_queue_that_is_smaller_than_a_request_is_refused(server_program, models):
    command = [server_program, models / "base.pt", "--adapters", models / "adapters", "--max-queue", 8]
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("server: --max-queue: expected at least --max-batch, 64")


def test_an_engine_that_computes_wrong_in_threads_is_refused_for_several_workers(server_program, models):
    command = [server_program, models / "base.pt", "--quantized-engine", "onednn", "--workers", 2]
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("server: --quantized-engine: onednn computes wrong numbers when passes run at once")
    assert "expected --workers 1, got 2" in result.stderr


def test_sums_have_all_their_digits(server):
    def digits_of_the_sum():
        server.predict(None, [[1]])
        text = server.ask("GET", "/metrics")[1]
        line = next(line for line in text.splitlines() if line.startswith("torchgraft_predict_seconds_sum "))
        return len(line.split()[1].replace(".", "").lstrip("0"))

    # A stream rounds to six unless told otherwise. One sum of nanoseconds may end in zeros; not all of eight do.
    assert max(digits_of_the_sum() for _ in range(8)) > 6


def test_a_folder_that_has_gone_is_not_an_empty_one(server_program, models, own_adapters):
    with Server(server_program, models / "base.pt", own_adapters) as server:
        assert len(server.ask("GET", "/v1/adapters")[1]["adapters"]) == ADAPTERS
        shutil.rmtree(own_adapters)
        assert server.ask("GET", "/v1/adapters")[0] == 500


def test_an_adapter_that_is_too_large_is_refused(server_program, models, tmp_path):
    folder = tmp_path / "adapters"
    shutil.copytree(models / "adapters" / "task-1", folder / "task-1")  # a LoRA alone
    with Server(server_program, models / "base.pt", folder) as server:
        row_bytes = int(server.metric("torchgraft_adapter_row_bytes"))
    with Server(server_program, models / "base.pt", folder, "--max-adapter-bytes", row_bytes) as server:
        shutil.copytree(models / "adapters" / "task-0", folder / "task-0")  # UniPELT
        for _ in range(2):
            status, answer = server.predict("task-0", [[1]])
            assert status == 422 and f"adapters of at most {row_bytes} bytes" in answer["error"]["message"]
            assert server.predict("task-1", [[1]])[0] == 200


def test_a_body_that_never_comes_holds_up_no_end(server_program, models):
    options = ("--drain-seconds", 600, "--idle-seconds", 600)
    with (
        Server(server_program, models / "base.pt", models / "adapters", *options) as server,
        connections_to(server, 1) as (client,),
    ):
        client.sendall(post([[1, 2]])[:-5])
        assert server.ask("GET", "/healthz")[0] == 200
        assert server.stop() == 0  # or Server.wait() gives up


def test_what_still_waits_when_draining_is_over_is_answered(server_program, models, own_adapters, waits_at_open):
    """Requests in the queue, and those whose adapters have not come."""
    options = ("--drain-seconds", 1, "--max-wait-us", WAITS)
    with Server(server_program, models / "base.pt", own_adapters, *options, environment=waits_at_open) as server:
        with concurrent.futures.ThreadPoolExecutor(8) as pool, contextlib.ExitStack() as reading:
            reading.enter_context(endless_reading(own_adapters / "task-1"))
            asked = [pool.submit(server.predict, name, [[1]]) for name in [None] * 4 + ["task-1"] * 4]
            wait_until(lambda: server.metric("torchgraft_queue_rows") == 8)
            server.terminate()
            wait_until(lambda: sum(request.done() for request in asked) >= 7)
            reading.close()  # the one that is being read
            assert server.wait() == 0
        for request in asked:
            status, answer = request.result(timeout=60)
            assert status == 503 and answer["error"]["message"]


def test_a_second_signal_ends_it_at_once(server_program, models):
    options = ("--drain-seconds", 600, "--max-wait-us", WAITS)
    with (
        Server(server_program, models / "base.pt", models / "adapters", *options) as server,
        connections_to(server, 1) as (client,),
    ):
        client.sendall(post([[1, 2]]))
        wait_until(lambda: server.metric("torchgraft_queue_rows") == 1)
        server.terminate_and_see_it_drain()
        server.terminate()
        assert server.wait() == -signal.SIGTERM


def test_a_limit_of_the_server_alone_is_told_without_the_model(server_program, models):
    with Server(server_program, models / "base.pt", models / "adapters", "--max-tokens", 8) as server:
        status, answer = server.ask("POST", "/v1/predict", {"input_ids": [[1] * 9]})
    assert status == 413 and answer["error"]["message"] == "expected at most 8 tokens in a row, got 9"
