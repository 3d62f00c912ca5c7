"""Parallel on every architecture that `adapters==1.3.0` supports: equal to the library.

Where the library cannot repeat the rows itself (LoRAs in eager attention, models that its list of Parallel lacks), it
gets inputs that are repeated already or, where it refuses Parallel, each child alone.
"""

import inspect

import adapters.composition as library
import pytest
import torch
from adapters.context import ForwardContext

import torchgraft
from all_cases import tolerance
from case import Case
from hugging_face_cases import CASES
from oracle import difference
from oracle_reference import _prepared
from test_compositions_of_families import bank, widest
from thinned import thinned

# The children of each act at the same sites, and differ in what they do where the library can make two of one adapter.
KINDS = {
    "bottlenecks": ["double_seq_bn"],
    "loras": ["lora_all"],
    "prefixes": ["prefix_gated"],
    "behind": ["lora_all", "double_seq_bn"],
}
OFTEN = {"bert_sdpa", "bert_eager", "t5_eager", "gpt2_sdpa", "vit_sdpa", "llama_sdpa"}


def children_of(kind: str, names: dict[str, str], module) -> list:
    last = names[KINDS[kind][-1]]
    other = {"loras": module.Average(last, last), "prefixes": last}.get(kind, module.Stack(last, last))
    return [last, other]


def block_of(kind: str, names: dict[str, str], module, children: list):
    before = [names[method] for method in KINDS[kind][:-1]]
    whole = module.Parallel(*children) if len(children) > 1 else children[0]
    return module.Stack(*before, whole) if before or isinstance(whole, str) else whole


@torch.no_grad()
def run_library(case: Case, dtype: torch.dtype, arguments: tuple, block, **keywords) -> torch.Tensor:
    prepared = _prepared(case.reference, dtype)
    prepared.model.set_active_adapters(block)
    named = dict(zip(inspect.signature(prepared._positional.forward).parameters, arguments, strict=True))
    with ForwardContext(prepared.model, **named, **keywords):
        return prepared._positional(*arguments)


def expected(case: Case, kind: str, dtype: torch.dtype, arguments: tuple) -> torch.Tensor:
    prepared = _prepared(case.reference, dtype)
    names = {method: prepared.adapter(method).name for method in KINDS[kind]}
    children = children_of(kind, names, library)
    block = block_of(kind, names, library, children)
    try:
        return run_library(case, dtype, arguments, block)
    except (RuntimeError, ValueError):
        pass
    try:
        repeated = tuple(argument.repeat(2, *[1] * (argument.dim() - 1)) for argument in arguments)
        return run_library(case, dtype, repeated, block, adapter_input_parallelized=True)
    except (RuntimeError, ValueError):
        alone = [block_of(kind, names, library, [child]) for child in children]
        return torch.cat([run_library(case, dtype, arguments, block) for block in alone])


# As Stack and Average there (REFUSED).
REFUSED = {("deberta_v2_shared_eager", "loras"), ("deberta_v2_shared_eager", "behind"),
           ("gptj_eager", "bottlenecks"), ("gptj_eager", "behind")}  # fmt: skip
PACKED = {name for name in CASES if name.startswith(("gpt2", "deberta_eager"))}  # the library composes no LoRAs there


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", thinned(CASES, lambda name: name in OFTEN, seconds=1.5))
def test_parallel_equals_the_library(name: str, kind: str) -> None:
    case = CASES[name]
    if any(method in case.without for method in KINDS[kind]):
        pytest.skip("the library has no such adapter here")
    names = {method: method for method in KINDS[kind]}
    block = block_of(kind, names, torchgraft, children_of(kind, names, torchgraft))
    if (name, kind) in REFUSED or (name in PACKED and "lora_all" in KINDS[kind]):
        with pytest.raises(torchgraft.GraftError, match="compose: 'c'"):
            torchgraft.compose(bank(name), "c", block, verify=False)
        return
    arguments = case.arguments(widest(name), 1)
    wanted = expected(case, kind, widest(name), arguments)
    module = torchgraft.compose(bank(name), "c", block, verify=False)
    module.activate("c")
    with torch.no_grad():
        found = case.hidden(module(*arguments))
    assert found.shape == wanted.shape
    assert difference(found, wanted) <= tolerance(name, "traced", widest(name))
