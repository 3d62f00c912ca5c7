"""examples/server with a decoder: sequences join and leave between steps, and each is written as it is alone."""

import concurrent.futures
import json
import random
import shutil
import threading

import pytest

from decoder_support import CONFIGS, UNGATED, Decoder, Written
from generate_support import LONG, MOST_NEW, MOST_PROMPT, Stream, ask, check_mixes, drawn, saved, start, tokens_of
from hosts_support import run
from server_support import wait_until

BYTES_PER_TOKEN = 2 * 2 * 8 * 4  # keys and values of two heads of 8


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("models"), Decoder(LONG + MOST_PROMPT))


@pytest.fixture(scope="module")
def written(models):
    return Written(models)


@pytest.fixture(scope="module")
def server(server_program, models):
    with start(server_program, models) as running:
        yield running
        # An answer may be there before its sequence has left.
        for left in ("sequences_running", "sequences_waiting", "cache_bytes"):
            wait_until(lambda left=left: running.metric(f"torchgraft_{left}") == 0)
        assert running.stop() == 0


@pytest.mark.quick
def test_each_adapter_alone(server, written):
    source = random.Random(0)
    for adapter in (None, *CONFIGS):
        prompt = drawn(source)[1]
        tokens = tokens_of(server, adapter, prompt, MOST_NEW)
        assert tokens == written(adapter, prompt, MOST_NEW)
        if adapter is None or adapter in UNGATED:
            assert tokens == written.full_pass(adapter, prompt, tokens)
    several = {adapter: tuple(tokens_of(server, adapter, [3, 4, 5], MOST_NEW)) for adapter in (None, *CONFIGS)}
    assert len(set(several.values())) == len(several)  # adapters change what is written


def test_compositions_in_requests(server, written):
    texts = ["Stack(bottleneck, lora)", "Average(lora, wide)", "Stack(prefixes, bottleneck)"]
    source = random.Random(7)
    cases = [(name, drawn(source)[1], MOST_NEW) for name in (*texts, None, "mam", *texts, "bottleneck")]
    with concurrent.futures.ThreadPoolExecutor(len(cases)) as pool:
        for case, found in zip(cases, pool.map(lambda case: tokens_of(server, *case), cases), strict=True):
            assert found == written(*case), case


def test_sequences_of_all_adapters_and_lengths_join_and_leave(server, written):
    steps, rows = (server.metric(f"torchgraft_batch_rows_{word}") for word in ("count", "sum"))
    evicted = server.metric("torchgraft_adapter_evictions_total")
    check_mixes(server, written, 40, seed=1)
    assert server.metric("torchgraft_adapter_evictions_total") > evicted
    shared = server.metric("torchgraft_batch_rows_sum") - rows
    assert shared > server.metric("torchgraft_batch_rows_count") - steps, "no two sequences shared a step"


@pytest.mark.slow(seconds=120)
def test_a_thousand_mixes(server, written):
    check_mixes(server, written, 1000, seed=2)


def test_long_and_short_ones_together(server, written):
    cases = [("lora", [5, 6], 700), ("unipelt", [9], 150), (None, [7, 7, 7], 400)]
    cases += [(adapter, [number], 10) for number, adapter in enumerate([None, *CONFIGS])]
    with concurrent.futures.ThreadPoolExecutor(len(cases)) as pool:
        found = list(pool.map(lambda case: tokens_of(server, *case), cases))
    for case, tokens in zip(cases, found, strict=True):
        assert tokens == written(*case), case


def test_streaming_and_stop(server, written):
    whole = written("lora", [3, 4], 30)
    stop = whole[-1]
    expected = whole[: whole.index(stop) + 1]
    stream = Stream(server, "lora", [3, 4], 200, stop=[stop, 99])
    assert stream.status == 200 and stream.content_type == "text/event-stream"
    assert stream.rest() == (expected, ("message", {"finish_reason": "stop"}))
    status, answer = ask(server, "lora", [3, 4], 200, stop=[stop])
    assert (status, answer) == (200, {"adapter": "lora", "tokens": expected, "finish_reason": "stop"})
    assert ask(server, None, [3], 4)[1]["finish_reason"] == "length"


def test_each_token_of_a_stream_is_an_event(server):
    stream = Stream(server, None, [3, 4], LONG)
    assert "token" in stream.event()[1]
    tokens, end = stream.rest()
    assert len(tokens) == LONG - 1 and end[1] == {"finish_reason": "length"}


def test_a_seed_gives_the_same_tokens_whatever_runs_beside(server, generate, models, tmp_path):
    how = {"do_sample": True, "temperature": 1.5, "top_k": 9, "top_p": 0.9}
    alone = [tokens_of(server, None, [3, 4, 5], MOST_NEW, seed=seed, **how) for seed in range(4)]
    assert len({tuple(tokens) for tokens in alone}) > 1
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        again = list(pool.map(lambda i: tokens_of(server, None, [3, 4, 5], MOST_NEW, seed=i % 4, **how), range(16)))
    assert again == alone * 4
    (tmp_path / "prompts.json").write_text('{"prompts": [[3, 4, 5]]}')
    words = "--sample --temperature 1.5 --top-k 9 --top-p 0.9 --seed 2 --heads 2 --head-size 8 --max-new-tokens"
    run(generate, models / "base.pt", tmp_path / "prompts.json", *words.split(), MOST_NEW,
        "--output", tmp_path / "tokens.json")  # fmt: skip
    assert json.loads((tmp_path / "tokens.json").read_text())["tokens"] == [alone[2]]


def test_without_a_seed_other_tokens_are_drawn_each_time(server):
    how = {"do_sample": True, "temperature": 1e6}  # all 31 tokens alike: the same twelve once in 31 ** 12 times
    assert tokens_of(server, None, [3], 12, **how) != tokens_of(server, None, [3], 12, **how)


def test_an_adapter_that_is_replaced_or_evicted_stays_with_its_sequence(server_program, models, written, tmp_path):
    adapters = shutil.copytree(models / "adapters", tmp_path / "adapters")
    with start(server_program, models, adapters=adapters) as server:
        before = Stream(server, "lora", [3, 4], 1500)
        assert before.status == 200
        removed = Stream(server, "mam", [3, 4], 1500)
        shutil.rmtree(adapters / "lora")
        shutil.copytree(adapters / "wide", adapters / "lora")
        assert server.ask("PUT", "/v1/adapters/lora")[0] == 200
        assert server.ask("DELETE", "/v1/adapters/mam")[0] == 200
        for adapter in ("unipelt", "prefixes", "bottleneck", "wide"):  # others want their rows
            assert tokens_of(server, adapter, [5], 3) == written(adapter, [5], 3)
        assert tokens_of(server, "lora", [3, 4], MOST_NEW) == written("wide", [3, 4], MOST_NEW)
        assert ask(server, "mam", [3, 4], 2)[0] == 404
        assert before.rest()[0] == written("lora", [3, 4], 1500)
        assert removed.rest()[0] == written("mam", [3, 4], 1500)


def test_banks_that_grow_while_a_sequence_runs(server_program, models, written, tmp_path):
    adapters = tmp_path / "adapters"
    shutil.copytree(models / "adapters" / "lora", adapters / "lora")
    with start(server_program, models, adapters=adapters) as server:
        before = Stream(server, "lora", [3, 4], 1500)
        assert before.status == 200
        shutil.copytree(models / "adapters" / "mam", adapters / "mam")  # needs other sites: another module
        assert tokens_of(server, "mam", [5], 30) == written("mam", [5], 30)
        assert server.metric("torchgraft_bank_rebuilds_total") == 1
        assert before.rest()[0] == written("lora", [3, 4], 1500)


def test_caches_stay_within_their_bytes(server_program, models, written):
    """Twice the tokens' bytes: a step copies them. What does not fit waits, in order of arrival."""
    with start(server_program, models, "--max-cache-bytes", 2 * BYTES_PER_TOKEN * 1000) as server:
        limit = "expected at most 1000 tokens before the last one, for which the server has caches"
        refused = f'{limit}, got 2 and "max_new_tokens" 1000'
        status, answer = ask(server, None, [3, 4], 1000)
        assert status == 413 and answer["error"]["message"] == refused
        largest, running, done = [0.0], [0.0], threading.Event()

        def watch():
            while not done.is_set():
                largest[0] = max(largest[0], server.metric("torchgraft_cache_bytes"))
                running[0] = max(running[0], server.metric("torchgraft_sequences_running"))

        watcher = threading.Thread(target=watch)
        watcher.start()
        cases = [("lora", [3], 900), (None, [4], 80), ("mam", [5], 700), *(("wide", [i], 90) for i in range(12))]
        with concurrent.futures.ThreadPoolExecutor(len(cases)) as pool:
            found = list(pool.map(lambda case: tokens_of(server, *case), cases))
        done.set()
        watcher.join()
        for case, tokens in zip(cases, found, strict=True):
            assert tokens == written(*case), case
        assert 0 < largest[0] <= 1000 * BYTES_PER_TOKEN
        assert running[0] > 1


@pytest.mark.parametrize("words", [("--max-cache-bytes", 2 * BYTES_PER_TOKEN * 600), ("--max-batch-tokens", 4)])
def test_neither_long_nor_short_ones_starve(server_program, models, written, words):
    """While short ones come without end, a long one that needs most of the cache begins and comes to its end; so does
    one that runs already, however many prompts come."""
    with start(server_program, models, "--max-queue", 64, *words) as server:
        done = threading.Event()

        def keep_asking(number: int) -> int:
            count = 0
            while not done.is_set():
                case = ("lora", [number, 3, 4], 5)
                assert tokens_of(server, *case) == written(*case)
                count += 1
            return count

        written("lora", [1, 3, 4], 5)
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            askers = [pool.submit(keep_asking, number) for number in range(6)]
            try:
                assert tokens_of(server, "mam", [5], 550) == written("mam", [5], 550)
            finally:
                done.set()
            assert all(asker.result() > 0 for asker in askers)


def test_a_full_queue(server_program, models):
    with start(server_program, models, "--max-batch", 1, "--max-queue", 1) as server:
        first = Stream(server, None, [3], LONG)
        assert first.status == 200
        second = threading.Thread(target=lambda: ask(server, None, [4], 1))
        second.start()
        wait_until(lambda: server.metric("torchgraft_sequences_waiting") == 1)
        status, answer = ask(server, None, [5], 1)
        assert status == 503 and "too many requests are waiting" in answer["error"]["message"]
        first.close()
        second.join()


def test_clients_that_go_free_their_sequences(server_program, models, written):
    with start(server_program, models, "--max-batch", 2) as server:
        running = Stream(server, None, [3], LONG)
        silent = server.connection()
        body = json.dumps({"adapter": "lora", "input_ids": [3], "max_new_tokens": LONG})
        silent.request("POST", "/v1/generate", body)
        wait_until(lambda: server.metric("torchgraft_sequences_running") == 2)
        waiting = server.connection()
        waiting.request("POST", "/v1/generate", body)
        wait_until(lambda: server.metric("torchgraft_sequences_waiting") == 1)
        waiting.close()
        wait_until(lambda: server.metric("torchgraft_sequences_waiting") == 0)
        assert server.metric("torchgraft_sequences_running") == 2
        running.close()
        silent.close()
        wait_until(lambda: server.metric("torchgraft_sequences_running") == 0)
        assert server.metric('torchgraft_sequences_total{end="cancelled"}') == 3
        wait_until(lambda: server.metric("torchgraft_cache_bytes") == 0)
        assert tokens_of(server, "lora", [3], MOST_NEW) == written("lora", [3], MOST_NEW)
        assert server.stop() == 0


def test_sigterm_drains(server_program, models, written):
    with start(server_program, models) as server:
        stream = Stream(server, "lora", [3, 4], LONG)
        assert stream.status == 200
        server.terminate_and_see_it_drain()
        assert stream.rest() == (written("lora", [3, 4], LONG), ("message", {"finish_reason": "length"}))
        assert server.wait() == 0


def test_sigterm_ends_what_takes_too_long(server_program, models):
    with start(server_program, models, "--drain-seconds", 0) as server:
        stream = Stream(server, "lora", [3, 4], LONG)
        assert stream.status == 200
        server.terminate_and_see_it_drain()
        name, data = stream.rest()[1]
        assert name == "error" and data["error"]["status"] == 503
        assert server.wait() == 0
