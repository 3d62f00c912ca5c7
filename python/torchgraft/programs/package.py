"""AOTInductor packages: programs as compiled code, which C++ runs without Python and without TorchScript."""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._files import check_writable, write_whole
from .._libraries import patcher
from ..errors import GraftError
from ..life import list_adapters
from .bank_constants import banks_read, computed_from_banks
from .description import CUSTOM, description_of
from .read_program import quiet
from .to_script import input_ranges

_BANKS = "adapters."
_POOLS_ALL = "adapters.pools_all"  # one flag for each adapter, where their gate_pooling differs


def compile_package(program: torch.export.ExportedProgram, path: str | Path, *, freezing: bool = True) -> None:
    """Compiles a program to an AOTInductor package, whole or not at all. Needs a C++ compiler; takes a minute or more.

    The package is for this kind of processor and this torch. It calls torchgraft's operators, so that a process loads
    libtorchgraft.so first; that of a lowered program calls none. It does not train. Its constants have the program's
    names; load_banks() and `load_constants` (C++) change those of adapters.

    Args:
        program: what export() returns.
        path: the file to write, ending in .pt2.
        freezing: pack the base's weights for this processor: faster, and they cannot be changed in the package. Where
            the program computes something from banks alone, as some forms of adapters do, nothing is packed: it would
            be computed once, and banks that are written later would not reach it.

    Raises:
        GraftError: the file cannot be written, or the program cannot be compiled.
    """
    target = Path(path)
    if target.suffix != ".pt2":
        raise GraftError(f"compile_package: expected a file ending in .pt2, got '{target}'")
    check_writable(target)
    description = description_of(program)
    # Inductor writes tensors of up to eight numbers into the code, where nobody can change them.
    options: dict[str, Any] = {"always_keep_tensor_constants": True, "cpp.dynamic_threads": True}
    options["freezing"] = freezing and computed_from_banks(program) is None
    if description:
        options["aot_inductor.metadata"] = {CUSTOM: json.dumps(description | {"package": _package_text(program)})}
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "package.pt2"
        try:
            with quiet(), torch.no_grad():
                torch._inductor.aoti_compile_and_package(program, package_path=str(package), inductor_configs=options)
        except Exception as error:  # Inductor raises errors of many classes
            text = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise GraftError(f"compile_package: AOTInductor does not compile the program ({text})") from error
        write_whole(package.read_bytes(), target)


def _package_text(program: torch.export.ExportedProgram) -> dict[str, Any]:
    """What a host compares before it loads the package's code."""
    return {
        "torch": torch.__version__,
        "torchgraft": patcher().version(),
        "banks": banks_read(program),
        "inputs": input_ranges(program),
    }


def load_banks(package: Any, module: torch.jit.ScriptModule, like: torch.jit.ScriptModule) -> None:
    """Writes the banks of a grafted module into a loaded package. No pass of the package may run meanwhile.

    Args:
        package: what torch._inductor.aoti_load_package() returns.
        module: a grafted module whose banks have the sizes of those of `like`: after replace_adapter(), for example.
            Unless the adapters of `like` differ in their gate_pooling, each adapter has to keep its name and its
            gate_pooling, which the package's code has fixed.
        like: the module that the package was made of.

    Raises:
        GraftError: banks differ in their names, sizes or dtypes, which `load_constants` of torch does not check, or in
            what layers share, or gates would be means over other tokens. The package has not changed then.
    """
    banks, old = _banks(module), _banks(like)
    names = [name for name in package.get_constant_fqns() if name.startswith(_BANKS)]
    _check_absent(banks, old, names)
    if _POOLS_ALL not in names:
        _check_poolings(module, like)
    for name in names:
        found, expected = _size_text(banks.get(name)), _size_text(old.get(name))
        if found != expected or name not in banks:
            raise GraftError(
                f"load_banks: expected '{name}' as {expected}, as the package has it, got {found}; make a package of "
                "the module as it is now"
            )
    if _sharing(banks) != _sharing(old):
        raise GraftError(
            "load_banks: the layers of a VeRA share their random matrix otherwise than in the package, which holds it "
            "once; make a package of the module as it is now"
        )
    package.load_constants({name: banks[name].detach().contiguous() for name in names}, check_full_update=False)


def _check_absent(banks: dict[str, Tensor], old: dict[str, Tensor], names: list[str]) -> None:
    """What the package does not have must be as it was: its code may have these numbers written into it."""
    shared = {old[name].data_ptr() for name in names if name in old}
    for name in sorted(old.keys() - set(names)):
        if old[name].data_ptr() in shared:  # one tensor under several names: the package has one of them
            continue
        if _size_text(banks.get(name)) != _size_text(old[name]) or not torch.equal(banks[name], old[name]):
            raise GraftError(
                f"load_banks: '{name}' has changed, and the package does not have it as a tensor that can be written; "
                "make a package of the module as it is now"
            )


def _banks(module: torch.jit.ScriptModule) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in module.state_dict().items() if name.startswith(_BANKS)}


def _sharing(banks: dict[str, Tensor]) -> set[frozenset[str]]:
    """Returns the groups of names that stand for one tensor."""
    groups: dict[int, set[str]] = {}
    for name, tensor in banks.items():
        if tensor.numel() > 0:
            groups.setdefault(tensor.data_ptr(), set()).add(name)
    return {frozenset(names) for names in groups.values() if len(names) > 1}


def _size_text(tensor: Tensor | None) -> str:
    return "none" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _check_poolings(module: torch.jit.ScriptModule, like: torch.jit.ScriptModule) -> None:
    found, expected = _pooling_text(module), _pooling_text(like)
    if found != expected:
        raise GraftError(
            f"load_banks: expected the adapters {expected}, as the package has them, got {found}; make a package of "
            "the module as it is now"
        )


def _pooling_text(module: torch.jit.ScriptModule) -> str:
    adapters = [f"'{info.name}' (gates over {info.gate_pooling or 'no'} tokens)" for info in list_adapters(module)]
    return ", ".join(adapters)
