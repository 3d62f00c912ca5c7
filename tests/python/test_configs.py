"""Configurations in C++ and in Python have the fields, defaults and names of the oracle."""

import json

import adapters
import pytest
import torchgraft
from adapters.configuration.adapter_config import ADAPTER_CONFIG_MAP
from torchgraft._libraries import patcher
from torchgraft.configs import config_to_json

CLASSES = ["SeqBnConfig", "DoubleSeqBnConfig", "ParBnConfig", "PrefixTuningConfig", "LoRAConfig", "MAMConfig",
           "UniPELTConfig"]  # fmt: skip
# Methods that are no bottleneck, prefix or LoRA at all.
OTHER_METHODS = {"prompt_tuning", "mtl_lora", "loreft", "noreft", "direft"}


@pytest.mark.parametrize("name", CLASSES)
def test_python_classes_equal_the_oracle(name: str) -> None:
    assert getattr(torchgraft, name)().to_dict() == getattr(adapters, name)().to_dict()


@pytest.mark.parametrize("name", sorted(ADAPTER_CONFIG_MAP.keys() - OTHER_METHODS))
def test_cpp_names_equal_the_oracle(name: str) -> None:
    assert json.loads(patcher().config_from_name(name)) == ADAPTER_CONFIG_MAP[name].to_dict()


def test_cpp_knows_every_name() -> None:
    assert set(patcher().config_names()) == ADAPTER_CONFIG_MAP.keys() - OTHER_METHODS


@pytest.mark.parametrize("name", sorted(OTHER_METHODS))
def test_other_methods_are_refused(name: str) -> None:
    with pytest.raises(torchgraft.GraftError, match="not supported"):
        patcher().config_from_name(name)
    with pytest.raises(torchgraft.GraftError, match="not supported"):
        patcher().normalise_config(json.dumps(ADAPTER_CONFIG_MAP[name].to_dict()))


@pytest.mark.parametrize("name", sorted(ADAPTER_CONFIG_MAP.keys() - OTHER_METHODS))
def test_json_goes_through_cpp_unchanged(name: str) -> None:
    config = ADAPTER_CONFIG_MAP[name].to_dict()
    assert json.loads(patcher().normalise_config(json.dumps(config))) == config


@pytest.mark.parametrize(
    "config",
    [
        adapters.ConfigUnion(adapters.LoRAConfig(r=3, leave_out=[1]), adapters.ParBnConfig(scaling="channel")),
        torchgraft.ConfigUnion(torchgraft.LoRAConfig(r=3), torchgraft.SeqBnConfig(reduction_factor={"default": 2})),
        torchgraft.UniPELTConfig(lora=torchgraft.LoRAConfig(r=2)),
    ],
    ids=str,
)
def test_objects_of_both_libraries_are_taken(config) -> None:
    assert json.loads(patcher().normalise_config(config_to_json(config))) == config.to_dict()


def test_names_paths_and_dicts_are_taken(tmp_path) -> None:
    assert config_to_json("unipelt") == "unipelt"
    content = {"config": torchgraft.LoRAConfig(r=5).to_dict(), "name": "x", "hidden_size": 4}
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    for given in (tmp_path, tmp_path / "adapter_config.json", str(tmp_path / "adapter_config.json")):
        assert json.loads(patcher().normalise_config(config_to_json(given))) == content["config"]
    assert json.loads(config_to_json({"architecture": "lora"})) == {"architecture": "lora"}
    with pytest.raises(TypeError, match="expected a configuration"):
        config_to_json(3)


def test_unions_of_python_refuse_what_the_oracle_refuses() -> None:
    with pytest.raises(TypeError, match="union inside a union"):
        torchgraft.ConfigUnion(torchgraft.MAMConfig())
    with pytest.raises(TypeError, match="expected a configuration"):
        torchgraft.ConfigUnion("lora")
    both = torchgraft.ConfigUnion(torchgraft.LoRAConfig(), torchgraft.LoRAConfig(r=2))
    with pytest.raises(torchgraft.GraftError, match="two LoRA configs"):
        patcher().normalise_config(config_to_json(both))


@pytest.mark.parametrize("name", ["dora", "vera", "dvora", "ia3", "compacter", "seq_bn_inv"])
def test_unsupported_fields_are_refused_by_name(name: str) -> None:
    with pytest.raises(torchgraft.GraftError, match=r"Config\.\w+=.* is not supported yet \(supported: "):
        patcher().check_supported(name)
