"""AdapterPool serves more adapters on one base than fit in memory."""

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from ._libraries import patcher
from .composition import composition_to_json
from .configs import config_to_json
from .grafting import Base, base_module, cpp_module, directory_spec, script_module


class Lease:
    """The right to run some adapters of a pool. As long as a lease lives, the pool does not write their rows.

    A lease ends with its `with` block, or with its last reference.

    Attributes:
        module: the module to run: call its `forward` or `forward_with_gates` with adapter_ids=ids.
        ids: int64 [B], on the CPU: the row of each requested name, in their order; -1 is the base model. Ids of
            compositions follow those of the rows.
    """

    def __init__(self, held: Any, module: torch.jit.ScriptModule):
        self._held = held
        self.module = module
        self.ids = torch.tensor(held.ids(), dtype=torch.int64)

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *_: object) -> None:
        self._held = None


def check_room(
    module: Base,
    room: Iterable[Any],
    *,
    gate_pooling: str | None = None,
    token_mask: str | None = None,
    max_row_bytes: int = 0,
) -> list[str]:
    """Returns why AdapterPool could not make rows for configurations: one text for each of `room`, empty for those that
    have room beside all before them. The arguments are AdapterPool's.

    Raises:
        GraftError: `module` is no Transformer, or a configuration is not supported.
        TypeError: `module` is neither TorchScript nor a program.
    """
    configs = [config_to_json(config) for config in room]
    return patcher().check_room(
        cpp_module(base_module(module)), configs, gate_pooling or "", token_mask or "", max_row_bytes
    )


class AdapterPool:
    """Keeps a fixed number of adapters on one base model in memory. Any of them can be used in any batch.

    A bank holds the parameters of all adapters of one slot, stacked along the first dimension: [capacity, ...]. To load
    an adapter, the pool writes its row of the banks in place; the graph and the module stay. If all rows are taken, the
    adapter that was used longest ago gives its row up. All methods may be called from any thread. docs/architecture.md
    has the rules.

    Args:
        module: a base model, or a grafted module, whose adapters then stay, or an exported program. It is not changed.
        capacity: how many adapters are in memory at once.
        room: configurations, as graft() takes them. Every row is made large enough for each of them. If an adapter
            needs more, the pool builds larger banks beside its traffic. Empty: rows fit the first adapter.
        gate_pooling: as in graft(). None: each adapter keeps its own, also within one batch. With "unpadded" a row's
            result does not depend on its batch.
        token_mask: as in graft().
        max_row_bytes: the most that one row may take. An adapter that needs more is refused. 0: no limit.
        max_compositions: how many compositions the module holds at once. For one of another structure (other blocks,
            weights or sizes, or adapters of other kinds) the pool builds its module anew, beside its traffic. 0: none.
        max_composition_parts: the most adapters in a composition.
        max_composition_depth: the most blocks one in another.

    Raises:
        GraftError: graft() would refuse `module` or a configuration, or `capacity` is not above the number of adapters
            of `module`.
        TypeError: `module` is neither TorchScript nor a program.
    """

    def __init__(
        self,
        module: Base,
        capacity: int = 64,
        room: Iterable[Any] = (),
        *,
        gate_pooling: str | None = None,
        token_mask: str | None = None,
        max_row_bytes: int = 0,
        max_compositions: int = 16,
        max_composition_parts: int = 8,
        max_composition_depth: int = 3,
    ):
        module = base_module(module)
        self._base = module
        configs = [config_to_json(config) for config in room]
        limits = [max_compositions, max_composition_parts, max_composition_depth]
        self._pool = patcher().AdapterPool(
            cpp_module(module), capacity, configs, gate_pooling or "", token_mask or "", max_row_bytes, limits
        )
        # The module of the newest banks, wrapped for Python: wrapping takes milliseconds.
        self._newest: tuple[Any, torch.jit.ScriptModule] | None = None

    def insert(self, name: str, directory: str | Path) -> None:
        """Loads the adapter of a directory (AdapterHub's, or a LoRA of PEFT). It replaces the adapter of that name for
        everybody who acquires it from now on. If leases hold all rows, the method waits for one.

        Raises:
            GraftError: the directory cannot be read, or the adapter does not fit the model. The pool has not changed.
        """
        for message in self._pool.insert(directory_spec(self._base, directory, name)):
            warnings.warn(message, stacklevel=2)

    def acquire(self, names: Sequence[str]) -> Lease:
        """Returns a lease on adapters that are in memory.

        Args:
            names: the adapter of each row of a batch. "" is the base model. A name may also be that of a composition
                (compose()), or the text of one: "Stack(en, ner)".

        Raises:
            GraftError: an adapter is not in memory, or a composition is refused.
        """
        return self._lease(self._pool.acquire(_checked(names)))

    def try_acquire(self, names: Sequence[str]) -> Lease | None:
        """Returns a lease as acquire() does, or None if an adapter is not in memory."""
        held = self._pool.try_acquire(_checked(names))
        return None if held is None else self._lease(held)

    def compose(self, name: str, composition: Any) -> None:
        """Gives a composition a name, or the name another composition, for everybody who acquires it from now on.

        Args:
            name: a text that no adapter in memory has.
            composition: as compose() takes it. Its adapters need not be in memory.

        Raises:
            GraftError: it has a Fuse, a Parallel or a MultiTask, is beyond the pool's limits, or the name is taken.
        """
        self._pool.compose(name, composition_to_json(composition))

    def remove_composition(self, name: str) -> bool:
        """Takes the name of a composition away. Leases keep it. Returns False if there was none."""
        return self._pool.remove_composition(name)

    def compositions(self) -> dict[str, str]:
        """Returns the compositions that have names, and each as text."""
        return self._pool.compositions()

    def evict(self, name: str) -> bool:
        """Takes an adapter out of memory; its row is free when the last lease on it ends. Returns False if it was not
        there."""
        return self._pool.evict(name)

    def resident(self) -> list[str]:
        """Returns the names of the adapters in memory, sorted."""
        return self._pool.resident()

    def room(self) -> list[str]:
        """Returns the configurations that each row can hold now, as JSON. A pool on the same base with this `room` has
        banks of the same names and sizes."""
        return self._pool.room()

    def stats(self) -> dict[str, int]:
        """Returns counts and sizes: "capacity", "resident" (adapters in memory), "row_bytes" (of one adapter, with
        padding), "bank_bytes" (of all rows), "loads" (rows written), "evictions", "rebuilds" (modules built anew, for
        banks that had to grow or compositions of another structure) and "compositions" (in the module)."""
        return self._pool.stats()

    def _lease(self, held: Any) -> Lease:
        newest = self._newest
        if newest is None or not newest[0].same_module(held):
            # A lease on no row keeps nobody waiting. It tells later whether the module is still this one.
            newest = (self._pool.acquire([]), script_module(held.module()))
            if newest[0].same_module(held):
                self._newest = newest
        return Lease(held, newest[1])


def _checked(names: Sequence[str]) -> list[str]:
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"acquire: expected a list with the name of each row's adapter, got {names!r}")
    return list(names)
