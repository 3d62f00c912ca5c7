"""References that are `adapters==1.3.0` run eagerly, for every architecture that the library supports."""

import functools
import inspect
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from adapters.context import ForwardContext
from torch import Tensor, nn

import adapters
import oracle
import torchgraft
from case import Gates


@dataclass(frozen=True, eq=False)
class OracleReference:
    """The library on one model.

    make(dtype): the eager model; its `model` is the Hugging Face model, its forward's parameters are named as the
        library expects them.
    renamed: the library's location -> ours, where they differ.
    lora_order: the order in which the model runs its projections, which is that of the gates in the library. Ours is
        always q, k, v.
    repair: changes a model that adapters.init() has prepared, where the library departs from its own definitions.
    """

    make: Callable[[torch.dtype], nn.Module]
    renamed: dict[str, str] = field(default_factory=dict)
    lora_order: str = "qkv"
    repair: Callable[[nn.Module], None] | None = None

    def graft(
        self, base: torch.jit.ScriptModule, methods: list[str], dtype: torch.dtype, verify: bool = True
    ) -> torch.jit.ScriptModule:
        directories = {method: self.accepted_directory(method, dtype) for method in methods}
        return torchgraft.graft(base, adapters=directories, verify=verify)

    def run(self, grafted: torch.jit.ScriptModule, method: str, arguments: tuple) -> tuple[Tensor, Gates]:
        return self.expected(method, _dtype_of(grafted), arguments)

    def directory(self, method: str, dtype: torch.dtype) -> str:
        """Where the library saved the randomised adapter."""
        return _prepared(self, dtype).adapter(method).directory

    def accepted_directory(self, method: str, dtype: torch.dtype) -> str:
        """The directory, as somebody leaves it who accepts that the library computes something else. So it is under a
        repair, which makes the library compute what torchgraft does."""
        directory = self.directory(method, dtype)
        if self.repair is not None:
            path = Path(directory) / "adapter_config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": None}))
        return directory

    def expected(self, method: str | None, dtype: torch.dtype, arguments: tuple) -> tuple[Tensor, Gates]:
        """What the library gives; method None is the base model."""
        return _prepared(self, dtype).call(method, arguments)

    def unrepaired(self) -> "OracleReference":
        return replace(self, repair=None)


def distance_of_unrepaired(reference: OracleReference, method: str, dtype: torch.dtype, arguments: tuple) -> float:
    """The largest difference that the repair of the library makes to the compared tensor."""
    repaired, _ = reference.expected(method, dtype, arguments)
    untouched, _ = reference.unrepaired().expected(method, dtype, arguments)
    return oracle.difference(untouched, repaired)


class _Prepared(oracle.Oracle):
    """One model with as many adapters as are asked for."""

    def __init__(self, reference: OracleReference, dtype: torch.dtype):
        self._reference = reference
        self._positional = reference.make(dtype)
        self.model = self._positional.model
        adapters.init(self.model)
        if reference.repair is not None:
            reference.repair(self.model)
        self._directory = tempfile.TemporaryDirectory(prefix="torchgraft_oracle_")
        self._saved = {}

    @torch.no_grad()
    def call(self, method: str | None, arguments: tuple) -> tuple[Tensor, Gates]:
        name = self.adapter(method).name if method is not None else None
        self.model.set_active_adapters(name)
        named = dict(zip(inspect.signature(self._positional.forward).parameters, arguments, strict=True))
        with ForwardContext(self.model, **named, output_adapter_gating_scores=True) as context:
            hidden = self._positional(*arguments)
        if name is None:
            return hidden, {}
        return hidden, self._gates_of(context.adapter_gating_scores.get(name, {}), name, hidden.size(0))

    def _gates_of(self, scores: dict, name: str, rows: int) -> Gates:
        """Gating scores as gates[layer][location], [rows, columns].

        Undone: squeezing (one row: [k], k = 1: [rows]); ungated bottlenecks, which report their up projection instead;
        names and the order of columns as the reference says. Modules that run again (ALBERT), and cross attention after
        self attention, have their columns on the right, as ours do.
        """
        modules = self.model.get_adapter(name)
        result: Gates = {}
        for layer, by_location in scores.items():
            for location, score in by_location.items():
                if not any(path.endswith("gate.weight") for path, _ in modules[layer][location].named_parameters()):
                    continue
                gate = torch.from_numpy(score.copy()).reshape(rows, -1)
                if location == "selfattn_lora":
                    gate = self._in_order(gate, name)
                result.setdefault(layer, {})[self._reference.renamed.get(location, location)] = gate
        return result

    def _in_order(self, gate: Tensor, name: str) -> Tensor:
        """[rows, attentions x matrices] with the matrices of each attention as q, k, v."""
        matrices = self._attention_matrices(name)
        order = [matrix for matrix in self._reference.lora_order if matrix in matrices]
        columns = [order.index(matrix) for matrix in "qkv" if matrix in matrices]
        return gate.unflatten(1, (-1, len(order)))[:, :, columns].flatten(1)


@functools.cache
def _prepared(reference: OracleReference, dtype: torch.dtype) -> _Prepared:
    return _Prepared(reference, dtype)


def _dtype_of(module: torch.jit.ScriptModule) -> torch.dtype:
    return next(parameter.dtype for parameter in module.parameters() if parameter.is_floating_point())
