"""The commands of `torchgraft` that read or change the adapters of a grafted file."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from . import composition, life
from ._console import say, table_console
from ._example import read_example
from ._files import check_script_output, check_writable, extra_files, load_module, save_module
from ._operators import is_optimized
from ._reading import parse_json
from ._steps import show_detail, step
from ._text import load_tokenizer, of_texts, text_arguments, text_limits
from .adapter_hub import CONFIG_FILE, SETUP_FILE
from .adapter_setup import load_adapter_setup, parts_of_setup, save_adapter_setup
from .adapter_training import freeze_adapter, unfreeze_adapter
from .checkpoints import load_adapter, match_adapter, save_adapter
from .errors import GraftError
from .gates import gate_table, gather_gates, plot_gates
from .grafting import is_grafted, names_of
from .programs.description import described_adapters

_BATCH = 32  # texts


def _load_grafted(path: Path) -> torch.jit.ScriptModule:
    module = load_module(path)
    if not is_grafted(module):
        raise GraftError(f"{path}: nothing is grafted onto it; see torchgraft add")
    return module


def save(arguments: argparse.Namespace) -> None:
    """Writes one adapter of a file, or a composition with its adapters, into an AdapterHub directory."""
    module = _load_grafted(arguments.base)
    is_composed = any(info.name == arguments.name and info.composition for info in life.list_adapters(module))
    if is_composed:
        save_adapter_setup(
            module, arguments.name, arguments.directory, not arguments.bin, arguments.force, arguments.model_class
        )
    else:
        save_adapter(
            module, arguments.name, arguments.directory, not arguments.bin, arguments.model_class, arguments.force
        )
    what = "composition" if is_composed else "adapter"
    say(arguments, f"{arguments.directory}: {what} {arguments.name}")


def _load_composition(base: torch.jit.ScriptModule, arguments: argparse.Namespace) -> None:
    """Of a directory of save_adapter_setup()."""
    if arguments.trainable:
        raise GraftError(
            "--trainable: a composition is loaded frozen; torchgraft unfreeze makes the AdapterFusion layers of a Fuse "
            "trainable"
        )
    name = arguments.name or arguments.directory.resolve().name
    wanted = [name, *parts_of_setup(arguments.directory)]
    present = [each for each in names_of(base) if each in wanted]
    if present and not arguments.force:
        raise GraftError(
            f"{arguments.base}: it has adapters or compositions of names in {arguments.directory} already "
            f"({', '.join(present)}); --force replaces them, --name gives the composition another name"
        )
    with step("grafting"):
        if name in present and any(info.name == name and info.composition for info in life.list_adapters(base)):
            base = life.remove_adapter(base, name)
        module = load_adapter_setup(base, arguments.directory, arguments.name, example=read_example(arguments.example))
    _write(base, module, arguments, f"{arguments.directory} is '{name}' and its adapters")


def load(arguments: argparse.Namespace) -> None:
    """Writes a file with the adapter of a directory, or its composition with its adapters, added or, with --force, in
    place of the adapters of these names."""
    check_script_output(arguments.output)
    base = load_module(arguments.base)
    if (arguments.directory / SETUP_FILE).exists():
        if (arguments.directory / CONFIG_FILE).exists():
            raise GraftError(
                f"{arguments.directory}: it holds an adapter ({CONFIG_FILE}) and a composition ({SETUP_FILE}); take "
                "the files of one of them away"
            )
        _load_composition(base, arguments)
        return
    example = read_example(arguments.example)
    with step("grafting"):
        module = load_adapter(base, arguments.directory, arguments.name, arguments.trainable, example=example)
    replaced = len(names_of(module)) == len(names_of(base))
    if replaced and not arguments.force:
        name = f"'{arguments.name}'" if arguments.name else "that directory's name"
        raise GraftError(
            f"{arguments.base}: it has an adapter of {name} already (it has: {', '.join(names_of(base))}); "
            "--name gives the loaded one another name, --force replaces"
        )
    new = [name for name in names_of(module) if name not in names_of(base)]
    name = f"'{new[0]}'" if new else f"'{arguments.name}'" if arguments.name else "the adapter of its name"
    _write(base, module, arguments, f"{arguments.directory} {'replaces' if replaced else 'is'} {name}")


def match(arguments: argparse.Namespace) -> None:
    """Prints where load would put each weight of a directory."""
    matches = match_adapter(load_module(arguments.base), arguments.directory)
    if arguments.json:
        print(json.dumps([{"weight": key, "place": place} for key, place in matches], indent=2))
        return
    for key, target in matches:
        print(f"{key} -> {target}")


def list_(arguments: argparse.Namespace) -> None:
    """Prints the adapters of a file with their sizes."""
    infos = described_adapters(arguments.base)
    if infos is None:
        infos = life.list_adapters(_load_grafted(arguments.base))
    if arguments.json:
        entries = [vars(info) | {"config": parse_json(info.config, info.name)} for info in infos]
        print(json.dumps(entries, indent=2))
        return
    table = Table()
    for heading in ("id", "name", "state", "gates over", "parameters", "MB", "locations"):
        table.add_column(heading, justify="right" if heading in ("id", "parameters", "MB") else "left")
    for index, info in enumerate(infos):
        state = ", ".join(word for word in ("active", "merged", "trainable") if getattr(info, word))
        pooling = f"{info.gate_pooling} tokens" if info.gate_pooling else ""
        table.add_row(str(index), info.name, state, pooling, f"{info.parameters:,}", f"{info.bytes / 1e6:.2f}",
                      info.composition or ", ".join(sorted(info.by_location)))  # fmt: skip
    table_console().print(table)


def _write(base: torch.jit.ScriptModule, module: torch.jit.ScriptModule, arguments: argparse.Namespace,
           done: str) -> None:  # fmt: skip
    """Writes the module, and says what was done, and which adapters it has now. base: as it was."""
    save_module(module, arguments.output, extra_files(arguments.base))
    names = names_of(module)
    active = f" (active: {module.active_adapter() or 'none, the base'})" if names else ""
    say(arguments, f"{arguments.output}: {done}; {'adapters ' + ', '.join(names) if names else 'no adapters'}{active}")
    if arguments.command != "lower" and is_optimized(base) and not is_optimized(module):
        say(arguments, f"  {arguments.base} was optimised, {arguments.output} is not: see torchgraft optimize")


def _changed(
    arguments: argparse.Namespace, done: str | Callable[[Any], str], change: Any, *values: Any, **options: Any
) -> None:
    """done: what the command says, or a function that tells of MODEL."""
    check_script_output(arguments.output)
    base = _load_grafted(arguments.base)
    with step(arguments.command):
        changed = change(base, *values, **options)
    _write(base, changed, arguments, done if isinstance(done, str) else done(base))


def _changed_state(arguments: argparse.Namespace, state: str, wanted: bool, done: str, change: Any) -> None:
    """Changes a state of an adapter (a flag of AdapterInfo). One that has it already makes OUT a copy."""
    check_script_output(arguments.output)
    module = _load_grafted(arguments.base)
    name = arguments.name
    if any(info.name == name and getattr(info, state) == wanted for info in life.list_adapters(module)):
        _write(module, module, arguments, f"nothing to do, '{name}' is {done} already")
        return
    with step(arguments.command):
        changed = change(module, name)
    _write(module, changed, arguments, f"'{name}' is now {done}")


def remove(arguments: argparse.Namespace) -> None:
    """Writes a file without some adapters."""
    names = ", ".join(f"'{name}'" for name in arguments.name)
    _changed(arguments, f"removed {names}", life.remove_adapter, *arguments.name)


def rename(arguments: argparse.Namespace) -> None:
    """Writes a file in which an adapter has another name."""
    done = f"'{arguments.name}' is now '{arguments.to}'"
    _changed(arguments, done, life.rename_adapter, arguments.name, arguments.to)


def compose(arguments: argparse.Namespace) -> None:
    """Writes a file with one more composition of its adapters."""
    example = read_example(arguments.example)
    done = f"'{arguments.name}' is {arguments.composition}"
    _changed(arguments, done, composition.compose, arguments.name, arguments.composition, example=example)


def freeze(arguments: argparse.Namespace) -> None:
    """Writes a file in which an adapter is frozen: a row of the banks."""
    _changed_state(arguments, "trainable", False, "frozen", freeze_adapter)


def unfreeze(arguments: argparse.Namespace) -> None:
    """Writes a file in which an adapter is trainable: it has parameters of its own."""
    _changed_state(arguments, "trainable", True, "trainable", unfreeze_adapter)


def merge(arguments: argparse.Namespace) -> None:
    """Writes a file in which a LoRA is added to the base's weights."""

    example = read_example(arguments.example)  # also where there is nothing to do: a wrong file is told

    def change(module: torch.jit.ScriptModule, name: str) -> torch.jit.ScriptModule:
        return life.merge_adapter(module, name, into_base=arguments.into_base, example=example)

    _changed_state(arguments, "merged", True, "merged into the base's weights", change)


def unmerge(arguments: argparse.Namespace) -> None:
    """Writes a file in which a merged LoRA is taken out of the base's weights."""
    example = read_example(arguments.example)

    def change(module: torch.jit.ScriptModule, name: str) -> torch.jit.ScriptModule:
        return life.unmerge_adapter(module, name, example=example)

    _changed_state(arguments, "merged", False, "out of the base's weights", change)


def lower(arguments: argparse.Namespace) -> None:
    """Writes a file that loads without libtorchgraft.so."""
    _changed(arguments, "calls ATen's operators only", life.lower, example=read_example(arguments.example))


def ungraft(arguments: argparse.Namespace) -> None:
    """Writes the base, without adapters."""
    _changed(arguments, _base_of, life.ungraft, example=read_example(arguments.example))


def _base_of(module: torch.jit.ScriptModule) -> str:
    merged = ", ".join(f"'{info.name}'" for info in life.list_adapters(module) if info.merged)
    return f"the base with the merged weights of {merged}" if merged else "the base"


def verify(arguments: argparse.Namespace) -> None:
    """Compares the parts of a file that must agree; says what could not be compared."""
    module = _load_grafted(arguments.base)
    with step("comparing"):
        left_out = life.verify(module, read_example(arguments.example))
    if left_out:
        raise GraftError("; ".join(f"{arguments.base}: {reason}" for reason in left_out))
    names = ", ".join(names_of(module))
    say(arguments, f"{arguments.base}: the base's rows and the adapters {names} give the results that they must")


def gates(arguments: argparse.Namespace) -> None:
    """Draws the gates of an adapter on texts, or prints them."""
    if arguments.output:
        check_writable(arguments.output)
    texts = [*arguments.text, *_lines(arguments.file)]
    if not texts:
        raise GraftError("gates: give --text TEXT, or --file FILE with one text per line")
    module = _load_grafted(arguments.base)
    name = arguments.adapter or module.active_adapter() or module.adapter_names()[0]
    if name not in module.adapter_names():
        raise GraftError(f"gates: no adapter is called '{name}'; there are: {', '.join(module.adapter_names())}")
    if any(info.name == name and info.composition for info in life.list_adapters(module)):
        raise GraftError(f"gates: '{name}' is a composition; forward_with_gates() has the gates of each adapter in it")
    module.activate(name)
    tokenizer = load_tokenizer(arguments.tokenizer or arguments.base.parent / "tokenizer.json", arguments.max_length)
    limits = text_limits(module)
    found = []
    for begin in range(0, len(texts), _BATCH):
        show_detail(f"texts {begin + 1} to {min(begin + _BATCH, len(texts))} of {len(texts)}")
        encodings = tokenizer.encode_batch(texts[begin : begin + _BATCH])
        for number, encoding in enumerate(encodings, begin + 1):
            limits.check([token for token, real in zip(encoding.ids, encoding.attention_mask, strict=True) if real],
                         f"text {number}")  # fmt: skip
        values = _values(encodings)
        inputs = text_arguments(module.forward_with_gates, values, "gates")
        with torch.no_grad(), of_texts("gates", module):
            found.append(module.forward_with_gates(*inputs)[1][name])
    gathered = gather_gates(found)
    if not gathered:
        with_gates = [info.name for info in life.list_adapters(module) if info.gate_pooling]
        others = f"; these have: {', '.join(with_gates)}" if with_gates else ", nor has any other of the file"
        raise GraftError(f"{arguments.base}: the adapter '{name}' has no gates{others}")
    if arguments.output:
        title = f"Gates of {name}, mean of {len(texts)} texts" if not arguments.each else f"Gates of {name}"
        plot_gates(gathered, arguments.output, per_example=arguments.each, labels=texts, title=title)
        say(arguments, f"{arguments.output}: written")
        return
    if arguments.json:
        print(json.dumps(_gates_by_text(gathered, texts if arguments.each else None), indent=2))
        return
    for index in range(len(texts)) if arguments.each else [None]:
        if index is not None:
            print(texts[index])
        _print_gates(*gate_table(gathered, index))
    if len(texts) > 1 and not arguments.each:
        print(f"mean of {len(texts)} texts (--each: each of them)")


def _gates_by_text(gathered: Any, texts: list[str] | None) -> Any:
    """Returns {location: {layer: gate}}; with `texts` a list of these, each with its text."""

    def of(index: int | None) -> dict[str, dict[str, float]]:
        locations, layers, values = gate_table(gathered, index)
        rows = zip(locations, values.tolist(), strict=True)
        return {
            location: {str(layer): value for layer, value in zip(layers, row, strict=True) if value == value}
            for location, row in rows
        }

    return of(None) if texts is None else [{"text": text, "gates": of(index)} for index, text in enumerate(texts)]


def _print_gates(locations: Any, layers: Any, values: torch.Tensor) -> None:
    width = max(map(len, ["layer", *locations]))
    print(f"{'layer':>{width}}", *(f"{layer:>5}" for layer in layers))
    for location, row in zip(locations, values.tolist(), strict=True):
        print(f"{location:<{width}}", *("    -" if value != value else f"{value:5.2f}" for value in row))


def _lines(path: Path | None) -> Any:
    if path is None:
        return []
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise GraftError(f"{path}: not UTF-8 text ({error.reason})") from error


def _values(encodings: Any) -> dict[str, torch.Tensor]:
    return {
        "ids": torch.tensor([encoding.ids for encoding in encodings]),
        "mask": torch.tensor([encoding.attention_mask for encoding in encodings]),
        "type": torch.tensor([encoding.type_ids for encoding in encodings]),
    }


COMMANDS = {
    "save": save, "load": load, "match": match, "list": list_, "compose": compose, "remove": remove, "rename": rename,
    "freeze": freeze, "unfreeze": unfreeze, "merge": merge, "unmerge": unmerge, "lower": lower, "ungraft": ungraft,
    "verify": verify, "gates": gates,
}  # fmt: skip
