"""Reads LoRA directories of Hugging Face PEFT: adapter_config.json and adapter_model.safetensors."""

import copy
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._libraries import patcher
from ._reading import parse_json, read_text
from .adapter_hub import CONFIG_FILE, AdapterDirectory, read_one_version, read_weights
from .configs import LoRAConfig
from .errors import GraftError
from .peft_config import PeftLoRAConfig, read_peft_config

WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
DEFAULT_NAME = "default"  # PEFT's name for an adapter to which the user gave none

_KEY = re.compile(
    r"(?:base_model\.model\.)?(?P<path>.+)"
    r"\.(?:lora_(?P<side>[AB])(?:\.[^.]+)?\.weight|lora_(?P<magnitude>magnitude_vector)(?:\.[^.]+)?(?:\.weight)?)"
)
# The roles of a layer's projections at which a LoRA can act, with the matrix or the field of LoRAConfig for it.
_MATRICES = {"query": "q", "key": "k", "value": "v"}
_FLAGS = {
    "output": "attn_output_lora",
    "ffn_gate": "gate_lora",
    "ffn_in": "intermediate_lora",
    "ffn_out": "output_lora",
}
_ROLES = (*_MATRICES, *_FLAGS)  # in execution order: parts of a packed map are concatenated in this order


def is_peft_directory(directory: Path) -> bool:
    """Returns whether PEFT wrote the directory, by its adapter_config.json. False if that file cannot be read."""
    path = directory / CONFIG_FILE
    try:
        content = parse_json(read_text(path), path)
    except (OSError, GraftError):
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


def _read_files(directory: Path) -> "tuple[PeftLoRAConfig, dict[str, _Update]]":
    config = read_peft_config(directory)
    return config, _read_updates(config)


def load_peft_directory(
    directory: str | Path, structure: Mapping[str, Any], parameters: Mapping[str, Tensor]
) -> AdapterDirectory:
    """Reads a LoRA of PEFT and converts it to an AdapterHub adapter for a model of this structure.

    The function matches linear maps by module path; where a frozen module has none, by the layer's number and the names
    of projections. It pads ranks that differ (rank_pattern) with zeros to the largest,
    multiplies scalings (alpha_pattern, use_rslora) into B, and lists layers without an update in `leave_out`.

    Args:
        directory: what `PeftModel.save_pretrained()` wrote.
        structure: the result of torchgraft.inspect() for the model.
        parameters: the model's parameters, by path. DoRA needs the biases: PEFT's DoRA scales all of a projection's
            result but its bias.

    Raises:
        GraftError: the directory holds no LoRA; a field is not known or not supported; weights are missing, or two are
            for one linear map; or the model lacks a linear map, or has it outside of its layers.
    """
    directory = Path(directory)
    config, updates = read_one_version(directory, (CONFIG_FILE, *WEIGHT_FILES), _read_files)
    projections = _projections(structure)
    if not projections:
        structure = _with_paths(config, updates, structure)
        projections = _projections(structure)
    maps = [path.removesuffix(".weight") for path, tensor in parameters.items() if path.endswith(".weight")
            and tensor.dim() == 2]  # fmt: skip
    model_paths = list(dict.fromkeys([*projections, *maps]))
    places = _match_paths(directory, updates, model_paths)
    _check_completeness(config, places, model_paths)
    targets: dict[tuple[int, str], tuple[dict, _Update]] = {}
    for path, update in updates.items():
        model_path = places[path].path
        targets |= _targets(directory, path, model_path, update, projections.get(model_path, []))
    rank = max(update.lora_a.size(0) for update in updates.values())
    return _as_adapter_hub(directory, targets, rank, structure, parameters)


def _projections(structure: Mapping[str, Any]) -> dict[str, list[tuple[int, str, dict]]]:
    """Returns {path of a linear map: [(index in "layers", role, the projection's entry)]}; several that are packed. A
    frozen module's linear maps have no paths."""
    result: dict[str, list[tuple[int, str, dict]]] = {}
    for index, layer in enumerate(structure["layers"]):
        for role in _ROLES:
            if layer["shares"] is None and layer[role] and layer[role]["path"]:
                result.setdefault(layer[role]["path"], []).append((index, role, layer[role]))
    return result


def _with_paths(config: PeftLoRAConfig, paths: Iterable[str], structure: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the structure of a frozen module, with PEFT's paths for linear maps that have an update in some layer.

    Raises:
        GraftError: an update has no place, or two have one place; or it is a DoRA's, which needs the biases.
    """
    directory = config.directory
    if config.use_dora:
        raise GraftError(
            f"{directory}: DoRA needs the biases of the module, which is frozen; graft the module before it is frozen"
        )
    text = json.dumps(structure)
    result = copy.deepcopy(dict(structure))
    layers = result["layers"]
    owners: dict[tuple[int, str], str] = {}
    for path in paths:
        places = [(index, _role_of(site)) for index, site in patcher().lora_places_by_number(text, path)]
        if not places:
            raise GraftError(
                f"{directory}: {path} has no place in the module, which is frozen, so that layers are matched by "
                "number and projections by name; graft the module before it is frozen"
            )
        for place in places:
            if place in owners:
                raise GraftError(
                    f"{directory}: {owners[place]} and {path} are both updates of the {place[1]} projection of layer "
                    f"{layers[place[0]]['layer']}; graft the whole model that the adapter was trained on"
                )
            owners[place] = path
    for (index, role), path in owners.items():
        for other, layer in enumerate(layers):
            if layer["kind"] == layers[index]["kind"] and layer[role] and (other, role) not in owners:
                layer[role]["path"] = _renumbered(path, layer["layer"] - layers[index]["layer"])
    for (index, role), path in owners.items():
        layers[index][role]["path"] = path
    return result


def _role_of(site: str) -> str:
    """Returns the role of the projection that a LoRA's site is at."""
    names = {matrix: role for role, matrix in _MATRICES.items()} | {"o": "output"}
    flags = {flag: role for role, flag in _FLAGS.items()}
    return flags[site] if site in flags else names[site.rsplit("_", 1)[1]]


def _renumbered(path: str, step: int) -> str:
    """Returns the path of the same linear map `step` layers further on."""
    parts = path.split(".")
    position = next(index for index, part in enumerate(parts) if part.isdigit())
    return ".".join([*parts[:position], str(int(parts[position]) + step), *parts[position + 1 :]])


def _read_updates(config: PeftLoRAConfig) -> dict[str, _Update]:
    directory = config.directory
    sides: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read_weights(directory, WEIGHT_FILES).items():
        match = _KEY.fullmatch(key)
        dimensions = 1 if match and match["magnitude"] else 2
        if match is None or tensor.dim() != dimensions or not tensor.is_floating_point():
            raise GraftError(f"{directory}: {key} is not a weight of a LoRA on a linear map")
        side = match["side"] or match["magnitude"]
        if side in sides.setdefault(match["path"], {}):
            raise GraftError(f"{directory}: two weights are lora_{side} of {match['path']}, {key} is one of them")
        sides[match["path"]][side] = tensor
    result = {}
    for path, side in sides.items():
        expected = {"A", "B", "magnitude_vector"} if config.use_dora else {"A", "B"}
        if set(side) != expected or side["A"].size(0) != side["B"].size(1):
            raise GraftError(f"{directory}: expected lora_A [r, in] and lora_B [out, r] for {path}"
                             + (", and its lora_magnitude_vector" if config.use_dora else ""))  # fmt: skip
        if side["A"].size(0) != config.rank(path):
            raise GraftError(
                f"{directory}: expected lora_A of {path} of rank {config.rank(path)}, as r and rank_pattern say, got "
                f"{side['A'].size(0)}"
            )
        result[path] = _Update(side["A"], side["B"] * config.scaling(path), side.get("magnitude_vector"))
    if not result:
        raise GraftError(f"{directory}: the adapter has no weights")
    return result


@dataclass(frozen=True)
class _Place:
    """Where an update belongs.

    Attributes:
        path: the linear map's path in the model.
        model_prefix: what precedes the part of that path which PEFT's path has, too.
        peft_prefix: what precedes that part in PEFT's path.
    """

    path: str
    model_prefix: str
    peft_prefix: str


def _place(model_path: str, peft_path: str) -> tuple[int, _Place] | None:
    """Compares two paths from their ends: a model may have been traced inside a head or a wrapper, or without one.

    Returns:
        How many components they share, and the place; None: they are not paths of one linear map. They are if one is
        the end of the other, or if they share a layer's number and its container.
    """
    model, saved = model_path.split("."), peft_path.split(".")
    shared = 0
    while shared < min(len(model), len(saved)) and model[-1 - shared] == saved[-1 - shared]:
        shared += 1
    number = next((index for index, component in enumerate(saved) if component.isdigit()), None)
    holds_a_layer = number is not None and number >= 1 and len(saved) - shared <= number - 1
    if shared < min(len(model), len(saved)) and not holds_a_layer:
        return None
    return shared, _Place(model_path, ".".join(model[: len(model) - shared]), ".".join(saved[: len(saved) - shared]))


def _match_paths(directory: Path, peft_paths: Iterable[str], model_paths: list[str]) -> dict[str, _Place]:
    """Finds the model's linear map of each update: one map for an update, one update for a map, and for all updates the
    same components before the part of the path that is common.

    Raises:
        GraftError: there is none, or there are several.
    """
    places: dict[str, _Place] = {}
    owners: dict[str, str] = {}
    for path in peft_paths:
        found = [place for place in (_place(model_path, path) for model_path in model_paths) if place]
        longest = max((shared for shared, _ in found), default=0)
        best = [place for shared, place in found if shared == longest]
        if not best:
            raise GraftError(
                f"{directory}: the model has no linear map {path}; PEFT adapters are matched by module path"
            )
        if len(best) > 1:
            raise GraftError(
                f"{directory}: {path} could be the model's {best[0].path} and its {best[1].path}; graft the part of "
                "the model that the adapter was trained on"
            )
        [place] = best
        if place.path in owners:
            raise GraftError(
                f"{directory}: {owners[place.path]} and {path} are both updates of the model's {place.path}; graft the "
                "whole model that the adapter was trained on"
            )
        owners[place.path] = path
        places[path] = place
    prefixes = {(place.model_prefix, place.peft_prefix): path for path, place in places.items()}
    if len(prefixes) > 1:
        one, other = [f"{path} (the model's {places[path].path})" for path in prefixes.values()][:2]
        raise GraftError(
            f"{directory}: {one} and {other} are of different parts; graft the whole model that the adapter was "
            "trained on"
        )
    return places


def _check_completeness(config: PeftLoRAConfig, places: Mapping[str, _Place], model_paths: list[str]) -> None:
    """Checks that each linear map that the configuration names has an update: a file may have lost some."""
    place = next(iter(places.values()))
    before = place.model_prefix + "." if place.model_prefix else ""
    for model_path in model_paths:
        path = ".".join(filter(None, [place.peft_prefix, model_path.removeprefix(before)]))
        if model_path.startswith(before) and path not in places and config.targets(path):
            raise GraftError(
                f"{config.directory}: the weights lack an update of {path} (the model's {model_path}), which "
                "target_modules names; if the adapter was trained on a model without it, name it in exclude_modules"
            )


def _targets(
    directory: Path, path: str, model_path: str, update: _Update, found: list[tuple[int, str, dict]]
) -> dict[tuple[int, str], tuple[dict, _Update]]:
    """Returns the projections that an update changes: one, or all that are packed into one linear map.

    Args:
        found: what _projections() has for `model_path`.

    Returns:
        {(index in "layers", role): (the projection's entry, its part of the update)}.
    """
    if not found:
        raise GraftError(
            f"{directory}: {path} is the model's {model_path}, which is not in a layer that was recognised; "
            "torchgraft.inspect() says which layers were, and why others were not"
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
    )
    flags = {flag: True for role, flag in _FLAGS.items() if role in roles}  # AdapterHub does not have all of them
    weights: dict[str, list[Tensor]] = {}
    for index, layer in enumerate(layers):
        if layer["shares"] is not None or layer["layer"] not in used:
            continue
        for role in _ROLES:
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
        config=json.dumps(config.to_dict() | flags),
        weights={key: torch.cat(parts) for key, parts in weights.items()},
    )
