"""The command serve: examples/server, with a process before it that makes token ids of texts.

The server is C++ alone. No library that tokenises as the models do can be linked into it (examples/server/README.md
lists those that were tried), so texts become ids here, by the `tokenizers` package, and go to the server over a socket
of this machine.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import os
import shlex
import shutil
import signal
import sys
from pathlib import Path

from aiohttp import web
from tokenizers import Tokenizer

from .line import fail
from .text_front import make_app

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_libc = ctypes.CDLL(None)


class ServeError(Exception):
    """Why there is nothing to serve. The message says what to do."""


def run(program: str, arguments: argparse.Namespace) -> None:
    """Serves until SIGTERM or Ctrl-C. Raises SystemExit with the server's status, unless that is 0.

    Args:
        arguments: the command line's: base (path), adapters (path or None), tokenizer (path of a tokenizer.json or of
            its folder), server (path or None), address, port, max_body, max_tokens (number or None), drain_seconds,
            library (paths), quiet, verbose (bools), server_options (texts for the server's own command line).
    """
    try:
        tokenizer = _load_tokenizer(arguments.tokenizer)
        server = _find_server(arguments.server)
        status = asyncio.run(_serve(arguments, tokenizer, server))
    except (ServeError, OSError) as error:
        fail(program, error)
    if status != 0:
        raise SystemExit(status)


def _load_tokenizer(path: Path) -> Tokenizer:
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.is_file():
        raise ServeError(f"{path}: no such file; give --tokenizer TOKENIZER.json, as Hugging Face models have it")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no class of its own
        raise ServeError(f"{path}: not a tokenizer ({str(error).splitlines()[0]})") from error


def _find_server(given: Path | None) -> str:
    named = str(given) if given else os.environ.get("TORCHGRAFT_SERVER")
    if named is None:
        raise ServeError(
            "no server to start: build examples/server (its README has the four commands), and give --server PROGRAM "
            "or set TORCHGRAFT_SERVER"
        )
    found = shutil.which(named if os.path.dirname(named) else os.path.join(".", named))
    if found is None:
        raise ServeError(f"{named}: no program; expected the one that examples/server builds")
    return found


def _end_with_parent() -> None:
    """In the child: it gets SIGTERM when this process ends, however that ends."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


async def _start(
    arguments: argparse.Namespace, server: str, stopped: asyncio.Event
) -> tuple[asyncio.subprocess.Process, str | None]:
    """Starts the server. Returns it with its address once it listens, or with None if `stopped` comes first."""
    libraries = [word for path in arguments.library for word in ("--library", str(path))]
    folder = [] if arguments.adapters is None else ["--adapters", str(arguments.adapters)]
    words = [str(arguments.base), *folder, "--drain-seconds", str(arguments.drain_seconds), *libraries,
             *arguments.server_options, "--address", "127.0.0.1", "--port", "0"]  # fmt: skip
    if arguments.verbose:
        print(f"starting {shlex.join([server, *words])}", file=sys.stderr, flush=True)
    process = await asyncio.create_subprocess_exec(
        server, *words, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, preexec_fn=_end_with_parent,
        start_new_session=True,  # Ctrl-C is for this process, which ends the server last
    )  # fmt: skip
    assert process.stdout is not None
    prefix = "listening on "
    listening = asyncio.create_task(process.stdout.readline())
    stopping = asyncio.create_task(stopped.wait())
    await asyncio.wait({listening, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not listening.done():
        listening.cancel()
        return process, None
    line = listening.result().decode(errors="replace").strip()
    if not line.startswith(prefix):
        await _killed(process)
        if process.returncode in (1, 2):  # it has said why, in a line
            raise SystemExit(process.returncode)
        raise ServeError(f"{server}: it ended with status {process.returncode} before it listened")
    return process, line.removeprefix(prefix)


async def _killed(process: asyncio.subprocess.Process) -> None:
    """Waits for a process that has ended, or is killed."""
    try:
        await asyncio.wait_for(process.wait(), 1)
    except TimeoutError:
        process.kill()
        await process.wait()


async def _serve(arguments: argparse.Namespace, tokenizer: Tokenizer, server: str) -> int:
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:
            asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    process, behind = await _start(arguments, server, stopped)
    if behind is None:
        process.terminate()
        await _killed(process)
        return 0
    try:
        app = make_app(tokenizer, f"http://{behind}", arguments.max_body, arguments.max_tokens)
        return await _answer(arguments, app, process, stopped)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def _answer(
    arguments: argparse.Namespace, app: web.Application, process: asyncio.subprocess.Process, stopped: asyncio.Event
) -> int:
    """Answers requests until `stopped` or until the server ends. Returns the server's status."""
    runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=arguments.drain_seconds)
    await runner.setup()
    try:
        await web.TCPSite(runner, arguments.address, arguments.port, backlog=1024).start()
        address, port = runner.addresses[0][:2]
        print(f"listening on {address}:{port}", flush=True)
        ended = asyncio.create_task(process.wait())
        stopping = asyncio.create_task(stopped.wait())
        await asyncio.wait({ended, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if ended.done():
            raise ServeError(f"the server behind ended with status {ended.result()}")
        if not arguments.quiet:
            print("draining", flush=True)
    finally:
        await runner.cleanup()  # answers what is under way
    process.terminate()
    return await ended
