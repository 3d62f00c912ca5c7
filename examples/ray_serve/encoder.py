"""One base model and some of a folder's adapters, in this process. Knows nothing of Ray."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import torchgraft
from torchgraft.adapter_hub import CONFIG_FILE, SAFETENSORS_FILE, SETUP_FILE, read_config, read_one_version

NAME = re.compile(r"[A-Za-z0-9_-]{1,128}")  # of a directory in the folder
BLOCK = re.compile(r"(Stack|Fuse|Split|BatchSplit|Parallel|MultiTask|Average)\(")
NO_COMPOSITION = (
    "it is a composition, and the server serves single adapters; ask for one of its adapters, or run the composition "
    "in a program of your own, as examples/serve does"
)
BATCH_ROWS = 64
MOST_ADAPTER_BYTES = 256 << 20  # of a row in memory

Status = int
Answer = tuple[Status, dict | str]  # 200 and the body of the answer, or an error's message


@dataclass
class Request:
    """Rows of token ids for the adapter of `lease`; pooling: "first" or "mean"."""

    lease: torchgraft.Lease
    rows: list[list[int]]
    pooling: str


class Encoder:
    """A TorchScript encoder, forward(input_ids, attention_mask) with [rows, tokens] int64 each, bare or grafted.

    Memory holds `capacity` adapters of the folder, and always those of a grafted file. gate_pooling: as AdapterPool
    takes it; None: as each adapter was trained. adapters: the folder; None: only those of a grafted file are served.
    """

    def __init__(
        self, model: Path, adapters: Path | None, capacity: int, threads: int, gate_pooling: str | None = None
    ):
        torch.set_num_threads(threads)
        module = torchgraft.load_module(model).eval()
        self._inputs = torchgraft.forward_inputs(module.forward)
        self._limits = torchgraft.text_limits(module)
        if not self._inputs.takes_mask:
            raise torchgraft.GraftError(f"{model}: forward takes no mask; examples/server runs it on unpadded rows")
        grafted = hasattr(module, "adapter_names")
        if adapters is None and not grafted:
            raise torchgraft.GraftError(f"{model} has no adapters; give the folder of some with --adapters")
        self._adapters = adapters
        self.own = set(module.adapter_names()) if grafted else set()
        self._pool = torchgraft.AdapterPool(
            module,
            # One more: while an adapter comes in, requests still run the one that leaves for it.
            len(self.own) + capacity + 1,
            room=self._room(module),
            gate_pooling=gate_pooling,
            max_row_bytes=MOST_ADAPTER_BYTES,
        )

    def _room(self, module: torch.jit.ScriptModule) -> list[Path]:
        """One configuration file of each content that can be served. The others are named, and keep nobody waiting."""
        files: dict[str, Path] = {}
        for path in sorted(self._adapters.glob(f"*/{CONFIG_FILE}")) if self._adapters else []:
            if path.parent.name in self.own:
                _report(path.parent.name, "the model's file has an adapter of that name, which is served; rename one")
                continue
            try:
                text = read_config(path)
                if text in files:
                    continue
                fault = torchgraft.check_room(module, [*files.values(), path], max_row_bytes=MOST_ADAPTER_BYTES)[-1]
            except torchgraft.GraftError as error:
                fault = str(error)
            if fault:
                _report(path.parent.name, torchgraft.one_line(fault))
            else:
                files[text] = path
        for path in sorted(self._adapters.glob(f"*/{SETUP_FILE}")) if self._adapters else []:
            if is_setup(self._adapters, path.parent.name):
                _report(path.parent.name, NO_COMPOSITION)
        return list(files.values())

    def has_setup(self, name: str) -> bool:
        """Whether the folder has a composition of that name, and no adapter."""
        return is_setup(self._adapters, name)

    def load(self, name: str, version: str) -> torchgraft.Lease:
        """Reads an adapter of the folder. Memory can hold several versions of one adapter at a time."""
        assert self._adapters is not None  # else no name has a version
        row = f"{name}@{version}"
        self._pool.insert(row, self._adapters / name)
        return self._pool.acquire([row])

    def resident(self, name: str) -> torchgraft.Lease:
        """An adapter of the model's file, or, for "", the base."""
        return self._pool.acquire([name])

    def run(self, requests: list[Request]) -> list[Answer]:
        """One forward pass, or one for each module: the pool builds a new one when its banks grow."""
        answers = {id(request): fault for request in requests if (fault := self._fault(request))}
        taken = [request for request in requests if id(request) not in answers]
        for module in {id(request.lease.module): request.lease.module for request in taken}.values():
            mine = [request for request in taken if request.lease.module is module]
            answers.update(zip(map(id, mine), self._answers(module, mine), strict=True))
        return [answers[id(request)] for request in requests]

    def _fault(self, request: Request) -> Answer | None:
        """What is wrong with a request's rows, as examples/server says it; else None."""
        for row in request.rows:
            if fault := self._limits.fault(row):
                is_too_long, message = fault
                return 413 if is_too_long else 400, message
        return None

    def _answers(self, module: torch.jit.ScriptModule, requests: list[Request]) -> list[Answer]:
        """If the pass fails, on a token that the model does not have, say, each request runs alone, so that the others
        get their answers."""
        try:
            states = iter(self._states(module, requests))
        except (RuntimeError, torch.jit.Error) as error:
            if len(requests) > 1:
                return [answer for request in requests for answer in self._answers(module, [request])]
            return [(400, torchgraft.one_line(error))]
        return [
            (200, {"outputs": [_pooled(next(states), row, request) for row in request.rows]}) for request in requests
        ]

    @torch.inference_mode()
    def _states(self, module: torch.jit.ScriptModule, requests: list[Request]) -> torch.Tensor:
        """float [rows, tokens, hidden], or what the model returns instead: [rows, n]."""
        rows = [torch.tensor(row) for request in requests for row in request.rows]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
        mask = (torch.arange(ids.size(1)) < lengths[:, None]).long()
        adapter_ids = torch.cat([request.lease.ids.expand(len(request.rows)) for request in requests])
        result = module(*self._inputs.arguments(ids, mask), adapter_ids=adapter_ids)
        while not isinstance(result, torch.Tensor):
            result = next(iter(result.values())) if isinstance(result, dict) else result[0]
        return result.float()


def model_id_of(adapters: Path | None, name: str) -> str:
    """NAME@VERSION of an adapter in the folder, so that changed files are another model to Ray; else "". While another
    process saves the adapter, waits for the instant of renaming to pass."""

    def look(directory: Path) -> str:
        weights = directory / SAFETENSORS_FILE
        if not (directory / CONFIG_FILE).is_file():
            return ""
        return f"{name}@{weights.stat().st_mtime_ns if weights.is_file() else 0}"

    if not name or adapters is None:
        return ""
    return read_one_version(adapters / name, (CONFIG_FILE, SAFETENSORS_FILE), look)


def is_composition(name: str) -> bool:
    """Whether it is text such as "Stack(en, ner)"."""
    return BLOCK.match(name) is not None


def is_setup(adapters: Path | None, name: str) -> bool:
    """Whether the folder has a composition of that name, and no adapter."""
    directory = adapters / name if adapters and NAME.fullmatch(name) else None
    return directory is not None and (directory / SETUP_FILE).is_file() and not model_id_of(adapters, name)


def _report(name: str, fault: str) -> None:
    print(f"adapter {name} cannot be served: {fault}", file=sys.stderr)


def _pooled(states: torch.Tensor, row: list[int], request: Request) -> list[float]:
    if states.dim() == 2:
        states = states[: len(row)].mean(0) if request.pooling == "mean" else states[0]
    return states.tolist()
