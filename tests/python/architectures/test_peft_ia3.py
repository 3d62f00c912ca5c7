"""(IA)^3 of PEFT gives what peft gives where its vectors multiply results of linear maps; else it is refused."""

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import torchgraft
from hugging_face_models import FAMILIES

CASES = {
    "keys and values": ("bert", dict(target_modules=["key", "value"])),
    # PEFT fills in what it knows of BERT: ["output.dense"], of which no map is among the targets.
    "keys and values, feed-forward modules filled in": (
        "bert",
        dict(target_modules=["key", "value"], feedforward_modules=None),
    ),
    "queries of one layer": ("bert", dict(target_modules=["layer.1.attention.self.query"])),
    "uneven": ("bert", dict(target_modules=["layer.0.attention.self.key", "layer.1.attention.self.value"])),
    "feed-forward results": ("bert", dict(target_modules=r".*(value|intermediate\.dense|layer\.\d\.output\.dense)")),
    "all": ("bert", dict(target_modules="all-linear", exclude_modules=["pooler.dense"])),
    "packed": ("gpt2", dict(target_modules=["c_attn"], fan_in_fan_out=True)),
    "grouped heads": ("llama", dict(target_modules=["k_proj", "v_proj"])),
    "cross attention": ("bart", dict(target_modules=["k_proj", "v_proj"])),
}


def _write(case: str, folder: Path, form: str = "traced") -> tuple[torch.jit.ScriptModule, tuple, torch.Tensor]:
    """The base, arguments and what peft gives; the adapter, random, is saved in the folder."""
    family, options = CASES[case]
    positional = FAMILIES[family].make("eager", torch.float64)
    base = torch.jit.trace(positional, FAMILIES[family].arguments(torch.float64, 0), check_trace=False, strict=False)
    base = torch.jit.freeze(base.eval()) if form == "frozen" else base
    arguments = FAMILIES[family].arguments(torch.float64, 1)
    config = peft.IA3Config(**(dict(feedforward_modules=[]) | options))
    tuned = peft.get_peft_model(positional.model, config)  # in place
    torch.manual_seed(0)
    with torch.no_grad():
        plain = positional(*arguments)
        for path, parameter in tuned.named_parameters():
            if "ia3_l" in path:
                parameter.normal_(1.0, 0.3)
        tuned.eval().save_pretrained(str(folder))
        expected = positional(*arguments)
    assert (plain - expected).abs().max() > 1e-3
    return base, arguments, expected


@pytest.mark.parametrize("case", CASES)
def test_equals_peft(case: str, tmp_path: Path) -> None:
    base, arguments, expected = _write(case, tmp_path)
    module = torchgraft.load_adapter(base, tmp_path, "task")
    tolerance = 3e-5 if CASES[case][0] == "llama" else 1e-6  # peft holds the vectors in float32
    with torch.no_grad():
        torch.testing.assert_close(module(*arguments), expected, rtol=tolerance, atol=tolerance)
    torchgraft.save_adapter(module, "task", tmp_path / "again")
    again = torchgraft.load_adapter(base, tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(again(*arguments), module(*arguments))


def test_equals_peft_on_a_frozen_module(tmp_path: Path) -> None:
    base, arguments, expected = _write("keys and values", tmp_path, "frozen")
    with pytest.warns(UserWarning, match="frozen"):
        module = torchgraft.load_adapter(base, tmp_path, "task")
    with torch.no_grad():
        torch.testing.assert_close(module(*arguments), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(r=1), "the field r is not known"),
        (dict(field_of_tomorrow=0), "the field field_of_tomorrow is not known"),
        (dict(peft_type="LORA", init_ia3_weights=None, feedforward_modules=None), "ia3_l is no weight of the method"),
        (dict(target_modules=["key", "value", "query"]), "lack an update of encoder.layer.0.attention.self.query"),
        (dict(exclude_modules=["key"]), "which target_modules, exclude_modules and layers_to_transform do not select"),
    ],
    ids=str,
)
def test_other_configurations_are_refused(fields: dict, message: str, tmp_path: Path) -> None:
    base, *_ = _write("keys and values", tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(torchgraft.GraftError, match=message):
        torchgraft.load_adapter(base, tmp_path)


def test_vectors_that_multiply_inputs_are_refused(tmp_path: Path) -> None:
    model = FAMILIES["bert"].make("eager", torch.float64)
    base = torch.jit.trace(model, FAMILIES["bert"].arguments(torch.float64, 0), check_trace=False, strict=False)
    config = peft.IA3Config(target_modules=["key", "output.dense"], feedforward_modules=["output.dense"])
    peft.get_peft_model(model.model, config).save_pretrained(str(tmp_path))
    with pytest.raises(torchgraft.GraftError, match=r"got \[1, \d+\]: what multiplies the input .* merge_and_unload"):
        torchgraft.load_adapter(base, tmp_path)


def test_other_weights_are_refused(tmp_path: Path) -> None:
    base, *_ = _write("keys and values", tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    weights = load_file(path)
    key = next(key for key in weights if ".key." in key)
    for changed, message in (
        (weights | {key: weights[key].T.contiguous()}, r"expected ia3_l of .* of shape \[out, 1\], got \[1, 48\]"),
        (weights | {key: weights[key][:40].contiguous()}, r"expected ia3_l of .*key for 48 outputs, got 40"),
        ({name: each for name, each in weights.items() if name != key}, "lack an update of"),
    ):
        save_file(changed, path)
        with pytest.raises(torchgraft.GraftError, match=message):
            torchgraft.load_adapter(base, tmp_path)
