"""AdapterFusion: Fuse equals `adapters==1.3.0`, with all fields of its configuration; directories go both ways."""

import functools
import itertools
import json

import adapters.composition as library
import pytest
import torch

import adapters
import torchgraft
from adapters import AdapterFusionConfig
from grafted import base, reloaded
from models import VARIANTS, hugging_face, make_batch
from oracle import TOLERANCE as TOLERANCES
from oracle import difference, oracle_for
from test_compositions import DTYPE, TOLERANCE, bank, expected, library_block, parts_of, run, saved
from torchgraft import Fuse, Stack
from torchgraft._libraries import patcher

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


def test_a_setup_with_a_fuse_goes_both_ways(tmp_path) -> None:
    block = Stack("gated", Fuse("bn", "bn2"))
    library_fusion("bert_sdpa", ["bn", "bn2"], "dynamic", tmp_path / "fusion", seed=5)
    batch = make_batch([9, 4, 7], 9, DTYPE)
    wanted, _ = expected("bert_sdpa", batch, block)
    model = oracle_for(VARIANTS["bert_sdpa"], DTYPE).model
    model.save_adapter_setup(str(tmp_path / "theirs"), library_block("bert_sdpa", block))
    loaded = torchgraft.load_adapter_setup(base("bert_sdpa", DTYPE), tmp_path / "theirs", "c")
    loaded.activate("c")
    assert difference(run(loaded, "bert_sdpa", batch), wanted) <= TOLERANCE

    module = fused("bert_sdpa", block, tmp_path / "fusion")
    torchgraft.save_adapter_setup(module, "c", tmp_path / "ours")
    again = torchgraft.load_adapter_setup(base("bert_sdpa", DTYPE), tmp_path / "ours", "c")
    again.activate("c")
    assert torch.equal(run(again, "bert_sdpa", batch), run(module, "bert_sdpa", batch))
    theirs = hugging_face("bert", "sdpa", DTYPE)
    adapters.init(theirs)
    theirs.load_adapter_setup(str(tmp_path / "ours"), set_active=True, use_safetensors=True)
    theirs.to(DTYPE).eval()
    with torch.no_grad():
        # The library reads adapters into float32, whatever the model's dtype.
        assert difference(theirs(batch.ids, batch.mask)[0], wanted) <= TOLERANCES[torch.float32]


def test_the_name_of_a_block_of_the_library_is_kept() -> None:
    block = library.Stack("c", library.Fuse("a", library.Stack("d", "b"), name="x"))
    tree = json.loads(torchgraft.composition.composition_to_json(block))
    assert tree == Stack("c", Fuse("a", Stack("d", "b"), name="x")).to_dict()


def test_layers_of_another_name_stay(tmp_path) -> None:
    library_fusion("bert_sdpa", ["bn", "bn2"], "static", tmp_path / "fusion")
    module = torchgraft.load_adapter_fusion(bank("bert_sdpa", "bn", "bn2"), tmp_path / "fusion", "bn,bn2")
    module = torchgraft.load_adapter_fusion(module, tmp_path / "fusion", "other")
    torchgraft.save_adapter_fusion(module, "bn,bn2", tmp_path / "saved")
    torchgraft.save_adapter_fusion(module, "bn,bn2", tmp_path / "saved")  # its own
    before = (tmp_path / "saved" / "adapter_fusion_config.json").read_text()
    with pytest.raises(torchgraft.GraftError, match="holds the AdapterFusion layers 'bn,bn2' already, not 'other'"):
        torchgraft.save_adapter_fusion(module, "other", tmp_path / "saved")
    assert (tmp_path / "saved" / "adapter_fusion_config.json").read_text() == before
    torchgraft.save_adapter_fusion(module, "other", tmp_path / "saved", overwrite=True)
    assert '"other"' in (tmp_path / "saved" / "adapter_fusion_config.json").read_text()


def test_a_renamed_adapter_is_renamed_in_the_layers(tmp_path) -> None:
    library_fusion("bert_sdpa", ["bn", "bn2"], "static", tmp_path / "fusion")
    path = tmp_path / "fusion" / "adapter_fusion_config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"adapter_names": ["bn", "bn2"]}))
    module = torchgraft.load_adapter_fusion(bank("bert_sdpa", "bn", "bn2"), tmp_path / "fusion", "bn,bn2")
    torchgraft.save_adapter_fusion(torchgraft.rename_adapter(module, "bn", "first"), "bn,bn2", tmp_path / "saved")
    saved_names = json.loads((tmp_path / "saved" / "adapter_fusion_config.json").read_text())["adapter_names"]
    assert saved_names == ["first", "bn2"]


def test_keys_of_names_that_begin_alike_are_skipped(tmp_path) -> None:
    """The library's filter takes them for the same layers."""
    library_fusion("bert_sdpa", ["bn", "bn2"], "static", tmp_path / "fusion")
    config = (tmp_path / "fusion" / "adapter_fusion_config.json").read_text()
    name = ",".join(saved("bert_sdpa", part).name for part in ("bn", "bn2"))
    weights = torchgraft.adapter_hub.read_weights(tmp_path / "fusion", torchgraft.adapter_fusion.WEIGHT_FILES)
    own = {key: weight for key, weight in weights.items() if f"adapter_fusion_layer.{name}." in key}
    longer = (f".{name}3.", f".{name},b.")
    more = {key.replace(f".{name}.", other): weight + 1 for key, weight in own.items() for other in longer}
    module = bank("bert_sdpa", "bn", "bn2")
    loaded = [patcher().load_adapter_fusion(module._c, config, state, "bn,bn2") for state in (own, own | more)]
    states = [torch.jit._recursive.wrap_cpp_module(each).state_dict() for each in loaded]
    fused_keys = [key for key in states[0] if "fusion_" in key]
    assert fused_keys and all(torch.equal(states[0][key], states[1][key]) for key in fused_keys)
    first = torch.jit._recursive.wrap_cpp_module(loaded[0]).state_dict()
    for weight in own.values():
        weight.zero_()  # the module has copies
    assert all(torch.equal(first[key], states[1][key]) for key in fused_keys)


def test_layers_without_key_query_and_value_keep_their_places(tmp_path) -> None:
    fields = dict.fromkeys(("key", "query", "value", "regularization", "value_initialized"), False)
    block = Fuse("bn", "bn2")
    library_fusion("bert_sdpa", ["bn", "bn2"], config_of(fields), tmp_path / "theirs")
    batch = make_batch([9, 4, 7], 9, DTYPE)
    wanted, _ = expected("bert_sdpa", batch, block)
    module = fused("bert_sdpa", block, tmp_path / "theirs")
    assert difference(run(module, "bert_sdpa", batch), wanted) <= TOLERANCE
    torchgraft.save_adapter_fusion(module, "bn,bn2", tmp_path / "ours")
    again = fused("bert_sdpa", block, tmp_path / "ours")
    assert torch.equal(run(again, "bert_sdpa", batch), run(module, "bert_sdpa", batch))
    # Adapters at other places than those that the layers were saved for: the library has no layer there.
    both = torchgraft.load_adapter_fusion(bank("bert_sdpa", "both", "bn"), tmp_path / "ours", "both,both")
    with pytest.raises(torchgraft.GraftError, match="has no weights there"):
        torchgraft.compose(both, "c", Fuse("both", "both"))


def test_adapters_of_a_fuse_are_frozen(tmp_path) -> None:
    """The library drops out the scores of a Fuse while it trains."""
    library_fusion("bert_sdpa", ["bn", "bn2"], "static", tmp_path / "fusion")
    module = fused("bert_sdpa", Fuse("bn", "bn2"), tmp_path / "fusion")
    with pytest.raises(
        torchgraft.GraftError, match="unfreeze_adapter: the composition 'c', Fuse.bn, bn2., has a Fuse and uses 'bn'"
    ):
        torchgraft.unfreeze_adapter(module, "bn")
    module = torchgraft.unfreeze_adapter(torchgraft.remove_adapter(module, "c"), "bn")
    with pytest.raises(torchgraft.GraftError, match="'bn' is trained"):
        torchgraft.compose(module, "c", Stack("bn", Fuse("bn2", "bn2", name="bn,bn2")))
    torchgraft.compose(module, "c", Stack("bn", "bn2"))


@pytest.mark.parametrize("name", ["a.b", "line\nbreak", "x" * 1001])
def test_names_that_no_key_can_have(name: str, tmp_path) -> None:
    library_fusion("bert_sdpa", ["bn", "bn2"], "static", tmp_path / "fusion")
    with pytest.raises(torchgraft.GraftError, match="cannot be the name of AdapterFusion layers") as error:
        torchgraft.load_adapter_fusion(bank("bert_sdpa", "bn", "bn2"), tmp_path / "fusion", name)
    assert len(str(error.value)) < 500


def test_what_is_refused(tmp_path) -> None:
    module = bank("bert_sdpa", "bn", "bn2", "lora")
    with pytest.raises(torchgraft.GraftError, match="no AdapterFusion layer 'bn,bn2' is in the module"):
        torchgraft.compose(module, "c", Fuse("bn", "bn2"))
    library_fusion("bert_sdpa", ["bn", "bn2"], "static", tmp_path / "fusion")
    module = torchgraft.load_adapter_fusion(module, tmp_path / "fusion", "bn,bn2")
    with pytest.raises(torchgraft.GraftError, match="Fuse for bottlenecks only, and 'lora' has another"):
        torchgraft.compose(module, "c", Fuse("bn", "lora"))
    library_fusion("bert_sdpa", ["bn", "bn2"], config_of({"temperature": True}), tmp_path / "warm")
    with pytest.raises(torchgraft.GraftError, match="temperature=true is not supported"):
        torchgraft.load_adapter_fusion(module, tmp_path / "warm")
