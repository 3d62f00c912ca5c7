"""A running examples/server whose model is a decoder, and requests of it."""

import concurrent.futures
import http.client
import json
import random
from pathlib import Path

import torch

from decoder_support import CONFIGS, save_models
from server_support import Server

MOST_PROMPT, MOST_NEW, LONG = 8, 12, 3000
CAPACITY = 4  # less than there are adapters: they come and go


def saved(folder: Path, decoder: torch.nn.Module) -> Path:
    torch.manual_seed(0)
    save_models(folder, decoder)
    return folder


def start(server_program: Path, models: Path, *options, adapters: Path | None = None, **more) -> Server:
    folder = adapters or models / "adapters"
    usual = {"--capacity": CAPACITY, "--max-tokens": LONG + MOST_PROMPT}
    words = [word for pair in usual.items() if pair[0] not in options for word in pair]
    return Server(server_program, models / "base.pt", folder, *words, *options, **more)


def ask(server: Server, adapter: str | None, prompt: list[int], count: int, **more):
    """(status, answer)"""
    body = {"adapter": adapter, "input_ids": prompt, "max_new_tokens": count, **more}
    return server.ask("POST", "/v1/generate", body)


def tokens_of(server, adapter, prompt, count, **more):
    status, answer = ask(server, adapter, prompt, count, **more)
    assert status == 200, answer
    assert answer["adapter"] == adapter
    return answer["tokens"]


class Stream:
    """A request whose events are read one by one."""

    def __init__(self, server, adapter, prompt, count, **more):
        self._connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
        body = {"adapter": adapter, "input_ids": prompt, "max_new_tokens": count, "stream": True, **more}
        self._connection.request("POST", "/v1/generate", json.dumps(body))
        self._response = self._connection.getresponse()
        self.status = self._response.status
        self.content_type = self._response.headers.get_content_type()

    def event(self):
        """The name and the data of the next one; None at the end."""
        name = "message"
        while line := self._response.readline().decode():
            if line.startswith("event: "):
                name = line.removeprefix("event: ").strip()
            elif line.startswith("data: "):
                assert self._response.readline() == b"\n"
                return name, json.loads(line.removeprefix("data: "))
        return None

    def rest(self):
        """The tokens that are still to come, and what ended them."""
        tokens = []
        while event := self.event():
            if "token" not in event[1]:
                assert self.event() is None
                return tokens, event
            tokens.append(event[1]["token"])
        raise AssertionError("the stream ended without saying why")

    def close(self):
        self._response.close()
        self._connection.close()


def drawn(source: random.Random, highest: int = 31):
    """adapter, prompt, count"""
    prompt = [source.randrange(highest) for _ in range(source.randrange(1, MOST_PROMPT + 1))]
    return source.choice([None, *CONFIGS]), prompt, source.randrange(1, MOST_NEW + 1)


def check_mixes(server, written, mixes: int, seed: int, together: int = 8) -> None:
    """Each mix: so many sequences of any adapters and lengths, which come when others have written some tokens."""
    source = random.Random(seed)
    prompts = [drawn(source) for _ in range(60)]
    with concurrent.futures.ThreadPoolExecutor(together) as pool:
        for _ in range(mixes):
            mix = [(*source.choice(prompts)[:2], source.randrange(1, MOST_NEW + 1)) for _ in range(together)]
            for case, found in zip(mix, pool.map(lambda case: tokens_of(server, *case), mix), strict=True):
                assert found == written(*case), case
