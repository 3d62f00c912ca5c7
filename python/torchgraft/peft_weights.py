"""Reads the weights of Hugging Face PEFT's LoRA and (IA)^3 directories."""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .adapter_hub import read_weights
from .errors import GraftError
from .peft_config import PeftLoRAConfig

WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_LONGEST_KEY = 1000  # bytes of a weight's name: what is longer is nothing that anybody wrote, and errors repeat it
_MOST_RANK = 64  # a module that was trained as a whole costs all updates of the adapter the memory of its rank

_KEY = re.compile(
    r"(?:base_model\.model\.)?(?P<path>.+)\.(?:lora_(?P<part>A|B|magnitude_vector)(?:\.[^.]+)?\.(?P<kind>weight|bias)"
    r"|lora_(?P<bare>magnitude_vector)(?:\.[^.]+)?|(?P<scale>ia3_l)(?:\.[^.]+)?)"
)
_WHOLE_KEY = re.compile(r"(?:base_model\.model\.)?(?P<path>.+)\.(?P<kind>weight|bias)")
_BASE_KEY = re.compile(r"(?:base_model\.model\.)?(?P<path>.+)\.base_layer\.(?P<kind>weight|bias)")
_EMBEDDING_KEY = re.compile(r"(?:base_model\.model\.)?(?P<path>.+)\.lora_embedding_(?P<part>A|B)(?:\.[^.]+)?")
_DIMENSIONS = {"A": 2, "B": 2, "magnitude_vector": 1, "B bias": 1, "ia3_l": 2, "embedding A": 2, "embedding B": 2}


@dataclass(frozen=True)
class Update:
    """The update B A of one linear map. lora_a: [r, in]; lora_b: [out, r], multiplied by alpha / r already; magnitude:
    [out], DoRA's; bias: [out], likewise multiplied. All are floating. (IA)^3 has no matrix A: lora_a is [1, 0], and
    lora_b, [out, 1], multiplies what the linear map gives. Of an embedding, `in` are the rows of its table."""

    lora_a: Tensor
    lora_b: Tensor
    magnitude: Tensor | None = None
    bias: Tensor | None = None
    is_of_embedding: bool = False

    @classmethod
    def zero(cls, projection: dict[str, Any], scales: bool) -> "Update":
        """Returns the update of rank 1 that changes nothing. scales: that of (IA)^3."""
        if scales:
            return cls(torch.zeros(1, 0), torch.ones(projection["out_features"], 1))
        return cls(torch.zeros(1, projection["in_features"]), torch.zeros(projection["out_features"], 1))

    @classmethod
    def between(cls, old: tuple[Tensor, Tensor | None], new: tuple[Tensor, Tensor | None]) -> "Update":
        """Returns the update that makes one linear map, (weight [out, in], bias), of another."""
        change = new[0].to(torch.float64) - old[0].to(torch.float64)
        out_features, in_features = change.shape
        one = torch.eye(min(change.shape), dtype=torch.float64)
        parts = (change, one) if out_features <= in_features else (one, change)
        bias = None if old[1] is None or new[1] is None else new[1].to(torch.float64) - old[1].to(torch.float64)
        return cls(*parts, bias=bias)

    def padded(self, rank: int) -> "Update":
        more = rank - self.lora_a.size(0)
        pad = torch.nn.functional.pad
        a, b = pad(self.lora_a, (0, 0, 0, more)), pad(self.lora_b, (0, more))
        return Update(a, b, self.magnitude, self.bias, self.is_of_embedding)

    def rows(self, first: int, count: int) -> "Update":
        """Returns the part of the update for one of several packed projections."""
        magnitude, bias = (
            None if part is None else part.narrow(0, first, count) for part in (self.magnitude, self.bias)
        )
        return Update(self.lora_a, self.lora_b.narrow(0, first, count), magnitude, bias, self.is_of_embedding)


@dataclass(frozen=True)
class PeftWeights:
    """What the file holds.

    Attributes:
        updates: by the linear map's path.
        wholes: linear maps that were trained as a whole (modules_to_save): {path: (weight, bias)}.
        bases: the base's own parameters, which PEFT saves beside a LoRA on the output embeddings, by path.
    """

    updates: dict[str, Update]
    wholes: dict[str, tuple[Tensor, Tensor | None]]
    bases: dict[str, Tensor]


def read_peft_weights(config: PeftLoRAConfig) -> PeftWeights:
    """Reads all weights of the directory.

    Raises:
        GraftError: a weight is none of a LoRA, or its shape is not; one is missing, or there twice.
    """
    directory = config.directory
    parts: dict[str, dict[str, Tensor]] = {}
    wholes: dict[str, dict[str, Tensor]] = {}
    bases: dict[str, Tensor] = {}
    for key, tensor in read_weights(directory, WEIGHT_FILES).items():
        if len(key.encode(errors="replace")) > _LONGEST_KEY:
            raise GraftError(
                f"{directory}: expected weights with names of at most {_LONGEST_KEY} bytes, got {key[:200]}..."
            )
        if base := _BASE_KEY.fullmatch(key):
            bases[f"{base['path']}.{base['kind']}"] = tensor
            continue
        if embedding := _EMBEDDING_KEY.fullmatch(key):
            part = f"embedding {embedding['part']}"
            _take(config, parts, embedding["path"], part, key, tensor)
            continue
        match = _KEY.fullmatch(key)
        if match is None:
            path, kind = _whole_of(config, key, tensor)
            wholes.setdefault(path, {})[kind] = tensor
            continue
        if ".base_layer." in match["path"]:
            path = match["path"].partition(".base_layer.")[0]
            raise GraftError(
                f"{directory}: {path} is a torch.nn.MultiheadAttention, of which PEFT changes the projection of the "
                "result, too; that runs on the tokens of all rows as one list, where adapters of rows cannot act. "
                "Merge the adapter into the base (PEFT's merge_and_unload())"
            )
        part = match["part"] or match["bare"] or match["scale"]
        part += " bias" if match["kind"] == "bias" else ""
        _take(config, parts, match["path"], part, key, tensor)
    updates = {path: _update(config, path, found) for path, found in parts.items()}
    if not updates:
        raise GraftError(f"{directory}: the adapter has no weights")
    for path, found in wholes.items():
        if "weight" not in found:
            raise GraftError(f"{directory}: the weight of {path} is missing, its bias is there")
    whole_maps = {path: (found["weight"], found.get("bias")) for path, found in wholes.items()}
    return PeftWeights(updates, whole_maps, bases)


def _take(
    config: PeftLoRAConfig, parts: dict[str, dict[str, Tensor]], path: str, part: str, key: str, tensor: Tensor
) -> None:
    """Puts a weight among those of its module."""
    if tensor.dim() != _DIMENSIONS.get(part) or not tensor.is_floating_point():
        raise GraftError(f"{config.directory}: {key} is not a weight of a LoRA on a linear map")
    if (part == "ia3_l") != config.scales:
        raise GraftError(f"{config.directory}: {key} is no weight of the method that peft_type names")
    if part in parts.setdefault(path, {}):
        name = part if config.scales else f"lora_{part}"
        raise GraftError(f"{config.directory}: two weights are {name} of {path}, {key} is one of them")
    parts[path][part] = _widened(tensor)


def _widened(tensor: Tensor) -> Tensor:
    """Returns the weight as PEFT holds it, which scales in float32 whatever the dtype of the file."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)


def _whole_of(config: PeftLoRAConfig, key: str, tensor: Tensor) -> tuple[str, str]:
    """Returns the path of the linear map that was trained as a whole, and which of its parameters has this key."""
    match = _WHOLE_KEY.fullmatch(key)
    if match is None or not config.saves_whole(match["path"]):
        raise GraftError(f"{config.directory}: {key} is not a weight of a LoRA on a linear map")
    if tensor.dim() != (2 if match["kind"] == "weight" else 1) or not tensor.is_floating_point():
        raise GraftError(
            f"{config.directory}: {key}, of modules_to_save, is not of a linear map, which is not supported"
        )
    if match["kind"] == "weight" and min(tensor.shape) > _MOST_RANK:
        raise GraftError(
            f"{config.directory}: {match['path']} was trained as a whole (modules_to_save), and has "
            f"{min(tensor.shape)} inputs and outputs; at most {_MOST_RANK} of one of them are supported"
        )
    return match["path"], match["kind"]


def _update(config: PeftLoRAConfig, path: str, parts: dict[str, Tensor]) -> Update:
    directory = config.directory
    if config.scales:
        if parts["ia3_l"].size(1) != 1:
            raise GraftError(
                f"{directory}: expected ia3_l of {path} of shape [out, 1], got {list(parts['ia3_l'].shape)}: what "
                "multiplies the input of a linear map (feedforward_modules) is not supported; merge the adapter into "
                "the base (PEFT's merge_and_unload())"
            )
        return Update(parts["ia3_l"].new_zeros(1, 0), parts["ia3_l"])
    is_of_embedding = "embedding A" in parts or "embedding B" in parts
    if is_of_embedding:
        if {"A", "B"} & set(parts):
            raise GraftError(f"{directory}: {path} has weights of a linear map and of an embedding")
        if config.use_dora or config.lora_bias:
            raise GraftError(
                f"{directory}: {path} is an embedding, on which DoRA and lora_bias are not supported; merge the "
                "adapter into the base with PEFT's merge_and_unload() before you trace that"
            )
        parts = {part.removeprefix("embedding "): tensor for part, tensor in parts.items()}
    expected = {"A", "B"} | ({"magnitude_vector"} if config.use_dora else set())
    expected |= {"B bias"} if config.lora_bias else set()
    if set(parts) != expected or parts["A"].size(0) != parts["B"].size(1):
        raise GraftError(f"{directory}: expected lora_A [r, in] and lora_B [out, r] for {path}"
                         + (", and its lora_magnitude_vector" if config.use_dora else "")
                         + (", and a bias of lora_B" if config.lora_bias else ""))  # fmt: skip
    if parts["A"].size(0) != config.rank(path):
        raise GraftError(
            f"{directory}: expected lora_A of {path} of rank {config.rank(path)}, as r and rank_pattern say, got "
            f"{parts['A'].size(0)}"
        )
    scaling = config.scaling(path)
    bias = parts["B bias"] * scaling if config.lora_bias else None
    return Update(parts["A"], parts["B"] * scaling, parts.get("magnitude_vector"), bias, is_of_embedding)
