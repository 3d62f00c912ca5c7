"""examples/server with decoders of other forms, and options that do not fit the decoder."""

import subprocess

import pytest
import torch

from decoder_support import CountingDecoder, Decoder, FlatDecoder, Written
from generate_support import ask, check_mixes, saved, start, tokens_of


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
        status, answer = ask(server, None, [3, 4], 24)
        expected = "at most 24 tokens before the last one, which the model has positions for, got 2 and "
        assert status == 413 and expected in answer["error"]["message"]
        written = Written(models)
        for adapter in (None, "unipelt"):  # the last token needs no position
            assert tokens_of(server, adapter, [3, 4], 23) == written(adapter, [3, 4], 23)
        assert ask(server, None, [3] * 24, 1)[0] == 200 and ask(server, None, [3] * 24, 2)[0] == 413


def test_the_cache_is_filled_to_its_end(server_program, models):
    """Room for 20 tokens, and one more that no cache keeps."""
    with start(server_program, models, "--max-cache-bytes", 20 * 256) as server:
        status, answer = ask(server, None, [3, 4], 20)
        expected = "at most 20 tokens before the last one, for which the server has caches, got 2 and "
        assert status == 413 and expected in answer["error"]["message"]
        assert tokens_of(server, "lora", [3, 4], 19) == Written(models)("lora", [3, 4], 19)


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
