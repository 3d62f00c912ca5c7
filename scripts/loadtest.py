#!/usr/bin/env python3
"""Measures throughput and latency of a server on this machine, and of the adapters library beside it.

    scripts/loadtest.py --server build/demo/server/server [--json FILE] [--picture FILE.png]
    scripts/loadtest.py --server examples/ray_serve/main.py --server-options "--replicas 2 --threads 1"

The model has MiniLM's size (6 layers, 384 wide) and random weights, on which its speed does not depend. The adapters
are UniPELT. A request is one text of 8 to 32 tokens. --requests and --seconds limit each point of three series:

    distinct    --clients clients; each sends its next request after an answer; 0 (base model), 1, 8, 64, 256 adapters
    offered     requests arrive at a fixed rate, however many wait: shares of the throughput with 64 adapters
    library     adapters==1.3.0, eager, set_active_adapters for each request, one process, the same cores

The clients run on the same cores as the server and slow it down a little. The script downloads nothing and connects to
127.0.0.1 only.
"""

import argparse
import asyncio
import json
import math
import os
import random
import re
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "python"), str(ROOT / "benchmarks")]
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
warnings.filterwarnings("ignore")  # torch.jit is deprecated, and says so

import psutil  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

import adapters  # noqa: E402
import torchgraft  # noqa: E402
from demo_models import HiddenStates  # noqa: E402
from this_machine import processor  # noqa: E402
from torchgraft.adapter_hub import CONFIG_FILE, SAFETENSORS_FILE  # noqa: E402

SIZES = dict(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
VOCABULARY = 30522
SHORTEST, LONGEST = 8, 32  # tokens
DISTINCT = [0, 1, 8, 64, 256]
CAPACITY = 64  # adapters in memory
SHARES = [0.25, 0.5, 0.75, 0.9, 1.1]
LIBRARY_ADAPTERS = 8
WARM_UP = 200  # requests
START_SECONDS, ANSWER_SECONDS, STOP_SECONDS = 300, 60, 120  # a server that takes longer hangs

console = Console(width=None if sys.stdout.isatty() else 110)


@dataclass
class Point:
    """One line of the table. per_second: answers; p50, p95, p99: milliseconds from a request to the last byte of its
    answer."""

    series: str
    x: float  # distinct adapters, or offered requests a second
    answered: int
    refused: int
    per_second: float
    p50: float
    p95: float
    p99: float


def encoder() -> torch.nn.Module:
    torch.manual_seed(0)
    return transformers.BertModel(transformers.BertConfig(**SIZES), add_pooling_layer=False).eval()


def make_files(folder: Path, count: int) -> None:
    """Writes base.pt, and adapters/task_0, ... with different weights."""
    example = torch.ones(2, 16, dtype=torch.int64)
    with torch.no_grad():
        base = torch.jit.trace(HiddenStates(encoder()).eval(), (example, example), check_trace=False)
    torch.jit.freeze(base).save(str(folder / "base.pt"))
    model = torchgraft.graft(base, "unipelt", "saved")
    torchgraft.save_adapter(model, "saved", folder / "saved")
    config = (folder / "saved" / CONFIG_FILE).read_text()
    weights = torchgraft.load_adapter_directory(folder / "saved").weights
    for index in range(count):
        directory = folder / "adapters" / f"task_{index}"
        directory.mkdir(parents=True)
        (directory / CONFIG_FILE).write_text(config)
        other = {key: value + 0.02 * torch.randn_like(value) for key, value in weights.items()}
        save_file(other, directory / SAFETENSORS_FILE)


def texts(count: int) -> list[list[int]]:
    source = random.Random(0)
    lengths = [source.randint(SHORTEST, LONGEST) for _ in range(count)]
    return [[source.randrange(1000, VOCABULARY) for _ in range(length)] for length in lengths]


def request_bytes(adapter: str | None, ids: list[int]) -> bytes:
    body = json.dumps({"adapter": adapter, "input_ids": [ids]}).encode()
    head = f"POST /v1/predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


class Client:
    """One connection to the server."""

    def __init__(self, port: int):
        self._port = port

    async def __aenter__(self) -> "Client":
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        return self

    async def __aexit__(self, *_) -> None:
        self._writer.close()

    async def ask(self, content: bytes) -> int:
        """Sends a request and drops the answer.

        Returns:
            The HTTP status.

        Raises:
            TimeoutError: the answer takes more than ANSWER_SECONDS.
        """
        async with asyncio.timeout(ANSWER_SECONDS):
            self._writer.write(content)
            head = await self._reader.readuntil(b"\r\n\r\n")
            length = int(re.search(rb"Content-Length: (\d+)", head, re.IGNORECASE)[1])
            await self._reader.readexactly(length)
            return int(head[9:12])


class Load:
    """The answers to a series of requests."""

    def __init__(self):
        self.seconds: list[float] = []
        self.refused = 0
        self.start = time.perf_counter()

    def add(self, status: int, seconds: float) -> None:
        if status == 200:
            self.seconds.append(seconds)
        else:
            self.refused += 1

    def point(self, series: str, x: float) -> Point:
        elapsed = time.perf_counter() - self.start
        p50 = p95 = p99 = math.nan
        if len(self.seconds) >= 2:
            cuts = statistics.quantiles(self.seconds, n=100, method="inclusive")
            p50, p95, p99 = (1e3 * cuts[index - 1] for index in (50, 95, 99))
        return Point(series, x, len(self.seconds), self.refused, len(self.seconds) / elapsed, p50, p95, p99)


def requests_for(distinct: int, count: int) -> list[bytes]:
    names = [f"task_{index}" for index in range(distinct)] or [None]
    source = random.Random(2)
    return [request_bytes(source.choice(names), ids) for ids in texts(count)]


async def closed(port: int, contents: list[bytes], clients: int, seconds: float) -> Load:
    """Sends requests from `clients` clients. Each sends the next one as soon as it has its answer."""
    load, waiting = Load(), iter(contents)

    async def work() -> None:
        async with Client(port) as client:
            for content in waiting:
                start = time.perf_counter()
                if start - load.start > seconds:
                    return
                load.add(await client.ask(content), time.perf_counter() - start)

    await asyncio.gather(*(work() for _ in range(clients)))
    return load


async def offered(port: int, contents: list[bytes], rate: float, clients: int, seconds: float) -> Load:
    """Sends requests at random times. Latency counts from the time a request was due, so that a slow server shows."""
    source = random.Random(1)
    queue: asyncio.Queue = asyncio.Queue()
    due = 0.0
    for content in contents:
        due += source.expovariate(rate)
        if due > seconds:
            break
        queue.put_nowait((due, content))
    load = Load()

    async def work() -> None:
        async with Client(port) as client:
            while not queue.empty():
                due, content = queue.get_nowait()
                await asyncio.sleep(max(0.0, load.start + due - time.perf_counter()))
                status = await client.ask(content)
                load.add(status, time.perf_counter() - load.start - due)

    await asyncio.gather(*(work() for _ in range(clients)))
    return load


def library_load(contents: list[list[int]], seconds: float) -> Load:
    """Runs each request alone, after making its adapter active, as the library serves."""
    model = encoder()
    adapters.init(model)
    for index in range(LIBRARY_ADAPTERS):
        model.add_adapter(f"task_{index}", adapters.UniPELTConfig())
    load = Load()
    with torch.inference_mode():
        for index, ids in enumerate(contents):
            if index == WARM_UP // 10:
                load = Load()
            start = time.perf_counter()
            if start - load.start > seconds:
                break
            model.set_active_adapters(f"task_{index % LIBRARY_ADAPTERS}")
            row = torch.tensor([ids])
            states = model(input_ids=row, attention_mask=torch.ones_like(row)).last_hidden_state
            states[0, 0].tolist()
            load.add(200, time.perf_counter() - start)
    return load


def start_server(program: Path, folder: Path, options: list[str]) -> tuple[subprocess.Popen, int]:
    run = [sys.executable, "-W", "ignore", program] if program.suffix == ".py" else [program]
    command = [*run, folder / "base.pt", "--adapters", folder / "adapters", "--port", 0, *options]
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, text=True)
    ready, _, _ = select.select([process.stdout], [], [], START_SECONDS)
    line = process.stdout.readline() if ready else ""
    if not line.startswith("listening on "):
        process.kill()
        raise SystemExit("the server did not start")
    return process, int(line.rsplit(":", 1)[1])


def stop_server(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=STOP_SECONDS)
    finally:
        process.kill()


def memory_of(pid: int) -> int:
    """Returns the bytes of a process and its children. Memory that several share counts once."""
    processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return sum(process.memory_full_info().pss for process in processes)


def measure(arguments: argparse.Namespace, folder: Path) -> list[Point]:
    points = []
    process, port = start_server(
        arguments.server, folder, ["--capacity", str(CAPACITY), *arguments.server_options.split()]
    )
    try:
        asyncio.run(closed(port, requests_for(0, WARM_UP), arguments.clients, arguments.seconds))
        for distinct in arguments.distinct:
            contents = requests_for(distinct, arguments.requests)
            asyncio.run(closed(port, contents[:WARM_UP], arguments.clients, arguments.seconds))  # loads the adapters
            load = asyncio.run(closed(port, contents, arguments.clients, arguments.seconds))
            points.append(load.point("distinct", distinct))
            print_points(points[-1:])
        most = max((point for point in points if point.x <= CAPACITY), key=lambda point: point.x).per_second
        for share in SHARES:
            contents = requests_for(CAPACITY, arguments.requests)
            load = asyncio.run(offered(port, contents, share * most, 256, arguments.seconds))
            points.append(load.point("offered", round(share * most)))
            print_points(points[-1:])
        console.print(f"server: {memory_of(process.pid) / 2**20:.0f} MiB of memory at the end")
    finally:
        stop_server(process)
    points.append(library_load(texts(arguments.requests), arguments.seconds).point("library", LIBRARY_ADAPTERS))
    print_points(points[-1:])
    return points


def print_points(points: list[Point]) -> None:
    for point in points:
        console.print(f"{point.series} {point.x:g}: {point.per_second:.0f}/s, p50 {point.p50:.1f} ms")


def print_table(points: list[Point]) -> None:
    table = Table("series", "adapters, or offered/s", "answered", "refused", "answers/s", "p50 ms", "p95 ms", "p99 ms")
    for point in points:
        numbers = (f"{value:.1f}" for value in (point.per_second, point.p50, point.p95, point.p99))
        table.add_row(point.series, f"{point.x:g}", str(point.answered), str(point.refused), *numbers)
    console.print(table)
    library = points[-1].per_second
    for point in points:
        if point.series == "distinct":
            console.print(f"{point.x:g} adapters: {point.per_second / library:.1f}x the library's answers/s")


def draw(points: list[Point], server: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    distinct = [point for point in points if point.series == "distinct"]
    positions = range(len(distinct))
    left.bar(positions, [point.per_second for point in distinct], color="#4c72b0", label=f"torchgraft, {server}")
    left.axhline(points[-1].per_second, color="#c44e52", label="adapters library, eager")
    left.set_xticks(positions, [f"{point.x:g}" for point in distinct])
    left.set(xlabel="distinct adapters in flight (64 in memory)", ylabel="answers a second")
    left.legend()
    rates = [point for point in points if point.series == "offered"]
    for name in ("p50", "p95", "p99"):
        right.plot([point.x for point in rates], [getattr(point, name) for point in rates], marker="o", label=name)
    right.set(xlabel="requests offered a second, 64 adapters", ylabel="milliseconds", yscale="log")
    right.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--server",
        type=Path,
        required=True,
        help="the program that examples/server builds, or examples/ray_serve/main.py",
    )
    parser.add_argument("--server-options", default="--workers 2 --threads 1")
    parser.add_argument("--requests", type=int, default=3000, help="the most for each point")
    parser.add_argument("--seconds", type=float, default=15, help="the most for each point")
    parser.add_argument("--distinct", type=int, nargs="+", default=DISTINCT, help="numbers of distinct adapters")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_files(Path(folder), max(CAPACITY, *arguments.distinct))
        points = measure(arguments, Path(folder))
    print_table(points)
    if arguments.json:
        machine = {"processor": processor(), "threads": torch.get_num_threads(), "torch": torch.__version__}
        document = {"machine": machine, "points": [asdict(point) for point in points]}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    if arguments.picture:
        draw(points, arguments.server.stem, arguments.picture)


if __name__ == "__main__":
    main()
