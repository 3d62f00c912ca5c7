"""examples/server/client.py and answers of /v1/generate that no good server gives, or that proxies make of them."""

import http.server
import json
import subprocess
import sys
import threading

import pytest
import tokenizers
from tokenizers import decoders

from hosts_support import ROOT

CLIENT = ROOT / "examples" / "server" / "client.py"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "it", "'", "s", "is", "##n"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """It cleans up: "it ' s" becomes "it's"."""
    made = tokenizers.BertWordPieceTokenizer(vocab={word: number for number, word in enumerate(WORDS)}, lowercase=False)
    cleaning = tokenizers.Tokenizer.from_str(made.to_str())
    parts = [decoders.WordPiece(cleanup=False), decoders.Fuse(), decoders.Replace(" ' ", "'")]
    cleaning.decoder = decoders.Sequence(parts)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    cleaning.save(str(path))
    return path


def answered(body: bytes, tokenizer, *words, status: int = 200, promised: int | None = None):
    """What the client makes of one answer. promised: how long the answer says it is."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.send_header("Content-Length", str(promised or len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        command = [sys.executable, CLIENT, "--tokenizer", tokenizer, "--url", f"http://127.0.0.1:{server.server_port}"]
        words = [str(word) for word in [*command, "--max-new-tokens", 9, *words, "a"]]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
        server.shutdown()
        return done


def events(*tokens: int, end: str | None = "length") -> bytes:
    data = [{"token": token} for token in tokens] + ([{"finish_reason": end}] if end else [])
    return "".join(f"data: {json.dumps(one)}\n\n" for one in data).encode()


def test_text_that_a_tokenizer_cleans_up(tokenizer):
    ids = [WORDS.index(word) for word in ("it", "'", "s", "a")]
    whole = answered(events(*ids), tokenizer)
    assert (whole.returncode, json.loads(whole.stdout)["written"]) == (0, "it's a")
    streamed = answered(events(*ids), tokenizer, "--stream")
    assert (streamed.returncode, streamed.stdout) == (0, "it '\n")
    assert streamed.stderr == "client.py: all tokens together make another text: it's a\n"
    plain = answered(events(5, 8), tokenizer, "--stream")
    assert (plain.returncode, plain.stdout, plain.stderr) == (0, "it is\n", "")


@pytest.mark.parametrize("words", [(), ("--stream",)])
def test_an_answer_that_breaks_off(tokenizer, words):
    done = answered(events(5, 8, end=None), tokenizer, *words)
    assert done.returncode == 1 and "client.py: the answer broke off: it has no finish_reason" in done.stderr
    body = events(5, 8, end=None)
    done = answered(body, tokenizer, *words, promised=len(body) + 9)
    assert done.returncode == 1 and done.stderr.startswith("client.py: ") and "Traceback" not in done.stderr


def test_an_error_of_a_proxy(tokenizer):
    done = answered(b"<html>bad</html>", tokenizer, status=502)
    assert done.returncode == 1 and done.stderr == "client.py: 502: Bad Gateway\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--temperature", "2"], "--temperature has a meaning with --max-new-tokens only"),
        (["--top-k", "2"], "--top-k has a meaning with --max-new-tokens only"),
        (["--stop", "2"], "--stop has a meaning with --max-new-tokens only"),
        (["--stream"], "--stream has a meaning with --max-new-tokens only"),
        (["--max-new-tokens", "2", "--pooling", "mean"], "--pooling has a meaning without --max-new-tokens only"),
        (["--max-new-tokens", "2", "--most", "9"], "--most has a meaning without --max-new-tokens only"),
    ],
)
def test_arguments_without_a_meaning(tokenizer, words, message):
    command = [sys.executable, CLIENT, "--tokenizer", tokenizer, *words, "--", "a"]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.endswith(f"error: {message}\n")
