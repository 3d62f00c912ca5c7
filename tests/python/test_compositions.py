"""Compositions: equal to `adapters==1.3.0` with set_active_adapters(composition), row by row."""

import functools
import random

import adapters.composition as library
import pytest
import torch

import torchgraft
from grafted import base, reloaded
from models import VARIANTS, Batch, make_batch
from oracle import TOLERANCE as TOLERANCES
from oracle import difference, oracle_for
from thinned import thinned

pytestmark = pytest.mark.quick

# Rounding in float32 moves products with (IA)^3 and LoRA by more than 1e-5.
DTYPE = torch.float64
TOLERANCE = TOLERANCES[DTYPE]

# Adapters of one kind have one configuration and other weights.
PARTS = {
    "bn": ("seq_bn", 0),
    "bn2": ("seq_bn", 1),
    "gated": ("seq_bn_gated", 0),
    "both": ("double_seq_bn_gated", 0),
    "normed": ("bn_residual_normed", 0),
    "norms": ("bn_norms", 0),
    "par": ("par_bn", 0),
    "par2": ("par_bn_gated", 0),
    "lora": ("lora", 0),
    "lora2": ("lora_gated", 0),
    "ia3": ("ia3", 0),
    "ia3b": ("ia3", 1),
    "dora": ("dora", 0),
    "prefix": ("prefix_flat", 0),
    "prefix2": ("prefix_two_gates", 0),
    "prefix3": ("prefix_flat", 1),
    "unipelt": ("unipelt", 0),
    "mam": ("mam", 0),
    "map": ("seq_bn_map", 0),
}


def saved(variant: str, part: str):
    return oracle_for(VARIANTS[variant], DTYPE).adapter(*PARTS[part])


@functools.cache
def bank(variant: str, *parts: str) -> torch.jit.ScriptModule:
    directories = {part: saved(variant, part).directory for part in parts}
    # test_oracle_bank.py verifies grafts of banks.
    return torchgraft.graft(base(variant, DTYPE), adapters=directories, active=parts[0], verify=False)


def library_block(variant: str, block: torchgraft.AdapterCompositionBlock):
    """The library's block, with the names that the adapters have in the library."""
    children = [
        saved(variant, child).name if isinstance(child, str) else library_block(variant, child)
        for child in block.children
    ]
    kwargs = block._kwargs() | ({"normalize_weights": False} if isinstance(block, torchgraft.Average) else {})
    return getattr(library, type(block).__name__)(*children, **kwargs)


def expected(variant: str, batch: Batch, block) -> tuple[torch.Tensor, dict]:
    """The library's hidden states, and its gating scores by part."""
    model = oracle_for(VARIANTS[variant], DTYPE).model
    model.set_active_adapters(library_block(variant, block) if block is not None else None)
    with torch.no_grad():
        outputs = model(batch.ids, batch.mask, output_adapter_gating_scores=block is not None)
    return outputs[0], outputs[-1] if block is not None else {}


def expected_states(variant: str, batch: Batch, block) -> torch.Tensor:
    """The same without gating scores, which the library cannot keep for parts of a batch."""
    model = oracle_for(VARIANTS[variant], DTYPE).model
    model.set_active_adapters(library_block(variant, block))
    with torch.no_grad():
        return model(batch.ids, batch.mask)[0]


def run(module: torch.jit.ScriptModule, variant: str, batch: Batch, **keywords) -> torch.Tensor:
    with torch.no_grad():
        return VARIANTS[variant].hidden(module(*VARIANTS[variant].arguments(batch), **keywords))


Stack, Average = torchgraft.Stack, torchgraft.Average
STACKS = [
    Stack("bn", "bn2"),
    Stack("bn", "gated", "both"),
    Stack("normed", "bn"),
    Stack("norms", "both"),
    Stack("par", "bn"),
    Stack("bn", "par2"),
    Stack("map", "bn"),
    Stack("lora", "lora2"),
    Stack("lora2", "lora", "dora"),
    Stack("dora", "lora"),
    Stack("ia3", "lora2"),
    Stack("lora", "ia3"),
    Stack("prefix", "prefix2"),
    Stack("prefix2"),
    Stack("unipelt", "mam"),
    Stack("mam", "lora2", "unipelt"),
]


def parts_of(block) -> list[str]:
    return torchgraft.composition.adapters_in(block)


# On the second base: a gate, a parallel part, low-rank parts of two kinds, prefixes, unions.
_SECOND = {STACKS[i] for i in (1, 4, 8, 12, 15)}


@pytest.mark.parametrize(
    ("variant", "block"),
    thinned(
        [(variant, block) for variant in ("bert_sdpa", "distilbert_eager") for block in STACKS],
        lambda each: each[0] == "bert_sdpa" or each[1] in _SECOND,
    ),
    ids=str,
)
def test_stacks_equal_the_library(variant: str, block) -> None:
    # Verified on one base: the results are compared below.
    module = torchgraft.compose(bank(variant, *parts_of(block)), "c", block, verify=variant == "bert_sdpa")
    module.activate("c")
    batch = make_batch([9, 4, 7], 9, DTYPE)
    wanted, _ = expected(variant, batch, block)
    assert difference(run(module, variant, batch), wanted) <= TOLERANCE
    assert difference(run(reloaded(module), variant, batch), wanted) <= TOLERANCE


# One bank for mixed batches: name of each composition, and what it is.
_PARTS = ["bn", "bn2", "both", "par", "lora", "lora2", "prefix", "prefix2", "unipelt", "mam", "dora"]
_COMPOSED = {
    "two": Stack("bn", "both"),
    "deep": Stack("unipelt", "mam", "par"),
    "loras": Stack("lora2", "lora", "dora"),
    "prefixes": Stack("prefix2", "prefix"),
    "all": Stack("prefix", "lora", "bn2", "unipelt"),
}


@functools.cache
def composed(variant: str) -> torch.jit.ScriptModule:
    module = bank(variant, *_PARTS)
    for name, block in _COMPOSED.items():
        module = torchgraft.compose(module, name, block, verify=False)
    return module


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("variant", ["bert_sdpa", "roberta_eager"])
def test_rows_of_a_mixed_batch_equal_themselves_alone(variant: str, seed: int) -> None:
    module = composed(variant)
    names = module.adapter_names()
    assert names == _PARTS + list(_COMPOSED)
    drawn = random.Random(seed)
    chosen = [drawn.choice([None, *names, *_COMPOSED, *_COMPOSED]) for _ in range(9)]
    ids = torch.tensor([-1 if name is None else names.index(name) for name in chosen])
    batch = make_batch([drawn.randint(1, 9) for _ in chosen], 9, DTYPE, seed)
    with torch.no_grad():
        result, gates = module.forward_with_gates(*VARIANTS[variant].arguments(batch), adapter_ids=ids)
    hidden = VARIANTS[variant].hidden(result)
    for row, name in enumerate(chosen):
        block = None if name is None else _COMPOSED.get(name, Stack(name))
        wanted, scores = expected(variant, batch.row(row), block)
        assert difference(hidden[row : row + 1], wanted) <= TOLERANCE, f"row {row}, {name}"
        if name in _COMPOSED:
            position = [other for other in range(row) if chosen[other] == name]
            check_gates(variant, gates, name, len(position), scores)


def check_gates(variant: str, gates: dict, name: str, position: int, scores: dict) -> None:
    for part in parts_of(_COMPOSED[name]):
        by_layer = gates[f"{name}.{part}"]
        for layer, locations in by_layer.items():
            for location, gate in locations.items():
                score = torch.from_numpy(scores[saved(variant, part).name][layer][location]).reshape(1, -1)
                assert difference(gate[position : position + 1], score) <= TOLERANCE, (
                    f"{name}.{part} {layer} {location}"
                )
    gated = [part for part in parts_of(_COMPOSED[name]) if part in ("both", "lora2", "prefix2", "unipelt")]
    assert all(gates[f"{name}.{part}"] for part in gated)


def test_a_module_without_compositions_is_as_before() -> None:
    """Adding and removing a composition gives the graph back, node for node."""
    module = bank("bert_sdpa", "bn", "bn2", "prefix2")
    without = torchgraft.remove_adapter(torchgraft.compose(module, "c", Stack("bn", "bn2")), "c")
    assert str(without.grafted_forward.inlined_graph) == str(module.grafted_forward.inlined_graph)
    assert without.adapter_names() == module.adapter_names()


def test_life_of_a_composition() -> None:
    module = torchgraft.compose(bank("bert_sdpa", "bn", "bn2", "gated"), "c", "Stack(bn, bn2)")
    info = torchgraft.list_adapters(module)[-1]
    assert (info.name, info.composition, info.parameters) == ("c", "Stack(bn, bn2)", 0)
    with pytest.raises(torchgraft.GraftError, match="the composition 'c', Stack.bn, bn2., uses 'bn'"):
        torchgraft.remove_adapter(module, "bn")
    assert torchgraft.remove_adapter(module, "bn", "c").adapter_names() == ["bn2", "gated"]
    assert torchgraft.remove_adapter(module, "gated").adapter_names() == ["bn", "bn2", "c"]
    renamed = torchgraft.rename_adapter(torchgraft.rename_adapter(module, "bn", "en"), "c", "d")
    assert torchgraft.list_adapters(renamed)[-1].composition == "Stack(en, bn2)"
    with pytest.raises(torchgraft.GraftError, match="already has a composition 'd'"):
        torchgraft.graft(renamed, config="lora", name="d")
    batch = make_batch([9, 4], 9, DTYPE)
    replaced = torchgraft.replace_adapter(module, "bn2", directory=saved("bert_sdpa", "both").directory)
    replaced.activate("c")
    assert (
        difference(run(replaced, "bert_sdpa", batch), expected("bert_sdpa", batch, Stack("bn", "both"))[0]) <= TOLERANCE
    )
    added = torchgraft.graft(module, config="lora", name="new")
    assert added.adapter_names() == ["bn", "bn2", "gated", "new", "c"]
    for change in (torchgraft.freeze_adapter, torchgraft.merge_adapter, torchgraft.unfreeze_adapter):
        with pytest.raises(torchgraft.GraftError, match="'c' is a composition, Stack.bn, bn2."):
            change(module, "c")


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("Stack(bn, none)", "no adapter is called 'none'"),
        ("Stack(Stack(bn, bn2), bn)", "cannot nest Stack.bn, bn2. inside Stack"),
        ("Average(bn, Fuse(bn, bn2))", "cannot nest Fuse"),
        ("Heap(bn)", "no block is called 'Heap'"),
        ("Stack(bn", "a comma or a closing bracket"),
        ("Stack(bn, weights=[1])", "Stack has no argument 'weights'"),
        ("Average(bn, bn2, weights=[1])", "as many weights"),
        ("Split(bn, bn2)", "splits with a number for each"),
        ("Average(prefix, bn)", "no Average for this method"),
    ],
)
def test_what_cannot_be_composed_is_named(block: str, message: str) -> None:
    with pytest.raises(torchgraft.GraftError, match=message):
        torchgraft.compose(bank("bert_sdpa", "bn", "bn2", "prefix"), "c", block)


def test_wrong_ids_are_named() -> None:
    module = torchgraft.compose(bank("bert_sdpa", "bn", "bn2"), "c", Stack("bn", "bn2"))
    batch = make_batch([9, 4], 9, DTYPE)
    with pytest.raises(Exception, match=r"expected adapter_ids in \[-1, 3\), got 3 in row 1"):
        run(module, "bert_sdpa", batch, adapter_ids=torch.tensor([2, 3]))


def test_adapter_setups_go_both_ways(tmp_path) -> None:
    variant, block = "bert_sdpa", Stack("gated", Average("bn", "bn2", weights=[0.25, 0.75]))
    module = torchgraft.compose(bank(variant, *parts_of(block)), "c", block)
    with pytest.raises(torchgraft.GraftError, match="'bn' is an adapter"):
        torchgraft.save_adapter_setup(module, "bn", tmp_path / "none")
    batch = make_batch([9, 4], 9, DTYPE)
    wanted, _ = expected(variant, batch, block)
    model = oracle_for(VARIANTS[variant], DTYPE).model

    theirs = tmp_path / "theirs"
    model.save_adapter_setup(str(theirs), library_block(variant, block))
    loaded = torchgraft.load_adapter_setup(base(variant, DTYPE), theirs)
    loaded.activate("theirs")
    assert difference(run(loaded, variant, batch), wanted) <= TOLERANCE

    ours = tmp_path / "ours"
    torchgraft.save_adapter_setup(module, "c", ours)
    setup, heads = model._load_adapter_setup_config(str(ours))
    assert heads is None and repr(setup) == repr(library.AdapterCompositionBlock.from_dict(block.to_dict()))
    again = torchgraft.load_adapter_setup(base(variant, DTYPE), ours, "again")
    assert torchgraft.list_adapters(again)[-1].composition == torchgraft.list_adapters(module)[-1].composition
    again.activate("again")
    module.activate("c")
    assert torch.equal(run(again, variant, batch), run(module, variant, batch))
    texts = [(folder / "adapter_setup.json").read_text() for folder in (theirs, ours)]
    for part in parts_of(block):
        texts[0] = texts[0].replace(f'"{saved(variant, part).name}"', f'"{part}"')
    assert texts[0] == texts[1]


def test_weights_that_no_reader_keeps_are_not_saved(tmp_path) -> None:
    block = Stack("gated", Average("bn", "bn2", weights=[0.5, 1.0], normalize_weights=False))
    module = torchgraft.compose(bank("bert_sdpa", *parts_of(block)), "c", block, verify=False)
    with pytest.raises(torchgraft.GraftError, match=r"the weights \[0.5, 1.0\] of an Average sum to 1.5"):
        torchgraft.save_adapter_setup(module, "c", tmp_path / "setup")
    assert not (tmp_path / "setup").exists()


def test_a_setup_of_another_composition_stays(tmp_path) -> None:
    module = torchgraft.compose(bank("bert_sdpa", "bn", "bn2", "gated"), "c", Stack("bn", "bn2"), verify=False)
    module = torchgraft.compose(module, "d", Stack("bn2", "bn"), verify=False)
    torchgraft.save_adapter_setup(module, "c", tmp_path)
    before = (tmp_path / "adapter_setup.json").read_text()
    torchgraft.save_adapter_setup(module, "c", tmp_path)  # its own
    with pytest.raises(torchgraft.GraftError, match="holds another composition already"):
        torchgraft.save_adapter_setup(module, "d", tmp_path)
    assert (tmp_path / "adapter_setup.json").read_text() == before
    torchgraft.save_adapter_setup(module, "d", tmp_path, overwrite=True)
    assert (tmp_path / "adapter_setup.json").read_text() != before


@pytest.mark.parametrize("variant", ["encoder_slow_pre_seq_first", "own_post_sdpa"])
def test_other_models_equal_their_adapters_applied_by_hand(variant: str) -> None:
    """Sequence-first ones among them. A Stack of one is the adapter, and a row of a BatchSplit is that row alone."""
    module = torchgraft.graft(base(variant, DTYPE), "double_seq_bn[use_gating=True]", "a")
    module = torchgraft.graft(
        module, torchgraft.LoRAConfig(selfattn_lora=False, output_lora=True, use_gating=True), "l"
    )
    module = torchgraft.graft(module, "prefix_tuning_flat[prefix_length=4]", "p")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, tensor in module.adapters.state_dict().items():
            if tensor.is_floating_point() and "scaling" not in key and torch.isfinite(tensor).all():
                tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) * 0.3)
    names = ["a", "l", "p"]
    for name in names:
        module = torchgraft.compose(module, f"only_{name}", Stack(name), verify=False)
    rows = torchgraft.BatchSplit("a", "a", batch_sizes=[2, 1])
    module = torchgraft.compose(module, "rows", rows, verify=False)
    batch = make_batch([9, 9, 9], 9, DTYPE)
    plain = run(module, variant, batch, adapter_ids=torch.full([3], -1))
    for name in names:
        wanted = run(module, variant, batch, adapter_ids=torch.full([3], names.index(name)))
        assert difference(wanted, plain) > 1e-3
        id = module.adapter_names().index(f"only_{name}")
        assert difference(run(module, variant, batch, adapter_ids=torch.full([3], id)), wanted) <= TOLERANCE
        mixed = run(module, variant, batch, adapter_ids=torch.tensor([-1, id, names.index(name)]))
        assert difference(mixed[1:], wanted[1:]) <= TOLERANCE and difference(mixed[:1], plain[:1]) <= TOLERANCE
    id = module.adapter_names().index("rows")
    wanted = run(module, variant, batch, adapter_ids=torch.zeros(3, dtype=torch.int64))
    assert difference(run(module, variant, batch, adapter_ids=torch.full([3], id)), wanted) <= TOLERANCE
