"""What save_adapter() writes has the keys and the values of the library's own file, for every architecture it knows."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import torchgraft
from all_cases import base, is_second_spelling, methods
from hugging_face_cases import CASES
from thinned import thinned

# LLaMA's and Mistral's mixins hang the intermediate LoRA on down_proj and the output one on up_proj: the same keys.


@pytest.mark.parametrize("name", thinned(CASES, lambda name: not is_second_spelling(name)))
def test_keys_and_values_that_are_saved_are_those_that_the_library_saved(name: str, tmp_path: Path) -> None:
    """All methods in one bank: its padding is not saved."""
    case, dtype = CASES[name], torch.float32
    directories = {method: case.reference.accepted_directory(method, dtype) for method in methods(name)}
    saved = {method: torchgraft.load_adapter_directory(directory) for method, directory in directories.items()}
    # test_architectures.py verifies the same graft.
    named = {saved[method].name: directories[method] for method in saved}
    bank = torchgraft.graft(base(name, "traced", dtype), adapters=named, verify=False)
    for method, adapter in saved.items():
        torchgraft.save_adapter(bank, adapter.name, tmp_path / method)
        written = load_file(tmp_path / method / "adapter.safetensors")
        expected = {key: tensor for key, tensor in adapter.weights.items() if ".prefix_tunings." not in key}
        pools = {key for key in written if ".prefix_tunings." in key}
        assert sorted(set(written) - pools) == sorted(expected)
        for key, tensor in expected.items():
            assert torch.equal(written[key], tensor), key
        # A pool holds keys and values now, under a key that the library has.
        owners = {key.rpartition(".control_trans")[0] for key in adapter.weights if ".control_trans" in key}
        assert {key.rpartition(".control_trans")[0] for key in pools} <= owners
        assert bool(pools) == bool(owners)
