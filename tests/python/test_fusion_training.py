"""AdapterFusion layers are made, trained and saved as in `adapters==1.3.0`: draws, gradients, steps, heads."""

import copy
import re
from pathlib import Path

import pytest
import torch
from adapters.methods.modeling import BertFusion
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

import adapters
import torchgraft
from adapters import AdapterFusionConfig
from grafted import base, reloaded
from models import VARIANTS, make_batch
from oracle import difference, oracle_for
from test_adapter_fusion import library_fusion
from test_compositions import DTYPE, TOLERANCE, bank, library_block, parts_of, run, saved
from torchgraft import Average, Fuse, HeadConfig, Stack
from torchgraft.adapter_fusion import WEIGHT_FILES
from torchgraft.adapter_hub import read_weights

pytestmark = pytest.mark.quick

FUSE = Fuse("bn", "gated", "bn2")


def layer_and_weight(path: str) -> tuple[int, str, str]:
    """(layer, site, weight) of a parameter here or in the library."""
    if path.startswith("adapters."):
        layer, weight = path.split(".")[2:]
        number, site = re.fullmatch(r"layer_(\d+)_(.*)", layer).groups()
        return int(number), site, weight
    number = int(re.search(r"layer\.(\d+)\.", path)[1])
    site = "mh_adapter" if ".attention." in path else "output_adapter"
    return number, site, "_".join(path.split(".")[-2:])


def library_model(variant: str, block, config, seed: int = 4) -> torch.nn.Module:
    """A copy of the library's model that trains fresh layers, as its trainer does, without the base's dropouts."""
    names = {part: saved(variant, part).name for part in parts_of(block)}  # all that the model has to have
    model = copy.deepcopy(oracle_for(VARIANTS[variant], DTYPE).model)
    names = [names[last] for last in lasts_of(fuse_of(block))]
    torch.manual_seed(seed)
    model.add_adapter_fusion(names, config, overwrite_ok=True)
    model.to(DTYPE)
    model.train_adapter_fusion(library_block(variant, block))
    model.eval()
    for module in model.modules():
        if isinstance(module, BertFusion):
            module.train()
            module.dropout.p = module.config["dropout_prob"] or 0.0  # else the base's, which a traced one does not tell
    return model


def fuse_of(block) -> Fuse:
    return next(child for child in [block, *block.children] if isinstance(child, Fuse))


def lasts_of(fuse: Fuse) -> list[str]:
    return [child if isinstance(child, str) else child.children[-1] for child in fuse.children]


def trained_fusion(variant: str, block, config, seed: int = 4) -> torch.jit.ScriptModule:
    grafted = bank(variant, *parts_of(block))
    torch.manual_seed(seed)
    module = torchgraft.add_adapter_fusion(grafted, lasts_of(fuse_of(block)), config,
                                           trainable=True)  # fmt: skip
    module = torchgraft.compose(module, "c", block)
    module.activate("c")
    return module.train()


def drawn_loss(hidden: Tensor) -> Tensor:
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3), dtype=DTYPE)
    return (hidden * weights).sum() / 10


def parameters_of(model: torch.nn.Module) -> dict[tuple[int, str, str], Tensor]:
    return {layer_and_weight(path): value for path, value in model.named_parameters() if value.requires_grad}


@pytest.mark.parametrize("kind", ["static", "dynamic"])
@pytest.mark.parametrize("parts", [["bn", "gated"], ["both", "norms"]], ids=",".join)
def test_fresh_layers_are_the_librarys(kind: str, parts: list[str], tmp_path: Path) -> None:
    model = library_model("bert_sdpa", Fuse(*parts), kind)
    grafted = bank("bert_sdpa", *parts)
    torch.manual_seed(4)
    module = torchgraft.add_adapter_fusion(grafted, parts, kind)
    torchgraft.save_adapter_fusion(module, ",".join(parts), tmp_path / "ours")
    ours = {layer_and_weight(path): value for path, value in read_weights(tmp_path / "ours", WEIGHT_FILES).items()}
    theirs = parameters_of(model)
    assert ours.keys() == theirs.keys() and len(ours) >= 8
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    with pytest.raises(torchgraft.GraftError, match="is frozen"):
        torchgraft.trainable_parameters(torchgraft.compose(module, "c", Fuse(*parts)), "c")


def fields(kind: str, **values) -> dict:
    return AdapterFusionConfig.load(kind, **values).to_dict()


@pytest.mark.parametrize(
    "config",
    [
        fields("static"),
        fields("dynamic"),
        fields("dynamic", residual_before=True, query_before_ln=True),
        fields("dynamic", value_before_softmax=False, key=False),
        fields("dynamic", value_initialized=False, dropout_prob=0.4),
        fields("static", query=False, dropout_prob=0.4),
    ],
    ids=["static", "dynamic", "residual", "late_value", "dropout", "dropout_of_keys"],
)
@pytest.mark.parametrize("block", [FUSE, Stack("map", Fuse("bn", Stack("gated", "bn2")))], ids=repr)
def test_gradients_equal_the_library(config: dict, block) -> None:
    batch = make_batch([9, 4, 7], 9, DTYPE)
    model, module = library_model("bert_sdpa", block, config), trained_fusion("bert_sdpa", block, config)
    theirs, ours = parameters_of(model), torchgraft.trainable_parameters(module, "c")
    assert sorted(map(layer_and_weight, ours)) == sorted(theirs)
    assert {id(value) for value in module.parameters() if value.requires_grad} == {id(v) for v in ours.values()}
    # Fresh values are the unit matrix, and fresh keys nearly nothing.
    with torch.no_grad():
        for key, value in ours.items():
            drawn = torch.randn(value.shape, generator=torch.Generator().manual_seed(len(key)), dtype=DTYPE) * 0.1
            value.copy_(drawn)
            theirs[layer_and_weight(key)].copy_(drawn)
    torch.manual_seed(9)
    expected = model(batch.ids, batch.mask)[0]
    torch.manual_seed(9)
    found = VARIANTS["bert_sdpa"].hidden(module(*VARIANTS["bert_sdpa"].arguments(batch)))
    assert difference(found, expected) <= TOLERANCE
    for hidden in (expected, found):
        drawn_loss(hidden).backward()
    for path, value in ours.items():
        wanted = theirs[layer_and_weight(path)].grad
        assert wanted is not None
        assert difference(torch.zeros_like(wanted) if value.grad is None else value.grad, wanted) <= TOLERANCE, path
    assert any(value.grad.abs().max() > 1e-3 for value in ours.values() if value.grad is not None)


def test_steps_with_the_regularisation_equal_the_library() -> None:
    batch = make_batch([9, 4, 7], 9, DTYPE)
    model, module = library_model("bert_sdpa", FUSE, "dynamic"), trained_fusion("bert_sdpa", FUSE, "dynamic")
    theirs, ours = parameters_of(model), torchgraft.trainable_parameters(module, "c")
    optimizers = [torch.optim.AdamW(values.values(), lr=1e-2) for values in (theirs, ours)]
    for _ in range(4):
        regularisation = torchgraft.fusion_regularization_loss(module, "c")
        target = model.get_fusion_regularization_loss()
        assert difference(regularisation.reshape(1), target.reshape(1)) <= TOLERANCE
        (drawn_loss(model(batch.ids, batch.mask)[0]) + target).backward()
        (drawn_loss(module(*VARIANTS["bert_sdpa"].arguments(batch))[0]) + regularisation).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for path, value in ours.items():
        assert difference(value, theirs[layer_and_weight(path)]) <= 1e-7, path
    assert regularisation > 1e-4
    model.eval()
    frozen = torchgraft.freeze_adapter(module, "c").eval()
    with torch.no_grad():
        expected = model(batch.ids, batch.mask)[0]
    assert difference(run(frozen, "bert_sdpa", batch), expected) <= 1e-6
    assert difference(run(reloaded(frozen), "bert_sdpa", batch), expected) <= 1e-6


def test_freezing_and_unfreezing() -> None:
    module = trained_fusion("bert_sdpa", FUSE, "dynamic").eval()
    batch = make_batch([9, 4, 7], 9, DTYPE)
    before = run(module, "bert_sdpa", batch)
    assert [info.name for info in torchgraft.list_adapters(module) if info.trainable] == ["c"]
    assert not any(key.startswith("model") for key in torchgraft.trainable_parameters(module, "c"))
    frozen = torchgraft.freeze_adapter(module, "c")
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert torch.equal(run(frozen.train(), "bert_sdpa", batch), run(frozen.eval(), "bert_sdpa", batch))
    assert difference(run(frozen, "bert_sdpa", batch), before) <= TOLERANCE
    again = torchgraft.unfreeze_adapter(reloaded(frozen), "c")
    parameters, held = (torchgraft.trainable_parameters(each, "c") for each in (again, module))
    assert list(parameters) == list(held)
    assert all(torch.equal(parameters[key], held[key]) for key in held)
    with torch.no_grad():  # copies have tensors of their own
        next(iter(parameters.values())).add_(1.0)
    assert torch.equal(run(module, "bert_sdpa", batch), before)


def test_a_trained_fuse_in_a_mixed_batch() -> None:
    """Rows of plain adapters and of the base are what they are alone, and have no part in the gradient."""
    module = trained_fusion("bert_sdpa", FUSE, "dynamic")
    batch = make_batch([9, 4, 7, 5], 9, DTYPE)
    ids = torch.tensor([3, -1, 1, 3])
    parameters = torchgraft.trainable_parameters(module, "c")
    hidden = VARIANTS["bert_sdpa"].hidden(module(*VARIANTS["bert_sdpa"].arguments(batch), adapter_ids=ids))
    alone = VARIANTS["bert_sdpa"].hidden(module(*VARIANTS["bert_sdpa"].arguments(batch)))
    assert difference(hidden[ids == 3], alone[ids == 3]) <= TOLERANCE
    others = torch.autograd.grad(
        hidden[ids != 3].sum(), list(parameters.values()), allow_unused=True, retain_graph=True
    )
    assert all(gradient is None or not gradient.any() for gradient in others)
    mixed = torch.autograd.grad(drawn_loss(hidden * (ids == 3).view(-1, 1, 1)), list(parameters.values()),
                                allow_unused=True)  # fmt: skip
    whole = torch.autograd.grad(drawn_loss(alone * (ids == 3).view(-1, 1, 1)), list(parameters.values()),
                                allow_unused=True)  # fmt: skip
    for one, other in zip(mixed, whole, strict=True):
        assert (one is None and other is None) or difference(one, other) <= TOLERANCE


def with_head(module: torch.jit.ScriptModule, **more) -> torch.jit.ScriptModule:
    torch.manual_seed(1)
    return torchgraft.add_head(module, "c", HeadConfig(num_labels=3, layers=1, **more))


def test_the_head_of_a_composition_is_trained_with_it() -> None:
    module = with_head(trained_fusion("bert_sdpa", FUSE, "dynamic"), pooling="mean")
    module = torchgraft.add_head(module, "bn", HeadConfig(num_labels=5, layers=1, pooling="first"))
    module.activate("c")
    parameters = torchgraft.trainable_parameters(module, "c")
    assert [key for key in parameters if "heads" in key] == [
        "adapters.heads.adapter_c.out_weight", "adapters.heads.adapter_c.out_bias"]  # fmt: skip
    batch = make_batch([9, 4, 7], 9, DTYPE)
    arguments, labels = VARIANTS["bert_sdpa"].arguments(batch), torch.tensor([0, 1, 2])
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
    losses = []
    for _ in range(15):
        losses.append(cross_entropy(module.forward_with_head(*arguments), labels))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.5 * losses[0]
    module.eval()
    hidden = run(module, "bert_sdpa", batch)
    weights = [parameters[f"adapters.heads.adapter_c.out_{name}"] for name in ("weight", "bias")]
    means = torch.stack([row[:length].mean(0) for row, length in zip(hidden, [9, 4, 7], strict=True)])
    with torch.no_grad():
        expected = torch.nn.functional.linear(means, *weights)
        frozen = torchgraft.freeze_adapter(module, "c")
        for each in (module, frozen, reloaded(frozen), torchgraft.rename_adapter(frozen, "c", "d")):
            assert difference(each.forward_with_head(*arguments), expected) <= 1e-10
        mixed = frozen.forward_with_head(*arguments, adapter_ids=torch.tensor([3, 0, 3]))
    assert difference(mixed[[0, 2], :3], expected[[0, 2]]) <= 1e-10
    assert torch.isneginf(mixed[[0, 2], 3:]).all() and torch.isfinite(mixed[1]).all()
    assert torchgraft.head_config(frozen, "c").pooling == "mean"
    assert torchgraft.head_config(frozen, "gated") is None
    counted = torchgraft.list_adapters(frozen)[-1].by_location
    assert counted["head"] == 3 * hidden.size(-1) + 3
    assert counted["output_adapter"] == sum(value.numel() for key, value in parameters.items() if "heads" not in key)
    bare = torchgraft.remove_head(frozen, "c")
    with pytest.raises(Exception, match="does not end in an adapter"):
        bare.forward_with_head(*arguments)
    gone = torchgraft.remove_adapter(frozen, "c")
    assert torchgraft.head_config(gone, "bn").num_labels == 5


@pytest.mark.parametrize("kind", ["static", "dynamic", "empty"])
def test_layers_are_counted_as_the_library_has_them(kind: str) -> None:
    config = fields("static", query=False, key=False) if kind == "empty" else kind
    parts = ["both", "norms"]
    theirs: dict[str, int] = {}
    for (_, site, weight), value in parameters_of(library_model("bert_sdpa", Fuse(*parts), config)).items():
        if not weight.startswith("dense_"):  # of layers without query, key and value: it does not use them
            theirs[site] = theirs.get(site, 0) + value.numel()
    module = torchgraft.add_adapter_fusion(bank("bert_sdpa", *parts), parts, config)
    module = torchgraft.compose(module, "c", Fuse(*parts))
    module = torchgraft.compose(module, "again", Fuse(*parts))
    infos = torchgraft.list_adapters(reloaded(module))
    assert [info.name for info in infos if info.composition] == ["c", "again"]
    for info in infos[-2:]:
        assert info.by_location == theirs and info.parameters == sum(theirs.values())
        assert info.bytes == info.parameters * DTYPE.itemsize


@pytest.mark.parametrize("safetensors", [True, False], ids=["safetensors", "bin"])
def test_a_setup_takes_its_head_along(safetensors: bool, tmp_path: Path) -> None:
    """Here, and to the library, whose head it then is."""
    module = torchgraft.freeze_adapter(trained_fusion("bert_sdpa", Fuse("bn", "bn2"), "dynamic"), "c").eval()
    torch.manual_seed(1)
    module = torchgraft.add_head(module, "c", HeadConfig(num_labels=3, layers=2))
    batch = make_batch([9, 4, 7], 9, DTYPE)
    arguments = VARIANTS["bert_sdpa"].arguments(batch)
    with torch.no_grad():
        expected = module.forward_with_head(*arguments)
    torchgraft.save_adapter_setup(module, "c", tmp_path / "ours", safetensors, model_class="BertAdapterModel")
    again = torchgraft.load_adapter_setup(base("bert_sdpa", DTYPE), tmp_path / "ours", "other")
    again.activate("other")
    with torch.no_grad():
        assert torch.equal(again.forward_with_head(*arguments), expected)

    plain = oracle_for(VARIANTS["bert_sdpa"], DTYPE).model
    library = adapters.BertAdapterModel(plain.config)
    states, held = library.bert.state_dict(), plain.state_dict()
    library.bert.load_state_dict({key: held[key] for key in states if key in held}, strict=False)
    # A library model with a head reads no keys of AdapterFusion layers that were saved without one, and says nothing.
    path = tmp_path / "ours" / "bn,bn2" / WEIGHT_FILES[0]
    save_file({f"bert.{key}": weight for key, weight in load_file(path).items()}, path)
    library.load_adapter_setup(str(tmp_path / "ours"), set_active=True, use_safetensors=True)
    library.to(DTYPE).eval()
    with torch.no_grad():
        assert difference(library(batch.ids, batch.mask)[0], expected) <= 1e-5

    library.save_adapter_setup(str(tmp_path / "theirs"), library.active_adapters, head_setup="c")
    back = torchgraft.load_adapter_setup(base("bert_sdpa", DTYPE), tmp_path / "theirs", "back")
    back.activate("back")
    with torch.no_grad():
        assert difference(back.forward_with_head(*arguments), expected) <= 1e-5


def test_a_setup_writes_nothing_when_a_part_cannot_be_written(tmp_path: Path) -> None:
    module = torchgraft.freeze_adapter(trained_fusion("bert_sdpa", Fuse("bn", "bn2"), "dynamic"), "c")
    module = torchgraft.add_head(module, "c", HeadConfig(num_labels=3, layers=1))
    (tmp_path / "setup" / "c").mkdir(parents=True)
    library_fusion("bert_sdpa", ["bn", "bn2"], "static", tmp_path / "setup" / "bn,bn2")  # under the library's names
    before = sorted(path for path in (tmp_path / "setup").rglob("*"))
    with pytest.raises(torchgraft.GraftError, match="holds the AdapterFusion layers"):
        torchgraft.save_adapter_setup(module, "c", tmp_path / "setup")
    assert sorted(path for path in (tmp_path / "setup").rglob("*")) == before
    for path in sorted((tmp_path / "setup" / "bn,bn2").iterdir()):
        path.unlink()
    (tmp_path / "setup" / "c" / "head_config.json").write_text('{"name": "d"}')
    before = sorted(path for path in (tmp_path / "setup").rglob("*"))
    with pytest.raises(torchgraft.GraftError, match="holds another head already"):
        torchgraft.save_adapter_setup(module, "c", tmp_path / "setup")
    assert sorted(path for path in (tmp_path / "setup").rglob("*")) == before
    torchgraft.save_adapter_setup(module, "c", tmp_path / "setup", overwrite=True)


def test_what_cannot_be_made_or_trained() -> None:
    module = bank("bert_sdpa", "bn", "bn2", "both", "lora")
    with pytest.raises(torchgraft.GraftError, match="'lora' has no bottlenecks"):
        torchgraft.add_adapter_fusion(module, ["bn", "lora"])
    with pytest.raises(torchgraft.GraftError, match="'bn' has bottlenecks at output_adapter, and 'both' at mh_adapter"):
        torchgraft.add_adapter_fusion(module, ["bn", "both"])
    with pytest.raises(torchgraft.GraftError, match="'none'"):
        torchgraft.add_adapter_fusion(module, ["bn", "none"])
    with pytest.raises(torchgraft.GraftError, match="no configuration is called"):
        torchgraft.add_adapter_fusion(module, ["bn", "bn2"], "fancy")
    with pytest.raises(torchgraft.GraftError, match="expected a Fuse"):
        torchgraft.add_adapter_fusion(module, Stack("bn", "bn2"))
    for value in (1.0, -0.1, 7):
        with pytest.raises(torchgraft.GraftError, match="dropout_prob to be at least 0 and below 1"):
            torchgraft.add_adapter_fusion(module, ["bn", "bn2"], {"dropout_prob": value})
    empty = dict.fromkeys(("key", "query", "value"), False)
    with pytest.raises(torchgraft.GraftError, match="nothing to train"):
        torchgraft.add_adapter_fusion(module, ["bn", "bn2"], empty, trainable=True)
    module = torchgraft.add_adapter_fusion(module, Fuse("bn", "bn2", name="x"), empty)
    with pytest.raises(torchgraft.GraftError, match="AdapterFusion layers 'x' already.*remove_adapter_fusion"):
        torchgraft.add_adapter_fusion(module, ["bn", "bn2"], name="x")
    module = torchgraft.compose(module, "f", Fuse("bn", "bn2", name="x"))
    with pytest.raises(torchgraft.GraftError, match="nothing to train"):
        torchgraft.unfreeze_adapter(module, "f")
    module = torchgraft.compose(module, "mean", Average("bn", "bn2"))
    for call in (torchgraft.unfreeze_adapter, torchgraft.freeze_adapter):
        with pytest.raises(torchgraft.GraftError, match="'mean' is a composition"):
            call(module, "mean")
    with pytest.raises(torchgraft.GraftError, match="'mean' is a composition"):
        torchgraft.add_head(module, "mean", HeadConfig(num_labels=2))
    with pytest.raises(torchgraft.GraftError, match="no composition with a Fuse is called 'mean'"):
        torchgraft.fusion_regularization_loss(module, "mean")
