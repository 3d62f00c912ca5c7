"""Other changes of modules with compositions: lower, optimise, quantise, train, add heads; what cannot be done."""

import warnings

import pytest
import torch
from torch import Tensor

import torchgraft
from grafted import base
from models import VARIANTS, make_batch
from oracle import adapter_parameters, difference, oracle_for
from test_compositions import DTYPE, TOLERANCE, bank, library_block, run, saved
from torchgraft import Average, Stack

pytestmark = pytest.mark.quick


def _module(dtype: torch.dtype = DTYPE) -> torch.jit.ScriptModule:
    module = torchgraft.compose(bank("bert_sdpa", "unipelt", "both", "lora2"), "c", Stack("unipelt", "both"))
    module = torchgraft.compose(module, "d", Average("lora2", "lora2"))
    module.activate("c")
    return module.to(dtype)


def test_lowered_modules_give_the_same() -> None:
    module = _module()
    lowered = torchgraft.lower(module)
    assert "torchgraft::" not in str(lowered.grafted_forward.inlined_graph)
    batch = make_batch([9, 4, 7, 3], 9, DTYPE)
    for ids in ([3, 3, 3, 3], [3, 0, -1, 3], [4, 4, 0, 4]):
        found = [run(held, "bert_sdpa", batch, adapter_ids=torch.tensor(ids)) for held in (module, lowered)]
        assert difference(*found) <= TOLERANCE


def test_optimised_and_int8_modules_keep_compositions() -> None:
    module = _module(torch.float32)
    batch = make_batch([9, 4, 7, 3], 9, torch.float32)
    optimized = torchgraft.optimize(module)
    assert difference(run(optimized, "bert_sdpa", batch), run(module, "bert_sdpa", batch)) <= 1e-4
    quantized = torchgraft.quantize(module)
    quantized = quantized[0] if isinstance(quantized, tuple) else quantized
    assert [info.composition for info in torchgraft.list_adapters(quantized)][3] == "Stack(unipelt, both)"
    assert quantized.active_adapter() == "c"
    run(quantized, "bert_sdpa", batch)


def test_a_composition_within_a_composition_is_named() -> None:
    with pytest.raises(torchgraft.GraftError, match=r"uses 'c', which is a composition, .*; name its adapters"):
        torchgraft.compose(_module(), "more", "Stack(lora2, c)")


def test_verify_runs_compositions() -> None:
    assert torchgraft.verify(torchgraft.remove_adapter(_module(), "d")) == []


@pytest.mark.parametrize(
    "text",
    [
        "BatchSplit(a, b, batch_sizes=[2, 3])",
        pytest.param("Split(a, b, splits=[2, 1])", marks=pytest.mark.slow(seconds=4)),
        pytest.param("Stack(a, Split(a, b, splits=[3, 1]))", marks=pytest.mark.slow(seconds=4)),
    ],
)
def test_compositions_that_split_hinder_no_change(text: str) -> None:
    """Inputs that verification makes up have other sizes. What was not compared is said."""
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    module = torch.jit.script(torch.nn.TransformerEncoder(layer, 2).eval())
    for name in ("a", "b"):
        module = torchgraft.graft(module, "seq_bn[reduction_factor=4]", name)
    with pytest.warns(UserWarning, match="'c' splits inputs of other sizes than those that were made up; give example"):
        module = torchgraft.compose(module, "c", text)
    for change in (torchgraft.lower, torchgraft.optimize):
        with pytest.warns(UserWarning, match="'c'.* splits inputs of other sizes"):
            change(module)
    more = torchgraft.graft(module, "lora", "more")
    assert more.adapter_names() == ["a", "b", "more", "c"]
    assert any("'c' splits inputs" in text for text in torchgraft.verify(module))
    tokens, rows = (4, 2) if "3, 1" in text else (3, 2) if "[2, 1]" in text else (4, 5)
    assert torchgraft.verify(module, example=(torch.randn(rows, tokens, 16),)) == []


def test_what_cannot_hold_compositions_refuses_them() -> None:
    module = _module()
    batch = make_batch([9, 4, 7], 9, DTYPE)
    with pytest.raises(torchgraft.GraftError, match="export: the module has compositions"):
        torchgraft.export(module, VARIANTS["bert_sdpa"].arguments(batch))
    held = torchgraft.AdapterPool(module, 8, room=["lora"]).compositions()
    assert held == {"c": "Stack(unipelt, both)", "d": "Average(lora2, lora2)"}
    with pytest.raises(torchgraft.GraftError, match="'c' is a composition, Stack.unipelt, both."):
        torchgraft.save_adapter(module, "c", "/nonexistent")
    merged = torchgraft.graft(base("bert_sdpa", DTYPE), adapters={"lora": saved("bert_sdpa", "lora").directory})
    composed = torchgraft.compose(merged, "c", Stack("lora"))
    with pytest.raises(torchgraft.GraftError, match="merge_adapter: the composition 'c', Stack.lora., uses 'lora'"):
        torchgraft.merge_adapter(composed, "lora")
    with pytest.raises(torchgraft.GraftError, match="'lora' is merged into the base's weights"):
        torchgraft.compose(torchgraft.merge_adapter(merged, "lora"), "c", Stack("lora"))


def _loss(hidden: Tensor) -> Tensor:
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(8), dtype=DTYPE)
    return (hidden * weights).sum()


@pytest.mark.parametrize("part", ["both", "unipelt"])
def test_gradients_of_a_part_equal_the_library(part: str) -> None:
    """A part is trained in its Stack, the other is frozen."""
    block = Stack("unipelt", "both")
    directories = {name: saved("bert_sdpa", name).directory for name in ("unipelt", "both") if name != part}
    module = torchgraft.graft(base("bert_sdpa", DTYPE), adapters=directories)
    module = torchgraft.graft(module, adapters={part: saved("bert_sdpa", part).directory}, trainable=True)
    module = torchgraft.compose(module, "c", block)
    module.activate("c")
    batch = make_batch([7, 4], 7, DTYPE, seed=6)
    named = torchgraft.trainable_parameters(module, part)
    gradients = torch.autograd.grad(_loss(module(*VARIANTS["bert_sdpa"].arguments(batch))[0]), list(named.values()))

    model = oracle_for(VARIANTS["bert_sdpa"], DTYPE).model
    model.set_active_adapters(library_block("bert_sdpa", block))
    unique = {id(value): value for _, value in adapter_parameters(model, saved("bert_sdpa", part).name)}
    wanted = list(unique.values())
    for parameter in wanted:
        parameter.requires_grad_()
    expected = torch.autograd.grad(_loss(model(batch.ids, batch.mask)[0]), wanted)
    assert len(gradients) == len(expected)
    for parameter, gradient in zip(named.values(), gradients, strict=True):
        twin = next(i for i, value in enumerate(wanted) if torch.equal(value.reshape(-1), parameter.reshape(-1)))
        scale = max(1.0, expected[twin].abs().max().item())
        assert (gradient.reshape(-1) - expected[twin].reshape(-1)).abs().max().item() <= 1e-9 * scale


def test_a_row_of_a_stack_has_the_head_of_its_last_adapter() -> None:
    module = bank("bert_sdpa", "bn", "bn2")
    for name, labels in (("bn", 3), ("bn2", 5)):
        module = torchgraft.add_head(module, name, torchgraft.HeadConfig(num_labels=labels))
    module = torchgraft.compose(module, "c", Stack("bn", "bn2"))
    module = torchgraft.compose(module, "mean", Average("bn", "bn2"))
    batch = make_batch([9, 4], 9, DTYPE)
    arguments = VARIANTS["bert_sdpa"].arguments(batch)
    with torch.no_grad():
        module.activate("c")
        hidden = module(*arguments)[0]
        logits = module.forward_with_head(*arguments)
        assert logits.shape == (2, 5)
        assert torch.equal(logits, module.adapters.heads.logits(hidden, batch.mask, None, 1))
        mixed = module.forward_with_head(*arguments, adapter_ids=torch.tensor([0, 2]))
        assert difference(mixed[1, :5], logits[1]) <= TOLERANCE and mixed[0, 3:].isinf().all()
        module.activate("mean")
        with pytest.raises(Exception, match="the active composition does not end in an adapter"):
            module.forward_with_head(*arguments)
        # Rows that say themselves which adapter they use do not read the active one.
        assert torch.equal(module.forward_with_head(*arguments, adapter_ids=torch.tensor([0, 2])), mixed)


@pytest.mark.parametrize(
    ("variant", "block"),
    [
        ("bert_sdpa", torchgraft.Parallel("bn", torchgraft.BatchSplit("bn2", "bn", batch_sizes=[1, 1]))),
        ("encoder_slow_pre_seq_first", torchgraft.Parallel("bn", "bn2")),
    ],
)
def test_verified_on_inputs_that_are_made_up(variant: str, block: torchgraft.Parallel) -> None:
    """A warning would say what was not compared."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = torchgraft.compose(bank(variant, "bn", "bn2"), "c", block)
        torchgraft.lower(torchgraft.rename_adapter(module, "bn", "en"))
        torchgraft.compose(module, "more", Stack("bn", "bn2"))
    assert not [each for each in caught if "not compared" in str(each.message)]
