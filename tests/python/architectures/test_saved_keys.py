"""What save_adapter() writes has the keys and the values of the library's own file, for every architecture it knows."""

import pytest
import torch
from safetensors.torch import load_file

import torchgraft
from case import METHODS
from hugging_face_cases import CASES

# LLaMA's and Mistral's mixins hang the intermediate LoRA on down_proj and the output one on up_proj: the same keys.
_FORMS = [(name, method) for name, case in CASES.items() for method in METHODS if method not in case.without]


@pytest.mark.parametrize(("name", "method"), [pytest.param(*form, id="-".join(form)) for form in _FORMS])
def test_the_keys_are_the_librarys(name: str, method: str, tmp_path) -> None:
    case = CASES[name]
    base = case.to_script("traced", torch.float32)
    directory = case.reference.directory(method, torch.float32)
    saved = torchgraft.load_adapter_directory(directory)
    torchgraft.save_adapter(torchgraft.load_adapter(base, directory), saved.name, tmp_path)
    written = load_file(tmp_path / "adapter.safetensors")
    expected = {key: tensor for key, tensor in saved.weights.items() if ".prefix_tunings." not in key}
    pools = {key for key in written if ".prefix_tunings." in key}
    assert sorted(set(written) - pools) == sorted(expected)
    for key, tensor in expected.items():
        assert torch.equal(written[key], tensor), key
    # A pool holds keys and values now, at a place that the library has.
    places = {key.rpartition(".control_trans")[0] for key in saved.weights if ".control_trans" in key}
    assert {key.rpartition(".control_trans")[0] for key in pools} <= places
    assert bool(pools) == bool(places)
