"""One base model and some of a folder's adapters, in this process. Knows nothing of Ray."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import torchgraft
from torchgraft.adapter_hub import CONFIG_FILE, SAFETENSORS_FILE, SETUP_FILE, read_config, read_one_version
from torchgraft.adapter_setup import read_setup
from torchgraft.composition import adapters_of, composition_to_json, composition_to_text, is_composition_text

NAME = re.compile(r"[A-Za-z0-9_-]{1,128}")  # of a directory in the folder
BATCH_ROWS = 64
MOST_ADAPTER_BYTES = 256 << 20  # of a row in memory
MOST_PARTS = 8  # adapters in a composition
TRIES = 20  # files may change, and adapters leave, while a composition comes in

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
        self,
        model: Path,
        adapters: Path | None,
        capacity: int,
        threads: int,
        gate_pooling: str | None = None,
        max_compositions: int = 16,
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
            # One more: while an adapter comes in, requests still run the one that leaves for it. And rows that Ray
            # holds no lease on, for the adapters of a composition.
            len(self.own) + capacity + 1 + MOST_PARTS,
            room=self._room(module),
            gate_pooling=gate_pooling,
            max_row_bytes=MOST_ADAPTER_BYTES,
            max_compositions=max_compositions,
            max_composition_parts=MOST_PARTS,
        )

    def _room(self, module: torch.jit.ScriptModule) -> list[Path]:
        """One configuration file of each content that can be served. The others are named, and keep nobody waiting."""
        files: dict[str, Path] = {}
        for name, path in self._config_files():
            if name in self.own:
                _report(name, "the model's file has an adapter of that name, which is served; rename one")
                continue
            try:
                text = read_config(path)
                if text in files:
                    continue
                fault = torchgraft.check_room(module, [*files.values(), path], max_row_bytes=MOST_ADAPTER_BYTES)[-1]
            except torchgraft.GraftError as error:
                fault = str(error)
            if fault:
                _report(name, torchgraft.one_line(fault))
            else:
                files[text] = path
        return list(files.values())

    def _config_files(self) -> list[tuple[str, Path]]:
        """The names of adapters and compositions in the folder, and the configuration files of each."""
        if self._adapters is None:
            return []
        files = [(path.parent.name, path) for path in sorted(self._adapters.glob(f"*/{CONFIG_FILE}"))]
        for path in sorted(self._adapters.glob(f"*/{SETUP_FILE}")):
            name = path.parent.name
            if is_setup(self._adapters, name):
                try:
                    files += [(name, path.parent / part / CONFIG_FILE) for part in adapters_of(read_setup(path.parent))]
                except torchgraft.GraftError as error:
                    _report(name, torchgraft.one_line(str(error)))
        return files

    def has_setup(self, name: str) -> bool:
        """Whether the folder has a composition of that name, and no adapter."""
        return is_setup(self._adapters, name)

    def load(self, name: str, version: str) -> torchgraft.Lease:
        """Reads an adapter of the folder. Memory can hold several versions of one adapter at a time."""
        assert self._adapters is not None  # else no name has a version
        row = f"{name}@{version}"
        self._pool.insert(row, self._adapters / name)
        return self._pool.acquire([row])

    def composed(self, name: str) -> torchgraft.Lease:
        """A composition: of the folder, or text such as "Stack(en, ner)" of adapters that are served. Its adapters come
        in as others do; all of those of a directory are of one version.

        Raises:
            GraftError: an adapter cannot be read, or the composition is refused.
            LookupError: an adapter is not there.
        """
        for _ in range(TRIES):
            tree, directories = self._rows_of(name)
            text = composition_to_text(tree)
            if lease := self._pool.try_acquire([text]):
                return lease
            resident = self._pool.resident()
            for row, directory in directories.items():
                if row not in resident:
                    self._pool.insert(row, directory)
            if self._rows_of(name) != (tree, directories):
                continue  # the files changed meanwhile
            try:
                return self._pool.acquire([text])
            except torchgraft.GraftError:
                if not {*directories, *adapters_of(tree)}.difference(self._pool.resident()):
                    raise  # else an adapter left for another
        raise torchgraft.GraftError(f"'{name}': its files, or the adapters in memory, change all the time")

    def _rows_of(self, name: str) -> tuple[dict, dict[str, Path]]:
        """The composition of rows, and the directory of each row. An adapter of the model's file keeps its name."""
        if is_composition_text(name):
            tree, root, begin = torchgraft.parse_json(composition_to_json(name), name), self._adapters, ""
        else:
            tree, root, begin = read_setup(self._adapters / name), self._adapters / name, f"{name}/"
        rows, directories = {}, {}
        for part in adapters_of(tree):
            if not begin and part in self.own:
                continue
            model_id = model_id_of(root, part) if NAME.fullmatch(part) else ""
            if not model_id:
                raise LookupError(f"no adapter is called '{part}'")
            rows[part] = begin + model_id
            directories[begin + model_id] = root / part
        return _with_rows(tree, rows), directories

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


def _with_rows(tree: dict, rows: dict[str, str]) -> dict:
    if tree["type"] == "single":
        return tree | {"children": [rows.get(name, name) for name in tree["children"]]}
    return tree | {"children": [_with_rows(child, rows) for child in tree["children"]]}


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
