"""Which adapters are trained, and their parameters.

A frozen adapter is a row of banks that require no gradients. A trainable one has parameters of its own in the module,
the MLPs of its prefixes among them, and its dropout acts in train() mode.
"""

import torch

from ._libraries import patcher
from .grafting import cpp_module, script_module


def trainable_parameters(module: torch.jit.ScriptModule, name: str) -> dict[str, torch.Tensor]:
    """The parameters of a trainable adapter, and of its head, by their names in the module.

    They are the module's own tensors, in an order that is the same for every copy of it: an optimizer that steps on
    them trains the module.

    Raises:
        GraftError: the adapter is unknown or frozen.
    """
    return dict(patcher().trainable_parameters(cpp_module(module), name))


def freeze_adapter(module: torch.jit.ScriptModule, name: str) -> torch.jit.ScriptModule:
    """A copy in which the adapter is a row of the banks, as served: its prefixes are computed, their MLPs dropped."""
    return script_module(patcher().freeze_adapter(cpp_module(module), name))


def unfreeze_adapter(module: torch.jit.ScriptModule, name: str) -> torch.jit.ScriptModule:
    """A copy in which the adapter is trainable. Of ejected prefixes the keys and values themselves are trained.

    Raises:
        GraftError: the adapter is merged, or a Compacter, whose factors a frozen adapter has not kept.
    """
    return script_module(patcher().unfreeze_adapter(cpp_module(module), name))
