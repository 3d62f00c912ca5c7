"""Makes a TorchScript module, grafted or not, faster for inference."""

from typing import Any

import torch

from ._libraries import patcher
from .grafting import Base, base_module, cpp_module, example_arguments, module_with_warnings


def optimize(
    module: Base, *, exact_base: bool = False, verify: bool = True, example: Any = None
) -> torch.jit.ScriptModule:
    """Returns a copy of `module` whose linear maps, each with the function that follows it, are `torchgraft::linear`:
    the kernel that is faster for the size at hand; and whose layer norms of a sum are `torchgraft::residual_norm`.
    Results are equal up to rounding, which int8 linear maps may enlarge. The copy shares the memory of the
    weights, and needs libtorchgraft.so. `module` itself is unchanged. What runs under `torch.autocast` in the module
    stays as it is. The copy refuses sparse inputs of linear maps and norms (`x.to_sparse()`), also where `module` takes
    them.

    Optimise last, before `torch.jit.freeze`: graft, train, optimise. Functions that change adapters take an optimised
    module, too, but return one that is not.

    Args:
        module: a scripted, traced or frozen module, grafted or not, or an exported program.
        exact_base: leave the base of a grafted module as it is. Deactivated, the copy then gives the base's results
            bit for bit; otherwise they differ by rounding.
        verify: run both modules and compare the results, of a grafted module those of the base and of all adapters. A
            warning says what could not be compared.
        example: for `verify`: inputs, as graft() takes them.

    Raises:
        GraftError: forward has neither a linear map nor a norm of a sum, the module has forward hooks, an adapter is
            trainable, or a result differs on the inputs.
        TypeError: `module` is neither TorchScript nor a program.
    """
    base = cpp_module(base_module(module))
    return module_with_warnings(patcher().optimize(base, exact_base, verify, example_arguments(example)))
