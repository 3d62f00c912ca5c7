"""examples/server with decoders of other forms, and options that do not fit the decoder."""

import subprocess

import pytest
import torch

from decoder_support import CountingDecoder, Decoder, FlatDecoder, Written
from generate_support import ask, check_mixes, saved, start


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("models"), Decoder())


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("flat"), FlatDecoder())


def test_a_decoder_without_positions(server_program, tmp_path):
    """It would take padding for tokens: sequences of unequal lengths, whichever join, are written as alone."""
    models = saved(tmp_path, CountingDecoder())
    with start(server_program, models) as server:
        check_mixes(server, Written(models, positions=False), 12, seed=4)
        assert server.stop() == 0


def test_a_cache_that_is_one_list(server_program, flat):
    with start(server_program, flat, "--layers", 2) as server:
        status, answer = ask(server, None, [3, 4], 5)
        assert status == 200, answer
        decoder = torch.jit.load(flat / "base.pt")
        ids, tokens = [3, 4], []
        for _ in range(5):
            nothing = [torch.zeros(1, 2, 0, 8)] * 2
            size = len(ids)
            mask = torch.full((size, size), -1e30).triu(1)[None, None]
            logits = decoder(torch.tensor([ids]), mask, torch.arange(size)[None], nothing)[0]
            tokens.append(int(logits[0, -1].argmax()))
            ids.append(tokens[-1])
        assert answer["tokens"] == tokens


def test_positions_that_the_graph_shows(server_program, models):
    with start(server_program, models) as server:
        status, answer = ask(server, None, [3, 4], 23)
        assert status == 413 and "at most 24 tokens, which the model has positions for, got 2" in str(answer)
        assert ask(server, None, [3, 4], 22)[0] == 200


@pytest.mark.parametrize(
    ("name", "words", "status", "message"),
    [
        ("models", ["--heads", "3"], 1, "Tried with 3 heads (--heads)"),
        ("models", ["--head-size", "9"], 1, "heads of 9 (--head-size)"),
        ("models", ["--mask-of-tokens"], 1, "a mask of tokens (without --mask-of-tokens: one that is added"),
        ("flat", [], 1, "lists of 1 (--layers)"),
        ("models", ["--max-cache-bytes", "511"], 1, "expected room in the caches for at least 2 tokens, of 256 bytes"),
        ("models", ["--workers", "2"], 2, "--workers: the model is a decoder: this has a meaning for encoders only"),
        ("models", ["--pad-id", "1"], 2, "--pad-id: the model is a decoder"),
    ],
)
def test_options_that_do_not_fit_end_the_start(request, server_program, name, words, status, message):
    folder = request.getfixturevalue(name)
    command = [server_program, folder / "base.pt", "--adapters", folder / "adapters", "--port", "0", *words]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=120)
    assert done.returncode == status and message in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and done.stdout == ""
