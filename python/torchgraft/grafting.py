"""graft() and inspect()."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ._libraries import patcher
from .adapter_hub import load_adapter_directory
from .configs import config_to_json
from .errors import GraftError
from .peft import is_peft_directory, load_peft_directory


def cpp_module(module: Any) -> Any:
    """The torch::jit::Module inside."""
    if not isinstance(module, torch.jit.ScriptModule):
        raise TypeError(
            f"torchgraft works on TorchScript modules, got {type(module).__name__}; "
            "trace it (torch.jit.trace), script it (torch.jit.script) or load one (torch.jit.load)"
        )
    return module._c


Weights = dict[str, torch.Tensor]
# What the patcher takes for one adapter: its name, its configuration, trained weights with their name in them, whether
# it is trainable, and its head: configuration, weights, and their name in them.
Spec = tuple[str, str, Weights | None, str, bool, tuple[str, Weights, str] | None]


def script_module(module: Any) -> torch.jit.ScriptModule:
    """The Python face of a torch::jit::Module."""
    return torch.jit._recursive.wrap_cpp_module(module)


def directory_spec(
    module: torch.jit.ScriptModule, directory: str | Path, name: str | None = None, trainable: bool = False
) -> Spec:
    """The adapter of a directory of AdapterHub or PEFT for `module`, under `name` or its own."""
    if is_peft_directory(Path(directory)):
        saved = load_peft_directory(directory, inspect(module), dict(module.named_parameters()))
    else:
        saved = load_adapter_directory(directory)
    head = None if saved.head is None else (saved.head.config, saved.head.weights, saved.head.name)
    return name or saved.name, saved.config, saved.weights, saved.name, trainable, head


def _sites_option(sites: Mapping[str, Any] | str | Path | None) -> dict[str, str]:
    """The argument of the patcher that overrules detection: text as `inspect --json` prints it. What it says is checked
    there, where it is compared with the graph."""
    if sites is None:
        return {}
    if isinstance(sites, Mapping):
        return {"sites": json.dumps(dict(sites))}
    if not isinstance(sites, str | Path):
        raise TypeError(f"expected sites to be a dict or a path, got {type(sites).__name__}")
    try:
        text = Path(sites).read_text(encoding="utf-8")
        json.loads(text)
    except OSError as error:
        raise GraftError(f"{sites}: cannot read the sites ({error.strerror})") from error
    except ValueError as error:
        raise GraftError(f"{sites}: not a JSON file ({error}); expected what inspect --json prints") from error
    return {"sites": text}


def graft(
    module: torch.jit.ScriptModule,
    config: Any = None,
    name: str | None = None,
    adapters: Mapping[str, str | Path] | None = None,
    *,
    gate_pooling: str = "all",
    token_mask: str | None = None,
    active: str | None = None,
    verify: bool = True,
    sites: Mapping[str, Any] | str | Path | None = None,
    fuse: bool = True,
    trainable: bool = False,
) -> torch.jit.ScriptModule:
    """A copy of `module` with adapters grafted on; `module` itself is unchanged.

    The copy's parameters are tensors of their own on the memory of the module's: moving or converting one leaves the
    other as it is; writing into a weight in place writes into both.

    Args:
        module: a scripted or traced Transformer, or a module that is grafted already: then the adapters are added.
        config: what to graft under `name`, freshly initialised: a name ("unipelt", "mam", "lora", ...), a configuration
            of this package or of the `adapters` library, a dict, or the path of an adapter_config.json.
        name: the name of that adapter.
        adapters: trained adapters, {name: directory of AdapterHub, or of a LoRA of PEFT}; configuration and weights
            come from the directory.
        gate_pooling: "all": a gate is the mean over all tokens, as in the `adapters` library. "unpadded": over the
            tokens that are not padding, so that a row's result does not depend on how far its batch was padded.
        token_mask: for "unpadded", the argument of forward that is the token mask ([B, S], non-zero = real token).
            None takes it from the attention's own mask.
        active: the adapter that is active in the result. None: the last one grafted.
        verify: check the result (well-formed, complete, survives saving and loading).
        sites: an edited result of inspect(), or the path of a JSON file with it, that overrules detection
            (docs/sites.md). None: what is detected.
        fuse: make one operator of a projection and its LoRA (docs/performance.md). A grafted module remembers it.
        trainable: the adapters of this call have parameters of their own, to be trained (docs/training.md); the base's
            weights then require no gradients. False: they are frozen, as unfreeze_adapter() can change.

    Returns:
        A ScriptModule, in the same mode (train or eval) as `module`, with `forward(..., adapter_ids=None)`,
        `forward_with_gates(..., adapter_ids=None)`, `base_forward(...)`, `activate(name)`, `deactivate()`,
        `active_adapter()`, `adapter_names()` and `adapter_config(name)`. `adapter_ids` is an int64 tensor [B]: the
        adapter of each row, in the order of `adapter_names()`; -1 is the base.

    Raises:
        GraftError: no attention found, a place that the model does not have, weights that do not fit, an unsupported
            field of the configuration. The message says what to do.
        TypeError: `module` is not TorchScript, or `config` is nothing that describes a configuration.
    """
    base = cpp_module(module)
    specs: list[Spec] = []
    if config is not None:
        if name is None:
            raise GraftError("graft: a config needs the name of its adapter (name=...)")
        specs.append((name, config_to_json(config), None, "", trainable, None))
    elif name is not None:
        raise GraftError(f"graft: the adapter '{name}' needs a config (config=...), or a directory (adapters=...)")
    for adapter_name, directory in (adapters or {}).items():
        specs.append(directory_spec(module, directory, adapter_name, trainable))
    grafted = patcher().graft(base, specs, gate_pooling, token_mask or "", active or "", verify, fuse=fuse,
                              **_sites_option(sites))  # fmt: skip
    return script_module(grafted)


def inspect(module: torch.jit.ScriptModule, sites: Mapping[str, Any] | str | Path | None = None) -> dict[str, Any]:
    """The layers that the patcher sees in `module` (of a grafted module: in its base), as plain data.

    Args:
        module: a TorchScript module.
        sites: an edited result of this function, or the path of a JSON file with it, that overrules detection
            (docs/sites.md). None: what is detected.

    Returns:
        {"layers": [...], "near_misses": [...]}: one entry per attention with its Transformer layer, kind, heads, sizes,
        norm orders, the module paths of its projections, the locations where adapters can go, and notes on what was not
        found; near misses are sentences.

    Raises:
        GraftError: `sites` cannot be read, or does not fit the module.
    """
    return json.loads(patcher().inspect(cpp_module(module), **_sites_option(sites)))
