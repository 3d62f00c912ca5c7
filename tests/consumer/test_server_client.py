"""examples/server/client.py: texts in, outputs out, through the model's tokenizer."""

import json
import subprocess
import sys

import pytest
import tokenizers
import torch
import transformers

import torchgraft
from hosts_support import ROOT
from server_support import MOST_TOKENS, VOCABULARY, Expected, Server, save_random_adapter, traced_encoder

CLIENT = ROOT / "examples" / "server" / "client.py"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "serv", "##er", "is", "quick", "naive", "café", ",", "!"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A BERT tokenizer of few words, as transformers saves it: with padding and truncation switched on."""
    assert len(WORDS) <= VOCABULARY
    made = tokenizers.BertWordPieceTokenizer(vocab={word: number for number, word in enumerate(WORDS)}, lowercase=False)
    made.enable_padding(length=20)
    made.enable_truncation(4)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    path.with_name("vocab.txt").write_text("\n".join(WORDS))
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    base = traced_encoder()
    base.save(folder / "base.pt")
    save_random_adapter(base, folder / "adapters" / "task", "unipelt", 0)
    return folder


@pytest.fixture(scope="module")
def server(server_program, models):
    with Server(server_program, models / "base.pt", models / "adapters") as running:
        yield running


def ask(server, tokenizer, *words) -> subprocess.CompletedProcess:
    command = [sys.executable, CLIENT, "--tokenizer", tokenizer, "--url", f"http://127.0.0.1:{server.port}", *words]
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("adapter", [None, "task"])
@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_texts_are_answered_as_their_tokens(server, models, tokenizer, adapter, pooling):
    expected = Expected(torch.jit.load(models / "base.pt"), models / "adapters")
    by_python = transformers.BertTokenizer(tokenizer.with_name("vocab.txt"), do_lower_case=False)  # transformers' own
    texts = ["a server is quick, naive!", "a café\tserver漢a", ""]
    done = ask(server, tokenizer, "--pooling", pooling, *(["--adapter", adapter] if adapter else []), *texts)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["text"] for line in lines] == texts
    for line, text in zip(lines, texts, strict=True):
        ids = by_python(text).input_ids
        torch.testing.assert_close(torch.tensor(line["output"]), expected(adapter, ids, pooling), rtol=0, atol=1e-5)


def test_logits_are_answered_by_label(server, models, tokenizer):
    """Of adapters with heads; their hidden states are there for the asking."""
    heads = {
        "rated": torchgraft.HeadConfig(num_labels=2, labels=["no", "yes"]),
        "tagged": torchgraft.HeadConfig(head_type="tagging", num_labels=2, labels=["out", "in"]),
        "nameless": torchgraft.HeadConfig(num_labels=3),
    }
    adapters = dict.fromkeys(heads, models / "adapters" / "task")
    model = torchgraft.graft(torch.jit.load(models / "base.pt"), adapters=adapters)
    ids = [[2, 4, 7, 3]]  # [CLS] a is [SEP]
    answers = {}
    for name, head in heads.items():
        model = torchgraft.add_head(model, name, head)
        torchgraft.save_adapter(model, name, models / "adapters" / name)
        done = ask(server, tokenizer, "--adapter", name, "a is")
        assert done.returncode == 0, done.stderr
        answers[name] = json.loads(done.stdout)["logits"]
    logits = {name: server.predict(name, ids)[1]["logits"][0] for name in heads}
    assert answers["rated"] == pytest.approx(dict(zip(["no", "yes"], logits["rated"], strict=True)), abs=1e-5)
    assert answers["nameless"] == pytest.approx(logits["nameless"], abs=1e-5)
    assert len(answers["tagged"]) == 4
    for token, expected in zip(answers["tagged"], logits["tagged"], strict=True):
        assert token == pytest.approx(dict(zip(["out", "in"], expected, strict=True)), abs=1e-5)
    assert "output" in json.loads(ask(server, tokenizer, "--adapter", "rated", "--pooling", "mean", "a is").stdout)


def test_long_texts_are_cut_where_the_caller_says(server, tokenizer):
    words = " ".join(["a"] * 40)
    assert ask(server, tokenizer, words).returncode == 1  # more than the model has positions
    done = ask(server, tokenizer, "--most", MOST_TOKENS, words)
    assert done.returncode == 0, done.stderr


def test_what_the_server_refuses_is_said(server, tokenizer):
    done = ask(server, tokenizer, "--adapter", "nobody", "a")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.strip() == "client.py: 404: no adapter is called 'nobody'"


def test_a_tokenizer_that_is_none(server, tmp_path):
    (tmp_path / "garbage.json").write_text("{}")
    for path in (tmp_path / "missing.json", tmp_path / "garbage.json"):
        done = ask(server, path, "a")
        assert done.returncode == 2 and str(path) in done.stderr and "Traceback" not in done.stderr


def test_a_server_that_is_not_there(server, tokenizer):
    command = [sys.executable, str(CLIENT), "--tokenizer", str(tokenizer), "--url", "http://127.0.0.1:1", "a"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.startswith("client.py: ") and "Traceback" not in done.stderr


def test_a_decoder_continues_texts(server_program, tokenizer, tmp_path):
    """Drawn and greedily, as text and as JSON; errors of the server are said."""
    from decoder_support import Decoder, Written, save_models
    from generate_support import MOST_NEW, start

    torch.manual_seed(0)
    save_models(tmp_path, Decoder(64))
    read = tokenizers.Tokenizer.from_file(str(tokenizer))
    read.no_padding()
    read.no_truncation()
    prompt = read.encode("a is").ids
    with start(server_program, tmp_path) as server:
        how = ("--adapter", "lora", "--max-new-tokens", MOST_NEW)
        done = ask(server, tokenizer, *how, "a is", "quick")
        assert done.returncode == 0, done.stderr
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        assert [line["text"] for line in lines] == ["a is", "quick"]
        assert lines[0]["written"] == read.decode(Written(tmp_path)("lora", prompt, MOST_NEW))
        assert ask(server, tokenizer, *how, "--stream", "a is").stdout == lines[0]["written"] + "\n"
        drawn = [
            ask(server, tokenizer, *how, "--temperature", 3, "--seed", seed, "a is").stdout for seed in (1, 1, 2, 3)
        ]
        assert drawn[0] == drawn[1] and len(set(drawn)) > 1
        done = ask(server, tokenizer, "--max-new-tokens", 100, "a is")
        assert done.returncode == 1 and done.stderr.startswith("client.py: 413: expected at most 64 tokens")
