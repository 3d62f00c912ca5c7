"""An adapter that scripts/train.py has trained, served: all defaults, the same numbers for the same batch."""

import csv
import json
import sys

import pytest
import tokenizers
import torch

import torchgraft
from hosts_support import ROOT, run
from server_support import TOLERANCE, VOCABULARY, Server, traced_encoder

ROWS = [[5, 6, 7, 8, 9, 10, 11, 12], [20], [30, 31, 32]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """base.pt, a tokenizer, and train.py's output in out/ and in adapters/trained."""
    folder = tmp_path_factory.mktemp("trained")
    traced_encoder().save(folder / "base.pt")
    words = {f"w{number}": number for number in range(VOCABULARY)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w1"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    with open(folder / "train.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for number in range(40):
            label = ("low", "high")[number % 2]
            text = [f"w{(number % 2) * 25 + index}" for index in range(1, 3 + number % 9)]
            writer.writerow([" ".join(text), label])
    run(sys.executable, ROOT / "scripts" / "train.py", folder / "base.pt", "-o", folder / "out", "--save-model",
        "--train", folder / "train.csv", "--validation-fraction", 0.2, "--epochs", 2, "--learning-rate", 0.05,
        "--prefix-learning-rate", 0.05)  # fmt: skip
    (folder / "adapters").mkdir()
    (folder / "out" / "adapter").rename(folder / "adapters" / "trained")
    return folder


def padded(rows):
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    return ids, (ids > 0).long()


def logits(module, rows):
    with torch.no_grad():
        return module.forward_with_head(*padded(rows))


def test_the_server_answers_what_was_trained(server_program, trained):
    expected = logits(torch.jit.load(trained / "out" / "model.pt"), ROWS)
    directory = {"trained": trained / "adapters" / "trained"}
    base = torch.jit.load(trained / "base.pt")
    torch.testing.assert_close(logits(torchgraft.graft(base, adapters=directory), ROWS), expected, **TOLERANCE)
    with pytest.warns(UserWarning, match="was trained with gates over all tokens"):
        unpadded = logits(torchgraft.graft(base, adapters=directory, gate_pooling="unpadded"), ROWS)
    assert (unpadded - expected).abs().max() > 1e-3  # so that the test can tell one from the other
    with Server(server_program, trained / "base.pt", trained / "adapters") as server:
        status, answer = server.predict("trained", ROWS)
        assert status == 200, answer
        torch.testing.assert_close(torch.tensor(answer["logits"]), expected, **TOLERANCE)
        assert server.stop() == 0 and server.errors == ""
    with Server(server_program, trained / "base.pt", trained / "adapters", "--gate-pooling", "unpadded") as server:
        torch.testing.assert_close(torch.tensor(server.predict("trained", ROWS)[1]["logits"]), unpadded, **TOLERANCE)
        server.stop()
    assert "warning: AdapterPool: 'trained' was trained with gates over all tokens" in server.errors


def test_ray_answers_what_was_trained(trained, monkeypatch, capfd):
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "ray_serve"))
    encoder_module = __import__("encoder")
    try:
        encoder = encoder_module.Encoder(trained / "base.pt", trained / "adapters", capacity=2, threads=1)
        request = encoder_module.Request(encoder.load("trained", "0"), ROWS, "first")
        ((status, answer),) = encoder.run([request])
        assert status == 200, answer
        with torch.no_grad():
            expected = torch.jit.load(trained / "out" / "model.pt")(*padded(ROWS))[:, 0]
        torch.testing.assert_close(torch.tensor(answer["outputs"]), expected, **TOLERANCE)
        encoder_module.Encoder(trained / "out" / "model.pt", trained / "adapters", capacity=2, threads=1)
        assert capfd.readouterr().err == ""
        module = torchgraft.rename_adapter(torch.jit.load(trained / "out" / "model.pt"), "task", "trained")
        module.save(trained / "shadows.pt")
        encoder_module.Encoder(trained / "shadows.pt", trained / "adapters", capacity=2, threads=1)
        assert "adapter trained cannot be served: the model's file has" in capfd.readouterr().err
    finally:
        del sys.modules["encoder"]


def test_the_directory_says_what_was_trained(trained):
    config = json.loads((trained / "adapters" / "trained" / "adapter_config.json").read_text())
    assert config.get("gate_pooling", "all") == "all"
