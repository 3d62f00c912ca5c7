"""What a test of an architecture needs to know of it.

A Case is a small random model, a way of calling it, and a Reference, which knows what the grafted model must give.
References are the `adapters` library where it supports the model (oracle_reference.py), and a restatement of the
definitions in plain PyTorch where it does not (restated_reference.py).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

# What every architecture is tested with; the names are keys of oracle.CONFIGS.
METHODS = ("unipelt", "mam", "double_seq_bn", "lora_all", "prefix_gated")

Gates = dict[int, dict[str, Tensor]]  # gates[layer][location]: [rows, columns]


class Reference(Protocol):
    """Adapters have the names of their methods."""

    def graft(
        self, base: torch.jit.ScriptModule, methods: list[str], dtype: torch.dtype, verify: bool = True
    ) -> torch.jit.ScriptModule:
        """`base` with an adapter for each method, all in one bank, every parameter random and none of them zero.

        Args:
            verify: that of torchgraft.graft(), which takes half of its time.
        """
        ...

    def run(self, grafted: torch.jit.ScriptModule, method: str, arguments: tuple) -> tuple[Tensor, Gates]:
        """What the grafted model must give for the arguments where the adapter of `method` is active: the compared
        tensor, and the gates of gated modules."""
        ...


@dataclass(frozen=True)
class Case:
    """One architecture.

    make(dtype): a fresh eager model in eval mode, the same values at every call. It takes positional tensors.
    arguments(dtype, seed): those tensors. Seed 0 is what the model is traced with; other seeds have other batch sizes,
        lengths and (where the model takes a mask) paddings. Every row has a real token.
    hidden(result): the tensor that is compared, from the model's result.
    forms: how it becomes TorchScript: "traced", "scripted", and "fused": traced without grad mode, in which torch.nn's
        encoder layers run, and are recorded, as one operator.
    without: methods that the model has no location for, with the reason.
    """

    name: str
    make: Callable[[torch.dtype], nn.Module]
    arguments: Callable[[torch.dtype, int], tuple]
    reference: Reference
    hidden: Callable[[Any], Tensor] = lambda result: result[0] if isinstance(result, tuple) else result
    forms: tuple[str, ...] = ("traced",)
    without: dict[str, str] = field(default_factory=dict)

    def to_script(self, form: str, dtype: torch.dtype) -> torch.jit.ScriptModule:
        """The base as TorchScript."""
        model = self.make(dtype)
        if form == "scripted":
            return torch.jit.script(model)
        with torch.set_grad_enabled(form != "fused"):
            return torch.jit.trace(model, self.arguments(dtype, 0), check_trace=False, strict=False)
