"""Groups a model's layers for a picture: the attentions of one layer together, layers that look alike as one.

The input is the result of inspect() and, for grafted modules, the keys of their state dict.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

ROLES = ("query", "key", "value", "output", "ffn_gate", "ffn_in", "ffn_out")  # in the order in which a layer runs them
LONGEST_PATTERN = 6  # the most layers in a repeated pattern, such as local, local, global

_SLOT_KEY = re.compile(r"adapters\.layer_(\d+)\.([^.]+)\.(lora_a|prefix_key|up_weight|source_weight)")
# The dimension of this parameter that holds the module's size. Shapes: lora_a [N, r, in], prefix_key [N, heads, length,
# head size], up_weight [N, out, bottleneck], source_weight [N, units, r, in].
_SIZE_DIMENSION = {"lora_a": 1, "prefix_key": 2, "up_weight": 2, "source_weight": 2}


@dataclass(frozen=True)
class Slot:
    """A slot of a layer. name: "selfattn_lora_q"; size: its bank's rank, prefix length or bottleneck width."""

    name: str
    size: int
    gated: bool


@dataclass(frozen=True)
class Block:
    """One run of one Transformer layer. attentions: its entries of inspect()'s "layers", in execution order."""

    number: int
    attentions: tuple[dict[str, Any], ...]
    slots: frozenset[Slot]


@dataclass
class Group:
    """Blocks that look alike, in execution order."""

    blocks: list[Block] = field(default_factory=list)

    @property
    def first(self) -> Block:
        return self.blocks[0]

    @property
    def numbers(self) -> str:
        """Its layers: "3", "0 to 11", "0, 2, ... 46" or "0, run 12 times"."""
        numbers = [block.number for block in self.blocks]
        if len(set(numbers)) == 1:
            return f"{numbers[0]}, run {len(numbers)} times" if len(numbers) > 1 else str(numbers[0])
        if len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1)):
            return f"{numbers[0]} to {numbers[-1]}"
        return ", ".join([*map(str, numbers[:2]), f"... {numbers[-1]}"] if len(numbers) > 3 else map(str, numbers))

    @property
    def label(self) -> str:
        """The caption: "layer 3", "layers 0 to 11", ..."""
        is_one = len({block.number for block in self.blocks}) == 1
        return f"layer{'' if is_one else 's'} {self.numbers}"

    def path(self, attention: int, role: str) -> str:
        """Returns the module path of a projection; numbers that differ between the blocks are a range:
        "layer.{0-11}.query"."""
        paths = [block.attentions[attention][role]["path"].split(".") for block in self.blocks]
        return ".".join(_range_of(column) for column in zip(*paths, strict=True))


# Groups that run in turn, again and again: groups[0].blocks[0], groups[1].blocks[0], groups[0].blocks[1], ...
Pattern = list[Group]


def slots_of(module: torch.jit.ScriptModule) -> dict[int, frozenset[Slot]]:
    """Returns the slots of each Transformer layer; none if nothing is grafted onto `module`."""
    state = module.state_dict()
    found: dict[int, set[Slot]] = {}
    for key, value in state.items():
        if match := _SLOT_KEY.fullmatch(key):
            layer, name, parameter = match.groups()
            gated = f"adapters.layer_{layer}.{name}.gate_weight" in state
            found.setdefault(int(layer), set()).add(Slot(name, value.size(_SIZE_DIMENSION[parameter]), gated))
    return {layer: frozenset(slots) for layer, slots in found.items()}


def blocks_of(layers: Iterable[dict[str, Any]], slots: Mapping[int, frozenset[Slot]]) -> list[Block]:
    """Splits `layers` into runs of Transformer layers. A new block begins at another layer number, or at an attention
    that the block has already: a layer whose weights run again keeps its number."""
    result: list[Block] = []
    attentions: list[dict[str, Any]] = []
    weights: set[int] = set()  # for each attention the index of the first one with its weights
    for entry in layers:
        shares = entry["index"] if entry["shares"] is None else entry["shares"]
        is_again = shares is not None and shares in weights  # None: sites describe it (docs/sites.md)
        if attentions and (entry["layer"] != attentions[0]["layer"] or is_again):
            result.append(_block(attentions, slots))
            attentions, weights = [], set()
        attentions.append(entry)
        weights.add(shares)
    return [*result, _block(attentions, slots)] if attentions else result


def patterns_of(blocks: list[Block]) -> list[Pattern]:
    """Groups `blocks` into few patterns: at every block it takes the pattern that covers most of the following
    blocks."""
    looks = [_look(block) for block in blocks]
    result: list[Pattern] = []
    start = 0
    while start < len(blocks):
        length, times = max(
            ((length, _repetitions(looks[start:], length)) for length in range(1, LONGEST_PATTERN + 1)),
            key=lambda found: (found[0] * found[1] if found[1] > 1 else 1, -found[0]),
        )
        if times == 1:
            length = 1
        run = blocks[start : start + length * times]
        result.append([Group(run[offset::length]) for offset in range(length)])
        start += len(run)
    return result


def _block(attentions: list[dict[str, Any]], slots: Mapping[int, frozenset[Slot]]) -> Block:
    number = attentions[0]["layer"]
    return Block(number, tuple(attentions), slots.get(number, frozenset()))


def _look(block: Block) -> Any:
    """Returns a value that is equal for blocks that look alike: all entries without layer numbers and numbers in paths
    and notes."""

    def masked(value: Any) -> Any:
        if isinstance(value, str):
            return re.sub(r"\d+", "#", value)
        if isinstance(value, dict):
            return tuple((key, masked(inner)) for key, inner in value.items())
        return tuple(map(masked, value)) if isinstance(value, list) else value

    positions = ("index", "layer", "shares")
    entries = [{key: value for key, value in entry.items() if key not in positions} for entry in block.attentions]
    return masked(entries), block.slots


def _repetitions(looks: list[Any], length: int) -> int:
    """Counts how often the first `length` looks repeat, the first time included."""
    times = 1
    while looks[times * length : (times + 1) * length] == looks[:length]:
        times += 1
    return times


def _range_of(segments: Iterable[str]) -> str:
    """Joins one segment of the paths of alike layers: the segment itself if all are equal, else a range of numbers."""
    distinct = list(dict.fromkeys(segments))
    return distinct[0] if len(distinct) == 1 else f"{{{distinct[0]}-{distinct[-1]}}}"
