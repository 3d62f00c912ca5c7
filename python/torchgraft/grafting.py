"""Grafts adapters onto a module, and inspects modules."""

import functools
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ._libraries import patcher
from ._reading import MOST_SITES_BYTES, parse_json, read_text
from .adapter_hub import load_adapter_directory
from .configs import config_to_json
from .errors import GraftError, one_line
from .peft import is_peft_directory, load_peft_directory


def cpp_module(module: Any) -> Any:
    """Returns the torch::jit::Module inside `module`.

    Raises:
        TypeError: `module` is not TorchScript.
    """
    if not isinstance(module, torch.jit.ScriptModule):
        raise TypeError(
            f"torchgraft works on TorchScript modules, got {type(module).__name__}; "
            "trace it (torch.jit.trace), script it (torch.jit.script) or load one (torchgraft.load_module); "
            "torchgraft.from_program() makes one of an exported program"
        )
    return module._c


# What adapters are grafted onto: TorchScript, or a program that becomes TorchScript by from_program().
Base = torch.jit.ScriptModule | torch.export.ExportedProgram


def base_module(module: Any) -> torch.jit.ScriptModule:
    """Returns `module`, or the TorchScript of an exported program.

    Raises:
        GraftError: as from_program() does.
        TypeError: `module` is neither.
    """
    if isinstance(module, torch.export.ExportedProgram):
        from .programs.to_script import from_program  # which imports this file

        return from_program(module)
    cpp_module(module)
    return module


Weights = dict[str, torch.Tensor]
# One adapter for the patcher: name, configuration, trained weights, the adapter's name in these weights, whether it is
# trainable, and its head: (configuration, weights, the head's name in these weights).
Spec = tuple[str, str, Weights | None, str, bool, tuple[str, Weights, str] | None]


def script_module(module: Any) -> torch.jit.ScriptModule:
    """Wraps a torch::jit::Module as a ScriptModule."""
    return with_short_errors(torch.jit._recursive.wrap_cpp_module(module))


def with_short_errors(module: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    """Returns `module`, whose methods that take an adapter's name or adapter_ids raise one line: TorchScript adds a
    trace of some twenty lines to what a method raises, and tells of casts where an argument has another type. Scripting
    and saving see the methods themselves."""
    if not is_grafted(module):
        return module
    for method in ("activate", "adapter_config"):
        module.__dict__[method] = _shortened(getattr(module, method))
    for method in _TAKING_IDS:
        if hasattr(module, method):
            module.__dict__[method] = _TakesIds(getattr(module, method))
    return module


_TAKING_IDS = ("forward", "forward_with_gates", "forward_with_head")
_IS_OF_IDS = re.compile(r"for argument 'adapter_ids' but instead found type '([^']*)'")


class _TakesIds:
    """A method of a grafted module. It is the method to whoever asks what it is, or for an attribute of it."""

    def __init__(self, method: Any) -> None:
        self._method = method

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        try:
            return self._method(*arguments, **named)
        except RuntimeError as error:
            found = _IS_OF_IDS.search(str(error))
            if found is None:
                raise
        raise TypeError(
            f"{self._method.name}: expected adapter_ids to be an int64 tensor with one id for each row, such as "
            f"torch.tensor([0, 1, -1]), got {found[1]}"
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_method"], name)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self.__dict__["_method"])


def _shortened(method: Any) -> Any:
    def call(name: str) -> Any:
        if not isinstance(name, str):
            raise TypeError(f"{method.name}: expected the name of one adapter, got {type(name).__name__}")
        try:
            return method(name)
        except torch.jit.Error as error:
            message = one_line(error)
        raise GraftError(message)  # here: without the trace as its context

    return functools.update_wrapper(call, method)


def is_grafted(module: torch.jit.ScriptModule) -> bool:
    """Returns whether adapters are grafted onto `module`."""
    # A base may have a method `adapter_names` of its own, but not all that grafting adds.
    return hasattr(module, "adapter_names") and hasattr(module, "forward_with_gates")


def names_of(module: torch.jit.ScriptModule) -> list[str]:
    """Returns the names of the adapters of `module`, grafted or not."""
    return module.adapter_names() if is_grafted(module) else []


def directory_spec(
    module: torch.jit.ScriptModule,
    directory: str | Path,
    name: str | None = None,
    trainable: bool = False,
    sites: Mapping[str, Any] | str | Path | None = None,
) -> Spec:
    """Reads the adapter of a directory of AdapterHub or PEFT, for `module`. `name` None: the name in the directory.
    sites: as for graft()."""
    if is_peft_directory(Path(directory)):
        saved = load_peft_directory(directory, inspect(module, sites), dict(module.named_parameters()))
    else:
        saved = load_adapter_directory(directory)
    head = None if saved.head is None else (saved.head.config, saved.head.weights, saved.head.name)
    return name or saved.name, saved.config, saved.weights, saved.name, trainable, head


def _sites_option(sites: Mapping[str, Any] | str | Path | None) -> dict[str, str]:
    """Returns the patcher's argument `sites`: text as `inspect --json` prints it. Checks only that it is JSON: the
    patcher compares it with the graph."""
    if sites is None:
        return {}
    if isinstance(sites, Mapping):
        return {"sites": json.dumps(dict(sites))}
    if not isinstance(sites, str | Path):
        raise TypeError(f"expected sites to be a dict or a path, got {type(sites).__name__}")
    try:
        text = read_text(Path(sites), MOST_SITES_BYTES)
    except OSError as error:
        raise GraftError(f"{sites}: cannot read the sites ({error.strerror})") from error
    parse_json(text, sites)
    return {"sites": text}


def graft(
    module: Base,
    config: Any = None,
    name: str | None = None,
    adapters: Mapping[str, str | Path] | None = None,
    *,
    gate_pooling: str | None = None,
    token_mask: str | None = None,
    active: str | None = None,
    verify: bool = True,
    sites: Mapping[str, Any] | str | Path | None = None,
    fuse: bool = True,
    trainable: bool = False,
    example: Any = None,
    allow_partial: bool = False,
    rename: Mapping[str, str] | None = None,
    part: str | None = None,
) -> torch.jit.ScriptModule:
    """Returns a copy of `module` with adapters grafted on; `module` itself is unchanged.

    The copy's parameters are other tensors on the same memory. If you move or convert one module, the other stays as it
    is; if you write into a weight in place, you change both.

    Args:
        module: a scripted or traced Transformer, or an exported program. If it is grafted already, the adapters are
            added to those that it has.
        config: the configuration of a fresh adapter: a name ("unipelt", "mam", "lora", ...), a configuration of this
            package or of the `adapters` library, a dict, or the path of an adapter_config.json.
        name: the name of the fresh adapter.
        adapters: trained adapters, {name: directory of AdapterHub, or of a LoRA of PEFT}. Configuration and weights
            come from the directory.
        gate_pooling: "all": a gate is the mean over all tokens, as in the `adapters` library. "unpadded": the mean over
            the tokens that are not padding, so that a row's result does not depend on how far its batch was padded.
            None: as a directory says ("all" if it says nothing, as AdapterHub's do), and "all" for a fresh adapter. A
            warning names a trained adapter that had another one, and adapters without gates. Each adapter of a module
            has its own.
        token_mask: for "unpadded": the name of forward's argument that is the token mask ([B, S], non-zero = real
            token). None: each attention's own mask says which tokens are real. All adapters of a module share it.
        active: the adapter that is active in the result. None: the last one grafted.
        verify: check the result: well-formed, complete, survives saving and loading, and gives the base's numbers where
            no adapter acts (docs/adapters.md). A warning says why if the numbers could not be compared.
        sites: an edited result of inspect(), or the path of a JSON file with it. It overrules what the patcher detects
            (docs/sites.md). None: the patcher detects the sites.
        fuse: fuse a projection and its LoRA into one operator, and a linear map and its parallel bottleneck
            (docs/performance.md). A grafted module remembers this choice.
        trainable: give the adapters of this call parameters of their own, to train them (docs/training.md). The base's
            weights then require no gradients. False: the adapters are frozen; unfreeze_adapter() makes them trainable.
        example: for `verify`: inputs on which the base runs. A tuple of forward's arguments, a dict of them by name, or
            one tensor. None: made up from forward's signature where that is possible.
        allow_partial: graft a fresh adapter also where some attention was not recognised and gets none, with a warning.
            Layers are then numbered without it. False: that is an error.
        rename: other names, in the result, for what the base calls as grafting does: {"adapter_ids": "base_ids"} for an
            argument of forward, {"adapters": "base_adapters"} for an attribute, or a method such as "activate". The
            result remembers them, and ungraft() gives the old ones back. None: such a base is refused.
        part: "encoder": `module` is the encoder of a model with a decoder, in a file of its own, and takes its half of
            an adapter of both. "decoder": the same of a decoder that reads the encoder's states, which the patcher also
            sees by itself. None: as the patcher sees it.

    Returns:
        A ScriptModule, in the same mode (train or eval) as `module`, with these methods:

        - `forward(..., adapter_ids=None)`: the arguments and the result of the base's forward. `adapter_ids`, int64
            [B]: the adapter of each row, counted as in `adapter_names()`; -1 is the base. None: all rows use the active
            adapter.
        - `forward_with_gates(..., adapter_ids=None)`: (result, gates). `gates[adapter][layer][location]` is [rows that
            use the adapter, gates], in the dtype of the hidden states.
        - `base_forward(...)`: the base.
        - `activate(name)`, `deactivate()`, `active_adapter()`, `adapter_names()` and `adapter_config(name)`.

    Raises:
        GraftError: no attention was found, the model lacks a location, weights do not fit, a name is taken, or a field
            of the configuration is not supported. The message says what to do.
        TypeError: `module` is neither TorchScript nor a program, or `config` describes no configuration.
    """
    module = base_module(module)
    base = cpp_module(module)
    sites = sites if part is None else _sites_of_part(module, part, sites)
    specs: list[Spec] = []
    if config is not None:
        if name is None:
            raise GraftError("graft: a config needs the name of its adapter (name=...)")
        specs.append((name, config_to_json(config), None, "", trainable, None))
    elif name is not None:
        raise GraftError(f"graft: the adapter '{name}' needs a config (config=...), or a directory (adapters=...)")
    for adapter_name, directory in (adapters or {}).items():
        specs.append(directory_spec(module, directory, adapter_name, trainable, sites))
    made, messages = patcher().graft(base, specs, gate_pooling or "", token_mask or "", active or "", verify, fuse=fuse,
                                     allow_partial=allow_partial, example=example_arguments(example),
                                     rename=dict(rename or {}), **_sites_option(sites))  # fmt: skip
    if gate_pooling == "unpadded":
        messages += _no_gates(made, [spec[0] for spec in specs])
    return module_with_warnings((made, messages))


def _sites_of_part(
    module: torch.jit.ScriptModule, part: str, sites: Mapping[str, Any] | str | Path | None
) -> dict[str, Any]:
    """Returns the sites of a module that is one part of an encoder and a decoder."""
    if part not in ("encoder", "decoder"):
        raise GraftError(f'graft: expected part to be "encoder" or "decoder", got "{part}"')
    found = inspect(module, sites)
    kinds = {layer["kind"] for layer in found["layers"]}
    wanted = {"self", "encoder"} if part == "encoder" else {"self", "cross"}
    if not kinds <= wanted or (part == "decoder" and "cross" not in kinds):
        what = "self attention alone" if part == "encoder" else "self attention and cross attention"
        raise GraftError(
            f'graft: part="{part}": expected {what}, found attention of the kinds {", ".join(sorted(kinds))}; '
            "see torchgraft.inspect()"
        )
    for layer in found["layers"] if part == "encoder" else []:
        layer["kind"] = "encoder"
    return found


def _no_gates(module: Any, names: list[str]) -> list[str]:
    """Says which of the adapters have no gates to pool."""
    pooling = {entry["name"]: entry["gate_pooling"] for entry in patcher().list_adapters(module)}
    return [f"graft: '{name}' has no gates: gate_pooling=\"unpadded\" changes nothing"
            for name in names if not pooling[name]]  # fmt: skip


def module_with_warnings(result: tuple[Any, list[str]]) -> torch.jit.ScriptModule:
    """Wraps the module of the patcher's (module, messages). The messages become warnings of the caller's caller."""
    module, messages = result
    for message in messages:
        warnings.warn(message, stacklevel=3)
    return script_module(module)


def example_arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Returns the positional and the named arguments of the argument `example`."""
    if example is None:
        return None
    if isinstance(example, Mapping):
        return (), dict(example)
    return (example,) if isinstance(example, torch.Tensor) else tuple(example), {}


def inspect(module: Base, sites: Mapping[str, Any] | str | Path | None = None) -> dict[str, Any]:
    """Returns the layers that the patcher sees in `module`, as plain data. For a grafted module it inspects the base.

    Args:
        module: a TorchScript module, or an exported program.
        sites: an edited result of this function, or the path of a JSON file with it. It overrules what the patcher
            detects (docs/sites.md). None: the patcher detects the sites.

    Returns:
        {"layers": [...], "linear_maps": [...], "near_misses": [...], "embeddings": {...}}. "layers" has one entry per
        attention: its Transformer layer, kind, heads, sizes, norm orders, the module paths of its projections, the
        locations where adapters can act, and notes on what was not found. "linear_maps" are those outside of the layers
        on which a LoRA can be, and tables of embeddings ("embedding": true). Near misses are sentences. "embeddings"
        says where an invertible adapter can act: their size, or a note why they were not found, and whether the model
        has output embeddings.

    Raises:
        GraftError: `sites` cannot be read, or does not fit the module.
        TypeError: `module` is neither TorchScript nor a program, or `sites` is neither a dict nor a path.
    """
    return parse_json(patcher().inspect(cpp_module(base_module(module)), **_sites_option(sites)), "sites")
