"""Configurations: this package's classes, the C++ library and adapters==1.3.0 agree on every field and default."""

import dataclasses
import inspect
import json

import pytest
import torch
from adapters.configuration.adapter_config import ADAPTER_CONFIG_MAP

import adapters
import torchgraft
from torchgraft._libraries import patcher
from torchgraft.configs import config_to_json

pytestmark = pytest.mark.quick

CLASSES = [
    "BnConfig", "SeqBnConfig", "DoubleSeqBnConfig", "ParBnConfig", "PrefixTuningConfig", "PromptTuningConfig",
    "LoRAConfig", "VeraConfig", "DvoRAConfig", "MTLLoRAConfig", "ReftConfig", "LoReftConfig", "NoReftConfig",
    "DiReftConfig", "AdapterPlusConfig",
]  # fmt: skip
UNIONS = ["MAMConfig", "UniPELTConfig"]
REQUIRED = dict(mh_adapter=True, output_adapter=False, reduction_factor=4, non_linearity="gelu")
REFT_REQUIRED = dict(layers=[0, 2], prefix_positions=1, suffix_positions=2, r=3, orthogonality=False)
# A field that the library leaves out of what it writes: it loads a DiReFT as a NoReFT.
NOT_WRITTEN = {"DiReftConfig": {"subtract_projection": False}, "direft": {"subtract_projection": False}}

# Parsed, and refused by the field that they rest on.
REFUSED: dict[str, str] = {}
NAMES = sorted(ADAPTER_CONFIG_MAP)

# Values other than the defaults, one field of each type at least.
VARIED = [
    adapters.SeqBnConfig(reduction_factor={"0": 4, "default": 2.5}, leave_out=[1, 3], init_weights_seed=7),
    adapters.BnConfig(**REQUIRED, scaling="channel", residual_before_ln="post_add", inv_adapter="glow"),
    adapters.ParBnConfig(scaling=0.5, dropout=0.25, phm_init_range=1e-05),
    adapters.PrefixTuningConfig(flat=True, prefix_length=3, shared_gating=False, encoder_prefix=False),
    adapters.PromptTuningConfig(prompt_length=3, prompt_init_text="a text", combine="prefix_after_bos"),
    adapters.LoRAConfig(r=3, alpha=5, attn_matrices=["k"], vera_d=0.5, dtype="float16"),
    adapters.VeraConfig(vera_d=1.0, vera_b=0.5, r=3),
    adapters.MTLLoRAConfig(n_up_projection=3, weights_sharpness=0.5, task_specific_matrix_type="linear"),
    adapters.LoReftConfig(layers=[1, 3], suffix_positions=4, tied_weights=True, non_linearity="relu", dropout=0.0),
    adapters.ConfigUnion(
        adapters.LoRAConfig(leave_out=[0]), adapters.LoRAConfig(leave_out=[1]), adapters.SeqBnConfig()
    ),
]


def _fields(config_class: type) -> dict[str, object]:
    """Default by field; MISSING for a required one."""
    result = {}
    for field in dataclasses.fields(config_class):
        has_factory = field.default_factory is not dataclasses.MISSING
        result[field.name] = field.default_factory() if has_factory else field.default
    return result


def _make(module, name: str):
    return getattr(module, name)(**{"BnConfig": REQUIRED, "ReftConfig": REFT_REQUIRED}.get(name, {}))


@pytest.mark.parametrize("name", CLASSES)
def test_fields_and_defaults_are_the_librarys(name: str) -> None:
    assert _fields(getattr(torchgraft, name)) == _fields(getattr(adapters, name))


@pytest.mark.parametrize("name", CLASSES + UNIONS)
def test_constructors_take_the_librarys_arguments(name: str) -> None:
    ours = list(inspect.signature(getattr(torchgraft, name)).parameters)
    assert ours == list(inspect.signature(getattr(adapters, name)).parameters)


@pytest.mark.parametrize("name", CLASSES + UNIONS)
def test_to_dict_is_the_librarys(name: str) -> None:
    assert _make(torchgraft, name).to_dict() == _make(adapters, name).to_dict() | NOT_WRITTEN.get(name, {})


@pytest.mark.parametrize("name", CLASSES)
def test_replace_changes_a_copy(name: str) -> None:
    config = _make(torchgraft, name)
    before = config.to_dict()
    field = next(field for field in ("r", "dropout", "prompt_length") if field in before)
    change = {field: 9 if field != "dropout" else 0.75}
    assert config.replace(**change).to_dict() == before | change
    assert config.to_dict() == before


def test_older_names_are_the_same_configurations() -> None:
    assert torchgraft.PfeifferConfig is torchgraft.SeqBnConfig
    assert torchgraft.HoulsbyConfig is torchgraft.DoubleSeqBnConfig
    assert torchgraft.ParallelConfig is torchgraft.ParBnConfig


def test_unions_take_parts() -> None:
    prefix = dict(prefix_length=4)
    ours = torchgraft.UniPELTConfig(torchgraft.PrefixTuningConfig(**prefix), lora=torchgraft.LoRAConfig(r=2))
    theirs = adapters.UniPELTConfig(adapters.PrefixTuningConfig(**prefix), lora=adapters.LoRAConfig(r=2))
    assert ours.to_dict() == theirs.to_dict()
    assert all(part["use_gating"] for part in ours.to_dict()["configs"])
    assert ours.replace(leave_out=[1]).to_dict() == theirs.replace(leave_out=[1]).to_dict()


@pytest.mark.parametrize(
    "parts", [("lora",), (torchgraft.MAMConfig(),), (torchgraft.LoRAConfig(), {"architecture": "lora"})]
)
def test_a_union_refuses_what_is_no_single_configuration(parts: tuple) -> None:
    with pytest.raises(TypeError):
        torchgraft.ConfigUnion(*parts)


def test_mam_refuses_parts_of_another_kind() -> None:
    with pytest.raises(TypeError, match="expected prefix_tuning to be a PrefixTuningConfig, got LoRAConfig"):
        torchgraft.MAMConfig(prefix_tuning=torchgraft.LoRAConfig())
    with pytest.raises(TypeError, match="expected adapter to be a BnConfig, got LoRAConfig"):
        torchgraft.MAMConfig(adapter=torchgraft.LoRAConfig())


def test_names_are_the_librarys() -> None:
    assert patcher().config_names() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_named_configurations_are_the_librarys(name: str) -> None:
    expected = ADAPTER_CONFIG_MAP[name].to_dict() | NOT_WRITTEN.get(name, {})
    assert json.loads(patcher().config_from_name(name)) == expected
    assert json.loads(config_to_json(ADAPTER_CONFIG_MAP[name])) == expected


@pytest.mark.parametrize("name", NAMES)
def test_unsupported_fields_are_refused_by_name(name: str) -> None:
    if name not in REFUSED:
        patcher().check_supported(name)
        return
    with pytest.raises(torchgraft.GraftError) as refusal:
        patcher().check_supported(name)
    assert f"config: {REFUSED[name]} is not supported yet (supported: " in str(refusal.value)


@pytest.mark.parametrize("config", VARIED, ids=lambda config: type(config).__name__)
def test_every_value_survives_cpp(config) -> None:
    normalised = patcher().normalise_config(config_to_json(config))
    assert json.loads(normalised) == json.loads(json.dumps(config.to_dict()))
    assert patcher().normalise_config(normalised) == normalised


_OTHERWISE = {"reduction_factor": {"0": True, "default": 16}}  # a number, or numbers by layer


@pytest.mark.parametrize("name", CLASSES)
def test_true_is_no_number_and_one_is_not_true(name: str) -> None:
    """Python takes one for the other, and JSON libraries may."""
    config = _make(torchgraft, name).to_dict()
    seen = set()
    for field, value in config.items():
        kind = "bool" if isinstance(value, bool) else "number" if isinstance(value, int | float) else "other"
        wrong = {"bool": [1, 0, 1.0], "number": [True, False], "other": []}[kind]
        if field in _OTHERWISE and kind == "number":
            wrong.append(_OTHERWISE[field])
        for other in wrong:
            seen.add(kind)
            with pytest.raises(
                torchgraft.GraftError, match=f"expected \\w+[.]{field}.* to be .*, got (true|false|1|0)"
            ):
                patcher().normalise_config(json.dumps(config | {field: other}))
    assert seen == ({"number"} if name == "PromptTuningConfig" else {"bool", "number"})


@pytest.mark.parametrize("name", ["seq_bn", "par_bn", "mam", "unipelt"])
def test_the_library_loads_what_cpp_writes(name: str) -> None:
    written = json.loads(patcher().config_from_name(name))
    assert adapters.AdapterConfig.load(written).to_dict() == ADAPTER_CONFIG_MAP[name].to_dict()
    # An Adapter takes a scaling that is a float, not an int.
    scalings = [part["scaling"] for part in written.get("configs", [written]) if "scaling" in part]
    assert all(isinstance(scaling, float) for scaling in scalings) and scalings


@pytest.mark.parametrize("field", ["reduction_factor", "init_weights_seed"])
def test_numbers_may_be_written_either_way(field: str) -> None:
    both = [config_to_json(torchgraft.SeqBnConfig().replace(**{field: value})) for value in (3, 3.0)]
    assert patcher().normalise_config(both[0]) == patcher().normalise_config(both[1])


def test_the_same_config_in_every_form(tmp_path) -> None:
    config = adapters.LoRAConfig(r=3)
    saved = {"config": config.to_dict(), "hidden_size": 48, "name": "t"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(saved))
    forms = [
        config,
        torchgraft.LoRAConfig(r=3),
        config.to_dict(),
        saved,
        patcher().normalise_config(config_to_json(config)),
        tmp_path,
        str(tmp_path),
        tmp_path / "adapter_config.json",
        str(tmp_path / "adapter_config.json"),
    ]
    normalised = {patcher().normalise_config(config_to_json(form)) for form in forms}
    assert len(normalised) == 1 and json.loads(normalised.pop()) == config.to_dict()


def test_a_name_is_left_to_cpp(tmp_path, monkeypatch) -> None:
    assert config_to_json("no such name") == "no such name"
    (tmp_path / "unipelt").mkdir()
    monkeypatch.chdir(tmp_path)
    assert config_to_json("unipelt") == "unipelt"
    assert json.loads(patcher().normalise_config('{"config": "unipelt"}')) == ADAPTER_CONFIG_MAP["unipelt"].to_dict()


def test_what_is_no_configuration() -> None:
    with pytest.raises(TypeError, match="expected a configuration, its name or its path, got int"):
        config_to_json(3)
    with pytest.raises(torchgraft.GraftError, match="nowhere.json: cannot read the adapter's configuration"):
        config_to_json("nowhere.json")


@pytest.mark.parametrize(
    "text",
    [
        "seq_bn[reduction_factor=8]",
        "seq_bn[reduction_factor=8]|lora[r=16,use_gating=True]",
        " prefix_tuning[flat=True, prefix_length=3] | par_bn[scaling='learned', leave_out=[0, 1]] ",
        "double_seq_bn[reduction_factor={'0': 4, 'default': 16}, non_linearity=\"gelu\"]",
        "lora[attn_matrices=['k'], init_weights_seed=None, alpha=2]",
        "seq_bn[phm_init_range=1e-4, dropout=0.0]",
        "seq_bn[mh_adapter=True,output_adapter=False]|par_bn",
        "mam",
    ],
)
def test_strings_mean_what_they_mean_in_the_library(text: str) -> None:
    expected = adapters.AdapterConfig.load(text.strip()).to_dict()
    ours = json.loads(patcher().config_from_string(text))
    assert ours == json.loads(patcher().normalise_config(json.dumps(expected)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seq_bn[reduction_factor=8", "no closing bracket"),
        ("seq_bn[reduction_factor]", "cannot read the value"),
        ("seq_bn[non_linearity='gelu]", "is not closed"),
        ("seq_bn[8]", "cannot read the values"),
        ("seq_bn[wings=2]", "has no field 'wings'"),
        ("mam|lora", "a union inside a union"),
        ("lora|lora", "two LoRA configs"),
        ("lora|", "no configuration is called ''"),
        ("unipel", "no configuration is called 'unipel'; there are: .*; did you mean 'unipelt'\\?"),
        (
            "lora[composition_mod=add]",
            "LoRAConfig has no field 'composition_mod'; it has: .*; did you mean 'composition_mode'\\?",
        ),
        (
            "unipelt[rank=2]",
            "no part of 'unipelt' has a field 'rank'; PrefixTuningConfig has: .*prefix_length.*; "
            "BnConfig has: .*reduction_factor.*; LoRAConfig has: .*, r, alpha",
        ),
    ],
)
def test_strings_that_are_none_are_refused(text: str, message: str) -> None:
    with pytest.raises(torchgraft.GraftError, match=message):
        patcher().config_from_string(text)
    with pytest.raises(Exception):  # noqa: B017, PT011 (the library's is of many kinds)
        adapters.AdapterConfig.load(text)


@pytest.mark.parametrize(
    "text",
    ["lora[leave_out=[" + "1," * 1000 + "1]]", "mam|" * 1000 + "mam", "lora[" * 1000, "lo\0ra"],
    ids=lambda t: t[:9],
)
def test_texts_that_can_be_no_path_are_no_path(text: str) -> None:
    """A path's parts have at most 255 bytes, and no zero byte."""
    assert config_to_json(text) == text
    with pytest.raises(torchgraft.GraftError):
        torchgraft.graft(torch.jit.script(torch.nn.Linear(2, 2)), text)


def test_a_value_goes_to_every_part_of_a_union_that_has_the_field() -> None:
    """Written out, the library gives the same."""
    lora = adapters.LoRAConfig(r=4, alpha=2, use_gating=True, dropout=0.1)
    prefix = adapters.PrefixTuningConfig(prefix_length=10, use_gating=True, dropout=0.1)
    bottleneck = adapters.SeqBnConfig(reduction_factor=16, use_gating=True, dropout=0.1)
    expected = adapters.ConfigUnion(prefix, bottleneck, lora).to_dict()
    ours = json.loads(patcher().config_from_string("unipelt[r=4, dropout=0.1]"))
    assert ours == json.loads(patcher().normalise_config(json.dumps(expected)))


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("UniPELT", "unipelt"),
        ("MAM", "mam"),
        ("LoRA[r=4]", "lora[r=4]"),
        ("unipeltconfig", "unipelt"),
        ("SeqBn", "seq_bn"),
        ("Prefix-Tuning", "prefix_tuning"),
        ("(IA)^3", "ia3"),
        ("seq_bn[non_linearity=gelu, mh_adapter=true, init_weights_seed=null]",
         "seq_bn[non_linearity='gelu', mh_adapter=True, init_weights_seed=None]"),
        ("lora[attn_matrices=[q, k]]", "lora[attn_matrices=['q', 'k']]"),
    ],
)  # fmt: skip
def test_names_and_values_as_people_write_them(text: str, same: str) -> None:
    assert patcher().config_from_string(text) == patcher().config_from_string(same)


def test_no_two_configurations_have_names_that_people_would_take_for_one() -> None:
    plain = {}
    for name in ADAPTER_CONFIG_MAP:
        plain.setdefault(name.replace("_", ""), []).append(name)
    assert [names for names in plain.values() if len(names) > 1] == []


def test_values_are_checked_at_once() -> None:
    """The library takes them, and fails where they are used; of two values it takes the last."""
    with pytest.raises(torchgraft.GraftError, match="expected LoRAConfig.r to be an integer"):
        patcher().config_from_string("lora[r='x']")
    with pytest.raises(torchgraft.GraftError, match="r is given twice in .* give it once"):
        patcher().config_from_string("lora[r=4, alpha=8, r=8]")


@pytest.mark.parametrize("name", ["AdapterConfig", "PfeifferConfig", "HoulsbyConfig", "ParallelConfig"])
def test_older_class_names(name: str) -> None:
    new = {
        "AdapterConfig": "BnConfig",
        "PfeifferConfig": "SeqBnConfig",
        "HoulsbyConfig": "DoubleSeqBnConfig",
        "ParallelConfig": "ParBnConfig",
    }[name]
    assert getattr(torchgraft, name) is getattr(torchgraft, new)
