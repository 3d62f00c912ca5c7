"""Fresh adapters: with init_weights_seed, every value equals that of adapters==1.3.0."""

import pytest
import torch
from adapters.methods.modeling import PHMLayer
from torch import Tensor

import adapters
import torchgraft
from grafted import base
from models import hugging_face

SEED = dict(init_weights_seed=5)
ALL_LORA = dict(r=5, attn_matrices=["q", "k", "v"], intermediate_lora=True, output_lora=True)

CONFIGS = {
    "lora": adapters.LoRAConfig(**SEED, **ALL_LORA),
    "lora_gated": adapters.LoRAConfig(use_gating=True, **SEED, **ALL_LORA),
    "lora_bert": adapters.LoRAConfig(init_weights="bert", use_gating=True, **SEED),
    "lora_ia3": adapters.LoRAConfig(init_weights="ia3", **SEED),
    "lora_vera": adapters.LoRAConfig(init_weights="vera", use_gating=True, **SEED),
    "bert": adapters.DoubleSeqBnConfig(use_gating=True, **SEED),
    "mam_adapter": adapters.ParBnConfig(mh_adapter=True, use_gating=True, scaling="learned", **SEED),
    "houlsby": adapters.SeqBnConfig(init_weights="houlsby", scaling="channel", reduction_factor=3, **SEED),
    "ia3": adapters.IA3Config(**SEED),
    "dora": adapters.LoRAConfig(use_dora=True, **SEED, **ALL_LORA),
    "dora_gated": adapters.LoRAConfig(use_dora=True, use_gating=True, **SEED, **ALL_LORA),
    "norms": adapters.SeqBnConfig(ln_before=True, ln_after=True, **SEED),
    "compacter": adapters.CompacterConfig(shared_phm_rule=False, reduction_factor=4, **SEED),
    "compacter_factors": adapters.CompacterConfig(
        shared_phm_rule=False, factorized_phm_rule=True, phm_rank=2, phm_c_init="uniform", reduction_factor=4, **SEED
    ),
    "compacter_whole": adapters.CompacterPlusPlusConfig(
        shared_phm_rule=False, factorized_phm_W=False, reduction_factor=4, **SEED
    ),
    "prefix": adapters.PrefixTuningConfig(prefix_length=4, bottleneck_size=20, non_linearity="gelu", **SEED),
    "prefix_flat": adapters.PrefixTuningConfig(prefix_length=4, flat=True, leave_out=[1], **SEED),
    "loreft": adapters.LoReftConfig(r=3, suffix_positions=1, **SEED),
    "loreft_square": adapters.LoReftConfig(r=48, tied_weights=True, **SEED),
    "noreft": adapters.NoReftConfig(r=3, suffix_positions=1, layers=[0, 2], **SEED),
    "invertible": adapters.SeqBnInvConfig(**SEED),
    "invertible_gated": adapters.DoubleSeqBnInvConfig(use_gating=True, inv_adapter_reduction_factor=3.5, **SEED),
    "invertible_houlsby": adapters.SeqBnInvConfig(init_weights="houlsby", **SEED),
    "invertible_prefix": adapters.ConfigUnion(
        adapters.PrefixTuningConfig(prefix_length=4, bottleneck_size=20, **SEED), adapters.SeqBnInvConfig(**SEED)
    ),
    "invertible_reft": adapters.ConfigUnion(
        adapters.LoReftConfig(r=3, suffix_positions=1, **SEED), adapters.SeqBnInvConfig(**SEED)
    ),
    "invertible_lora": adapters.ConfigUnion(
        adapters.LoRAConfig(use_gating=True, **SEED, **ALL_LORA), adapters.SeqBnInvConfig(**SEED)
    ),
    "union": adapters.ConfigUnion(
        adapters.PrefixTuningConfig(prefix_length=4, bottleneck_size=20, **SEED),
        adapters.SeqBnConfig(use_gating=True, **SEED),
        adapters.LoRAConfig(use_gating=True, **SEED),
    ),
}
# A seed of 0 counts as none in the library: fix_seed asks whether it is true.
UNSEEDED = [None, 0]


def _parameters(adapter: torch.nn.Module | None) -> list[tuple[str, Tensor]]:
    """(path, value); a layer of Compacter counts as the linear map that it is."""
    if adapter is None:
        return []
    layers = {path: module for path, module in adapter.named_modules() if isinstance(module, PHMLayer)}
    result = [(name, value) for name, value in adapter.named_parameters() if name.rpartition(".")[0] not in layers]
    for path, layer in layers.items():
        # A linear map is known by what it makes of the unit vectors.
        result.append((f"{path}.weight", (layer(torch.eye(layer.in_features)) - layer.b).T))
        result.append((f"{path}.bias", layer.b))
    return [(name, value.squeeze(1) if name == "m.weight" else value) for name, value in result]


def _oracle_parameters(model: torch.nn.Module) -> dict[str, Tensor]:
    """{"layer.slot.parameter": value} of the adapter "t", with the names of the grafted module."""
    names = {
        "lora_A": "lora_a",
        "lora_B": "lora_b",
        "adapter_down.0.weight": "down_weight",
        "adapter_down.0.bias": "down_bias",
        "adapter_up.weight": "up_weight",
        "adapter_up.bias": "up_bias",
        "m.weight": "magnitude",
        "adapter_norm_after.weight": "norm_after_weight",
        "adapter_norm_after.bias": "norm_after_bias",
        "scaling": "scaling",
        "gate.weight": "gate_weight",
        "gate.bias": "gate_bias",
    }
    slots = {
        "attention.self.query": "selfattn_lora_q",
        "attention.self.key": "selfattn_lora_k",
        "attention.self.value": "selfattn_lora_v",
        "intermediate.dense": "intermediate_lora",
        "output.dense": "output_lora",
        "attention.output": "mh_adapter",
        "output": "output_adapter",
    }
    result = {}
    for layer, block in enumerate(model.encoder.layer):
        for path, module in block.named_modules():
            for container in ("loras", "adapters"):
                adapter = dict(getattr(module, container, {})).get("t")
                if getattr(adapter, "add_layer_norm_before", False):
                    names |= {
                        "adapter_down.1.weight": "down_weight",
                        "adapter_down.1.bias": "down_bias",
                        "adapter_norm_before.weight": "norm_before_weight",
                        "adapter_norm_before.bias": "norm_before_bias",
                    }
                for name, value in _parameters(adapter):
                    result[f"{layer}.{slots[path]}.{names[name]}"] = value
        pool = block.attention.self.prefix_tuning
        if "t" in pool.prefixes:
            keys, values = pool.pool.prefix_tunings["t"](1)["self_prefix"][pool.prefixes["t"]]
            result[f"{layer}.self_prefix.prefix_key"] = keys[0]
            result[f"{layer}.self_prefix.prefix_value"] = values[0]
        if "t" in block.reft_layer.refts:
            units = block.reft_layer.refts["t"].units
            result[f"{layer}.output_reft.source_weight"] = torch.stack([unit.learned_source.weight for unit in units])
            result[f"{layer}.output_reft.source_bias"] = torch.stack([unit.learned_source.bias for unit in units])
            result[f"{layer}.output_reft.projection"] = torch.stack([unit.projection.weight for unit in units])
    if "t" in model.invertible_adapters:
        sides = {f"{net}.{layer}": f"{net.lower()}_{part}" for net in "FG" for layer, part in ((0, "down"), (2, "up"))}
        for name, value in model.invertible_adapters["t"].named_parameters():
            side, kind = name.rsplit(".", 1)
            result[f"0.inv_adapter.{sides[side]}_{kind}"] = value
    return {name: value.detach() for name, value in result.items()}


def _grafted_parameters(module: torch.jit.ScriptModule) -> dict[str, Tensor]:
    """The same of a grafted module with one adapter. Slots of bottlenecks are named after their kind as well."""
    result = {}
    for name, value in module.adapters.named_parameters():
        layer, slot, parameter = name.removeprefix("layer_").split(".")
        slot = slot[: slot.index("_adapter") + len("_adapter")] if "_adapter" in slot else slot
        slot = slot.removesuffix("_scale").removesuffix("_dora").removesuffix("_linear")
        result[f"{layer}.{slot}.{parameter}"] = value.detach()[0]
    return result


@pytest.mark.quick
@pytest.mark.parametrize("name", CONFIGS)
def test_seeded_weights_equal_the_oracle(name: str) -> None:
    model = hugging_face("bert", "sdpa", torch.float32)
    adapters.init(model)
    model.add_adapter("t", config=CONFIGS[name])
    expected = _oracle_parameters(model)
    actual = _grafted_parameters(torchgraft.graft(base("bert_sdpa", torch.float32), CONFIGS[name], "t"))
    assert set(expected) == set(actual)
    for key, value in expected.items():
        is_product = ".prefix_" in key or "compacter" in name or ".magnitude" in key
        tolerance = 1e-6 if is_product else 0.0
        assert actual[key].shape == value.shape, key
        assert (actual[key] - value).abs().max() <= tolerance, key


@pytest.mark.parametrize("seed", UNSEEDED)
def test_without_a_seed_modules_differ(seed: int | None) -> None:
    config = adapters.SeqBnConfig(init_weights_seed=seed)
    first, second = (
        _grafted_parameters(torchgraft.graft(base("bert_sdpa", torch.float32), config, "t")) for _ in range(2)
    )
    assert not torch.equal(first["0.output_adapter.down_weight"], first["1.output_adapter.down_weight"])
    assert not torch.equal(first["0.output_adapter.down_weight"], second["0.output_adapter.down_weight"])


def test_the_global_seed_makes_fresh_weights_repeatable() -> None:
    def fresh() -> dict[str, Tensor]:
        torch.manual_seed(3)
        return _grafted_parameters(torchgraft.graft(base("bert_sdpa", torch.float32), "unipelt", "t"))

    first, second = fresh(), fresh()
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
