"""Compositions on every architecture that `adapters==1.3.0` supports: equal to the library, or refused with it."""

import functools
import inspect

import adapters.composition as library
import pytest
import torch
from adapters.context import ForwardContext

import torchgraft
from all_cases import dtypes, is_second_spelling, tolerance
from case import METHODS, Case
from hugging_face_cases import CASES
from oracle import difference
from oracle_reference import _prepared
from thinned import thinned

BLOCKS = {
    "bottlenecks": ("Stack", "double_seq_bn", "mam"),
    "loras": ("Stack", "lora_all", "unipelt"),
    "prefixes": ("Stack", "mam", "prefix_gated"),
    "average": ("Average", "lora_all", "lora_all"),
}
# What the library runs and torchgraft refuses: a LoRA that acts on relative positions, too; a bottleneck whose residual
# has the result of the attention beside it.
REFUSED = {("deberta_v2_shared_eager", "loras"), ("deberta_v2_shared_eager", "average"),
           ("gptj_eager", "bottlenecks"), ("gptj_eager", "loras"), ("gptj_eager", "prefixes")}  # fmt: skip
# Second spellings of an encoder and of a decoder: prefixes are the only part that attention itself takes up.
OFTEN = {"bert_eager", "gpt2_eager"}


def block_of(kind: str, names: dict[str, str], module) -> object:
    block, *methods = BLOCKS[kind]
    return getattr(module, block)(*[names[method] for method in methods])


def widest(name: str) -> torch.dtype:
    return max(dtypes(name), key=lambda dtype: dtype.itemsize)


@functools.cache
def bank(name: str) -> torch.jit.ScriptModule:
    case = CASES[name]
    methods = [method for method in METHODS if method not in case.without]
    # test_architectures.py verifies the same graft.
    return case.reference.graft(case.to_script("traced", widest(name)), methods, widest(name), verify=False)


@torch.no_grad()
def expected(case: Case, kind: str, dtype: torch.dtype, arguments: tuple) -> torch.Tensor:
    prepared = _prepared(case.reference, dtype)
    names = {method: prepared.adapter(method).name for method in BLOCKS[kind][1:]}
    prepared.model.set_active_adapters(block_of(kind, names, library))
    named = dict(zip(inspect.signature(prepared._positional.forward).parameters, arguments, strict=True))
    with ForwardContext(prepared.model, **named):
        return prepared._positional(*arguments)


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("name", thinned(CASES, lambda name: not is_second_spelling(name) or name in OFTEN))
def test_compositions_equal_the_library(name: str, kind: str) -> None:
    case = CASES[name]
    if any(method in case.without for method in BLOCKS[kind][1:]):
        pytest.skip("the library has no such adapter here")
    block = block_of(kind, {method: method for method in METHODS}, torchgraft)
    arguments = case.arguments(widest(name), 1)
    try:
        wanted = expected(case, kind, widest(name), arguments)
    except Exception:
        wanted = None
    if wanted is None or (name, kind) in REFUSED:
        with pytest.raises(torchgraft.GraftError, match="compose: 'c'"):
            torchgraft.compose(bank(name), "c", block, verify=False)
        return
    module = torchgraft.compose(bank(name), "c", block, verify=False)
    module.activate("c")
    with torch.no_grad():
        found = case.hidden(module(*arguments))
    assert difference(found, wanted) <= tolerance(name, "traced", widest(name))
