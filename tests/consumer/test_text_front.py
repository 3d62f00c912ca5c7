"""torchgraft serve: texts over HTTP. Answers are those of the ids that the tokenizer makes, faults are answered, and no
process is left behind."""

import concurrent.futures
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import tokenizers
import torch

from hosts_support import ROOT
from server_support import MOST_TOKENS, TOLERANCE, Server, wait_until

WORDS = [
    "[UNK]",
    "[PAD]",
    "[CLS]",
    "[SEP]",
    *["the", "film", "was", "slow", "and", "its", "end", "came", "late", "we", "liked", "music", "though"],
]
TEXTS = ["The film was slow", "its END came late, though", "музыка \U0001f3b5", ""]
TORCHGRAFT = [sys.executable, ROOT / "scripts" / "graft.py"]  # the same as torchgraft


class TextServer(Server):
    behind = ("--",)

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.pid).children()

    def texts(self, texts: object, adapter: str | None = None, **more):
        return self.ask("POST", "/v1/predict", {"adapter": adapter, "texts": texts, **more})


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory) -> Path:
    """A tokenizer as models have them: it pads and cuts, which a server must not do."""
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.enable_padding(pad_id=1, length=12)
    tokenizer.enable_truncation(6)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def ids_of(tokenizer_file: Path, text: str) -> list[int]:
    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_file))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer.encode(text).ids


def start(server_program: Path, models: Path, tokenizer_file: Path, *options: object, **more) -> TextServer:
    words = [*TORCHGRAFT, "serve"]
    front = ["--tokenizer", tokenizer_file, "--server", server_program, *options]
    return TextServer(words, models / "base.pt", models / "adapters", *front, **more)


@pytest.fixture(scope="module")
def front(server_program, models, tokenizer_file):
    with start(server_program, models, tokenizer_file) as running:
        yield running


@pytest.mark.quick
@pytest.mark.parametrize("adapter", [None, "task-0", "task-1"])
@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_texts_are_answered_as_their_ids_are(front, expected, tokenizer_file, adapter, pooling):
    status, answer = front.texts(TEXTS, adapter, pooling=pooling)
    assert status == 200, answer
    assert answer["adapter"] == adapter
    for got, text in zip(answer["outputs"], TEXTS, strict=True):
        wanted = expected(adapter, ids_of(tokenizer_file, text), pooling)
        torch.testing.assert_close(torch.tensor(got), wanted, **TOLERANCE)


def test_ids_and_all_other_addresses_are_those_of_the_server(front, expected):
    got = front.outputs("task-2", [[2, 5, 6, 3]])[0]
    torch.testing.assert_close(got, expected("task-2", [2, 5, 6, 3]), **TOLERANCE)
    assert front.ask("GET", "/healthz") == (200, {"status": "ok"})
    assert front.ask("GET", "/v1/adapters/task-0")[1]["name"] == "task-0"
    assert front.metric('torchgraft_responses_total{status="200"}') > 0
    assert front.ask("PUT", "/v1/adapters/task-3")[0] == 200
    assert front.ask("GET", "/v1/adapters/none")[0] == 404
    assert front.ask("DELETE", "/nowhere")[0] == 404


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"texts": []}, "at least one text"),
        ({"texts": "a text"}, "expected a list"),
        ({"texts": ["a", 7]}, '"texts"[1]: expected a text, got 7'),
        ({"texts": ["a"], "input_ids": [[2]]}, "got both"),
        ({"texts": ["a"], "adapters": "task-0"}, "unknown field"),
        ({"texts": ["\ud800"]}, "surrogate"),
        ('{"texts": ["a"]', "not JSON"),
        (b'{"texts": ["\xff"]}', "not JSON"),
        ('{"texts": ' + "[" * 100_000 + "]" * 100_000 + "}", "too deeply"),
        ('{"texts": ["a"], "pooling": ' + "9" * 5000 + "}", "not JSON"),
        ('{"texts": ["a"], "texts": ["b"]}', 'an object has the name "texts" twice'),
    ],
    ids=["no text", "no list", "number", "both", "field", "surrogate", "cut", "bytes", "deep", "digits", "twice"],
)
def test_wrong_requests_are_answered(front, body, message):
    status, answer = front.ask("POST", "/v1/predict", body)
    assert status == 400
    assert message in answer["error"]["message"]


def test_large_bodies_are_refused(front):
    status, answer = front.texts(["late " * (1 << 20)])
    assert (status, "4194304 bytes" in answer["error"]["message"]) == (413, True)


def test_long_texts_are_refused_or_cut_as_asked(front, server_program, models, tokenizer_file, expected):
    text = "film " * (MOST_TOKENS + 5)
    status, answer = front.texts([text])
    assert (status, f"at most {MOST_TOKENS}" in answer["error"]["message"]) == (413, True)
    with start(server_program, models, tokenizer_file, "--max-tokens", 8) as cutting:
        status, answer = cutting.texts([text])
        assert status == 200, answer
        ids = ids_of(tokenizer_file, text)[:7] + [WORDS.index("[SEP]")]
        torch.testing.assert_close(torch.tensor(answer["outputs"][0]), expected(None, ids), **TOLERANCE)


def test_many_at_once_get_their_own_answers(front, expected, tokenizer_file):
    def ask(number: int) -> tuple:
        text = " ".join(WORDS[4 + (number + i) % 13] for i in range(1 + number % 9))
        adapter = f"task-{number % 4}"
        return text, adapter, front.texts([text], adapter)

    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(ask, range(200)))
    for text, adapter, (status, answer) in answers:
        assert status == 200, answer
        wanted = expected(adapter, ids_of(tokenizer_file, text))
        torch.testing.assert_close(torch.tensor(answer["outputs"][0]), wanted, **TOLERANCE)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_both_processes(server_program, models, tokenizer_file, number):
    front = start(server_program, models, tokenizer_file)
    (child,) = front.children()
    os.kill(front.pid, number)
    assert front.wait() == 0
    assert not child.is_running()


def test_a_signal_ends_a_server_that_does_not_listen_yet(models, tokenizer_file, tmp_path):
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\nexec sleep 600\n")
    slow.chmod(0o755)
    words = ["serve", models / "base.pt", "--adapters", models / "adapters", "--tokenizer", tokenizer_file]
    command = [*TORCHGRAFT, *words, "--server", slow]
    with subprocess.Popen(list(map(str, command))) as front:
        wait_until(lambda: psutil.Process(front.pid).children())
        (child,) = psutil.Process(front.pid).children()
        wait_until(lambda: child.name() == "sleep")
        front.terminate()
        assert front.wait(30) == 0
        assert not child.is_running()


def test_requests_under_way_are_answered_before_the_end(server_program, models, tokenizer_file):
    with start(server_program, models, tokenizer_file) as front, concurrent.futures.ThreadPoolExecutor(1) as pool:
        (child,) = front.children()
        child.suspend()
        asked = pool.submit(front.texts, TEXTS)
        time.sleep(0.5)
        front.terminate_and_see_it_drain()
        child.resume()
        assert asked.result()[0] == 200
        assert front.wait() == 0


def test_without_the_server_behind_it_ends_and_says_so(server_program, models, tokenizer_file):
    front = start(server_program, models, tokenizer_file)
    front.children()[0].kill()
    assert front.wait() == 1
    assert "the server behind ended with status -9" in front.errors


def test_killed_it_leaves_no_server_behind(server_program, models, tokenizer_file):
    front = start(server_program, models, tokenizer_file)
    (child,) = front.children()
    os.kill(front.pid, signal.SIGKILL)
    front.wait()
    wait_until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, 30)


def run_serve(*words: object) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key != "TORCHGRAFT_SERVER"}
    command = [*TORCHGRAFT, "serve", *words]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120, env=environment)


def test_what_cannot_start_says_why_in_one_line(server_program, models, tokenizer_file, tmp_path):
    (tmp_path / "no.json").write_text(json.dumps({"version": 1}))
    folder = ["--adapters", models / "adapters", "--port", 0]
    whole = [models / "base.pt", *folder, "--tokenizer", tokenizer_file]
    with_server = [*whole, "--server", server_program]
    for words, status, message in [
        (whole, 1, "build examples/server"),
        ([*whole, "--server", tmp_path / "none"], 1, "no program"),
        (
            [models / "base.pt", *folder, "--tokenizer", tmp_path / "no.json", "--server", server_program],
            1,
            "tokenizer",
        ),
        ([models / "base.pt", *folder, "--tokenizer", tmp_path, "--server", server_program], 1, "no such file"),
        ([*with_server, "--", "--capacity", 0], 2, "--capacity"),  # the server's own lines and statuses
        ([tokenizer_file, *with_server[1:]], 1, "tokenizer.json"),
        ([*with_server, "--port", 70000], 2, "65535"),
        ([*with_server, "--max-tokens", 0], 2, "above 0"),
        ([*with_server, "--capacity", 3], 2, "--capacity"),
    ]:
        result = run_serve(*words)
        assert result.returncode == status, (words, result.stderr)
        last = result.stderr.splitlines()[-1]
        assert message in last, result.stderr
        assert "Traceback" not in result.stderr
    result = run_serve(models / "base.pt", "--port", 0, "--tokenizer", tokenizer_file, "--server", server_program)
    assert result.returncode == 2 and "base.pt has no adapters; give the folder of some" in result.stderr
