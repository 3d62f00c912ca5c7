"""Finds the linear maps of a frozen module, which have no paths, that the updates of a PEFT directory are for."""

import copy
import json
from collections.abc import Mapping
from typing import Any

from ._libraries import patcher
from .errors import GraftError
from .peft_config import PeftLoRAConfig
from .peft_weights import PeftWeights

# The roles of a layer's projections at which a LoRA can act, with the matrix or the field of LoRAConfig for it.
MATRICES = {"query": "q", "key": "k", "value": "v"}
FLAGS = {
    "output": "attn_output_lora",
    "ffn_gate": "gate_lora",
    "ffn_in": "intermediate_lora",
    "ffn_out": "output_lora",
}


def with_paths(config: PeftLoRAConfig, weights: PeftWeights, structure: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the structure of a frozen module, with PEFT's paths for linear maps that have an update in some layer.

    Raises:
        GraftError: an update has no place, or two have one place; or it is a DoRA's, which needs the biases.
    """
    directory = config.directory
    if config.use_dora:
        raise GraftError(
            f"{directory}: DoRA needs the biases of the module, which is frozen; graft the module before it is frozen"
        )
    if weights.wholes:
        raise GraftError(
            f"{directory}: {next(iter(weights.wholes))} was trained as a whole (modules_to_save), and the module is "
            "frozen; graft the module before it is frozen"
        )
    text = json.dumps(structure)
    result = copy.deepcopy(dict(structure))
    layers = result["layers"]
    owners: dict[tuple[int, str], str] = {}
    for path in weights.updates:
        places = [(index, _role_of(site)) for index, site in patcher().lora_sites_by_number(text, path)]
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
    names = {matrix: role for role, matrix in MATRICES.items()} | {"o": "output"}
    flags = {flag: role for role, flag in FLAGS.items()}
    return flags[site] if site in flags else names[site.rsplit("_", 1)[1]]


def _renumbered(path: str, step: int) -> str:
    """Returns the path of the same linear map `step` layers further on."""
    parts = path.split(".")
    position = next(index for index, part in enumerate(parts) if part.isdigit())
    return ".".join([*parts[:position], str(int(parts[position]) + step), *parts[position + 1 :]])
