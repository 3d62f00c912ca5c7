#!/usr/bin/env python3
"""Asks the server about texts: tokenises them here, with the tokenizer of the model, and sends token ids.

    client.py --tokenizer tokenizer.json [--adapter NAME] [--url http://127.0.0.1:8080] TEXT...
    client.py --tokenizer tokenizer.json --max-new-tokens 40 [--stream] TEXT...

Prints one line of JSON for each text: of an adapter with a head the logits, by label if its labels have names, else
the hidden state, of the first token or as --pooling says. With --max-new-tokens: what a decoder writes behind the text;
with --stream as text, as soon as it is known. Needs the package `tokenizers`.
"""

import argparse
import http.client
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator

from tokenizers import Tokenizer


class ServerError(Exception):
    """The error that the server answered."""


class TextChangedError(Exception):
    """All tokens together make another text than what was yielded: `text`. Some tokenizers clean up what they join."""

    def __init__(self, text: str) -> None:
        super().__init__(f"all tokens together make another text: {text}")
        self.text = text


def predict(
    url: str,
    tokenizer: Tokenizer,
    texts: list[str],
    adapter: str | None = None,
    pooling: str | None = None,
    most: int = 512,
) -> dict:
    """The answer: "outputs", or "logits" and perhaps "labels", one list for each text. Cuts texts at `most` tokens.

    Args:
        adapter: None is the base model.
        pooling: "first" or "mean": hidden states even of an adapter with a head; None: logits if it has one.

    Raises:
        ServerError: the server refused; OSError: it cannot be reached.
    """
    tokenizer.enable_truncation(most)
    tokenizer.no_padding()  # the server pads, and knows what is padding
    ids = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    body = {"adapter": adapter, "input_ids": ids} | ({"pooling": pooling} if pooling else {})
    with _opened(url + "/v1/predict", body) as response:
        return json.load(response)


def generate(url: str, tokenizer: Tokenizer, text: str, adapter: str | None = None, **how: object) -> str:
    """What a decoder writes behind the text.

    Args:
        how: fields of the request: max_new_tokens, stop, do_sample, temperature, top_k, top_p, seed.

    Raises:
        ServerError: the server refused, or the sequence failed; OSError and HTTPException: the connection did.
    """
    return tokenizer.decode(list(_tokens(url, tokenizer, text, adapter, how)))


def stream(url: str, tokenizer: Tokenizer, text: str, adapter: str | None = None, **how: object) -> Iterator[str]:
    """Yields what generate() returns, piece by piece.

    Raises:
        TextChangedError: at the end, when generate() would return another text; else as generate().
    """
    tokens: list[int] = []
    whole = yielded = ""
    for token in _tokens(url, tokenizer, text, adapter, how):
        tokens.append(token)
        whole = tokenizer.decode(tokens)
        # A character of several tokens is no character before its last one.
        if whole.startswith(yielded) and not whole.endswith("\ufffd"):
            yield whole[len(yielded) :]
            yielded = whole
    if not whole.startswith(yielded):
        raise TextChangedError(whole)
    yield whole[len(yielded) :]


def _tokens(url: str, tokenizer: Tokenizer, text: str, adapter: str | None, how: dict) -> Iterator[int]:
    tokenizer.no_truncation()
    tokenizer.no_padding()
    body = {"adapter": adapter, "input_ids": tokenizer.encode(text).ids, "stream": True, **how}
    has_ended = False
    with _opened(url + "/v1/generate", body) as response:
        for line in response:
            data = json.loads(line.removeprefix(b"data: ")) if line.startswith(b"data: ") else {}
            if "error" in data:
                raise ServerError(f"{data['error']['status']}: {data['error']['message']}")
            has_ended = has_ended or "finish_reason" in data
            if "token" in data:
                yield data["token"]
    if not has_ended:
        raise ServerError("the answer broke off: it has no finish_reason")


def _opened(url: str, body: dict) -> http.client.HTTPResponse:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        return urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        raise ServerError(f"{error.code}: {_message(error)}") from error


def _message(error: urllib.error.HTTPError) -> str:
    try:
        return json.load(error)["error"]["message"]
    except (ValueError, KeyError, TypeError):  # of a proxy
        return error.reason


def named(logits: list, labels: list[str] | None) -> list | dict:
    """By label, if labels have names; for tagging, of each token."""
    if labels is None:
        return logits
    if isinstance(logits[0], list):
        return [named(token, labels) for token in logits]
    return dict(zip(labels, logits, strict=True))


def results(answer: dict) -> list[dict]:
    """One entry for each text."""
    if "outputs" in answer:
        return [{"output": output} for output in answer["outputs"]]
    return [{"logits": named(logits, answer.get("labels"))} for logits in answer["logits"]]


def declared_arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+", metavar="TEXT")
    parser.add_argument("--tokenizer", required=True, help="the model's tokenizer.json")
    parser.add_argument("--adapter", help="default: the base model")
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--pooling", choices=["first", "mean"])
    parser.add_argument("--most", type=int, help="tokens of a text; longer ones are cut (512)")
    writing = parser.add_argument_group("of a decoder")
    writing.add_argument("--max-new-tokens", type=int, help="how many tokens to write behind each text")
    writing.add_argument("--stop", type=int, nargs="+", default=[], metavar="ID", help="tokens that end a text")
    writing.add_argument("--temperature", type=float, help="draw tokens; this divides the logits")
    writing.add_argument("--top-k", type=int, help="draw among so many tokens")
    writing.add_argument("--top-p", type=float, help="draw among the likeliest tokens of this probability")
    writing.add_argument("--seed", type=int, help="draw tokens, with these random numbers")
    writing.add_argument("--stream", action="store_true", help="print text as soon as it is known")
    return parser


def print_written(tokenizer: Tokenizer, arguments: argparse.Namespace) -> None:
    drawing = {key: getattr(arguments, key) for key in ("temperature", "top_k", "top_p", "seed")}
    how = {key: value for key, value in drawing.items() if value is not None}
    how |= {"do_sample": True} if how else {}
    how |= {"max_new_tokens": arguments.max_new_tokens, "stop": arguments.stop}
    for text in arguments.texts:
        if not arguments.stream:
            written = generate(arguments.url, tokenizer, text, arguments.adapter, **how)
            print(json.dumps({"text": text, "written": written}, ensure_ascii=False))
            continue
        try:
            for piece in stream(arguments.url, tokenizer, text, arguments.adapter, **how):
                print(piece, end="", flush=True)
        except TextChangedError as change:
            print(f"client.py: {change}", file=sys.stderr)
        print()


def print_predicted(tokenizer: Tokenizer, arguments: argparse.Namespace) -> None:
    how = (arguments.adapter, arguments.pooling, arguments.most or 512)
    answer = predict(arguments.url, tokenizer, arguments.texts, *how)
    for text, result in zip(arguments.texts, results(answer), strict=True):
        print(json.dumps({"text": text, **result}, ensure_ascii=False))


def check_arguments(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Ends the program where an argument has no meaning for what is asked."""
    is_written = arguments.max_new_tokens is not None
    of_others = ["pooling", "most"] if is_written else ["stop", "temperature", "top_k", "top_p", "seed", "stream"]
    for name in of_others:
        if getattr(arguments, name) not in (None, False, []):
            how = "without" if is_written else "with"
            parser.error(f"--{name.replace('_', '-')} has a meaning {how} --max-new-tokens only")


def main() -> int:
    parser = declared_arguments()
    arguments = parser.parse_args()
    check_arguments(parser, arguments)
    try:
        tokenizer = Tokenizer.from_file(arguments.tokenizer)
    except Exception as error:  # the library raises no class of its own
        parser.error(f"{arguments.tokenizer}: {error}")
    try:
        (print_predicted if arguments.max_new_tokens is None else print_written)(tokenizer, arguments)
    except (ServerError, OSError, http.client.HTTPException, ValueError) as error:
        print(f"client.py: {error or type(error).__name__}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
