"""AdapterFusion: Fuse equals `adapters==1.3.0`, with all fields of its configuration; directories go both ways."""

import functools
import itertools

import pytest
import torch

import torchgraft
from adapters import AdapterFusionConfig
from grafted import reloaded
from models import VARIANTS, make_batch
from oracle import difference, oracle_for
from test_compositions import DTYPE, TOLERANCE, bank, expected, parts_of, run, saved
from torchgraft import Fuse, Stack

pytestmark = pytest.mark.quick

_FIELDS = ("key", "query", "value", "query_before_ln", "residual_before", "value_before_softmax")
_number = itertools.count()


def library_fusion(variant: str, parts: list[str], config, directory, seed: int = 0) -> None:
    """Gives the library's model AdapterFusion layers of these adapters, with random weights, and saves them."""
    model = oracle_for(VARIANTS[variant], DTYPE).model
    names = [saved(variant, part).name for part in parts]
    model.add_adapter_fusion(names, config, overwrite_ok=True)
    name = ",".join(names)
    model.to(DTYPE)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if f"adapter_fusion_layer.{name}." in path:
                scale = 0.6 / parameter.size(-1) ** 0.5 if parameter.dim() == 2 else 0.3
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=DTYPE) * scale)
    model.eval()
    model.save_adapter_fusion(str(directory), name)


def fused(variant: str, block, directory) -> torch.jit.ScriptModule:
    fuse = next(child for child in [block, *block.children] if isinstance(child, Fuse))
    names = [child if isinstance(child, str) else child.children[-1] for child in fuse.children]
    module = torchgraft.load_adapter_fusion(bank(variant, *parts_of(block)), directory, ",".join(names))
    module = torchgraft.compose(module, "c", block)
    module.activate("c")
    return module


@functools.cache
def configurations() -> list[dict]:
    rows = [dict(zip(_FIELDS, values, strict=True)) for values in itertools.product([True, False], repeat=len(_FIELDS))]
    return rows[::5]  # every value of every field, and of most pairs


def config_of(fields: dict) -> dict:
    return AdapterFusionConfig.load("dynamic", **fields).to_dict()


@pytest.mark.parametrize("fields", configurations(), ids=lambda fields: "-".join(k for k, v in fields.items() if v))
def test_fields_of_the_configuration(fields: dict, tmp_path) -> None:
    block = Fuse("bn", "gated", "bn2")
    library_fusion("bert_sdpa", parts_of(block), config_of(fields), tmp_path / "fusion")
    batch = make_batch([9, 4, 7], 9, DTYPE)
    wanted, _ = expected("bert_sdpa", batch, block)
    module = fused("bert_sdpa", block, tmp_path / "fusion")
    assert difference(run(module, "bert_sdpa", batch), wanted) <= TOLERANCE
    assert difference(run(reloaded(module), "bert_sdpa", batch), wanted) <= TOLERANCE


@pytest.mark.parametrize(
    "block",
    [
        Fuse("both", "par"),
        Fuse("par", "both"),
        Fuse(Stack("bn", "bn2"), "gated"),
        Fuse("normed", Stack("norms", "par2")),
        Stack("both", Fuse("bn", "bn2", "gated")),
        Stack("lora2", Fuse("bn", "bn2"), "par"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_nested_fusions_equal_the_library(kind: str, block, tmp_path) -> None:
    fuse = next(child for child in [block, *block.children] if isinstance(child, Fuse))
    names = [child if isinstance(child, str) else child.children[-1] for child in fuse.children]
    batch = make_batch([9, 4, 7], 9, DTYPE)
    try:
        library_fusion("bert_sdpa", names, kind, tmp_path / "fusion", seed=3)
        wanted, _ = expected("bert_sdpa", batch, block)
    except Exception:
        with pytest.raises(torchgraft.GraftError):
            fused("bert_sdpa", block, tmp_path / "fusion")
        return
    module = fused("bert_sdpa", block, tmp_path / "fusion")
    assert difference(run(module, "bert_sdpa", batch), wanted) <= TOLERANCE


def test_directories_go_both_ways(tmp_path) -> None:
    block = Fuse("bn", "bn2")
    library_fusion("bert_sdpa", ["bn", "bn2"], "dynamic", tmp_path / "theirs")
    module = fused("bert_sdpa", block, tmp_path / "theirs")
    assert torchgraft.list_adapter_fusions(module) == ["bn,bn2"]
    torchgraft.save_adapter_fusion(module, "bn,bn2", tmp_path / "ours")
    ours = torchgraft.adapter_hub.read_weights(tmp_path / "ours", torchgraft.adapter_fusion.WEIGHT_FILES)
    theirs = torchgraft.adapter_hub.read_weights(tmp_path / "theirs", torchgraft.adapter_fusion.WEIGHT_FILES)
    name = ",".join(saved("bert_sdpa", part).name for part in ("bn", "bn2"))
    theirs = {key: weight for key, weight in theirs.items() if f".{name}." in key}  # the library saves "a,b,c", too
    assert sorted(ours) == sorted(key.replace(name, "bn,bn2") for key in theirs)
    assert all(torch.equal(ours[key.replace(name, "bn,bn2")], weight) for key, weight in theirs.items())

    renamed = torchgraft.rename_adapter(module, "bn", "first")
    renamed.activate("c")
    batch = make_batch([9, 4, 7], 9, DTYPE)
    assert torch.equal(run(renamed, "bert_sdpa", batch), run(module, "bert_sdpa", batch))
    with pytest.raises(torchgraft.GraftError, match="the composition 'c', Fuse.bn, bn2., uses 'bn,bn2'"):
        torchgraft.remove_adapter_fusion(module, "bn,bn2")
    alone = torchgraft.remove_adapter(module, "c")
    assert torchgraft.list_adapter_fusions(torchgraft.remove_adapter_fusion(alone, "bn,bn2")) == []


def test_what_is_refused(tmp_path) -> None:
    module = bank("bert_sdpa", "bn", "bn2", "lora")
    with pytest.raises(torchgraft.GraftError, match="no AdapterFusion layer 'bn,bn2' is in the module"):
        torchgraft.compose(module, "c", Fuse("bn", "bn2"))
    library_fusion("bert_sdpa", ["bn", "bn2"], "static", tmp_path / "fusion")
    module = torchgraft.load_adapter_fusion(module, tmp_path / "fusion", "bn,bn2")
    with pytest.raises(torchgraft.GraftError, match="Fuse for bottlenecks only"):
        torchgraft.compose(module, "c", Fuse("bn", "lora"))
    library_fusion("bert_sdpa", ["bn", "bn2"], config_of({"temperature": True}), tmp_path / "warm")
    with pytest.raises(torchgraft.GraftError, match="temperature=true is not supported"):
        torchgraft.load_adapter_fusion(module, tmp_path / "warm")
