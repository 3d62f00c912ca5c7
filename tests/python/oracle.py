"""The oracle: adapters==1.3.0 run eagerly, with every adapter parameter randomised.

Its gating scores come as numpy arrays with peculiarities that `Oracle._gates` undoes; see there.
"""

import functools
import itertools
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from adapters.context import ForwardContext
from torch import Tensor, nn

import adapters
import models
from adapters import (
    AdapterPlusConfig,
    BnConfig,
    CompacterConfig,
    ConfigUnion,
    DiReftConfig,
    DoubleSeqBnConfig,
    IA3Config,
    LoRAConfig,
    LoReftConfig,
    MAMConfig,
    NoReftConfig,
    ParBnConfig,
    PrefixTuningConfig,
    ReftConfig,
    SeqBnConfig,
    UniPELTConfig,
)
from models import Batch, Variant

_ALL_LORA = dict(attn_matrices=["q", "k", "v"], intermediate_lora=True, output_lora=True)
_MAP = {"0": 4, "default": 12}

# Every method alone and in unions, gated and not. Prefixes are shorter than by default, but where that matters.
CONFIGS = {
    "unipelt": UniPELTConfig(),
    "mam": MAMConfig(),
    "seq_bn": SeqBnConfig(),
    "seq_bn_gated": SeqBnConfig(use_gating=True),
    "seq_bn_map": SeqBnConfig(reduction_factor=_MAP, leave_out=[2], use_gating=True),
    "seq_bn_both": SeqBnConfig(reduction_factor=4, mh_adapter=True),
    "seq_bn_learned_scaling": SeqBnConfig(scaling="learned", use_gating=True),
    "seq_bn_channel_scaling": SeqBnConfig(scaling="channel"),
    "double_seq_bn": DoubleSeqBnConfig(),
    "double_seq_bn_gated": DoubleSeqBnConfig(use_gating=True, reduction_factor=3),
    "par_bn": ParBnConfig(),
    "par_bn_gated": ParBnConfig(use_gating=True),
    "par_bn_both": ParBnConfig(mh_adapter=True, scaling="learned"),
    "bn_residual_normed": SeqBnConfig(residual_before_ln=False, mh_adapter=True, use_gating=True),
    "bn_residual_post_add": SeqBnConfig(residual_before_ln="post_add", reduction_factor=4),
    "bn_last": SeqBnConfig(original_ln_after=False, residual_before_ln=False, use_gating=True),
    "adapter_plus": AdapterPlusConfig(stochastic_depth=0.0, reduction_factor=12),
    "bn_last_parallel": ParBnConfig(original_ln_after=False, mh_adapter=True, output_adapter=False, scaling=1.0),
    "bn_norms": DoubleSeqBnConfig(ln_before=True, ln_after=True, use_gating=True),
    "bn_norm_all": SeqBnConfig(ln_after=True, adapter_residual_before_ln=True, scaling="channel"),
    "bn_norms_parallel": ParBnConfig(ln_before=True, ln_after=True, adapter_residual_before_ln=True, use_gating=True),
    "mh_only": BnConfig(mh_adapter=True, output_adapter=False, reduction_factor=6, non_linearity="gelu"),
    "lora": LoRAConfig(alpha=16),
    "lora_gated": LoRAConfig(alpha=16, use_gating=True),
    "lora_all": LoRAConfig(r=5, alpha=3, **_ALL_LORA),
    "lora_all_gated": LoRAConfig(r=5, alpha=3, use_gating=True, **_ALL_LORA),
    "lora_k_leave_out": LoRAConfig(r=2, attn_matrices=["k"], leave_out=[1]),
    "ia3": IA3Config(),
    "ia3_gated": IA3Config(use_gating=True, attn_matrices=["q", "k", "v"], output_lora=True),
    "dora": LoRAConfig(use_dora=True, alpha=16),
    "dora_gated": LoRAConfig(use_dora=True, r=3, use_gating=True, **_ALL_LORA),
    "compacter": CompacterConfig(shared_phm_rule=False, reduction_factor=4),
    "compacter_factors": CompacterConfig(
        shared_phm_rule=False, factorized_phm_rule=True, phm_rank=2, ln_before=True, reduction_factor=4
    ),
    "prefix": PrefixTuningConfig(),
    "prefix_gated": PrefixTuningConfig(prefix_length=7, bottleneck_size=20, use_gating=True),
    "prefix_two_gates": PrefixTuningConfig(prefix_length=7, bottleneck_size=20, use_gating=True, shared_gating=False),
    "prefix_flat": PrefixTuningConfig(prefix_length=6, flat=True),
    "prefix_flat_gated": PrefixTuningConfig(prefix_length=1, flat=True, use_gating=True),
    "prefix_leave_out": PrefixTuningConfig(prefix_length=6, bottleneck_size=20, leave_out=[0], use_gating=True),
    # The library fails in float64 where one of the two numbers of positions is 0, and at rows shorter than the second.
    "loreft": LoReftConfig(suffix_positions=1),
    "noreft": NoReftConfig(r=3, suffix_positions=1, non_linearity="gelu"),
    "direft": DiReftConfig(r=2, prefix_positions=1, suffix_positions=2),
    "reft_overlapping": LoReftConfig(r=2, prefix_positions=4, suffix_positions=2, layers=[0, 2]),
    "reft_tied": ReftConfig("all", 2, 2, 5, orthogonality=True, tied_weights=True),
    "union_reft": ConfigUnion(
        LoReftConfig(r=2, suffix_positions=1),
        ParBnConfig(reduction_factor=4, use_gating=True),
        SeqBnConfig(
            original_ln_after=False, residual_before_ln=False, mh_adapter=True, output_adapter=False, use_gating=True
        ),
        PrefixTuningConfig(prefix_length=3, bottleneck_size=20),
        LoRAConfig(r=3, use_gating=True, **_ALL_LORA),
    ),
    "union_everything": ConfigUnion(
        PrefixTuningConfig(prefix_length=5, bottleneck_size=20, use_gating=True, shared_gating=False),
        DoubleSeqBnConfig(reduction_factor=4, use_gating=True, leave_out=[1]),
        LoRAConfig(r=3, alpha=9, use_gating=True, **_ALL_LORA),
    ),
}


def runs_on(config: str, variant: str) -> bool:
    """Whether the library can run it: "post_add" is a crash where no norm comes behind the residual add."""
    return config != "bn_residual_post_add" or not ("_pre" in variant or variant.startswith("vit"))


Gates = dict[int, dict[str, Tensor]]  # gates[layer][location], each [rows, k]


@dataclass(frozen=True)
class Saved:
    """One randomised adapter: its name in the oracle and the directory that save_adapter wrote."""

    name: str
    directory: str


@dataclass(frozen=True)
class Result:
    """hidden [B, S, H]; outputs: all that the Hugging Face model returns (hidden alone for embeddings)."""

    hidden: Tensor
    outputs: tuple
    gates: Gates


def randomise(model: nn.Module, name: str, seed: int) -> None:
    """Gives every parameter of the adapter a normal value; none is zero, gates are well away from 0.5.

    Parameters that several layers share (the prefix pool's) are met once. Values do not depend on the dtype.
    """
    generator = torch.Generator().manual_seed(seed)
    seen = set()
    with torch.no_grad():
        for path, parameter in adapter_parameters(model, name):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            value = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if path.endswith("gate.bias"):
                value = torch.sign(value) * (0.7 + 0.4 * value.abs())
            elif path.endswith("gate.weight"):
                value = value * 0.15
            elif "scaling" in path:
                value = 1.5 + 0.5 * value
            elif "control_trans" in path and parameter.dim() == 1 and not path.endswith("bias"):
                value = value * 0.8  # a flat prefix: keys and values themselves
            elif parameter.dim() == 1:
                value = value * 0.2
            elif parameter.dim() == 3:
                value = value * 0.5  # a factor of Compacter's: products of four of them are summed
            else:
                value = value * 1.2 / parameter.size(1) ** 0.5
            if path.endswith("projection.parametrizations.weight.original"):
                value.diagonal().fill_(-1.0)  # signs, which torch cuts to whole numbers and never trains
            parameter.copy_(value)


def adapter_parameters(model: nn.Module, name: str) -> list[tuple[str, nn.Parameter]]:
    """(path, parameter) of the adapter's modules, layer by layer, in the oracle's own order."""
    found = []
    for layer, modules in model.get_adapter(name).items():
        for location, module in modules.items():
            found += [(f"{layer}.{location}.{path}", parameter) for path, parameter in module.named_parameters()]
    return found


def make_oracle_adapter(model: nn.Module, config, name: str, seed: int) -> None:
    """Adds the adapter to a model that adapters.init() has prepared, in the model's dtype, and randomises it."""
    dtype = next(model.parameters()).dtype
    model.add_adapter(name, config=config)
    model.to(dtype)
    randomise(model, name, seed)


def say_subtraction(directory: str | Path, config) -> None:
    """Writes into a directory of the library's whether its ReFT subtracts the projection, which the library omits."""
    if isinstance(config, ReftConfig):
        path = Path(directory) / "adapter_config.json"
        content = json.loads(path.read_text())
        content["config"]["subtract_projection"] = config.subtract_projection
        path.write_text(json.dumps(content))


class Oracle:
    """One Hugging Face model with adapters, as eager as it gets. Holds as many adapters as the tests ask for."""

    def __init__(self, family: str, attention: str, dtype: torch.dtype):
        self.family = family
        self.model = models.hugging_face(family, attention, dtype)
        adapters.init(self.model)
        self._directory = tempfile.TemporaryDirectory(prefix="torchgraft_oracle_")
        self._saved: dict[tuple[str, int], Saved] = {}

    def adapter(self, config_name: str, seed: int = 0) -> Saved:
        """The adapter of CONFIGS[config_name] with random values, saved as AdapterHub saves it."""
        key = (config_name, seed)
        if key not in self._saved:
            name = f"{config_name}_{seed}"
            make_oracle_adapter(self.model, CONFIGS[config_name], name, 17 + seed)
            directory = str(Path(self._directory.name) / name)
            self.model.save_adapter(directory, name)
            say_subtraction(directory, CONFIGS[config_name])
            self.model.eval()
            self._saved[key] = Saved(name, directory)
        return self._saved[key]

    @torch.no_grad()
    def run(self, variant: Variant, batch: Batch, adapter: Saved | None) -> Result:
        """The model's results and gates for the batch; adapter None is the base model."""
        return self.run_with_grad(variant, batch, adapter)

    def run_with_grad(self, variant: Variant, batch: Batch, adapter: Saved | None) -> Result:
        """The same, on autograd's record. Gates never are: the library detaches them."""
        self.model.set_active_adapters(adapter.name if adapter else None)
        if variant.inputs == "ids":
            outputs = self.model(batch.ids, batch.mask, output_adapter_gating_scores=adapter is not None)
            scores = outputs[-1] if adapter else {}
            outputs = outputs[:-1] if adapter else outputs
        else:
            # ReFT counts the real tokens of the mask that the whole model would be given.
            counted = {"attention_mask": batch.mask} if variant.masked and self._has_reft(adapter) else {}
            with ForwardContext(
                self.model, inputs_embeds=batch.embeddings, output_adapter_gating_scores=True, **counted
            ) as context:
                outputs = (self._encode(variant, batch, adapter),)
            scores = getattr(context, "adapter_gating_scores", {})  # there is none without an adapter
        gates = self._gates(scores, adapter.name, batch.rows) if adapter else {}
        return Result(outputs[0], outputs, gates)

    def _encode(self, variant: Variant, batch: Batch, adapter: Saved | None) -> Tensor:
        """The encoder stack alone, from embeddings [B, S, H]."""
        mask = (1.0 - batch.mask.to(batch.embeddings.dtype))[:, None, None, :] * -1.0e9 if variant.masked else None
        if self.family != "vit":
            return self.model.encoder(batch.embeddings, mask, return_dict=True).last_hidden_state
        if mask is None:
            return self.model.encoder(batch.embeddings).last_hidden_state
        # ViT takes no padding mask, but hands each layer's head mask to scaled_dot_product_attention as the additive
        # mask. There the prefix's columns, which the layer puts in front of the keys, are ours to add.
        masks = []
        for layer in range(models.LAYERS):
            length = self._prefix_length(adapter, layer)
            masks.append(torch.cat([mask.new_zeros(batch.rows, 1, 1, length), mask], dim=-1))
        return self.model.encoder(batch.embeddings, head_mask=masks).last_hidden_state

    def _has_reft(self, adapter: Saved | None) -> bool:
        config = self.model.adapters_config.get(adapter.name) if adapter else None
        return config is not None and any(isinstance(method, ReftConfig) for method in _methods(config))

    def _prefix_length(self, adapter: Saved | None, layer: int) -> int:
        if adapter is None:
            return 0
        config = self.model.adapters_config.match(adapter.name, PrefixTuningConfig, layer_idx=layer)
        return config.prefix_length if config is not None else 0

    def _gates(self, scores: dict, name: str, rows: int) -> Gates:
        """Gating scores as gates[layer][location], [rows, k].

        Undone: squeezing (one row: [k], k = 1: [rows]); ungated bottlenecks, which report their up projection instead;
        DistilBERT's location "self" for "self_prefix"; ViT's column order for LoRA (k, v, q; here always q, k, v).
        """
        gated = {
            location
            for config in _methods(self.model.adapters_config.get(name))
            if config.get("use_gating", False)
            for location in _locations(config)
        }
        result: Gates = {}
        for layer, by_location in scores.get(name, {}).items():
            for location, score in by_location.items():
                location = "self_prefix" if location == "self" else location
                if location not in gated:
                    continue
                gate = torch.from_numpy(score.copy()).reshape(rows, -1)
                if location == "selfattn_lora" and self.family == "vit":
                    matrices = self._attention_matrices(name)
                    order = [matrix for matrix in "kvq" if matrix in matrices]
                    gate = gate[:, [order.index(matrix) for matrix in "qkv" if matrix in matrices]]
                result.setdefault(layer, {})[location] = gate
        return result

    def _attention_matrices(self, name: str) -> list[str]:
        return self.model.adapters_config.match(name, LoRAConfig).attn_matrices


def _methods(config) -> list:
    return list(config.configs) if isinstance(config, ConfigUnion) else [config]


def _locations(config) -> set[str]:
    if isinstance(config, LoRAConfig):
        return {"selfattn_lora", "intermediate_lora", "output_lora"}
    if isinstance(config, PrefixTuningConfig):
        return {"self_prefix"}
    return {"mh_adapter", "output_adapter"}


@functools.cache
def oracle(family: str, attention: str, dtype: torch.dtype) -> Oracle:
    """The oracle for a family, built once a session; adapters are added to it as tests ask for them."""
    return Oracle(family, attention, dtype)


def oracle_for(variant: Variant, dtype: torch.dtype) -> Oracle:
    """The oracle that a variant is compared with.

    DistilBERT's is always the eager one: with sdpa the library gives DistilBERT's additive mask the value 1 at the
    prefixes (meant as "attend" in the 0/1 mask of the eager code), which adds 1 to their scores.
    """
    return oracle(variant.family, "eager" if variant.family == "distilbert" else variant.attention, dtype)


TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def difference(a: Tensor, b: Tensor) -> float:
    """The largest difference; shapes and dtypes must agree.

    Absolute for values up to 1, as layer norms make them. A pre-norm stack without a last norm ends in values around
    100, whose float32 spacing is 8e-6: larger tensors are measured in units of their standard deviation.
    """
    assert a.shape == b.shape and a.dtype == b.dtype, f"{a.dtype} {tuple(a.shape)} against {b.dtype} {tuple(b.shape)}"
    if a.numel() == 0:
        return 0.0
    scale = max(1.0, b.std().item()) if b.numel() > 1 else 1.0
    return (a - b).abs().max().item() / scale


def assert_gates_close(actual: dict, expected: Gates, tolerance: float) -> None:
    """Same layers, same locations, same values. `actual` may be a TorchScript dict."""
    assert sorted(actual) == sorted(expected)
    for layer, locations in expected.items():
        assert sorted(actual[layer]) == sorted(locations), f"layer {layer}"
    for layer, location in itertools.chain(*([(i, k) for k in expected[i]] for i in expected)):
        found = difference(actual[layer][location], expected[layer][location])
        assert found <= tolerance, f"gate of layer {layer}, {location}: differs by {found}"


def varied_batches(variant: Variant, dtype: torch.dtype) -> list[Batch]:
    """Batches unlike the one that the base was traced with: padded (where it can be), one row, other sizes."""
    lengths = [[11, 4, 8], [5], [7, 7, 2, 3]] if variant.masked else [[11, 11, 11], [5], [7, 7, 7, 7]]
    return [models.make_batch(rows, max(rows), dtype, seed) for seed, rows in enumerate(lengths)]
