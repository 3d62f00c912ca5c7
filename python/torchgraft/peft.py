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
DEFAULT_NAME = "default"  # PEFT's name for an adapter to which the user gave none

_KEY = re.compile(
    r"(?:base_model\.model\.)?(?P<path>.+)"
    r"\.(?:lora_(?P<side>[AB])(?:\.[^.]+)?\.weight|lora_(?P<magnitude>magnitude_vector).*)"
)
# Initialisations that also change the base's weights: the adapter fits the changed weights only.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")
# Fields that must be off, and what each would add.
_UNSUPPORTED = {
    "use_qalora": "QALoRA", "modules_to_save": "whole modules", "trainable_token_indices": "tokens",
    "lora_bias": "a bias", "alora_invocation_tokens": "activated LoRA", "target_parameters": "parameters",
    "use_bdlora": "block-diagonal LoRA", "arrow_config": "Arrow",
}  # fmt: skip
# The roles of a layer's projections at which a LoRA can act, with the matrix or the field of LoRAConfig for it.
_MATRICES = {"query": "q", "key": "k", "value": "v"}
_FLAGS = {"ffn_in": "intermediate_lora", "ffn_out": "output_lora"}


def is_peft_directory(directory: Path) -> bool:
    """Returns whether PEFT wrote the directory, by its adapter_config.json. False if that file cannot be read."""
    try:
        content = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and "peft_type" in content


@dataclass(frozen=True)
class _Update:
    """The update B A of one linear map. lora_a: [r, in]; lora_b: [out, r], multiplied by alpha / r already; magnitude:
    [out], DoRA's. All are floating."""

    lora_a: Tensor
    lora_b: Tensor
    magnitude: Tensor | None = None

    def padded(self, rank: int) -> "_Update":
        more = rank - self.lora_a.size(0)
        pad = torch.nn.functional.pad
        return _Update(pad(self.lora_a, (0, 0, 0, more)), pad(self.lora_b, (0, more)), self.magnitude)

    def rows(self, first: int, count: int) -> "_Update":
        """Returns the part of the update for one of several packed projections."""
        magnitude = None if self.magnitude is None else self.magnitude.narrow(0, first, count)
        return _Update(self.lora_a, self.lora_b.narrow(0, first, count), magnitude)


def load_peft_directory(
    directory: str | Path, structure: Mapping[str, Any], parameters: Mapping[str, Tensor]
) -> AdapterDirectory:
    """Reads a LoRA of PEFT and converts it to an AdapterHub adapter for a model of this structure.

    The function matches linear maps by module path. It pads ranks that differ (rank_pattern) with zeros to the largest,
    multiplies scalings (alpha_pattern, use_rslora) into B, and lists layers without an update in `leave_out`.

    Args:
        directory: what `PeftModel.save_pretrained()` wrote.
        structure: the result of torchgraft.inspect() for the model.
        parameters: the model's parameters, by path. DoRA needs the biases: PEFT's DoRA scales all of a projection's
            result but its bias.

    Raises:
        GraftError: the directory holds no LoRA; a field is not supported; the model lacks a linear map; or AdapterHub
            has no location for it (the attention's output projection, the gate of a feed-forward block).
    """
    directory = Path(directory)
    config = json.loads(read_config(directory))
    _check_config(directory, config)
    updates = _read_updates(directory, config)
    targets: dict[tuple[int, str], tuple[dict, _Update]] = {}
    for path, update in updates.items():
        targets |= _targets(directory, path, update, structure)
    rank = max(update.lora_a.size(0) for update in updates.values())
    return _as_adapter_hub(directory, targets, rank, structure, parameters)


def _check_config(directory: Path, config: dict[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise GraftError(f"{directory}: PEFT's {config.get('peft_type')} is not supported, only LORA")
    for field, meaning in _UNSUPPORTED.items():
        if config.get(field):
            raise GraftError(f"{directory}: {field} ({meaning}) is not supported")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE):
        raise GraftError(
            f"{directory}: init_lora_weights={init} has changed the base's weights, and this model does not have the "
            "changed ones; convert the adapter with PEFT's path_initial_model_for_weight_conversion"
        )


def _pattern_value(patterns: Mapping[str, Any] | None, path: str, default: float) -> float:
    """Returns the value of the first pattern that matches the end of `path`, as PEFT does."""
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
            raise GraftError(f"{directory}: {key} is not a weight of a LoRA on a linear map")
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
    """Compares paths without their leading components: a model may have been traced inside a head or a wrapper."""
    return a == b or a.endswith("." + b) or b.endswith("." + a)


def _targets(
    directory: Path, path: str, update: _Update, structure: Mapping[str, Any]
) -> dict[tuple[int, str], tuple[dict, _Update]]:
    """Returns the projections that an update changes: one, or all that are packed into one linear map.

    Returns:
        {(index in "layers", role): (the projection's entry, its part of the update)}.
    """
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
            raise GraftError(
                f"{directory}: {path} is {what}, where AdapterHub has no location for a LoRA; target_modules may name "
                "query, key and value projections and both ends of the feed-forward block"
            )
    width = sum(projection["out_features"] for _, _, projection in found)
    if update.lora_b.size(0) != width or update.lora_a.size(1) != found[0][2]["in_features"]:
        raise GraftError(
            f"{directory}: expected lora_A and lora_B of {path} for {found[0][2]['in_features']} inputs and {width} "
            f"outputs, got {update.lora_a.size(1)} and {update.lora_b.size(0)}"
        )
    first = min(projection["offset"] for _, _, projection in found)
    return {
        (index, role): (projection, update.rows(projection["offset"] - first, projection["out_features"]))
        for index, role, projection in found
    }  # fmt: skip


def _bias(projection: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> Tensor:
    """Returns the bias of one projection, [out]; zeros if it has none."""
    features = projection["out_features"]
    bias = parameters.get(f"{projection['path']}.bias")
    return torch.zeros(features) if bias is None else bias.detach().narrow(0, projection["offset"], features)


def _as_adapter_hub(
    directory: Path,
    targets: Mapping[tuple[int, str], tuple[dict, _Update]],
    rank: int,
    structure: Mapping[str, Any],
    parameters: Mapping[str, Tensor],
) -> AdapterDirectory:
    layers = structure["layers"]
    roles = {role for _, role in targets}
    used = {layers[index]["layer"] for index, _ in targets}
    dora = any(update.magnitude is not None for _, update in targets.values())
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
            _, update = targets.get((index, role), (None, None))
            if update is None and dora:
                raise GraftError(
                    f"{directory}: DoRA on {role} of some layers, and in layer {layer['layer']} on others, is not "
                    "supported; target_modules must name the same projections in each layer"
                )
            if update is None:  # other layers update this role: here the update is zero
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
