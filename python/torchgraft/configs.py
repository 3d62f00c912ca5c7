"""Adapter configurations, with the fields and defaults of `adapters==1.3.0`.

The classes are plain data. AdapterHub's documentation says what each field means. graft() checks which values are
supported and refuses others by name. The tests compare every field and default with the installed library.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ._libraries import patcher
from ._reading import parse_json
from .adapter_hub import read_config
from .errors import GraftError


@dataclass
class _Method:
    """The base class of configurations of one method."""

    def to_dict(self) -> dict[str, Any]:
        """Returns all fields, as adapter_config.json holds them."""
        return asdict(self)

    def replace(self, **changes: Any) -> "_Method":
        """Returns a copy with other values.

        Raises:
            TypeError: a field does not exist.
        """
        return replace(self, **changes)


@dataclass
class BnConfig(_Method):
    """A bottleneck adapter after attention (`mh_adapter`) and/or the feed-forward block (`output_adapter`)."""

    mh_adapter: bool
    output_adapter: bool
    reduction_factor: float | Mapping[str, float]
    non_linearity: str
    original_ln_before: bool = False
    original_ln_after: bool = True
    ln_before: bool = False
    ln_after: bool = False
    init_weights: str = "bert"
    init_weights_seed: int | None = None
    is_parallel: bool = False
    scaling: float | str = 1.0
    use_gating: bool = False
    residual_before_ln: bool | str = True
    adapter_residual_before_ln: bool = False
    inv_adapter: str | None = None
    inv_adapter_reduction_factor: float | None = None
    cross_adapter: bool = False
    leave_out: list[int] = field(default_factory=list)
    dropout: float = 0.0
    phm_layer: bool = False
    phm_dim: int = 4
    factorized_phm_W: bool | None = True  # noqa: N815 (the library's name)
    shared_W_phm: bool | None = False  # noqa: N815
    shared_phm_rule: bool | None = True
    factorized_phm_rule: bool | None = False
    phm_c_init: str | None = "normal"
    phm_init_range: float | None = 0.0001
    learn_phm: bool | None = True
    hypercomplex_nonlinearity: str | None = "glorot-uniform"
    phm_rank: int | None = 1
    phm_bias: bool | None = True
    stochastic_depth: float | None = 0.0


@dataclass
class SeqBnConfig(BnConfig):
    """Pfeiffer et al. 2020: sequential, after the feed-forward block."""

    original_ln_before: bool = True
    mh_adapter: bool = False
    output_adapter: bool = True
    non_linearity: str = "relu"
    reduction_factor: float | Mapping[str, float] = 16


@dataclass
class DoubleSeqBnConfig(BnConfig):
    """Houlsby et al. 2019: sequential, after attention and after the feed-forward block."""

    mh_adapter: bool = True
    output_adapter: bool = True
    non_linearity: str = "swish"
    reduction_factor: float | Mapping[str, float] = 16


@dataclass
class ParBnConfig(BnConfig):
    """He et al. 2021: parallel to the feed-forward block."""

    mh_adapter: bool = False
    output_adapter: bool = True
    non_linearity: str = "relu"
    reduction_factor: float | Mapping[str, float] = 2
    init_weights: str = "mam_adapter"
    is_parallel: bool = True
    scaling: float | str = 4.0


@dataclass
class AdapterPlusConfig(BnConfig):
    """Steitz & Roth 2024: after the feed-forward block and its norm, with a scale for each channel."""

    original_ln_after: bool = False
    original_ln_before: bool = True
    residual_before_ln: bool | str = False
    stochastic_depth: float | None = 0.1
    init_weights: str = "houlsby"
    scaling: float | str = "channel"
    mh_adapter: bool = False
    output_adapter: bool = True
    reduction_factor: float | Mapping[str, float] = 96
    non_linearity: str = "gelu"


AdapterConfig = BnConfig  # the names in older releases of the library
PfeifferConfig = SeqBnConfig
HoulsbyConfig = DoubleSeqBnConfig
ParallelConfig = ParBnConfig


@dataclass
class PrefixTuningConfig(_Method):
    """Li & Liang 2021: learned keys and values before those of every attention."""

    architecture: str | None = "prefix_tuning"
    encoder_prefix: bool = True
    cross_prefix: bool = True
    leave_out: list[int] = field(default_factory=list)
    flat: bool = False
    prefix_length: int = 30
    bottleneck_size: int = 512
    non_linearity: str = "tanh"
    dropout: float = 0.0
    use_gating: bool = False
    shared_gating: bool = True
    init_weights_seed: int | None = None


@dataclass
class LoRAConfig(_Method):
    """Hu et al. 2021: a low-rank update of linear maps. With `use_gating` the gate replaces `alpha / r`."""

    architecture: str | None = "lora"
    selfattn_lora: bool = True
    intermediate_lora: bool = False
    output_lora: bool = False
    leave_out: list[int] = field(default_factory=list)
    r: int = 8
    alpha: int = 8
    dropout: float = 0.0
    attn_matrices: list[str] = field(default_factory=lambda: ["q", "v"])
    composition_mode: str = "add"
    init_weights: str = "lora"
    init_weights_seed: int | None = None
    use_gating: bool = False
    use_dora: bool = False
    vera_d: float | None = None
    vera_b: float | None = None
    dtype: str | None = None


@dataclass
class VeraConfig(LoRAConfig):
    """Kopiczko et al. 2024: matrices `d` and `b` around random ones, which all layers share and nothing trains."""

    vera_d: float | None = 0.1
    vera_b: float | None = 0.0
    init_weights: str = "vera"


@dataclass
class DvoRAConfig(VeraConfig):
    """VeRA with DoRA's magnitudes."""

    use_dora: bool = True


@dataclass
class MTLLoRAConfig(LoRAConfig):
    """Yang et al. 2024: a LoRA whose update is a weighted sum of `n_up_projection` ones, with a matrix for the task."""

    architecture: str | None = "mtl_lora"
    n_up_projection: int = 1
    task_specific_matrix_type: str = "singular_values"
    weights_sharpness: float = 0.05


@dataclass
class PromptTuningConfig(_Method):
    """Lester et al. 2021: tokens among the embedded ones. `random_uniform_scale` is an attribute of the class."""

    architecture: str | None = "prompt_tuning"
    prompt_length: int = 10
    prompt_init: str = "random_uniform"
    prompt_init_text: str | None = None
    random_uniform_scale = 0.5
    combine: str = "prefix"
    init_weights_seed: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns all fields, and also another `random_uniform_scale` than 0.5, which the library leaves out."""
        return _fields_of(self, super().to_dict())


@dataclass
class ReftConfig(_Method):
    """Wu et al. 2024: a low-rank change of what leaves a layer, at the first and the last real tokens of a row.

    As in the library, `subtract_projection` is an attribute of the class: False for DiReftConfig.
    """

    layers: str | list[int]
    prefix_positions: int
    suffix_positions: int
    r: int
    orthogonality: bool
    tied_weights: bool = False
    subtract_projection = True
    dropout: float = 0.05
    non_linearity: str | None = None
    dtype: str | None = None
    architecture: str = "reft"
    output_reft: bool = True
    init_weights_seed: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns all fields, and also a `subtract_projection` that is False, which the library leaves out."""
        return asdict(self) | ({} if self.subtract_projection else {"subtract_projection": False})


@dataclass
class LoReftConfig(ReftConfig):
    """With an orthogonal projection."""

    layers: str | list[int] = "all"
    prefix_positions: int = 3
    suffix_positions: int = 0
    r: int = 1
    orthogonality: bool = True


@dataclass
class NoReftConfig(LoReftConfig):
    """Without orthogonality."""

    orthogonality: bool = False


@dataclass
class DiReftConfig(NoReftConfig):
    """Without orthogonality and without subtracting the projection of what is changed."""

    subtract_projection = False


class ConfigUnion:
    """Several methods under one adapter name. graft() finds conflicts between them.

    Raises:
        TypeError: a part is not a configuration of this module, or is itself a union.
    """

    architecture = "union"

    def __init__(self, *configs: _Method):
        for config in configs:
            if isinstance(config, ConfigUnion):
                raise TypeError("a union inside a union is not possible")
            if not isinstance(config, _Method):
                raise TypeError(f"expected a configuration, got {type(config).__name__}")
        self.configs = list(configs)

    def to_dict(self) -> dict[str, Any]:
        """Returns the union as adapter_config.json holds it."""
        return {"architecture": "union", "configs": [config.to_dict() for config in self.configs]}

    def replace(self, **changes: Any) -> "ConfigUnion":
        """Returns a union whose parts are copies with other values.

        Raises:
            TypeError: a part does not have the field.
        """
        return ConfigUnion(*[config.replace(**changes) for config in self.configs])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ConfigUnion) and self.to_dict() == other.to_dict()

    def __repr__(self) -> str:
        return f"ConfigUnion({', '.join(map(repr, self.configs))})"


class MAMConfig(ConfigUnion):
    """Mix-and-match (He et al. 2021): prefixes and a parallel bottleneck.

    Raises:
        TypeError: a part has the wrong class.
    """

    def __init__(self, prefix_tuning: PrefixTuningConfig | None = None, adapter: BnConfig | None = None):
        parts = [prefix_tuning or PrefixTuningConfig(bottleneck_size=800), adapter or ParBnConfig()]
        for name, part, kind in zip(("prefix_tuning", "adapter"), parts, (PrefixTuningConfig, BnConfig), strict=True):
            if not isinstance(part, kind):
                raise TypeError(f"expected {name} to be a {kind.__name__}, got {type(part).__name__}")
        super().__init__(*parts)


class UniPELTConfig(ConfigUnion):
    """Mao et al. 2022: gated prefixes, bottlenecks and LoRA. Every part is copied with use_gating=True."""

    def __init__(
        self,
        prefix_tuning: PrefixTuningConfig | None = None,
        adapter: BnConfig | None = None,
        lora: LoRAConfig | None = None,
    ):
        parts = [
            prefix_tuning or PrefixTuningConfig(prefix_length=10),
            adapter or SeqBnConfig(reduction_factor=16),
            lora or LoRAConfig(r=8, alpha=2),
        ]
        super().__init__(*[part.replace(use_gating=True) for part in parts])


def config_argument(text: str | None) -> str | Path | None:
    """Returns a configuration that a user names on a command line: a path if it has a slash or is the name of a JSON
    file, else text, which config_to_json() takes for a name. None for None."""
    return Path(text) if text is not None and ("/" in text or text.endswith(".json")) else text


def config_fields(config: Any) -> dict[str, Any]:
    """Returns all fields of a configuration, as adapter_config.json holds them.

    Args:
        config: as config_to_json() takes it.

    Raises:
        GraftError: as config_to_json(); or it is no configuration.
    """
    text = config_to_json(config)
    core = patcher()
    whole = core.normalise_config(text) if text.lstrip().startswith("{") else core.config_from_string(text)
    return dict(parse_json(whole, "config"))


def is_there(text: str) -> bool:
    """Returns whether the text is a path of something. One that is too long, or no path at all, is of nothing."""
    try:
        return Path(text).exists()
    except (OSError, ValueError):
        return False


def _fields_of(config: Any, fields: dict[str, Any] | None = None) -> dict[str, Any]:
    """Returns config.to_dict(), with what it leaves out of the library's DiReftConfig and PromptTuningConfig."""
    fields = dict(config.to_dict() if fields is None else fields)
    if "configs" in fields and hasattr(config, "configs"):
        fields["configs"] = [_fields_of(part) for part in config.configs]
    elif not getattr(config, "subtract_projection", True):
        fields["subtract_projection"] = False
    elif getattr(config, "random_uniform_scale", 0.5) != 0.5:
        fields["random_uniform_scale"] = config.random_uniform_scale
    return fields


def config_to_json(config: Any) -> str:
    """Returns a configuration as the patcher reads it: JSON text, or a name.

    Args:
        config: an object with `to_dict()` (of this module or of the `adapters` library), a mapping, JSON text, a name,
            or the path of an adapter_config.json or of a directory that holds one. A string that is a known name is not
            taken for a path.

    Raises:
        GraftError: the file cannot be read or is not JSON, or the text is empty.
        TypeError: `config` is none of these.
    """
    if isinstance(config, str) and not config.strip():
        raise GraftError("config: expected a configuration, its name (unipelt, mam, lora, ...) or its path, got ''")
    if hasattr(config, "to_dict"):
        return json.dumps(_fields_of(config))
    if isinstance(config, Mapping):
        return json.dumps(dict(config))
    if isinstance(config, str) and (config.lstrip().startswith("{") or config in patcher().config_names()):
        return config
    if isinstance(config, Path) or (isinstance(config, str) and (is_there(config) or config.endswith(".json"))):
        return read_config(config)
    if isinstance(config, str):
        return config
    raise TypeError(f"expected a configuration, its name or its path, got {type(config).__name__}")
