"""examples/server with a decoder: what goes wrong is one sequence's alone, and bad requests are answered."""

import concurrent.futures
import random

import pytest

from decoder_support import (
    GIVES_DOUBLE,
    GIVES_NAN,
    GIVES_SHORT,
    NORMAL,
    RAISES,
    WRITES_DOUBLE,
    WRITES_ERROR,
    WRITES_NAN,
    WRITES_SHORT,
    Decoder,
    FaultyDecoder,
    Written,
)  # fmt: skip
from generate_support import LONG, MOST_PROMPT, Stream, ask, drawn, saved, start, tokens_of
from server_support import Server


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("models"), Decoder(LONG + MOST_PROMPT))


@pytest.fixture(scope="module")
def server(server_program, models):
    with start(server_program, models) as running:
        yield running
        assert running.stop() == 0


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("faulty"), FaultyDecoder())


@pytest.mark.parametrize("in_step", [False, True], ids=["prompt", "step"])
def test_a_fault_is_of_its_sequence_alone(server_program, faulty, in_step):
    """The model gives caches of another dtype or length, raises, gives NaN, or has no more positions: that sequence
    gets an error, and the others go on."""
    messages = {
        (GIVES_DOUBLE, WRITES_DOUBLE): "expected the cache 'past' to be Float of shape [1, 2, ",
        (GIVES_SHORT, WRITES_SHORT): "expected the cache 'past' to be Float of shape [1, 2, ",
        (RAISES, WRITES_ERROR): "token 28",
        (GIVES_NAN, WRITES_NAN): "its logits are not numbers",
    }
    written = Written(faulty)
    with Server(server_program, faulty / "base.pt", faulty / "adapters") as server:
        source = random.Random(3)
        good = [drawn(source, NORMAL) for _ in range(24)]
        bad = {("lora", (5, causes[in_step]), 9): message for causes, message in messages.items()}
        bad["mam", (5, 6, 7), 60] = "index out of range"  # it has 24 positions
        cases = [*good, *bad] * 2
        source.shuffle(cases)
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(lambda case: ask(server, case[0], list(case[1]), case[2]), cases))
        for case, (status, answer) in zip(cases, answers, strict=True):
            if isinstance(case[1], tuple):
                assert status == 500 and bad[case] in answer["error"]["message"], (case, answer)
            else:
                assert status == 200 and answer["tokens"] == written(*case), (case, answer)
        stream = Stream(server, None, [5, WRITES_SHORT], 9)
        tokens, (name, data) = stream.rest()
        assert tokens == [GIVES_SHORT] and name == "error" and data["error"]["status"] == 500
        assert server.metric('torchgraft_sequences_total{end="error"}') == 2 * len(bad) + 1


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({}, 400, '"input_ids" is missing'),
        ({"input_ids": []}, 400, "expected at least one token id"),
        ({"input_ids": [[3]]}, 400, '"input_ids": expected token ids, integers from 0, got a list'),
        ({"input_ids": [3.5]}, 400, "got 3.5"),
        ({"input_ids": [-1]}, 400, "got -1"),
        ({"input_ids": [2**63]}, 400, "got 9223372036854775808"),
        ({"input_ids": [3], "max_new_tokens": 0}, 400, "expected an integer from 1 to 1099511627776, got 0"),
        ({"input_ids": [3], "max_new_tokens": 2**64 - 1}, 400, "an integer from 1 to 1099511627776, got 184467440737"),
        ({"input_ids": [3], "max_new_tokens": True}, 400, '"max_new_tokens": expected an integer from 1 to 10995116'),
        ({"input_ids": [3], "stop": [3] * 65}, 400, '"stop": expected at most 64 token ids, got 65'),
        ({"input_ids": [3], "stop": 5}, 400, '"stop": expected a list of integers, got 5'),
        ({"input_ids": [3], "stream": 1}, 400, '"stream": expected true or false, got 1'),
        ({"input_ids": [3], "temperature": 2}, 400, '"temperature" has a meaning with "do_sample": true only'),
        ({"input_ids": [3], "do_sample": True, "temperature": 0}, 400, '"temperature": expected a number from 0.000'),
        ({"input_ids": [3], "do_sample": True, "top_k": 0}, 400, '"top_k": expected an integer from 1 to 10995116'),
        ({"input_ids": [3], "do_sample": True, "top_p": 1.5}, 400, '"top_p": expected a number above 0, at most 1'),
        ({"input_ids": [3], "do_sample": True, "seed": 2**64}, 400, "from 0 to 18446744073709551615, got 1.84467"),
        ({"input_ids": [3], "beams": 2}, 400, 'unknown field "beams"'),
        ('{"input_ids": [3], "input_ids": [4]}', 400, 'the body has "input_ids" twice'),
        ({"input_ids": [3], "adapter": "nobody"}, 404, "no adapter is called 'nobody'"),
        ({"input_ids": [3], "adapter": "../secret"}, 404, "expected an adapter's name of letters"),
        ({"input_ids": [3] * LONG}, 413, f"expected at most {LONG + MOST_PROMPT} tokens"),
        ({"input_ids": [99]}, 400, "expected token ids from 0 and below 31, which the model has, got 99"),
    ],
)  # fmt: skip
def test_bad_requests(server, body, status, message):
    got, answer = server.ask("POST", "/v1/generate", body)
    assert got == status and message in answer["error"]["message"], answer
    if isinstance(body, dict):  # a stream that has not begun: the same answer
        assert server.ask("POST", "/v1/generate", {"stream": True, **body})[0] == status


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Split(bottleneck, bottleneck, splits=[1, 2])", "splits its tokens or its rows, of which a step has one"),
        ("BatchSplit(bottleneck, bottleneck, batch_sizes=[1, 0])", "compose its adapters without Split and BatchSplit"),
        ("Parallel(lora, wide)", "no pool holds a Parallel; acquire each of its parts"),
        ("MultiTask(lora, wide)", "no pool holds a MultiTask; acquire for each row the part of its task"),
        ("Fuse(bottleneck, bottleneck)", "AdapterFusion layers, which no pool holds yet"),
    ],
)
def test_compositions_that_no_sequence_can_use(server, text, message):
    for _ in range(2):  # the second time its adapters are in memory
        for stream in (False, True):
            status, answer = ask(server, text, [3, 4, 5], 2, stream=stream)
            assert status == 422 and message in answer["error"]["message"], answer


def test_limits_that_the_command_line_gives(server_program, models):
    with start(server_program, models, "--max-positions", 20, "--vocabulary", 10) as server:
        status, answer = ask(server, None, [3, 4], 20)
        expected = "at most 20 tokens before the last one, which the model has positions for, got 2 and "
        assert status == 413 and expected in answer["error"]["message"]
        assert len(tokens_of(server, None, [3, 4], 19)) == 19  # the last one needs no position
        assert ask(server, None, [3, 10], 1) == (
            400,
            {
                "error": {
                    "status": 400,
                    "message": "expected token ids from 0 and below 10, which the model has, got 10",
                }
            },
        )


def test_a_decoder_reads_no_texts_and_an_encoder_writes_none(server, server_program, tmp_path):
    from server_support import save_models as save_encoder

    assert server.predict(None, [[3]])[0] == 404 and server.ask("GET", "/v1/generate")[0] == 405
    save_encoder(tmp_path, 1)
    with Server(server_program, tmp_path / "base.pt", tmp_path / "adapters") as encoder:
        status, answer = ask(encoder, None, [3], 1)
        assert status == 404 and "no decoder with caches" in answer["error"]["message"]
