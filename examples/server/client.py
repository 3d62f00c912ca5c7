#!/usr/bin/env python3
"""Asks the server about texts: tokenises them here, with the tokenizer of the model, and sends token ids.

    client.py --tokenizer tokenizer.json [--adapter NAME] [--url http://127.0.0.1:8080] TEXT...

Prints one line of JSON for each text: of an adapter with a head the logits, by label if its labels have names, else the
hidden state, of the first token or as --pooling says. Needs the package `tokenizers`.
"""

import argparse
import json
import sys
import urllib.error
import urllib.request

from tokenizers import Tokenizer


class ServerError(Exception):
    """The error that the server answered."""


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
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url + "/v1/predict", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        raise ServerError(f"{error.code}: {json.load(error)['error']['message']}") from error


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+", metavar="TEXT")
    parser.add_argument("--tokenizer", required=True, help="the model's tokenizer.json")
    parser.add_argument("--adapter", help="default: the base model")
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--pooling", choices=["first", "mean"])
    parser.add_argument("--most", type=int, default=512, help="tokens of a text; longer ones are cut")
    arguments = parser.parse_args()
    try:
        tokenizer = Tokenizer.from_file(arguments.tokenizer)
    except Exception as error:  # the library raises no class of its own
        parser.error(f"{arguments.tokenizer}: {error}")
    try:
        how = (arguments.adapter, arguments.pooling, arguments.most)
        answer = predict(arguments.url, tokenizer, arguments.texts, *how)
    except (ServerError, OSError) as error:
        print(f"client.py: {error}", file=sys.stderr)
        return 1
    for text, result in zip(arguments.texts, results(answer), strict=True):
        print(json.dumps({"text": text, **result}, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
