"""Reads LoRA and (IA)^3 directories of Hugging Face PEFT: adapter_config.json and adapter_model.safetensors."""

import itertools
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._reading import parse_json, read_text
from .adapter_hub import CONFIG_FILE, AdapterDirectory, read_one_version
from .configs import LoRAConfig
from .errors import GraftError
from .peft_config import PeftLoRAConfig, read_peft_config
from .peft_frozen import FLAGS, MATRICES, with_paths
from .peft_paths import Place, match_paths, place_of, shown_paths
from .peft_weights import WEIGHT_FILES, PeftWeights, Update, read_peft_weights

DEFAULT_NAME = "default"  # PEFT's name for an adapter to which the user gave none

_NO_LAYER = -1  # stands for a layer's index: a linear map outside of the layers, whose role is its path
_ROLES = (*MATRICES, *FLAGS)  # in execution order: parts of a packed map are concatenated in this order


def is_peft_directory(directory: Path) -> bool:
    """Returns whether PEFT wrote the directory, by its adapter_config.json. False if that file cannot be read."""
    path = directory / CONFIG_FILE
    try:
        content = parse_json(read_text(path), path)
    except (OSError, GraftError):
        return False
    return isinstance(content, dict) and "peft_type" in content


def _read_files(directory: Path) -> tuple[PeftLoRAConfig, PeftWeights]:
    config = read_peft_config(directory)
    return config, read_peft_weights(config)


def load_peft_directory(
    directory: str | Path, structure: Mapping[str, Any], parameters: Mapping[str, Tensor]
) -> AdapterDirectory:
    """Reads a LoRA or an (IA)^3 of PEFT and converts it to an AdapterHub adapter for a model of this structure.

    The function matches linear maps by module path; where a frozen module has none, by the layer's number and the names
    of projections. It pads ranks that differ (rank_pattern) with zeros to the largest, multiplies scalings
    (alpha_pattern, use_rslora) into B, lists layers without an update in `leave_out`, and makes updates of linear maps
    that were trained as a whole (modules_to_save).

    Args:
        directory: what `PeftModel.save_pretrained()` wrote.
        structure: the result of torchgraft.inspect() for the model.
        parameters: the model's parameters, by path; those of adapters count for nothing. DoRA needs the biases: PEFT's
            DoRA scales all of a projection's result but its bias.

    Raises:
        GraftError: the directory holds another method; a field is not known or not supported; weights are missing, or
            two are for one linear map; or the model lacks a linear map, or has it outside of its layers.
    """
    directory = Path(directory)
    parameters = {path: each for path, each in parameters.items() if not path.startswith("adapters.")}
    config, weights = read_one_version(directory, (CONFIG_FILE, *WEIGHT_FILES), _read_files)
    projections = _projections(structure)
    if not projections and not parameters:  # frozen
        structure = with_paths(config, weights, structure)
        projections = _projections(structure)
    maps = [path.removesuffix(".weight") for path, tensor in parameters.items() if path.endswith(".weight")
            and tensor.dim() == 2]  # fmt: skip
    linear_maps = {entry["path"]: entry for entry in structure.get("linear_maps", [])}
    model_paths = list(dict.fromkeys([*projections, *linear_maps, *maps]))  # those of int8 have no "weight"
    wholes = _present(directory, weights.wholes, model_paths, _output_embeddings(structure))
    places = match_paths(directory, [*weights.updates, *wholes], model_paths, list(linear_maps))
    _check_completeness(config, weights.updates, places, model_paths)
    _check_bases(directory, weights.bases, places, parameters)
    for path in wholes:
        if linear_maps.get(places[path].path, {}).get("embedding"):
            raise GraftError(
                f"{directory}: {path} is an embedding that was trained as a whole (modules_to_save), which is not "
                "supported; merge the adapter into the base with PEFT's merge_and_unload() before you trace that"
            )
    updates = weights.updates | {
        path: _whole_update(config, path, places[path].path, whole, parameters) for path, whole in wholes.items()
    }
    targets: dict[tuple[int, str], tuple[dict[str, Any], Update]] = {}
    for path, update in updates.items():
        model_path = places[path].path
        found = projections.get(model_path, [])
        if not found and model_path in linear_maps:
            found = [(_NO_LAYER, model_path, linear_maps[model_path])]
        targets |= _targets(directory, path, model_path, update, found)
    rank = max(update.lora_a.size(0) for update in updates.values())
    return _as_adapter_hub(config, targets, rank, structure, parameters)


def _output_embeddings(structure: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Returns the linear maps, by path, from features of the embeddings' width to as many outputs as the table of the
    tokens has rows."""
    embeddings = structure.get("embeddings", {})
    if not embeddings.get("output"):
        return {}
    maps = {entry["path"]: entry for entry in structure.get("linear_maps", [])
            if entry["in_features"] == embeddings["size"]}  # fmt: skip
    most = max((entry["out_features"] for entry in maps.values()), default=0)
    return {path: entry for path, entry in maps.items() if entry["out_features"] == most}


def _present(
    directory: Path,
    wholes: Mapping[str, tuple[Tensor, Tensor | None]],
    model_paths: list[str],
    output_embeddings: Mapping[str, Mapping[str, Any]],
) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Returns those linear maps that the model has. Warns of the others: the model may have been traced without its
    head.

    Args:
        output_embeddings: the linear maps that may be the model's output embeddings. Such a map may have the path of
            the embedding that has the same weight.

    Raises:
        GraftError: one of the others may be such a map.
    """
    found = {path: whole for path, whole in wholes.items() if any(place_of(each, path) for each in model_paths)}
    for path, (weight, _) in wholes.items():
        for other, entry in output_embeddings.items():
            is_like_it = tuple(weight.shape) == (entry["out_features"], entry["in_features"])
            if path not in found and is_like_it and not any(place_of(other, each) for each in found):
                raise GraftError(
                    f"{directory}: {path} (modules_to_save) may be the model's {other}, which has as many inputs and "
                    "outputs: a weight that is tied to an embedding has the embedding's path. Untie the model's "
                    f"weights, so that {path} has one of its own"
                )
    lost = shown_paths(path for path in wholes if path not in found)
    if lost:
        warnings.warn(
            f"{directory}: {lost} (modules_to_save) is not loaded: the model has no such linear map; a prediction "
            "needs its own head",
            stacklevel=2,
        )
    return found


def _check_bases(
    directory: Path, bases: Mapping[str, Tensor], places: Mapping[str, Place], parameters: Mapping[str, Tensor]
) -> None:
    """Checks that the parameters of the base that the file has are the model's."""
    for name, saved in bases.items():
        path, kind = name.rsplit(".", 1)
        found = parameters.get(f"{places[path].path}.{kind}") if path in places else None
        if found is None or found.shape != saved.shape or not torch.equal(found.detach().to(saved.dtype), saved):
            raise GraftError(
                f"{directory}: the file has {name} of the base, and the model's is another; graft the model that the "
                "adapter was trained on"
            )


def _whole_update(
    config: PeftLoRAConfig,
    path: str,
    model_path: str,
    whole: tuple[Tensor, Tensor | None],
    parameters: Mapping[str, Tensor],
) -> Update:
    """Returns the update that makes a linear map of the model the one that was trained as a whole."""
    weight, bias = parameters.get(f"{model_path}.weight"), parameters.get(f"{model_path}.bias")
    if weight is None:
        raise GraftError(
            f"{config.directory}: {path} was trained as a whole (modules_to_save), and the model's {model_path} has no "
            "floating-point weight to compare with (int8?); load the adapter onto the float module, and quantise after"
        )
    old = weight.detach()
    if config.use_dora:
        raise GraftError(f"{config.directory}: DoRA beside modules that were trained as a whole is not supported")
    if config.scales:
        raise GraftError(
            f"{config.directory}: (IA)^3 beside {path}, which was trained as a whole (modules_to_save), is not "
            "supported; merge it into the base with PEFT's merge_and_unload() before you trace that"
        )
    if old.shape != whole[0].shape or (bias is None) != (whole[1] is None):
        raise GraftError(
            f"{config.directory}: expected {path} (modules_to_save) to be of shape {list(old.shape)}, as the model's "
            f"{model_path}, got {list(whole[0].shape)}" + ("" if (bias is None) == (whole[1] is None) else
                                                            "; and one of them has a bias")
        )  # fmt: skip
    return Update.between((old, None if bias is None else bias.detach()), whole)


def _projections(structure: Mapping[str, Any]) -> dict[str, list[tuple[int, str, dict[str, Any]]]]:
    """Returns {path: [(index in "layers", role, the projection's entry)]}; several that are packed. A frozen module's
    linear maps have no paths."""
    result: dict[str, list[tuple[int, str, dict[str, Any]]]] = {}
    for index, layer in enumerate(structure["layers"]):
        for role in _ROLES:
            if layer["shares"] is None and layer[role] and layer[role]["path"]:
                result.setdefault(layer[role]["path"], []).append((index, role, layer[role]))
    return result


def _check_completeness(
    config: PeftLoRAConfig, updates: Mapping[str, Update], places: Mapping[str, Place], model_paths: list[str]
) -> None:
    """Checks that each linear map that the configuration names has an update, for a file may have lost some, and that
    it names each that has one: PEFT would leave the others out."""
    for path in places:
        if path in updates and not config.targets(path):
            raise GraftError(
                f"{config.directory}: the weights have an update of {path}, which target_modules, exclude_modules and "
                "layers_to_transform do not select, so that PEFT would leave it out; correct adapter_config.json"
            )
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
    directory: Path, path: str, model_path: str, update: Update, found: list[tuple[int, str, dict[str, Any]]]
) -> dict[tuple[int, str], tuple[dict[str, Any], Update]]:
    """Returns the projections that an update changes: one, or all that are packed into one linear map.

    Args:
        found: what _projections() has for `model_path`.

    Returns:
        {(index in "layers", role): (the projection's entry, its part of the update)}.
    """
    if not found:
        raise GraftError(
            f"{directory}: {path} is the model's {model_path}, which is in no layer that was recognised, and no linear "
            "map or embedding that is applied once, to the tokens of all rows: torchgraft.inspect() says what was "
            "recognised. Merge the adapter into the base with PEFT's merge_and_unload() before you trace that"
        )
    if update.is_of_embedding != found[0][2].get("embedding", False):
        kinds = ("an embedding", "a linear map") if update.is_of_embedding else ("a linear map", "an embedding")
        raise GraftError(
            f"{directory}: {path} is {kinds[0]}, and the model's {model_path} {kinds[1]} (they are tied); untie the "
            "model's weights, or merge the adapter into the base with PEFT's merge_and_unload() before you trace that"
        )
    _check_parts(directory, path, model_path, found)
    width = sum(projection["out_features"] for _, _, projection in found)
    reads_input = update.lora_a.size(1) in (0, found[0][2]["in_features"])  # (IA)^3 reads none
    if update.lora_b.size(0) > width and reads_input:
        raise GraftError(
            f"{directory}: {path} is the model's {model_path}, of whose {update.lora_b.size(0)} outputs {width} were "
            f"recognised ({', '.join(role for _, role, _ in found)}); a LoRA cannot be on the others"
        )
    if update.lora_b.size(0) != width or not reads_input:
        if not update.lora_a.size(1):
            raise GraftError(f"{directory}: expected ia3_l of {path} for {width} outputs, got {update.lora_b.size(0)}")
        raise GraftError(
            f"{directory}: expected lora_A and lora_B of {path} for {found[0][2]['in_features']} inputs and {width} "
            f"outputs, got {update.lora_a.size(1)} and {update.lora_b.size(0)}"
        )
    first = min(projection["offset"] for _, _, projection in found)
    return {
        (index, role): (projection, update.rows(projection["offset"] - first, projection["out_features"]))
        for index, role, projection in found
    }  # fmt: skip


def _check_parts(directory: Path, path: str, model_path: str, found: list[tuple[int, str, dict[str, Any]]]) -> None:
    """Checks that no two projections read the same outputs of one linear map: PEFT's update acts on both at once."""
    parts = sorted(found, key=lambda each: each[2]["offset"])
    for (index, role, projection), (other_index, other_role, other) in itertools.pairwise(parts):
        if other["offset"] < projection["offset"] + projection["out_features"]:
            roles = role if role == other_role else f"{role} and {other_role}"
            where = "of one layer" if index == other_index else "of two layers"
            raise GraftError(
                f"{directory}: {path} is the model's {model_path}, some of whose outputs, or whose weight, two "
                f"projections {where} have in common ({roles}); a LoRA on such a map is not supported. Merge the "
                "adapter into the base with PEFT's merge_and_unload() before you trace that"
            )


def _bias(projection: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> Tensor:
    """Returns the bias of one projection, [out]; zeros if it has none."""
    features = projection["out_features"]
    bias = parameters.get(f"{projection['path']}.bias")
    return torch.zeros(features) if bias is None else bias.detach().narrow(0, projection["offset"], features)


def _as_adapter_hub(
    peft_config: PeftLoRAConfig,
    targets: Mapping[tuple[int, str], tuple[dict[str, Any], Update]],
    rank: int,
    structure: Mapping[str, Any],
    parameters: Mapping[str, Tensor],
) -> AdapterDirectory:
    directory, layers = peft_config.directory, structure["layers"]
    outside = {role: target for (index, role), target in targets.items() if index == _NO_LAYER}
    roles = {role for index, role in targets if index != _NO_LAYER}
    used = {layers[index]["layer"] for index, _ in targets if index != _NO_LAYER}
    _check_all_have(directory, roles & set(FLAGS), used, layers)
    dora = any(update.magnitude is not None for _, update in targets.values())
    config = LoRAConfig(
        r=rank,
        alpha=rank,
        selfattn_lora=any(role in MATRICES for role in roles),
        attn_matrices=[matrix for role, matrix in MATRICES.items() if role in roles],
        use_dora=dora,
        composition_mode="scale" if peft_config.scales else "add",
        init_weights="ia3" if peft_config.scales else "lora",
        leave_out=sorted({layer["layer"] for layer in layers} - used),
    )
    fields = config.to_dict() | {flag: True for role, flag in FLAGS.items() if role in roles}
    if outside:  # these fields are not AdapterHub's, nor are some of FLAGS
        fields["linear_maps"] = list(outside)
    if any(update.bias is not None for _, update in targets.values()):
        fields["lora_bias"] = True
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
            # Where other layers update this role, the update here changes nothing.
            update = update or Update.zero(projection, peft_config.scales)
            _append(weights, projection, update, fields, parameters)
    for projection, update in outside.values():
        _append(weights, projection, update, fields, parameters)
    return AdapterDirectory(
        name=DEFAULT_NAME,
        config=json.dumps(fields),
        weights={key: torch.cat(parts) for key, parts in weights.items()},
    )


def _check_all_have(directory: Path, roles: set[str], used: set[int], layers: list[Mapping[str, Any]]) -> None:
    """Checks that each layer with an update has all of `roles`: an adapter has its locations in all of its layers."""
    for role in sorted(roles):
        lacking = sorted(used - {layer["layer"] for layer in layers if layer[role]})
        if lacking:
            shown = ", ".join(map(str, lacking))
            raise GraftError(
                f"{directory}: the layers {shown} have an update and no {role} of their own, and other layers one "
                f"on {role}; a LoRA on different projections by layer is not supported. Merge the adapter into the "
                "base with PEFT's merge_and_unload() before you trace that"
            )


def _append(
    weights: dict[str, list[Tensor]],
    projection: Mapping[str, Any],
    update: Update,
    fields: Mapping[str, Any],
    parameters: Mapping[str, Tensor],
) -> None:
    """Appends an update to `weights`, under AdapterHub's names. fields: of the configuration."""
    padded = update.padded(fields["r"])
    prefix = f"{projection['path']}.loras.{DEFAULT_NAME}"
    parts = {"lora_A": padded.lora_a, "lora_B": padded.lora_b}
    if fields["composition_mode"] == "scale":
        del parts["lora_A"]
    if fields.get("lora_bias"):
        parts["lora_bias"] = torch.zeros(projection["out_features"]) if padded.bias is None else padded.bias
    if padded.magnitude is not None:
        parts |= {"m.weight": padded.magnitude.unsqueeze(1), "fixed": _bias(projection, parameters)}
    for name, tensor in parts.items():
        weights.setdefault(f"{prefix}.{name}", []).append(tensor)
