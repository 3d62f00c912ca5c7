"""Makes exported programs of TorchScript modules, grafted or not."""

import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim

from .._reading import parse_json
from ..composition import has_block
from ..errors import GraftError, one_line
from ..grafting import cpp_module, is_grafted
from ..life import list_adapters, lower
from ..pool import AdapterPool
from .description import CUSTOM, describe, describe_pool, gate_names
from .eager import Eager
from .read_program import quiet
from .to_script import fixed_inputs


def export(
    module: torch.jit.ScriptModule | AdapterPool,
    example_inputs: Any,
    *,
    adapter_ids: bool = True,
    gates: bool = False,
    lowered: bool = False,
    dynamic: bool = True,
) -> torch.export.ExportedProgram:
    """Returns an exported program that computes what a TorchScript module computes.

    The program's parameters and buffers have the module's names, and share its memory: a bank is
    `adapters.layer_0.selfattn_lora_q.lora_a`. Its operators are ATen's and torchgraft's: whoever loads it loads
    libtorchgraft.so first.

    Args:
        module: a TorchScript module. If it is grafted, the adapter that is active now is the active one in the program.
            Or a pool: the program then has its banks as they are now, and takes its rows' numbers. A host that hands
            its own pool's banks to the compiled program (examples/server) serves any number of adapters with it.
        example_inputs: inputs of forward, adapter_ids left out: a tuple, a dict by name, or one tensor. Give at least
            two rows, and lengths that are no sizes of the model.
        adapter_ids: the program takes adapter_ids, int64 [B], as its last input. False: it takes none, and every row
            uses the active adapter.
        gates: the program returns (result, gates). `gates` has a tensor [B, columns] for each location, named
            "layer_0.selfattn_lora"; the program's description says which columns belong to an adapter.
        lowered: call ATen operators only. The program then needs no library, is slower, and does not check adapter_ids.
        dynamic: leave open every size that the model leaves open, the batch and the length among them. False: the
            program takes inputs of the example's sizes only.

    Raises:
        GraftError: the module does what no program can do (branches on values), or refuses the example.
        TypeError: `module` is neither TorchScript nor a pool.
    """
    pool = module if isinstance(module, AdapterPool) else None
    if pool is not None:
        module = _pool_module(pool, adapter_ids, gates, lowered)
    cpp_module(module)
    grafted = is_grafted(module)
    if re.search(r"= quantized::\w+", str(module.inlined_graph)):
        raise GraftError(
            "export: the module has packed int8 or float16 weights, which no exported program can hold; export the "
            "module in float32"
        )
    if grafted and pool is None:
        _check_compositions(module, adapter_ids, gates)
    if grafted and any(name.endswith(".prompt_length") for name, _ in module.adapters.named_buffers()):
        raise GraftError(
            "export: the module has prompts (prompt_tuning), whose number of tokens is read while it runs, as no "
            "exported program can; remove them (remove_adapter), or train prefix_tuning instead"
        )
    if gates and not grafted:
        raise GraftError("export: nothing is grafted onto the module, so that it has no gates")
    arguments = _arguments(module, example_inputs)
    ids = (torch.zeros(_rows(module, arguments), dtype=torch.int64),) if adapter_ids and grafted else ()
    description = describe(module, bool(ids), gates, lowered) if pool is None else describe_pool(pool)
    given = _left_out(module, len(arguments), bool(ids))
    target = lower(module, example=example_inputs) if lowered and grafted else module
    eager = _WithGates(target, "grafted_forward", given) if gates else Eager(target, given=given)
    program = _exported(eager, (*arguments, *ids), dynamic)
    program.graph_module.meta.setdefault("custom", {})[CUSTOM] = description
    if dynamic:
        _warn_of_fixed_sizes(program)
    return program


def _check_compositions(module: torch.jit.ScriptModule, adapter_ids: bool, gates: bool) -> None:
    """Raises GraftError where a program would have to find the rows of a composition, or to tell its gates."""
    compositions = [info for info in list_adapters(module) if info.composition]
    if compositions and adapter_ids:
        raise GraftError(
            "export: the module has compositions, whose rows are found while it runs, as no exported program can; "
            "activate one, and export it for all rows (adapter_ids=False, --no-ids), or remove them (remove_adapter)"
        )
    if compositions and gates:
        raise GraftError(
            "export: the module has compositions, whose gates no program returns; export it without gates, or remove "
            "them (remove_adapter)"
        )
    for info in compositions:
        if info.active and has_block(parse_json(info.config, info.name), "MultiTask"):
            raise GraftError(
                f"export: the active composition, {info.composition}, needs the task of each row, and a module with "
                "compositions is exported without adapter_ids; remove the compositions (remove_adapter) and export "
                "their adapters"
            )


def _pool_module(pool: AdapterPool, adapter_ids: bool, gates: bool, lowered: bool) -> torch.jit.ScriptModule:
    """The module of a pool's newest banks."""
    if not adapter_ids or gates or lowered:
        raise GraftError("export: the program of a pool takes adapter_ids, returns no gates and is not lowered")
    if not pool.room():
        raise GraftError("export: the pool has no banks yet; name configurations that its rows can hold (room)")
    if pool.stats()["compositions"] > 0:
        raise GraftError(
            "export: the pool has compositions, whose rows are found while it runs, as no exported program can; make "
            "the pool with max_compositions=0"
        )
    return pool.acquire([]).module


def _arguments(module: torch.jit.ScriptModule, example: Any) -> tuple[Any, ...]:
    """The example as positional arguments of forward."""
    if isinstance(example, Tensor):
        return (example,)
    if not isinstance(example, Mapping):
        return tuple(example)
    names = [argument.name for argument in module.forward.schema.arguments[1:]]
    if unknown := [name for name in example if name not in names]:
        raise GraftError(f"export: forward has no argument '{unknown[0]}'; it has: {', '.join(names)}")
    given = [name in example for name in names]
    last = max((position for position, is_given in enumerate(given) if is_given), default=-1)
    if not all(given[: last + 1]):
        raise GraftError(f"export: the example has no '{names[given.index(False)]}', an argument of forward")
    return tuple(example[name] for name in names[: last + 1])


def _rows(module: torch.jit.ScriptModule, arguments: tuple[Any, ...]) -> int:
    """How many rows the example has: gates say it, whichever dimension is the batch."""
    try:
        with torch.no_grad():
            gates = module.grafted_forward(*arguments)[1]
    except (RuntimeError, torch.jit.Error) as error:
        raise GraftError(f"export: the module does not run on the example inputs: {one_line(error)}") from error
    gates = [gate for gate in gates if _has_run(gate)]
    tensors = [value for value in (*gates, *arguments) if isinstance(value, Tensor)]
    return tensors[0].size(0)


def _has_run(gate: Tensor) -> bool:
    """Whether the layer of a gate of grafted_forward has run: it may stand in a branch."""
    return gate.dim() == 2


def _left_out(module: torch.jit.ScriptModule, count: int, adapter_ids: bool) -> dict[str, Any]:
    """The arguments of forward that are not among the first `count`, with their defaults."""
    rest = module.forward.schema.arguments[1 + count :]
    return {each.name: each.default_value for each in rest if not (adapter_ids and each.name == "adapter_ids")}


class _WithGates(Eager):
    """Returns (result, gates), the gates of one location side by side; NaN where a layer's branch does not run."""

    def run(self, values: Iterable[Any]) -> tuple[Any, dict[str, Tensor]]:
        result, gates = super().run(values)
        parts: dict[str, list[Tensor]] = {}
        known = next((gate for gate in gates if _has_run(gate)), None)
        counts = self._script.adapters.gate_counts
        for name, gate, count in zip(gate_names(self._script), gates, counts, strict=True):
            if name:
                has_run = known is None or _has_run(gate)
                part = gate if has_run else known.new_full((known.size(0), max(count)), float("nan"))
                parts.setdefault(name, []).append(part)
        return result, {name: torch.cat(found, 1) for name, found in parts.items()}


def _exported(eager: Eager, example: tuple[Any, ...], dynamic: bool) -> torch.export.ExportedProgram:
    shapes = tuple(
        dict.fromkeys(range(value.dim()), Dim.AUTO) if isinstance(value, Tensor) and dynamic else None
        for value in example
    )
    # torch.export takes one tensor that is given twice for one input, and drops the other.
    example = tuple(value.clone() if isinstance(value, Tensor) else value for value in example)
    try:
        with quiet():
            return torch.export.export(eager, example, dynamic_shapes=(*shapes,), strict=False)
    except GraftError:
        raise
    except Exception as error:  # torch.export raises errors of many classes
        text = str(error).strip().splitlines() or [type(error).__name__]
        raise GraftError(
            f"export: torch.export does not take the module ({text[0].rstrip('.')}); a program cannot branch on what "
            "tensors hold, and the example must be valid inputs"
        ) from error


def _warn_of_fixed_sizes(program: torch.export.ExportedProgram) -> None:
    if (fixed := fixed_inputs(program)) is not None:
        warnings.warn(
            f"export: the program takes inputs of one size only ({fixed}); give an example of at least two rows, or "
            "a model that leaves its sizes open",
            stacklevel=3,
        )
