"""Banks of VeRA, whose random matrix is one tensor for all layers: what a row needs, and swapping them in packages."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import torchgraft
from grafted import base

DOUBLE = torch.float64


@pytest.mark.parametrize("room", [["vera"], ["vera[r=2]", "dvora[leave_out=[1]]", "lora"], ["vera", "vera[r=16]"]])
def test_what_a_row_needs_is_known_beforehand(room: list[str]) -> None:
    plain = base("bert_sdpa", DOUBLE)
    size = torchgraft.AdapterPool(plain, capacity=4, room=room).stats()["row_bytes"]
    assert torchgraft.check_room(plain, room, max_row_bytes=size) == [""] * len(room)
    assert torchgraft.check_room(plain, room, max_row_bytes=size - 1)[-1]


class _Package:
    """As much of a loaded package as load_banks() asks for."""

    def __init__(self, names: list[str]):
        self.names, self.loaded = names, {}

    def get_constant_fqns(self) -> list[str]:
        return self.names

    def load_constants(self, constants: dict[str, Tensor], check_full_update: bool) -> None:
        self.loaded = constants


def test_banks_are_swapped_only_where_layers_share_alike() -> None:
    plain = base("bert_sdpa", DOUBLE)
    torch.manual_seed(0)
    everywhere = torchgraft.graft(torchgraft.graft(plain, "vera", "a"), "vera", "b")
    replaced = torchgraft.replace_adapter(everywhere, "a", "vera")
    shared = "layer_0.selfattn_lora_q_vera.lora_a"
    names = [key for key in everywhere.state_dict() if key.endswith((shared, "scaling"))]
    package = _Package(names)
    torchgraft.load_banks(package, replaced, like=everywhere)
    assert len(package.loaded) == len(names) and any(name.endswith(shared) for name in package.loaded)
    in_part = torchgraft.replace_adapter(everywhere, "a", "vera[leave_out=[1]]")
    with pytest.raises(torchgraft.GraftError, match="share their random matrix otherwise than in the package"):
        torchgraft.load_banks(package, in_part, like=everywhere)


def test_one_part_of_a_packed_projection_is_saved_when_frozen_only(tmp_path: Path) -> None:
    """The library has no VeRA there; the second part of one was refused, the first one alone was written."""
    plain = base("encoder_script_post", DOUBLE)
    config = torchgraft.VeraConfig(attn_matrices=["q"], r=4)
    module = torchgraft.graft(plain, config, "task", trainable=True, verify=False)
    with pytest.raises(torchgraft.GraftError, match="selfattn_lora_q of layer 0 is VeRA or MTL-LoRA on a packed"):
        torchgraft.save_adapter(module, "task", tmp_path / "trained")
    assert not (tmp_path / "trained" / "adapter_config.json").exists()
    torchgraft.save_adapter(torchgraft.freeze_adapter(module, "task"), "task", tmp_path / "frozen")
