#!/usr/bin/env python3
"""Asks the server for texts: tokenises here, with the tokenizer of the model, and sends token ids.

    client.py --tokenizer tokenizer.json [--adapter NAME] [--url http://127.0.0.1:8080] TEXT...

Prints one line of JSON for each text. Needs the package `tokenizers`.
"""

import argparse
import json
import sys
import urllib.error
import urllib.request

from tokenizers import Tokenizer


class ServerError(Exception):
    """What the server answered instead of outputs."""


def predict(
    url: str, tokenizer: Tokenizer, texts: list[str], adapter: str | None = None, pooling: str = "mean", most: int = 512
) -> list[list[float]]:
    """The outputs, one list of numbers for each text; adapter None is the base model. Texts are cut at `most` tokens.

    Raises:
        ServerError: the server refused; OSError: it cannot be reached.
    """
    tokenizer.enable_truncation(most)
    tokenizer.no_padding()  # the server pads, and knows what is padding
    ids = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    body = json.dumps({"adapter": adapter, "input_ids": ids, "pooling": pooling}).encode()
    request = urllib.request.Request(url + "/v1/predict", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)["outputs"]
    except urllib.error.HTTPError as error:
        raise ServerError(f"{error.code}: {json.load(error)['error']['message']}") from error


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+", metavar="TEXT")
    parser.add_argument("--tokenizer", required=True, help="the model's tokenizer.json")
    parser.add_argument("--adapter", help="the base model without")
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--pooling", choices=["first", "mean"], default="mean")
    parser.add_argument("--most", type=int, default=512, help="tokens of a text; what is longer is cut")
    arguments = parser.parse_args()
    try:
        tokenizer = Tokenizer.from_file(arguments.tokenizer)
    except Exception as error:  # no other type is raised
        parser.error(f"{arguments.tokenizer}: {error}")
    try:
        how = (arguments.adapter, arguments.pooling, arguments.most)
        outputs = predict(arguments.url, tokenizer, arguments.texts, *how)
    except (ServerError, OSError) as error:
        print(f"client.py: {error}", file=sys.stderr)
        return 1
    for text, output in zip(arguments.texts, outputs, strict=True):
        print(json.dumps({"text": text, "output": output}, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
