"""Saves compositions to directories of AdapterHub (adapter_setup.json beside a directory for each adapter), and loads
them."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ._libraries import patcher
from ._reading import parse_json, read_text
from .adapter_fusion import load_adapter_fusion, save_adapter_fusion
from .adapter_hub import ADAPTER_FILES, HEAD_CONFIG_FILE, HEAD_WEIGHT_FILES, SETUP_FILE, read_head
from .adapter_hub import CONFIG_FILE as ADAPTER_CONFIG_FILE
from .checkpoints import check_replaces, load_adapter, pickled, save_adapter
from .composition import adapters_of, compose
from .errors import GraftError
from .grafting import Base, base_module, cpp_module, names_of, script_module
from .life import list_adapters

_VERSION = "adapters.1.3.0"  # the format is that library's


def save_adapter_setup(
    module: torch.jit.ScriptModule,
    name: str,
    directory: str | Path,
    safetensors: bool = True,
    overwrite: bool = False,
    model_class: str | None = None,
) -> None:
    """Writes a composition and its adapters into a directory that load_adapter_setup() of this package and of
    `adapters==1.3.0` read.

    The directory gets adapter_setup.json and, for each adapter, a directory of its name, as save_adapter() writes it.
    The AdapterFusion layers of each Fuse get one, too, and so does the composition's head. adapter_setup.json comes
    last. Nothing is written when a part cannot be.

    Args:
        module: a grafted module with the composition.
        name: the composition's name. The files do not hold it.
        directory: where to write.
        safetensors: as for save_adapter().
        overwrite: as for save_adapter().
        model_class: as for save_adapter(), of the composition's head.

    Raises:
        GraftError: the module has no such composition, the weights of an Average in it do not sum to 1, which no reader
            of the files would keep, the directory holds another composition or other adapters, or it cannot be written.
    """
    held = _checked_setup(module, name, Path(directory), overwrite, model_class)
    root = Path(directory)
    for part in held.parts:
        save_adapter(module, part, root / part, safetensors, overwrite=overwrite)
    for fusion in held.fusions:
        save_adapter_fusion(module, fusion, root / fusion, overwrite)
    if held.head_text:
        _save_head(root / name, held.head_text, held.head_weights, safetensors)
    text = json.dumps(held.file, indent=2)
    update = patcher().update_directory
    obsolete = list(ADAPTER_FILES)  # of an adapter that overwrite=True replaces
    update(str(directory), {SETUP_FILE: text.encode()}, obsolete, SETUP_FILE, "", lambda: held.check(root, overwrite))


def check_setup(module: torch.jit.ScriptModule, name: str, directory: str | Path, overwrite: bool = False,
                model_class: str | None = None) -> None:  # fmt: skip
    """Raises GraftError where save_adapter_setup() would, and writes nothing."""
    _checked_setup(module, name, Path(directory), overwrite, model_class)


@dataclass(frozen=True)
class _Setup:
    """What save_adapter_setup() writes."""

    file: dict[str, Any]
    parts: list[str]
    fusions: list[str]
    head_text: str
    head_weights: dict[str, torch.Tensor]

    def check(self, root: Path, overwrite: bool) -> None:
        if not overwrite:
            _check_replaces_all(root, self.file, self.parts, self.fusions)


def _checked_setup(
    module: torch.jit.ScriptModule, name: str, directory: Path, overwrite: bool, model_class: str | None
) -> _Setup:
    """Reads the composition, and checks that all of it can be written."""
    found = {info.name: info for info in list_adapters(module)}
    if name not in found or not found[name].composition:
        what = f"'{name}' is an adapter; see save_adapter" if name in found else f"no composition is called '{name}'"
        raise GraftError(f"save_adapter_setup: {what}")
    tree = parse_json(found[name].config, name)
    _check_weights(tree)
    parts, fusions = adapters_of(tree), patcher().fusion_names_of(found[name].config)
    head_text, head_weights = patcher().composition_head_files(cpp_module(module), name, model_class or "")
    for part in [*parts, *fusions, *([name] if head_text else [])]:
        _check_folder(part, "save_adapter_setup")
    for part in parts:
        patcher().adapter_files(cpp_module(module), part, "")  # raises where it cannot be written
    setup = {"adapter_setup": tree, "head_setup": name if head_text else None, "version": _VERSION}
    result = _Setup(setup, parts, fusions, head_text, head_weights)
    result.check(directory, overwrite)
    return result


def _safetensors(weights: dict[str, torch.Tensor]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / HEAD_WEIGHT_FILES[0]
        patcher().write_safetensors(weights, str(path))
        return path.read_bytes()


def _save_head(directory: Path, text: str, weights: dict[str, torch.Tensor], safetensors: bool) -> None:
    name, other = HEAD_WEIGHT_FILES if safetensors else HEAD_WEIGHT_FILES[::-1]
    content = _safetensors(weights) if safetensors else pickled(weights)
    files = {HEAD_CONFIG_FILE: text.encode(), name: content}
    patcher().update_directory(str(directory), files, [other], HEAD_CONFIG_FILE, "", None)


def load_adapter_setup(
    module: Base, directory: str | Path, name: str | None = None, *, verify: bool = True,
    example: Any = None,
) -> torch.jit.ScriptModule:  # fmt: skip
    """Returns a copy of `module` that has the composition of a directory, its adapters and AdapterFusion layers.

    Args:
        module: a TorchScript Transformer, grafted or not, or an exported program. Adapters and layers of the same
            names are replaced.
        directory: what save_adapter_setup() wrote, here or in the `adapters` library.
        name: the composition's name in the result. None: the directory's.
        verify: as for compose().
        example: as for compose().

    Raises:
        GraftError: a file is missing or damaged, an adapter does not fit the module, the name is taken, or the
            directory has heads of its own (head_setup) that no composition takes.
    """
    module = base_module(module)
    path = Path(directory) / SETUP_FILE
    tree, head = _read_setup(path)
    name = Path(directory).resolve().name if name is None else name
    if name in names_of(module):
        raise GraftError(f"load_adapter_setup: the module has '{name}' already; give the composition another name")
    for part in adapters_of(tree):
        _check_folder(part, str(path))
        module = load_adapter(module, Path(directory) / part, part, verify=verify, example=example)
    for fusion in patcher().fusion_names_of(json.dumps(tree)):
        _check_folder(fusion, str(path))
        module = load_adapter_fusion(module, Path(directory) / fusion, fusion)
    module = compose(module, name, tree, verify=verify, example=example)
    return module if head is None else _load_head(module, name, Path(directory) / head)


def parts_of_setup(directory: Path) -> list[str]:
    """Returns the names of the adapters in a directory of save_adapter_setup().

    Raises:
        GraftError: adapter_setup.json is missing or damaged.
    """
    return adapters_of(_read_setup(directory / SETUP_FILE)[0])


def read_setup(directory: Path) -> dict[str, Any]:
    """Returns the composition in a directory of save_adapter_setup(), as to_dict() of a block gives it.

    Raises:
        GraftError: adapter_setup.json is missing or damaged, or names a head of the composition's own.
    """
    tree, head = _read_setup(directory / SETUP_FILE)
    if head is not None:
        raise GraftError(f"{directory / SETUP_FILE}: it has a head of its own, which load_adapter_setup reads")
    return tree


def _load_head(module: torch.jit.ScriptModule, name: str, directory: Path) -> torch.jit.ScriptModule:
    if not (directory / HEAD_CONFIG_FILE).exists():
        raise GraftError(f"{directory.parent / SETUP_FILE}: its head_setup names {directory.name}, which has no "
                         f"{HEAD_CONFIG_FILE}")  # fmt: skip
    head = read_head(directory)
    if head is None:  # it has warned of a head of an unknown kind
        return module
    return script_module(patcher().load_head(cpp_module(module), name, head.config, head.weights, head.name))


def _read_setup(path: Path) -> tuple[dict[str, Any], str | None]:
    """Returns the tree of an adapter_setup.json, with the weights of each Average divided by their sum, as the library
    does when it reads them, and the name of the composition's own head."""
    try:
        setup = parse_json(read_text(path), path)
    except OSError as error:
        raise GraftError(f"{path}: cannot read the adapter setup ({error.strerror})") from error
    if not isinstance(setup, dict) or "adapter_setup" not in setup:
        raise GraftError(f'{path}: expected an object with "adapter_setup"')
    if unknown := [key for key in setup if key not in ("adapter_setup", "head_setup", "version")]:
        raise GraftError(f"{path}: the key '{unknown[0]}' is not known")
    text = patcher().normalised_composition(json.dumps(setup["adapter_setup"]))
    tree, head = parse_json(text, path), setup.get("head_setup")
    if not head or head == _last_of_stack(tree):  # that adapter's directory has it
        return tree, None
    if not isinstance(head, str) or not patcher().fusion_names_of(text):
        raise GraftError(
            f"{path}: it has heads of its own (head_setup), and only a composition with a Fuse takes one; save it "
            "without head_setup"
        )
    _check_folder(head, str(path))
    return tree, head


def _last_of_stack(tree: dict[str, Any]) -> str | None:
    """Returns the adapter that ends a Stack, whose head a composition has."""
    last = tree["children"][-1]
    return last["children"][0] if tree["type"] == "Stack" and last["type"] == "single" else None


def _check_weights(tree: dict[str, Any]) -> None:
    weights = tree.get("kwargs", {}).get("weights")
    if weights is not None and abs(sum(weights) - 1) > 1e-9:
        raise GraftError(
            f"save_adapter_setup: the weights {weights} of an Average sum to {sum(weights)}, and whoever reads them "
            "from adapter_setup.json divides them by their sum; compose it with normalize_weights=True"
        )
    for child in tree["children"]:
        if isinstance(child, dict):
            _check_weights(child)


def _check_replaces_all(directory: Path, setup: dict[str, Any], parts: list[str], fusions: list[str]) -> None:
    """Raises GraftError when `directory` holds another composition, or another part in the place of one of its own."""
    if (directory / ADAPTER_CONFIG_FILE).exists():
        raise GraftError(
            f"save_adapter_setup: {directory} holds an adapter ({ADAPTER_CONFIG_FILE}) already; give another "
            "directory, or overwrite=True to replace it"
        )
    for part in parts:
        check_replaces(directory / part, part)
    for fusion in fusions:
        patcher().check_replaces_fusion(str(directory / fusion), fusion)
    if setup["head_setup"]:
        _check_replaces_head(directory / setup["head_setup"], setup["head_setup"])
    _check_replaces_setup(directory, setup["adapter_setup"])


def _check_replaces_head(directory: Path, name: str) -> None:
    path = directory / HEAD_CONFIG_FILE
    if not path.is_symlink() and not path.exists():
        return
    try:
        held = parse_json(read_text(path), path)
    except (OSError, GraftError):
        held = None
    if not isinstance(held, dict) or held.get("name") != name:
        raise GraftError(
            f"save_adapter_setup: {directory} holds another head already; give another directory, or overwrite=True to "
            "replace it"
        )


def _check_replaces_setup(directory: Path, tree: dict[str, Any]) -> None:
    """Raises GraftError when `directory` holds another composition than `tree`."""
    path = directory / SETUP_FILE
    if not path.is_symlink() and not path.exists():
        return
    try:
        setup = parse_json(read_text(path), path)
        held = setup.get("adapter_setup") if isinstance(setup, dict) else None
    except (OSError, GraftError):
        held = None
    if held != tree:
        raise GraftError(
            f"save_adapter_setup: {directory} holds another composition already; give another directory, or "
            "overwrite=True to replace it"
        )


def _check_folder(name: str, what: str) -> None:
    if not name or "/" in name or "\0" in name or name in (".", ".."):
        raise GraftError(f"{what}: '{name}' cannot have a directory of its name; rename it")
