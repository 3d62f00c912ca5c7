"""A Fuse of frozen bottlenecks is folded into them: equal to the library, and to the same layers unfolded."""

from pathlib import Path

import adapters.composition as library
import pytest
import torch

import torchgraft
from grafted import base, reloaded
from models import VARIANTS, make_batch
from oracle import TOLERANCE as TOLERANCES
from oracle import difference, oracle_for
from test_adapter_fusion import config_of, library_fusion
from test_compositions import DTYPE, PARTS, TOLERANCE, bank, expected, parts_of, run
from thinned import thinned
from torchgraft import Fuse, Stack

pytestmark = pytest.mark.quick

PARTS.setdefault("channel", ("seq_bn_channel_scaling", 0))
PARTS.setdefault("learned", ("seq_bn_learned_scaling", 0))
PARTS.setdefault("plus", ("adapter_plus", 0))


def folded_keys(module: torch.jit.ScriptModule) -> list[str]:
    return [key for key in module.state_dict() if key.startswith("adapters.folded_")]


def fused(block, directory: Path, config="dynamic") -> torch.jit.ScriptModule:
    names = [child if isinstance(child, str) else child.children[-1] for child in block.children]
    library_fusion("bert_sdpa", names, config, directory, seed=7)
    module = torchgraft.load_adapter_fusion(bank("bert_sdpa", *parts_of(block)), directory, ",".join(names))
    module = torchgraft.compose(module, "c", block)
    module.activate("c")
    return module


_BLOCKS = [
    Fuse("bn", "bn2", "gated"),
    Fuse("map", "bn"),  # other ranks, and a layer without one of them
    Fuse("channel", "learned", "bn"),
    Fuse("both", "both"),
]
_FIELDS = [{}, {"value": False}, {"key": False}, {"query": False}, {"query_before_ln": True}]


@pytest.mark.parametrize(
    ("block", "fields"),
    thinned(
        [(block, fields) for block in _BLOCKS for fields in _FIELDS],
        lambda pair: pair[0] is _BLOCKS[0] or not pair[1],
    ),
    ids=repr,
)
def test_folded_layers_equal_the_library_and_themselves_unfolded(block, fields: dict, tmp_path: Path) -> None:
    module = fused(block, tmp_path, config_of(fields))
    batch = make_batch([9, 4, 7], 9, DTYPE)
    found = run(module, "bert_sdpa", batch)
    assert folded_keys(module)
    assert difference(found, expected("bert_sdpa", batch, block)[0]) <= TOLERANCE
    assert torch.equal(run(reloaded(module), "bert_sdpa", batch), found)
    open_again = torchgraft.unfreeze_adapter(module, "c").eval()
    assert not folded_keys(open_again)
    assert difference(run(open_again, "bert_sdpa", batch), found) <= TOLERANCE
    ids = torch.tensor([len(parts_of(block)), 0, -1])
    with torch.no_grad():
        mixed = run(module, "bert_sdpa", batch, adapter_ids=ids)
    assert difference(mixed[:1], found[:1]) <= TOLERANCE


@pytest.mark.parametrize(
    ("block", "fields"),
    [
        (Fuse("bn", "bn2"), {"residual_before": True}),
        (Fuse("bn", Stack("gated", "bn2")), {}),
        (Fuse("bn", "norms"), {}),  # a norm of its own
        (Fuse("both", "norms"), {}),
        (Fuse("par", "par2"), {}),  # half as wide as the model each, and so as wide as it is together
    ],
    ids=["residual", "stack", "norm", "norms", "wide"],
)
def test_what_is_not_folded(block, fields: dict, tmp_path: Path) -> None:
    reason = ""
    try:
        module = fused(block, tmp_path, config_of(fields))
    except ValueError as error:
        reason = str(error)
    if reason:
        assert "must define the same value" in reason  # the library fuses alike adapters only
        pytest.skip("the library has no such fusion")
    assert bool(folded_keys(module)) == (block == Fuse("par", "par2"))
    batch = make_batch([9, 4, 7], 9, DTYPE)
    assert difference(run(module, "bert_sdpa", batch), expected("bert_sdpa", batch, block)[0]) <= TOLERANCE


def test_a_changed_part_changes_the_folded_layers(tmp_path: Path) -> None:
    module = fused(Fuse("bn", "bn2"), tmp_path)
    other = fused(Fuse("bn2", "bn2"), tmp_path / "b")
    directory = tmp_path / "saved"
    torchgraft.save_adapter(module, "bn2", directory)
    changed = torchgraft.replace_adapter(module, "bn", directory=directory)
    batch = make_batch([9, 4, 7], 9, DTYPE)
    assert difference(run(changed, "bert_sdpa", batch), run(other, "bert_sdpa", batch)) <= TOLERANCE
    assert difference(run(changed, "bert_sdpa", batch), run(module, "bert_sdpa", batch)) > 1e-3
    lowered = torchgraft.lower(module)
    assert difference(run(lowered, "bert_sdpa", batch), run(module, "bert_sdpa", batch)) <= TOLERANCE


def test_changes_of_fresh_adapters_are_verified() -> None:
    """With drawn weights, from which the layers are folded anew."""
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    module = torch.jit.script(torch.nn.TransformerEncoder(layer, 2).eval())
    for name in ("a", "b"):
        module = torchgraft.graft(module, "seq_bn[reduction_factor=4]", name)
    module = torchgraft.add_adapter_fusion(module, ["a", "b"])
    module = torchgraft.compose(module, "c", Fuse("a", "b"))
    assert folded_keys(module)
    module = torchgraft.average_adapter(module, "mean", ["a", "b"])
    optimised = torchgraft.optimize(torchgraft.rename_adapter(module, "a", "first"))
    torchgraft.lower(module)
    x = torch.randn(2, 5, 32)
    optimised.activate("c")
    module.activate("c")
    with torch.no_grad():
        torch.testing.assert_close(optimised(x), module(x), rtol=0, atol=1e-5)


def test_float32_is_within_its_tolerance(tmp_path: Path) -> None:
    names = ["seq_bn", "seq_bn_gated"]
    oracle = oracle_for(VARIANTS["bert_sdpa"], torch.float32)
    directories = {name: oracle.adapter(name, 0).directory for name in names}
    parts = [oracle.adapter(name, 0).name for name in names]
    oracle.model.add_adapter_fusion(parts, "dynamic", overwrite_ok=True)
    oracle.model.eval()
    oracle.model.save_adapter_fusion(str(tmp_path), ",".join(parts))
    module = torchgraft.graft(base("bert_sdpa", torch.float32), adapters=directories, active=names[0])
    module = torchgraft.load_adapter_fusion(module, tmp_path, ",".join(names))
    module = torchgraft.compose(module, "c", Fuse(*names))
    module.activate("c")
    assert folded_keys(module)
    oracle.model.set_active_adapters(library.Fuse(*parts))
    batch = make_batch([9, 4, 7], 9, torch.float32)
    with torch.no_grad():
        wanted = oracle.model(batch.ids, batch.mask)[0]
    assert difference(run(module, "bert_sdpa", batch), wanted) <= TOLERANCES[torch.float32]
