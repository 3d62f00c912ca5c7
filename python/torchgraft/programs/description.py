"""What an exported model says of itself: its adapters and their gates. It goes along with the program, into its file
and into packages."""

import json
import zipfile
from pathlib import Path
from typing import Any

import torch

from .._kinds import Kind, kind_of
from .._libraries import patcher
from .._reading import parse_json
from ..errors import GraftError
from ..grafting import cpp_module, is_grafted
from ..life import AdapterInfo, list_adapters
from ..pool import AdapterPool

# Where it stands: in the program's metadata, and as a file beside it (extra_files) or a key of a package's metadata.
CUSTOM = "torchgraft"
FILE = "torchgraft.json"


def describe(module: torch.jit.ScriptModule, adapter_ids: bool, gates: bool, lowered: bool) -> dict[str, Any]:
    """Returns a description of what is exported of `module`.

    Returns:
        {"adapters": [...], "adapter_ids": bool, "gate_outputs": [...], "gates": {...}, "lowered": bool}. "adapters" has
        what list_adapters() says, in the order of adapter_ids. "gate_outputs" names the last outputs, in their order,
        and "gates" has their columns for each adapter: {"reviews": {"layer_0.selfattn_lora": [0, 1]}}. Both are empty
        if the program returns no gates.
    """
    entries = [vars(info) | {"by_location": dict(info.by_location)}
               for info in (list_adapters(module) if is_grafted(module) else [])]  # fmt: skip
    for entry in entries:
        if not entry["composition"]:
            del entry["composition"]
    return {
        "adapters": entries,
        "adapter_ids": adapter_ids,
        "gate_outputs": [name for name in dict.fromkeys(gate_names(module)) if name] if gates else [],
        "gates": _gate_columns(module) if gates else {},
        "lowered": lowered,
    }


def describe_pool(pool: AdapterPool) -> dict[str, Any]:
    """Returns a description of what is exported of a pool: the same keys, no adapters, and "pool": what a host needs
    for a pool with the same banks."""
    room = [parse_json(config, "room") for config in pool.room()]
    with pool.acquire([]) as lease:
        digest = patcher().base_digest(cpp_module(lease.module))
    return {
        "adapters": [],
        "adapter_ids": True,
        "gate_outputs": [],
        "gates": {},
        "lowered": False,
        "pool": {"capacity": pool.stats()["capacity"], "room": room, "base": digest},
    }


def gate_names(module: torch.jit.ScriptModule) -> list[str]:
    """The output to which each gate that grafted_forward returns belongs; empty where no adapter has that gate."""
    held = module.adapters
    entries = zip(held.gate_layers, held.gate_locations, held.gate_counts, strict=True)
    return [f"layer_{layer}.{location}" if any(counts) else "" for layer, location, counts in entries]


def _gate_columns(module: torch.jit.ScriptModule) -> dict[str, dict[str, list[int]]]:
    counts = module.adapters.gate_counts
    names = gate_names(module)
    result: dict[str, dict[str, list[int]]] = {}
    for adapter, adapter_name in enumerate(module.adapter_names()):
        begins: dict[str, int] = {}
        found: dict[str, list[int]] = {}
        for name, count in zip(names, counts, strict=True):
            if name:
                begin = begins.get(name, 0)
                begins[name] = begin + max(count)
                found.setdefault(name, []).extend(range(begin, begin + count[adapter]))
        result[adapter_name] = {name: columns for name, columns in found.items() if columns}
    return result


def description_of(program: torch.export.ExportedProgram) -> dict[str, Any] | None:
    """The description of a program that export() made; None for another program."""
    return program.graph_module.meta.get("custom", {}).get(CUSTOM)


def description_text(program: torch.export.ExportedProgram) -> str | None:
    """The same as JSON."""
    description = description_of(program)
    return None if description is None else json.dumps(description)


def described_adapters(path: Path) -> list[AdapterInfo] | None:
    """Returns the adapters of an exported program or a package; None if the file is of another kind.

    Raises:
        GraftError: it is one that torchgraft did not export, or one without adapters.
    """
    kind = kind_of(path) if path.is_file() else Kind.UNKNOWN
    if kind not in (Kind.PROGRAM, Kind.PACKAGE):
        return None
    with zipfile.ZipFile(path) as archive:
        text = _description_in(archive, path)
    description = parse_json(text, path) if text else {}
    if isinstance(description, dict) and "pool" in description:
        raise GraftError(
            f"{path}: {kind.value} of a pool: whoever serves it (examples/server) brings the adapters along"
        )
    adapters = description.get("adapters") if isinstance(description, dict) else None
    if not adapters or not isinstance(adapters, list):
        raise GraftError(f"{path}: {kind.value} without adapters of torchgraft")
    return [_adapter_info(entry, path) for entry in adapters]


def _adapter_info(entry: Any, path: Path) -> AdapterInfo:
    """Reads what describe() has written of one adapter; files of before lack what has a default."""
    types = {"name": str, "config": str, "active": bool, "merged": bool, "trainable": bool, "gate_pooling": str,
             "parameters": int, "bytes": int, "by_location": dict, "composition": str}  # fmt: skip
    found = dict(entry) if isinstance(entry, dict) else {}
    if unknown := [key for key in found if key not in types]:
        raise GraftError(f"{path}: expected an adapter's entry to have {', '.join(types)}, got '{unknown[0]}', too")
    found.setdefault("gate_pooling", "")
    found.setdefault("composition", "")
    for key, kind in types.items():
        if type(found.get(key)) is not kind:
            raise GraftError(
                f"{path}: expected an adapter's entry with '{key}' of type {kind.__name__}, got {found.get(key)!r}"
            )
    if not all(type(count) is int for count in found["by_location"].values()):
        raise GraftError(f"{path}: expected numbers in 'by_location', got {found['by_location']}")
    return AdapterInfo(**found)


def _description_in(archive: zipfile.ZipFile, path: Path) -> str | bytes | None:
    for name in archive.namelist():
        if name.endswith(f"extra/{FILE}"):
            return archive.read(name)
        if "data/aotinductor/" in name and name.endswith("_metadata.json"):
            text = parse_json(archive.read(name), path).get(CUSTOM)
            if text is not None:
                return text
    return None
