"""Makes adapters trainable or frozen, and lists the parameters of trainable ones.

A bank holds the parameters of all adapters of one slot, stacked along the first dimension. A frozen adapter is a row of
the banks, which require no gradients. A trainable adapter has parameters of its own in the module, among them the MLPs
of its prefixes, and its dropout acts in train() mode.

A composition is trained as an adapter is: those of its adapters that are trainable, where they stand in it (MAD-X).
freeze_adapter() and unfreeze_adapter() of a composition with a Fuse are about its AdapterFusion layers and its head;
the adapters in it stay frozen.
"""

import torch

from ._libraries import patcher
from .grafting import cpp_module, script_module


def trainable_parameters(module: torch.jit.ScriptModule, name: str) -> dict[str, torch.Tensor]:
    """Returns the parameters of a trainable adapter and of its head, by their names in the module; or those of
    all that is trainable in a composition.

    They are the module's own tensors: an optimizer that changes them trains the module. Their order is the same for
    every copy of the module.

    Raises:
        GraftError: the name is unknown, or nothing is trainable: neither the adapter, nor anything in the composition.
        TypeError: `module` is not TorchScript.
    """
    return dict(patcher().trainable_parameters(cpp_module(module), name))


def freeze_adapter(module: torch.jit.ScriptModule, name: str) -> torch.jit.ScriptModule:
    """Returns a copy to serve, in which the adapter is a row of the banks. The copy holds the keys and values of the
    adapter's prefixes, and not the MLPs that computed them.

    Raises:
        GraftError: the name is unknown, or is that of a composition without a Fuse.
        TypeError: `module` is not TorchScript.
    """
    return script_module(patcher().freeze_adapter(cpp_module(module), name))


def unfreeze_adapter(module: torch.jit.ScriptModule, name: str) -> torch.jit.ScriptModule:
    """Returns a copy in which the adapter is trainable. Its prefixes have lost their MLPs when they were frozen; the
    copy trains their keys and values themselves.

    Raises:
        GraftError: the name is unknown, or is that of a composition without a Fuse; the adapter is merged, or a
            Compacter, whose factors a frozen adapter has dropped.
        TypeError: `module` is not TorchScript.
    """
    return script_module(patcher().unfreeze_adapter(cpp_module(module), name))
