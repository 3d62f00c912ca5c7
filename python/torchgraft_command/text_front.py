"""An HTTP application that takes texts, and hands their token ids to examples/server behind it.

Only the body of `POST /v1/predict` is read: `"texts": ["...", ...]` becomes `"input_ids": [[...], ...]`. Everything
else goes to the server, and its answers come back, byte by byte.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
from aiohttp import web
from tokenizers import Tokenizer

from . import json_text

# Between the server and this process only; aiohttp writes headers of its own.
_PER_CONNECTION = {"connection", "content-length", "date", "keep-alive", "server", "transfer-encoding"}
# Below the server's --idle-seconds (30): it closes silent connections.
_KEEP_SECONDS = 10
_DEEPEST_BODY = 4  # as in the server


class BadRequestError(Exception):
    """What is wrong with a request, for whoever sent it."""


def error_response(status: int, message: str) -> web.Response:
    """An answer in the form that the server gives its own errors."""
    return web.json_response({"error": {"status": status, "message": message}}, status=status)


def make_app(tokenizer: Tokenizer, server: str, max_body: int, max_tokens: int | None = None) -> web.Application:
    """Makes the application.

    Args:
        tokenizer: of the model. Its padding and truncation are switched off.
        server: the address of examples/server, "http://127.0.0.1:PORT".
        max_body: bytes of a request; more get 413.
        max_tokens: longer texts are cut to so many tokens. None: no text is cut, and the server refuses what is longer
            than its --max-tokens.
    """
    tokenizer.no_padding()  # the server pads, and knows what is padding
    if max_tokens is None:
        tokenizer.no_truncation()
    else:
        tokenizer.enable_truncation(max_tokens)
    app = web.Application(client_max_size=max_body)
    front = _Front(tokenizer, server, max_body)
    app.cleanup_ctx.append(front.connected)
    app.router.add_route("*", "/{path:.*}", front.handle)
    return app


class _Front:
    def __init__(self, tokenizer: Tokenizer, server: str, max_body: int) -> None:
        self._tokenizer = tokenizer
        self._server = server
        self._max_body = max_body
        self._session: aiohttp.ClientSession | None = None

    async def connected(self, app: web.Application) -> Any:
        """Holds connections to the server as long as the application runs."""
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_SECONDS)
        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False) as session:
            self._session = session
            yield

    async def handle(self, request: web.Request) -> web.Response:
        if not request.raw_path.startswith("/"):  # it may name another host
            return error_response(400, "expected a path that begins with /")
        try:
            body = await request.read()
            if request.method == "POST" and request.path == "/v1/predict":
                body = await self._with_ids(body)
        except web.HTTPRequestEntityTooLarge:
            return error_response(413, f"expected a body of at most {self._max_body} bytes")
        except BadRequestError as error:
            return error_response(400, str(error))
        try:
            return await self._ask(request, body)
        except (aiohttp.ClientError, OSError) as error:
            return error_response(502, f"the server behind gave no answer ({type(error).__name__})")

    async def _with_ids(self, body: bytes) -> bytes:
        """The same request with token ids; one without texts stays as it is."""
        if b'"texts"' not in body:  # also what is no JSON: the server says what is wrong with it
            return body
        try:
            request = json_text.parse(body, "the body", _DEEPEST_BODY)
        except ValueError as error:
            raise BadRequestError(str(error)) from None
        if not isinstance(request, dict) or "texts" not in request:
            return body
        texts = request.pop("texts")
        if "input_ids" in request:
            raise BadRequestError('expected "texts" or "input_ids", got both')
        if not isinstance(texts, list) or not texts:
            raise BadRequestError('"texts": expected a list of at least one text')
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise BadRequestError(f'"texts"[{index}]: expected a text, got {json.dumps(text)[:40]}')
        # In another thread: the library works outside of Python's lock.
        request["input_ids"] = [text.ids for text in await asyncio.to_thread(self._tokenizer.encode_batch, texts)]
        return json.dumps(request).encode()

    async def _ask(self, request: web.Request, body: bytes) -> web.Response:
        """The server's answer. It may have closed a silent connection just now: what changes nothing is sent again."""
        assert self._session is not None
        headers = {"Content-Type": request.headers["Content-Type"]} if "Content-Type" in request.headers else {}
        for may_repeat in (request.method in ("GET", "HEAD", "POST"), False):  # POST: predict
            try:
                async with self._session.request(
                    request.method, self._server + request.raw_path, data=body or None, headers=headers
                ) as answer:
                    content = await answer.read()
                    kept = {key: value for key, value in answer.headers.items() if key.lower() not in _PER_CONNECTION}
                    return web.Response(status=answer.status, body=content, headers=kept)
            except aiohttp.ServerDisconnectedError:
                if not may_repeat:
                    raise
        raise AssertionError("the second attempt answers or raises")
