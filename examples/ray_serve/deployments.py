"""The Ray Serve application: Gateway reads HTTP, replicas of EncoderReplica hold the model and run batches."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import starlette.requests
import starlette.responses
from ray import serve

import torchgraft
from encoder import BATCH_ROWS, NAME, Answer, Encoder, Request, model_id_of
from torchgraft.composition import composition_to_json, is_composition_text

FIELDS = {"adapter", "input_ids", "pooling"}
MOST_TOKENS = 512
MOST_TEXT = 1024  # characters of a composition


@dataclass(frozen=True)
class Settings:
    """Settings of a deployment: `min_replicas` to `max_replicas` replicas, each with `capacity` adapters and `threads`
    threads for a forward pass, and `max_compositions` compositions. adapters: None: a grafted model's own only.
    gate_pooling: None: as each adapter was trained."""

    model: Path
    adapters: Path | None
    capacity: int = 64
    threads: int = 1
    min_replicas: int = 1
    max_replicas: int = 4
    gate_pooling: str | None = None
    max_compositions: int = 16


class Batches:
    """A forward pass takes the requests that wait when it begins, in order of arrival, whatever their adapters.

    Not @serve.batch, which makes batches of one multiplexed model each.
    """

    def __init__(self, run: Callable[[list[Request]], list[Answer]]):
        self._run = run
        self._waiting: list[tuple[Request, asyncio.Future]] = []
        self._worker: asyncio.Task | None = None

    async def answer(self, request: Request) -> Answer:
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((request, future))
        if self._worker is None:
            self._worker = asyncio.create_task(self._work())
        return await future

    async def _work(self) -> None:
        while self._waiting:
            batch = self._take()
            try:
                answers = await asyncio.to_thread(self._run, [request for request, _ in batch])
            except Exception as error:
                answers = [(500, str(error))] * len(batch)
            for (_, future), answer in zip(batch, answers, strict=True):
                if not future.done():  # its client has gone
                    future.set_result(answer)
        self._worker = None

    def _take(self) -> list[tuple[Request, asyncio.Future]]:
        """At most BATCH_ROWS rows, at least one request."""
        count, rows = 0, 0
        for request, _ in self._waiting:
            rows += len(request.rows)
            if count > 0 and rows > BATCH_ROWS:
                break
            count += 1
        batch, self._waiting = self._waiting[:count], self._waiting[count:]
        return batch


@serve.deployment(max_ongoing_requests=256)
class EncoderReplica:
    """Ray sends a request to a replica that has its adapter, if one has, and drops the adapters used longest ago.

    What Ray keeps of an adapter is a lease on its row. Requests under way share the lease, so the pool rewrites the row
    of a dropped adapter only when they are done.
    """

    def __init__(self, settings: Settings):
        self._encoder = Encoder(
            settings.model,
            settings.adapters,
            settings.capacity,
            settings.threads,
            settings.gate_pooling,
            settings.max_compositions,
        )
        self._batches = Batches(self._encoder.run)

        @serve.multiplexed(max_num_models_per_replica=settings.capacity)
        async def adapter(model_id: str) -> torchgraft.Lease:
            return await asyncio.to_thread(self._encoder.load, *model_id.split("@"))

        self._adapter = adapter

    async def predict(self, name: str, rows: list[list[int]], pooling: str) -> Answer:
        model_id = serve.get_multiplexed_model_id()
        if not name or name in self._encoder.own:
            lease = self._encoder.resident(name)
        elif model_id:
            try:
                lease = await self._adapter(model_id)
            except torchgraft.GraftError as error:
                return 422, f"adapter '{name}' cannot be loaded: {error}"
        elif is_composition_text(name) or await asyncio.to_thread(self._encoder.has_setup, name):
            try:
                lease = await asyncio.to_thread(self._encoder.composed, name)
            except torchgraft.GraftError as error:
                return 422, f"'{name}' cannot be loaded: {error}"
            except LookupError as error:
                return 404, error.args[0]
        else:
            return 404, f"no adapter is called '{name}'"
        return await self._batches.answer(Request(lease, rows, pooling))


class BadRequestError(Exception):
    pass


def read_body(content: bytes) -> tuple[str, list[list[int]], str]:
    """(adapter, "" for the base; rows; pooling) of the body that examples/server takes."""
    try:
        body: Any = torchgraft.parse_json(content, "the body", deepest=4)
    except torchgraft.GraftError as error:
        raise BadRequestError(str(error)) from None
    if not isinstance(body, dict) or not FIELDS.issuperset(body) or "input_ids" not in body:
        raise BadRequestError('expected {"adapter": name or null, "input_ids": [[...]], "pooling": "first" or "mean"}')
    adapter, rows, pooling = body.get("adapter"), body["input_ids"], body.get("pooling", "first")
    if adapter is not None and not (isinstance(adapter, str) and adapter):
        raise BadRequestError('"adapter": expected a name, or null for the base model')
    if pooling not in ("first", "mean"):
        raise BadRequestError('"pooling": expected "first" or "mean"')
    if not isinstance(rows, list) or not 1 <= len(rows) <= BATCH_ROWS or not all(map(is_row, rows)):
        raise BadRequestError(
            f'"input_ids": expected 1 to {BATCH_ROWS} lists of 1 to {MOST_TOKENS} token ids, integers from 0'
        )
    return adapter or "", rows, pooling


def is_row(row: object) -> bool:
    is_list = isinstance(row, list) and 1 <= len(row) <= MOST_TOKENS
    return is_list and all(type(token) is int and 0 <= token < 2**63 for token in row)


def text_fault(text: str) -> str | None:
    """What is wrong with the text of a composition, as examples/server says it."""
    if len(text) > MOST_TEXT:
        return f"expected a composition of at most {MOST_TEXT} characters, got {len(text)}"
    try:
        composition_to_json(text)
    except torchgraft.GraftError as error:
        return str(error)
    return None


@serve.deployment(max_ongoing_requests=1024, ray_actor_options={"num_cpus": 0})
class Gateway:
    """HTTP in and out, with the messages of examples/server."""

    def __init__(self, encoder: serve.handle.DeploymentHandle, adapters: Path | None):
        self._encoder = encoder
        self._adapters = adapters

    async def __call__(self, request: starlette.requests.Request) -> starlette.responses.JSONResponse:
        if request.url.path == "/healthz" and request.method in ("GET", "HEAD"):
            return starlette.responses.JSONResponse({"status": "ok"})
        if request.url.path != "/v1/predict" or request.method != "POST":
            return failure(404, f"nothing is at {request.method} {request.url.path}")
        try:
            name, rows, pooling = read_body(await request.body())
        except BadRequestError as error:
            return failure(400, str(error))
        is_text = is_composition_text(name)
        if is_text and (fault := text_fault(name)):
            return failure(400, fault)
        if name and not is_text and not NAME.fullmatch(name):
            return failure(404, "expected an adapter's name of letters, digits, '_' and '-'")
        model_id = "" if is_text else await asyncio.to_thread(model_id_of, self._adapters, name)
        encoder = self._encoder.options(multiplexed_model_id=model_id)
        status, answer = await encoder.predict.remote(name, rows, pooling)
        if status != 200:
            return failure(status, answer)
        return starlette.responses.JSONResponse({"adapter": name or None, **answer})


def failure(status: int, message: str) -> starlette.responses.JSONResponse:
    return starlette.responses.JSONResponse({"error": {"status": status, "message": message}}, status)


def application(settings: Settings) -> serve.Application:
    replicas = EncoderReplica.options(
        ray_actor_options={"num_cpus": settings.threads},
        autoscaling_config={
            "min_replicas": settings.min_replicas,
            "initial_replicas": settings.min_replicas,
            "max_replicas": settings.max_replicas,
            # Requests in a replica, running or waiting: about half a batch beside the one that runs.
            "target_ongoing_requests": 1.5 * BATCH_ROWS,
            "upscale_delay_s": 10,
            "downscale_delay_s": 300,
        },
    )
    return Gateway.bind(replicas.bind(settings), settings.adapters)
