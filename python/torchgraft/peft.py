"""Reads LoRA directories of Hugging Face PEFT: adapter_config.json and adapter_model.safetensors."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .adapter_hub import CONFIG_FILE, AdapterDirectory, read_config, read_weights
from .configs import LoRAConfig
from .errors import GraftError

WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
DEFAULT_NAME = "default"  # as PEFT calls an adapter that nobody named

_KEY = re.compile(
    r"(?:base_model\.model\.)?(?P<path>.+)"
    r"\.(?:lora_(?P<side>[AB])(?:\.[^.]+)?\.weight|lora_(?P<magnitude>magnitude_vector).*)"
)
# Initialisations that change the base's weights too: the adapter is right on those only.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")
# Fields that must be off, with what they would mean.
_UNSUPPORTED = {
    "use_qalora": "QALoRA", "modules_to_save": "whole modules", "trainable_token_indices": "tokens",
    "lora_bias": "a bias", "alora_invocation_tokens": "activated LoRA", "target_parameters": "parameters",
    "use_bdlora": "block-diagonal LoRA", "arrow_config": "Arrow",
}  # fmt: skip
# Roles of a layer's projections that a LoRA has a place at, with the field of LoRAConfig.
_MATRICES = {"query": "q", "key": "k", "value": "v"}
_FLAGS = {"ffn_in": "intermediate_lora", "ffn_out": "output_lora"}


def is_peft_directory(directory: Path) -> bool:
    """Whether adapter_config.json says so. Unreadable files are none."""
    try:
        content = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and "peft_type" in content


@dataclass(frozen=True)
class _Update:
    """One linear map's update B A, alpha / r already in B. lora_a [r, in], lora_b [out, r], magnitude [out] of DoRA."""

    lora_a: Tensor
    lora_b: Tensor
    magnitude: Tensor | None = None

    def padded(self, rank: int) -> "_Update":
        more = rank - self.lora_a.size(0)
        pad = torch.nn.functional.pad
        return _Update(pad(self.lora_a, (0, 0, 0, more)), pad(self.lora_b, (0, more)), self.magnitude)

    def rows(self, first: int, count: int) -> "_Update":
        """The part for one of several packed projections."""
        magnitude = None if self.magnitude is None else self.magnitude.narrow(0, first, count)
        return _Update(self.lora_a, self.lora_b.narrow(0, first, count), magnitude)


def load_peft_directory(
    directory: str | Path, structure: Mapping[str, Any], parameters: Mapping[str, Tensor]
) -> AdapterDirectory:
    """The adapter as an AdapterHub one for a model of this structure.

    Modules are known by their paths. Ranks that differ (rank_pattern) are padded with zeros to the largest, scalings
    (alpha_pattern, use_rslora) are multiplied into B, and layers without an update are left out.

    Args:
        directory: what `PeftModel.save_pretrained()` wrote.
        structure: what torchgraft.inspect() says of the model.
        parameters: the model's, by path: PEFT's DoRA scales all of a projection's result but its bias.

    Raises:
        GraftError: not a LoRA, a field that is not supported, or a module that the model does not have or that a LoRA
            has no place at (the attention's output projection, gates of feed-forward blocks).
    """
    directory = Path(directory)
    config = json.loads(read_config(directory))
    _check_config(directory, config)
    updates = _read_updates(directory, config)
    places: dict[tuple[int, str], tuple[dict, _Update]] = {}  # (index in layers, role) -> projection and its update
    for path, update in updates.items():
        places |= _places(directory, path, update, structure)
    rank = max(update.lora_a.size(0) for update in updates.values())
    return _as_adapter_hub(directory, places, rank, structure, parameters)


def _check_config(directory: Path, config: dict[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise GraftError(f"{directory}: PEFT's {config.get('peft_type')} is not supported, only LORA")
    for field, meaning in _UNSUPPORTED.items():
        if config.get(field):
            raise GraftError(f"{directory}: {field} ({meaning}) is not supported")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE):
        raise GraftError(f"{directory}: init_lora_weights={init} has changed the base's weights, which the model here "
                         "does not have; convert it with PEFT's path_initial_model_for_weight_conversion")  # fmt: skip


def _pattern_value(patterns: Mapping[str, Any] | None, path: str, default: float) -> float:
    """Of the first pattern that is the path's end, as PEFT looks them up."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(?:.*\.)?(?:{pattern})$", path):
            return value
    return default


def _read_updates(directory: Path, config: dict[str, Any]) -> dict[str, _Update]:
    sides: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read_weights(directory, WEIGHT_FILES).items():
        match = _KEY.fullmatch(key)
        dimensions = 1 if match and match["magnitude"] else 2
        if match is None or tensor.dim() != dimensions or not tensor.is_floating_point():
            raise GraftError(f"{directory}: {key} is no weight of a LoRA on a linear map")
        sides.setdefault(match["path"], {})[match["side"] or match["magnitude"]] = tensor
    result = {}
    for path, side in sides.items():
        expected = {"A", "B", "magnitude_vector"} if config.get("use_dora") else {"A", "B"}
        if set(side) != expected or side["A"].size(0) != side["B"].size(1):
            raise GraftError(f"{directory}: expected lora_A [r, in] and lora_B [out, r] for {path}"
                             + (", and its lora_magnitude_vector" if config.get("use_dora") else ""))  # fmt: skip
        rank = side["A"].size(0)
        alpha = _pattern_value(config.get("alpha_pattern"), path, config.get("lora_alpha", 8))
        scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        result[path] = _Update(side["A"], side["B"] * scaling, side.get("magnitude_vector"))
    if not result:
        raise GraftError(f"{directory}: the adapter has no weights")
    return result


def _is_same_path(a: str, b: str) -> bool:
    """Modulo leading components: a model may have been traced under a head, or inside a wrapper."""
    return a == b or a.endswith("." + b) or b.endswith("." + a)


def _places(
    directory: Path, path: str, update: _Update, structure: Mapping[str, Any]
) -> dict[tuple[int, str], tuple[dict, _Update]]:
    """Where an update goes: one projection, or all that are packed into one linear map."""
    roles = [*_MATRICES, "output", "ffn_in", "ffn_gate", "ffn_out"]
    found = [
        (index, role, layer[role])
        for index, layer in enumerate(structure["layers"])
        for role in roles
        if layer["shares"] is None and layer[role] and _is_same_path(layer[role]["path"], path)
    ]
    if not found:
        raise GraftError(f"{directory}: the model has no linear map {path}; PEFT adapters are matched by module path")
    for _, role, _ in found:
        if role not in _MATRICES and role not in _FLAGS:
            what = "the attention's output projection" if role == "output" else "the gate of the feed-forward block"
            raise GraftError(f"{directory}: {path} is {what}, where a LoRA has no place; target_modules may name "
                             "query, key and value projections and both ends of the feed-forward block")  # fmt: skip
    width = sum(projection["out_features"] for _, _, projection in found)
    if update.lora_b.size(0) != width or update.lora_a.size(1) != found[0][2]["in_features"]:
        raise GraftError(f"{directory}: expected lora_A and lora_B of {path} for {found[0][2]['in_features']} inputs "
                         f"and {width} outputs, got {update.lora_a.size(1)} and {update.lora_b.size(0)}")  # fmt: skip
    first = min(projection["offset"] for _, _, projection in found)
    return {
        (index, role): (projection, update.rows(projection["offset"] - first, projection["out_features"]))
        for index, role, projection in found
    }  # fmt: skip


def _bias(projection: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> Tensor:
    """[out] of one projection; zeros when it has none."""
    features = projection["out_features"]
    bias = parameters.get(f"{projection['path']}.bias")
    return torch.zeros(features) if bias is None else bias.detach().narrow(0, projection["offset"], features)


def _as_adapter_hub(
    directory: Path,
    places: Mapping[tuple[int, str], tuple[dict, _Update]],
    rank: int,
    structure: Mapping[str, Any],
    parameters: Mapping[str, Tensor],
) -> AdapterDirectory:
    layers = structure["layers"]
    roles = {role for _, role in places}
    used = {layers[index]["layer"] for index, _ in places}
    dora = any(update.magnitude is not None for _, update in places.values())
    config = LoRAConfig(
        r=rank,
        alpha=rank,
        selfattn_lora=any(role in _MATRICES for role in roles),
        attn_matrices=[matrix for role, matrix in _MATRICES.items() if role in roles],
        use_dora=dora,
        leave_out=sorted({layer["layer"] for layer in layers} - used),
        **{flag: role in roles for role, flag in _FLAGS.items()},
    )
    weights: dict[str, list[Tensor]] = {}
    for index, layer in enumerate(layers):
        if layer["shares"] is not None or layer["layer"] not in used:
            continue
        for role in (*_MATRICES, *_FLAGS):
            projection = layer[role]
            if role not in roles or projection is None:
                continue
            _, update = places.get((index, role), (None, None))
            if update is None and dora:
                raise GraftError(f"{directory}: DoRA on {role} of some layers, and in layer {layer['layer']} on "
                                 "others, is not supported; target_modules must name the same projections in "
                                 "each")  # fmt: skip
            if update is None:  # another layer has one here: this one's is zero
                update = _Update(torch.zeros(1, projection["in_features"]), torch.zeros(projection["out_features"], 1))
            padded = update.padded(rank)
            prefix = f"{projection['path']}.loras.{DEFAULT_NAME}"
            weights.setdefault(f"{prefix}.lora_A", []).append(padded.lora_a)
            weights.setdefault(f"{prefix}.lora_B", []).append(padded.lora_b)
            if padded.magnitude is not None:
                weights.setdefault(f"{prefix}.m.weight", []).append(padded.magnitude.unsqueeze(1))
                weights.setdefault(f"{prefix}.fixed", []).append(_bias(projection, parameters))
    return AdapterDirectory(
        name=DEFAULT_NAME,
        config=json.dumps(config.to_dict()),
        weights={key: torch.cat(parts) for key, parts in weights.items()},
    )
