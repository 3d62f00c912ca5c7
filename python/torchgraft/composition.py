"""Compositions of adapters: the blocks of the `adapters` library, and compose().

    model = torchgraft.compose(model, "en_ner", torchgraft.Stack("en", "ner"))
    model.activate("en_ner")

A block's arguments are those of the library's block of the same name. compose() takes the library's own blocks, too.
"""

import json
from collections.abc import Iterable
from typing import Any, SupportsFloat

import torch

from ._libraries import patcher
from .errors import GraftError
from .grafting import cpp_module, example_arguments, module_with_warnings


def weights_of(weights: Iterable[Any], what: str) -> list[float]:
    """Returns the weights of adapters as floats. Python takes True for 1, which nobody means here.

    Raises:
        GraftError: one is no number.
    """
    found = list(weights)
    for weight in found:
        if isinstance(weight, bool) or not isinstance(weight, SupportsFloat):
            raise GraftError(f"{what}: expected weights to be numbers, got {weight!r}")
    return [float(weight) for weight in found]


class AdapterCompositionBlock:
    """A block. Its children are names of adapters and blocks."""

    def __init__(self, *children: "str | AdapterCompositionBlock"):
        for child in children:
            if not isinstance(child, str | AdapterCompositionBlock):
                raise TypeError(
                    f"{type(self).__name__}: expected names of adapters and blocks, got {type(child).__name__}"
                )
        self.children = list(children)

    def _kwargs(self) -> dict[str, Any]:
        return {}

    def to_dict(self) -> dict[str, Any]:
        """Returns what the library writes into adapter_setup.json."""
        children = [child.to_dict() if isinstance(child, AdapterCompositionBlock)
                    else {"type": "single", "children": [child]} for child in self.children]  # fmt: skip
        result: dict[str, Any] = {"type": type(self).__name__, "children": children}
        return result | ({"kwargs": self._kwargs()} if self._kwargs() else {})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AdapterCompositionBlock) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(repr(self))

    def __repr__(self) -> str:
        arguments = [repr(child) for child in self.children]
        arguments += [f"{name}={value!r}" for name, value in self._kwargs().items()]
        return f"{type(self).__name__}({', '.join(arguments)})"


class Stack(AdapterCompositionBlock):
    """Adapters one behind the other: each reads what the one before it has made."""


class Fuse(AdapterCompositionBlock):
    """Adapters side by side, whose results an AdapterFusion layer weighs.

    Args:
        name: the name of the layer. None: the names of the adapters, joined by commas.
    """

    def __init__(self, *children: str | AdapterCompositionBlock, name: str | None = None):
        super().__init__(*children)
        self.fusion_name = name

    def _kwargs(self) -> dict[str, Any]:
        return {"name": self.fusion_name} if self.fusion_name else {}


class Parallel(AdapterCompositionBlock):
    """Adapters side by side on copies of one input: B rows become B rows for each child, one child behind the other."""


class MultiTask(AdapterCompositionBlock):
    """LoRAs of which each row uses that of its task. task_ids() gives the adapter_ids of the tasks."""


class Average(AdapterCompositionBlock):
    """The weighted mean of the adapters' results.

    Args:
        weights: one for each child. None: all are equal.
        normalize_weights: divide the weights by their sum.
    """

    def __init__(
        self,
        *children: str | AdapterCompositionBlock,
        weights: list[float] | None = None,
        normalize_weights: bool = True,
    ):
        super().__init__(*children)
        count = len(children)
        given = [1 / max(count, 1)] * count if weights is None else weights_of(weights, "Average")
        total = sum(given) if weights is not None and normalize_weights else 1.0
        if total == 0:
            raise GraftError("Average: the weights sum to 0 and cannot be normalised")
        self.weights = [weight / total for weight in given]

    def _kwargs(self) -> dict[str, Any]:
        return {"weights": self.weights}


class Split(AdapterCompositionBlock):
    """Adapters of which each acts on its part of the tokens.

    Args:
        splits: how many tokens each child gets, or one number for all of them.
    """

    def __init__(self, *children: str | AdapterCompositionBlock, splits: list[int] | int):
        super().__init__(*children)
        self.splits = [splits] * len(children) if isinstance(splits, int) else list(splits)

    def _kwargs(self) -> dict[str, Any]:
        return {"splits": self.splits}


class BatchSplit(AdapterCompositionBlock):
    """Adapters of which each acts on its part of the rows.

    Args:
        batch_sizes: how many rows each child gets, or one number for all of them.
    """

    def __init__(self, *children: str | AdapterCompositionBlock, batch_sizes: list[int] | int):
        super().__init__(*children)
        self.batch_sizes = [batch_sizes] * len(children) if isinstance(batch_sizes, int) else list(batch_sizes)

    def _kwargs(self) -> dict[str, Any]:
        return {"batch_sizes": self.batch_sizes}


def adapters_in(block: AdapterCompositionBlock) -> list[str]:
    """Returns the names of the adapters in a block, each once, in their order."""
    return adapters_of(block.to_dict())


def adapters_of(tree: dict[str, Any]) -> list[str]:
    """The same for what to_dict() gives."""
    if tree["type"] == "single":
        return list(tree["children"])
    return list(dict.fromkeys(name for child in tree["children"] for name in adapters_of(child)))


def has_block(tree: dict[str, Any], block: str) -> bool:
    """Whether what to_dict() gives has a block of this name in it: "Parallel"."""
    return tree["type"] == block or any(
        has_block(child, block) for child in tree["children"] if isinstance(child, dict)
    )


def composition_to_json(composition: Any) -> str:
    """Returns a composition as the patcher reads it.

    Args:
        composition: a block, one of the `adapters` library, what its to_dict() gives, or text: "Stack(en, ner)".
    """
    if isinstance(composition, str):
        return patcher().composition_from_string(composition)
    if hasattr(composition, "to_dict"):
        block, composition = composition, composition.to_dict()
        _add_fusion_names(block, composition)
    if not isinstance(composition, dict):
        raise TypeError(f"compose: expected a block such as torchgraft.Stack(...), got {type(composition).__name__}")
    return json.dumps(composition)


def composition_to_text(composition: Any) -> str:
    """Returns a composition, as composition_to_json() takes it, as text that reads back as the same: Stack(en, ner)."""
    return patcher().composition_to_string(composition_to_json(composition))


def is_composition_text(name: str) -> bool:
    """Whether it is the text of a block, not the name of an adapter: one that begins with "Stack(", say."""
    return patcher().is_composition_text(name)


def _add_fusion_names(block: Any, tree: Any) -> None:
    """Writes the names of the library's Fuse blocks into what their to_dict() gives, which omits them."""
    if isinstance(block, str):
        return
    if name := getattr(block, "_name", None):
        tree["kwargs"] = {"name": name}
    for child, part in zip(block.children, tree["children"], strict=True):
        _add_fusion_names(child, part)


def compose(
    module: torch.jit.ScriptModule, name: str, composition: Any, *, verify: bool = True, example: Any = None
) -> torch.jit.ScriptModule:
    """Returns a copy of `module` with a composition of its adapters.

    The composition has a name and an id as an adapter has: activate(name), adapter_ids, list_adapters(),
    remove_adapter(), rename_adapter(). Ids of compositions follow those of the adapters. A row with the composition
    gets what the `adapters` library gives with set_active_adapters(composition); forward_with_gates() has the gates of
    each adapter in it under "<name>.<adapter>".

    Args:
        module: a grafted module.
        name: the composition's name: a text without dots that no adapter of the module has.
        composition: Stack(...), Average(...) and so on, nested as the library allows; a block of the library itself; or
            text, "Stack(en, ner)".
        verify: run the copy and compare the composition by its operators, by plain ATen calls and by adapter_ids, and
            the module's adapters with what they gave before. A warning says what could not be compared.
        example: for `verify`: inputs, as graft() takes them. And for a Parallel: inputs of the kind that the module
            will get. Those of another kind (a mask more, another dtype) give the same results, and save nothing.

    Raises:
        GraftError: an adapter is unknown, the name is taken, or the library cannot run this composition either: the
            message names the adapter and the block.
    """
    return module_with_warnings(patcher().compose(cpp_module(module), name, composition_to_json(composition), verify,
                                                  example_arguments(example)))  # fmt: skip


def task_ids(module: torch.jit.ScriptModule, name: str) -> list[int]:
    """Returns what rows of each task of a composition with a MultiTask have in adapter_ids, in the order of the tasks.

    `torch.tensor(task_ids(module, "tasks"))[tasks]` are the adapter_ids of what the library calls task_ids=tasks.

    Raises:
        GraftError: the module has no composition of that name that has a MultiTask.
    """
    return list(patcher().task_ids(cpp_module(module), name))
