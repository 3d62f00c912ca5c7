"""AdapterPool: more adapters on one base than memory has room for."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from ._libraries import patcher
from .configs import config_to_json
from .grafting import cpp_module, directory_spec, script_module


class Lease:
    """The right to run some adapters of a pool: while it lives, their rows hold what they held when it was made.

    It ends with its `with` block, or with its last reference.

    Attributes:
        module: run its `forward` or `forward_with_gates` with adapter_ids.
        ids: int64 [B], the row of each name that was asked for, in that order; -1 is the base model.
    """

    def __init__(self, held: Any, module: torch.jit.ScriptModule):
        self._held = held
        self.module = module
        self.ids = torch.tensor(held.ids(), dtype=torch.int64)

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *_: object) -> None:
        self._held = None


class AdapterPool:
    """A fixed number of adapters on one base model, any of them in any batch; the one used longest ago makes room.

    An adapter comes in by having its row of the stacked banks written, in place: the graph and the module stay. All
    methods may be called from any thread. docs/architecture.md has the rules.

    Args:
        module: a base model, or a grafted one, whose adapters then stay. It is not changed.
        capacity: how many adapters are in memory.
        room: configurations (as graft() takes them) that rows must hold. An adapter that needs more makes the pool
            build larger rows beside its traffic. None: those of the first adapter.
        gate_pooling, token_mask: as in graft(); with "unpadded" a row's result does not depend on its batch.

    Raises:
        GraftError: as graft(), and when capacity is not above the number of adapters of `module`.
    """

    def __init__(
        self,
        module: torch.jit.ScriptModule,
        capacity: int = 64,
        room: Iterable[Any] = (),
        *,
        gate_pooling: str = "all",
        token_mask: str | None = None,
    ):
        self._base = module
        configs = [config_to_json(config) for config in room]
        self._pool = patcher().AdapterPool(cpp_module(module), capacity, configs, gate_pooling, token_mask or "")
        # The newest rows' module in Python: wrapping one takes milliseconds.
        self._newest: tuple[Any, torch.jit.ScriptModule] | None = None

    def insert(self, name: str, directory: str | Path) -> None:
        """Brings the adapter of a directory (AdapterHub's, or a LoRA of PEFT) in, or replaces the one of that name for
        all who acquire it from now on. Waits for a row if leases hold them all.

        Raises:
            GraftError: it cannot be read or does not fit the model; then nothing has changed.
        """
        self._pool.insert(directory_spec(self._base, directory, name))

    def acquire(self, names: Sequence[str]) -> Lease:
        """A lease on adapters that are in memory, one name for each row of a batch; "" is the base model.

        Raises:
            GraftError: one of them is not there.
        """
        return self._lease(self._pool.acquire(list(names)))

    def try_acquire(self, names: Sequence[str]) -> Lease | None:
        """The same; None when one of them is not there."""
        held = self._pool.try_acquire(list(names))
        return None if held is None else self._lease(held)

    def evict(self, name: str) -> bool:
        """Takes an adapter out of memory; leases keep it until they end. False when it is not there."""
        return self._pool.evict(name)

    def resident(self) -> list[str]:
        """The names of those in memory, sorted."""
        return self._pool.resident()

    def stats(self) -> dict[str, int]:
        """capacity, resident, row_bytes (of one adapter, padding included), bank_bytes, loads, evictions, rebuilds."""
        return self._pool.stats()

    def _lease(self, held: Any) -> Lease:
        newest = self._newest
        if newest is None or not newest[0].same_module(held):
            # A lease on no row, which keeps nobody waiting, tells later whether the module is still this one.
            newest = (self._pool.acquire([]), script_module(held.module()))
            if newest[0].same_module(held):
                self._newest = newest
        return Lease(held, newest[1])
