"""examples/server with a decoder: memory that runs out, and adapters that cannot be had, end sequences, each once."""

import pytest

from decoder_support import Decoder, Written
from generate_support import LONG, MOST_NEW, MOST_PROMPT, Stream, ask, saved, start, tokens_of
from hosts_support import ROOT, run
from server_support import wait_until


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("models"), Decoder(LONG + MOST_PROMPT))


@pytest.fixture(scope="module")
def written(models):
    return Written(models)


@pytest.fixture(scope="module")
def little_memory(tmp_path_factory):
    """The environment of a server that cannot select rows of its caches while there is a file, and the file."""
    folder = tmp_path_factory.mktemp("preload")
    library, file = folder / "no_index_select.so", folder / "no_memory"
    run("g++", "-shared", "-fPIC", "-o", library, ROOT / "tests" / "consumer" / "no_index_select.cpp", "-ldl")
    return {"LD_PRELOAD": str(library), "NO_INDEX_SELECT": str(file)}, file


def ended(server, how: str) -> float:
    text = server.ask("GET", "/metrics")[1]
    name = f'torchgraft_sequences_total{{end="{how}"}}'
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name))


@pytest.mark.parametrize("how", ["gone", "length"])
def test_no_memory_to_drop_a_sequence(server_program, models, written, little_memory, how):
    """The one that leaves has ended as it should, once; those beside it get an error; later ones are served."""
    environment, file = little_memory
    with start(server_program, models, environment=environment) as server:
        first = Stream(server, None, [3, 4], 1000 if how == "length" else LONG)
        beside = Stream(server, None, [5, 4], LONG if how == "gone" else 1900)  # of the same class
        assert first.status == beside.status == 200
        for _ in range(3):  # the first is of the prompt's own pass; then it has joined the other
            assert beside.event()[0] == "message"
        file.touch()
        try:
            if how == "gone":
                first.close()
            else:
                assert first.rest() == (written(None, [3, 4], 1000), ("message", {"finish_reason": "length"}))
            name, data = beside.rest()[1]
        finally:
            file.unlink()
        assert name == "error" and data["error"]["status"] == 500
        assert tokens_of(server, "lora", [3], MOST_NEW) == written("lora", [3], MOST_NEW)
        counts = [ended(server, end) for end in ("cancelled", "length", "error")]
        assert counts == ([1, 1, 1] if how == "gone" else [0, 2, 1])
        assert server.stop() == 0


def test_an_adapter_whose_place_others_keep(server_program, models, written):
    """With one row, that a sequence holds: 503, and the sequence goes on."""
    with start(server_program, models, "--capacity", 1, "--max-adapter-wait-ms", 50) as server:
        running = Stream(server, "lora", [3, 4], LONG)
        assert running.status == 200
        for _ in range(2):
            status, answer = ask(server, "mam", [5], 3)
            assert status == 503 and "no place for 'mam': others have held all 1 rows" in answer["error"]["message"]
        assert server.ask("PUT", "/v1/adapters/mam")[0] == 503
        assert running.rest()[0] == written("lora", [3, 4], LONG)
        assert tokens_of(server, "mam", [5], 3) == written("mam", [5], 3)


def test_clients_that_go_bring_in_no_adapter(server_program, models, written, waits_at_open):
    file = models / "adapters" / "mam" / "adapter.safetensors"
    wait = file.with_name(file.name + ".wait")
    with start(server_program, models, environment=waits_at_open) as server:
        wait.touch()
        try:
            first = server.connection()
            first.request("POST", "/v1/generate", '{"adapter": "mam", "input_ids": [5], "max_new_tokens": 3}')
            wait_until(lambda: server.metric("torchgraft_sequences_waiting") == 1)
            gone = server.connection()
            gone.request("POST", "/v1/generate", '{"adapter": "wide", "input_ids": [5], "max_new_tokens": 3}')
            wait_until(lambda: server.metric("torchgraft_sequences_waiting") == 2)
            gone.close()
            server.metric("torchgraft_sequences_waiting")  # so the server has seen it go
            server.metric("torchgraft_sequences_waiting")
        finally:
            wait.unlink()
        assert first.getresponse().status == 200
        wait_until(lambda: server.metric("torchgraft_sequences_waiting") == 0)
        assert server.metric("torchgraft_adapter_loads_total") == 1
        assert tokens_of(server, "wide", [5], 3) == written("wide", [5], 3)
