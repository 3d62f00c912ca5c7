"""Reads adapter_config.json of Hugging Face PEFT's LoRA and (IA)^3. What is not known to be without effect here is
refused."""

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ._patterns import Patterns
from ._reading import parse_json
from .adapter_hub import CONFIG_FILE, read_config
from .errors import GraftError

# Fields that a trained LoRA's results do not depend on: how it was trained, and where it came from.
_WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "fan_in_fan_out",
    "inference_mode", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "task_type", "velora_config",
}  # fmt: skip
# Fields that must be off, and what each would add.
_UNSUPPORTED = {
    "alora_invocation_tokens": "activated LoRA", "arrow_config": "Arrow", "kasa_config": "KaSA, which changes the base",
    "layer_replication": "layers that are used several times", "megatron_config": "Megatron",
    "monteclora_config": "MonteCLoRA", "target_parameters": "parameters", "trainable_token_indices": "tokens",
    "use_bdlora": "block-diagonal LoRA", "use_qalora": "QALoRA",
}  # fmt: skip
# Fields of IA3Config, which has no other: its effect is a vector that multiplies what a linear map gives.
_OF_IA3 = {"exclude_modules", "feedforward_modules", "init_ia3_weights", "modules_to_save", "target_modules"}
_MERGE = "merge it into the base with PEFT's merge_and_unload() before you trace that"
# Initialisations that leave the base's weights as they are.
_PLAIN_INITIALISATIONS = ("gaussian", "eva", "mica", "orthogonal")
_ALL_LINEAR = "all-linear"
_HIGHEST_RANK = 2**31 - 1
_LONGEST_SHOWN = 200  # characters of a value in an error
# What PEFT makes of the expressions of layers_pattern, and of rank_pattern and alpha_pattern.
_LAYER = r"(?:^|.*?\.){}\.(?P<number>\d+)\."
_END = r"(.*\.)?({})$"
_ANY_CONTAINER = r"(?<=\.)[^.]*"  # where layers_pattern says nothing


@dataclass(frozen=True)
class PeftLoRAConfig:
    """The fields of LoraConfig on which a trained adapter's results depend, named and read as PEFT does. scales: the
    directory is of an IA3Config, which has some of them."""

    directory: Path
    scales: bool
    r: int
    lora_alpha: float
    target_modules: str | list[str]
    exclude_modules: str | list[str]
    layers_to_transform: list[int] | None
    layers_pattern: list[str]
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    use_dora: bool
    lora_bias: bool
    modules_to_save: list[str]
    patterns: Patterns = dataclasses.field(compare=False, repr=False)

    def rank(self, path: str) -> int:
        """Returns the rank of the update of the linear map at `path`, by PEFT's module path."""
        return int(self._pattern_value(self.rank_pattern, path, self.r))

    def scaling(self, path: str) -> float:
        """Returns the factor of B A: alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA."""
        rank = self.rank(path)
        alpha = self._pattern_value(self.alpha_pattern, path, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def targets(self, path: str) -> bool:
        """Returns whether PEFT gives the linear map at `path` an update."""
        if self._names(self.exclude_modules, path):
            return False
        if self.target_modules == _ALL_LINEAR:
            return True
        if not self._names(self.target_modules, path):
            return False
        # PEFT ignores layers_to_transform beside a regular expression, and for a path that is named in full.
        if isinstance(self.target_modules, str) or path in self.target_modules or not self.layers_to_transform:
            return True
        number = self._layer_number(path)
        return number is not None and number in self.layers_to_transform

    def saves_whole(self, path: str) -> bool:
        """Returns whether the module at `path` is, or is inside of, one that was trained as a whole."""
        parts = path.split(".")
        return any(self._names(self.modules_to_save, ".".join(parts[: end + 1])) for end in range(len(parts)))

    def _layer_number(self, path: str) -> int | None:
        for pattern in self.layers_pattern or [_ANY_CONTAINER]:
            match = self.patterns.match(pattern, path, _LAYER)
            if match:
                return int(match["number"])
        return None

    def _pattern_value(self, patterns: Mapping[str, Any], path: str, default: float) -> float:
        """Returns the value of the first pattern that matches the end of `path`, as PEFT does."""
        for pattern, value in patterns.items():
            if self.patterns.match(pattern, path, _END):
                return value
        return default

    def _names(self, modules: str | list[str], path: str) -> bool:
        """Returns whether a regular expression, or one of several ends of paths, is that of `path`."""
        if isinstance(modules, str):
            return bool(modules) and self.patterns.match(modules, path, full=True) is not None
        return any(path == name or path.endswith("." + name) for name in modules)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + "..."


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _is_text_or_texts(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(each, str) for each in value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _HIGHEST_RANK


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_layers(value: Any) -> bool:
    return all(isinstance(each, int) and not isinstance(each, bool) for each in _as_list(value))


def _patterns_to(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(holds(each) for each in value.values())


# Field: (what it must be, the check, the value where the file has none or null).
_FIELDS: dict[str, tuple[str, Callable[[Any], bool], Any]] = {
    "r": (f"a whole number from 1 to {_HIGHEST_RANK}", _is_rank, 8),
    "lora_alpha": ("a number", _is_number, 8),
    "target_modules": ("a text or a list of texts", _is_text_or_texts, None),
    "exclude_modules": ("a text or a list of texts", _is_text_or_texts, []),
    "layers_to_transform": ("a layer or a list of layers", _is_layers, None),
    "layers_pattern": ("a text or a list of texts", _is_text_or_texts, []),
    "rank_pattern": (f"whole numbers from 1 to {_HIGHEST_RANK} by pattern", _patterns_to(_is_rank), {}),
    "alpha_pattern": ("numbers by pattern", _patterns_to(_is_number), {}),
    "use_rslora": ("true or false", _is_bool, False),
    "use_dora": ("true or false", _is_bool, False),
    "lora_bias": ("true or false", _is_bool, False),
    "modules_to_save": ("a text or a list of texts", _is_text_or_texts, []),
}


def read_peft_config(directory: Path) -> PeftLoRAConfig:
    """Reads adapter_config.json.

    Raises:
        GraftError: the file is of another method; it has a field that is not known, is not supported or has another
            type; or the LoRA's initialisation has changed the base's weights.
    """
    config = parse_json(read_config(directory), directory / CONFIG_FILE)
    scales = config.get("peft_type") == "IA3"
    if config.get("peft_type") != "LORA" and not scales:
        shown = str(config.get("peft_type"))[:_LONGEST_SHOWN]
        raise GraftError(
            f"{directory}: PEFT's {shown} is not supported, only LORA and IA3 are; {_MERGE}, or, where it cannot be "
            "merged, train one of torchgraft's methods"
        )
    _check_fields(directory, config, scales)
    _check_initialisation(directory, config.get("init_lora_weights", True))
    values = {}
    for name, (expected, holds, default) in _FIELDS.items():
        value = config.get(name)
        if value is not None and not holds(value):
            raise GraftError(f"{directory}: expected {name} to be {expected}, got {_shown(value)}")
        values[name] = default if value is None else value
    if values["target_modules"] is None:
        raise GraftError(f"{directory}: expected target_modules, which says where the adapter's updates are")
    if values["layers_to_transform"] is not None:
        values["layers_to_transform"] = _as_list(values["layers_to_transform"])
    if isinstance(values["target_modules"], str) and values["target_modules"] != _ALL_LINEAR:
        _check_no_layers(directory, values)
    values["modules_to_save"] = _as_list(values["modules_to_save"])
    values["layers_pattern"] = [each for each in _as_list(values["layers_pattern"]) if each]
    return PeftLoRAConfig(directory, scales, **values, patterns=_compiled(directory, values))


def _check_no_layers(directory: Path, values: Mapping[str, Any]) -> None:
    for field in ("layers_to_transform", "layers_pattern"):
        if values[field] not in (None, [], ""):
            raise GraftError(
                f"{directory}: target_modules is a regular expression, beside which PEFT takes no {field}; name the "
                f"layers in the expression, and remove {field} from adapter_config.json"
            )


def _check_fields(directory: Path, config: Mapping[str, Any], scales: bool) -> None:
    for field, value in config.items():
        if field in _UNSUPPORTED and value not in (None, False, [], {}):
            raise GraftError(f"{directory}: {field} ({_UNSUPPORTED[field]}) is not supported")
        if field == "bias" and value not in (None, "none"):
            raise GraftError(
                f"{directory}: bias={_shown(value)} has trained the base's biases, which is not supported; only "
                'bias="none" is'
            )
        known = field in _WITHOUT_EFFECT or field in _UNSUPPORTED or field in (_OF_IA3 if scales else _FIELDS)
        # null is a feature that is off, of a version that has more of them.
        if value is not None and not known and field not in ("peft_type", "bias", "init_lora_weights"):
            raise GraftError(
                f"{directory}: the field {field[:_LONGEST_SHOWN]} is not known, so what it changes is not either; if "
                "it has no effect on a trained adapter, remove it from adapter_config.json"
            )


def _check_initialisation(directory: Path, init: Any) -> None:
    if init is None or isinstance(init, bool) or (isinstance(init, str) and init.lower() in _PLAIN_INITIALISATIONS):
        return
    raise GraftError(
        f"{directory}: init_lora_weights={_shown(init)} has changed the base's weights, or is not known, and this "
        "model does not have the changed ones; convert the adapter with PEFT's path_initial_model_for_weight_conversion"
    )


def _compiled(directory: Path, values: Mapping[str, Any]) -> Patterns:
    """Regular expressions come from a file that somebody downloaded."""
    texts = [values[name] for name in ("target_modules", "exclude_modules") if isinstance(values[name], str)]
    layers = values["layers_pattern"] or [_ANY_CONTAINER]
    wholes = {_END: [*values["rank_pattern"], *values["alpha_pattern"]], _LAYER: layers, "{}": texts}
    result = Patterns(directory)
    for whole, patterns in wholes.items():
        for pattern in patterns:
            result.add(pattern, whole)
    return result
