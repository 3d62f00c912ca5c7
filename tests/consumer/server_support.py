"""A running examples/server, on 127.0.0.1, and what it should answer."""

import contextlib
import http.client
import json
import os
import resource
import select
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

import torchgraft

VOCABULARY, MOST_TOKENS = 50, 32
ADAPTERS = 12
CAPACITY = 5  # less than there are: they come and go
TOLERANCE = dict(rtol=0, atol=1e-5)
# Of every kind, so that one batch mixes methods, ranks and prefix lengths.
CONFIGS = ["unipelt", "lora[r=4]", "mam", "prefix_tuning[prefix_length=3]", "seq_bn[reduction_factor=4]"]


class Encoder(torch.nn.Module):
    """A small random BERT as a function of two tensors."""

    def __init__(self):
        super().__init__()
        config = transformers.BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
            max_position_embeddings=MOST_TOKENS,
        )
        self.model = transformers.BertModel(config, add_pooling_layer=False)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def traced_encoder() -> torch.jit.ScriptModule:
    torch.manual_seed(0)
    ids = torch.ones(2, 8, dtype=torch.int64)
    with torch.no_grad():
        return torch.jit.trace(Encoder().eval(), (ids, ids), check_trace=False)


def save_random_adapter(base: torch.jit.ScriptModule, directory: Path, config: str, seed: int) -> None:
    """An adapter that makes a difference, as AdapterHub keeps it."""
    name = directory.name.replace("-", "_")
    model = torchgraft.graft(base, config, name, gate_pooling="unpadded")  # so that batches change no answer
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.adapters.parameters():
            if parameter.is_floating_point() and parameter.dim() > 1 and parameter.isfinite().all():
                parameter.add_(torch.randn_like(parameter) * 0.3)
    torchgraft.save_adapter(model, name, directory)


def save_models(folder: Path, adapters: int, names: str = "adapters/task-{}") -> torch.jit.ScriptModule:
    """base.pt, which is returned, and adapters of all kinds below `folder`."""
    base = traced_encoder()
    base.save(folder / "base.pt")
    for index in range(adapters):
        save_random_adapter(base, folder / names.format(index), CONFIGS[index % len(CONFIGS)], index)
    return base


def wait_until(holds: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def allow_open_files(count: int) -> None:
    """To this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


class Expected:
    """What each adapter answers alone: a module of its own for each, run on one row without padding."""

    def __init__(self, base: torch.jit.ScriptModule, adapters: Path):
        self._base = base
        self._adapters = adapters
        self._modules: dict[str | None, torch.jit.ScriptModule] = {None: base}

    def __call__(self, adapter: str | None, ids: list[int], pooling: str = "first") -> torch.Tensor:
        if adapter not in self._modules:
            directory = {"alone": self._adapters / adapter}
            self._modules[adapter] = torchgraft.graft(self._base, adapters=directory)
        row = torch.tensor([ids])
        with torch.inference_mode():
            states = self._modules[adapter](row, torch.ones_like(row))[0]
        return states[0] if pooling == "first" else states.mean(0)


class Server:
    """One process; ends with the `with` block. Its program: examples/server's, or another that takes the same. In
    `errors` is what it has written to stderr, once it has ended.

    open_files: its soft and hard limit. environment: more of it. log: its stderr; then `errors` stays empty.
    """

    behind: tuple[str, ...] = ()  # what stands before options that are for a server behind this one

    def __init__(
        self,
        program: Path | list,
        model: Path,
        adapters: Path | None,
        *options: object,
        open_files: tuple[int, int] | None = None,
        environment: dict[str, str] | None = None,
        log: int | None = None,
    ):
        inherited = {key: value for key, value in os.environ.items() if key != "LD_LIBRARY_PATH"}
        words = program if isinstance(program, list) else [program]
        folder = [] if adapters is None else ["--adapters", adapters]
        command = [*words, model, *folder, "--port", 0, *options, *self.behind, "--threads", 1]
        # Not a pipe: one that nobody reads would stop the server when it is full.
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [str(part) for part in command],
            stdout=subprocess.PIPE,
            stderr=self._log if log is None else log,
            text=True,
            env=inherited | (environment or {}),
            preexec_fn=open_files and (lambda: resource.setrlimit(resource.RLIMIT_NOFILE, open_files)),
        )
        ready, _, _ = select.select([self._process.stdout], [], [], 300)
        line = self._process.stdout.readline() if ready else ""
        if not line.startswith("listening on "):
            self._process.kill()
            self._process.wait()
            raise AssertionError(f"the server did not start: {line}{self._logged()}")
        self.port = int(line.rsplit(":", 1)[1])
        self.errors = ""

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_) -> None:
        if self._process.poll() is None:
            self.stop()
        elif not self.errors:  # it has ended by itself
            self._read_errors()

    @property
    def pid(self) -> int:
        return self._process.pid

    def terminate(self) -> None:
        self._process.send_signal(signal.SIGTERM)

    def terminate_and_see_it_drain(self) -> None:
        self.terminate()
        assert self._process.stdout.readline() == "draining\n"

    def stop(self) -> int:
        """Its exit status."""
        self.terminate()
        return self.wait()

    def wait(self) -> int:
        try:
            self._process.communicate(timeout=60)
            self._read_errors()
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise
        return self._process.returncode

    def _read_errors(self) -> None:
        """Fails on what a sanitizer found, also where nobody asks for it."""
        self.errors = self._logged()
        assert "Sanitizer:" not in self.errors, self.errors

    def _logged(self) -> str:
        self._log.seek(0)
        return self._log.read()

    def connection(self, timeout: float = 60) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def ask(self, method: str, path: str, body: object = None, headers: dict[str, str] | None = None):
        """(status, answer) of one request on a connection of its own. Bytes and text are sent as they are."""
        connection = self.connection()
        try:
            content = body if body is None or isinstance(body, (bytes, str)) else json.dumps(body)
            connection.request(method, path, content, headers or {})
            response = connection.getresponse()
            text = response.read().decode()
            is_json = response.headers.get_content_type() == "application/json"
            return response.status, json.loads(text) if is_json else text
        finally:
            connection.close()

    def predict(self, adapter: str | None, rows: list[list[int]], **more):
        return self.ask("POST", "/v1/predict", {"adapter": adapter, "input_ids": rows, **more})

    def outputs(self, adapter: str | None, rows: list[list[int]], **more) -> torch.Tensor:
        status, answer = self.predict(adapter, rows, **more)
        assert status == 200, answer
        assert answer["adapter"] == adapter
        return torch.tensor(answer["outputs"])

    def metric(self, name: str) -> float:
        """A metric by its name, with labels if it has some."""
        status, text = self.ask("GET", "/metrics")
        assert status == 200
        values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        return float(values[name])


def post(rows: list[list[int]], adapter: str | None = None, padding: int = 0) -> bytes:
    """A request as it is sent, with so many spaces before its body."""
    body = b" " * padding + json.dumps({"adapter": adapter, "input_ids": rows}).encode()
    return b"POST /v1/predict HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body) + body


@contextlib.contextmanager
def connections_to(server: Server, count: int):
    with contextlib.ExitStack() as stack:
        address = ("127.0.0.1", server.port)
        yield [stack.enter_context(socket.create_connection(address, timeout=60)) for _ in range(count)]


def read_answer(client: socket.socket) -> tuple[int, dict]:
    """(status, answer) of the next response on a connection that stays open."""
    response = http.client.HTTPResponse(client)
    response.begin()
    return response.status, json.loads(response.read())
