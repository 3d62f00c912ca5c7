"""Drawn compositions: equal to the library where it runs them, refused where it refuses."""

import random

import pytest
import torch

import torchgraft
from models import make_batch
from oracle import difference
from test_compositions import DTYPE, PARTS, TOLERANCE, bank, expected_states, parts_of, run
from torchgraft import Average, BatchSplit, Split, Stack

_ROWS, _TOKENS = 4, 9
_NESTED = {
    Stack: [Split, BatchSplit, Average],
    Split: [Split, Stack, BatchSplit, Average],
    BatchSplit: [Stack, Split, BatchSplit, Average],
    Average: [Stack, Split, BatchSplit],
}
_BOTTLENECKS = ["bn", "bn2", "gated", "both", "normed", "norms", "par", "par2"]
_LORAS = ["lora", "lora2", "ia3", "dora"]


def parted(drawn: random.Random, total: int, count: int) -> list[int]:
    cuts = sorted(drawn.randint(0, total) for _ in range(count - 1))
    return [end - begin for begin, end in zip([0, *cuts], [*cuts, total], strict=True)]


def draw(drawn: random.Random, names: list[str], kinds: list, rows: int, tokens: int, level: int = 0):
    """A composition on this many rows and tokens, nested as the library allows."""
    kind = Stack if level > 1 else drawn.choice(kinds)
    count = drawn.randint(2, 3)
    sizes = {Split: parted(drawn, tokens, count), BatchSplit: parted(drawn, rows, count)}.get(kind, [0] * count)
    children = []
    for size in sizes:
        inner = [other for other in _NESTED[kind] if level == 0 or other is Stack]
        if inner and level < 2 and not (kind is Stack and level > 0) and drawn.random() < 0.35:
            own = size if kind is BatchSplit else rows, size if kind is Split else tokens
            children.append(draw(drawn, names, inner, *own, level + 1))
        else:
            children.append(drawn.choice(names))
    if kind is Average:
        # The library keeps weights in float32: these are exact there.
        return Average(*children, weights=[drawn.choice([0.25, 1.0, 3.0]) for _ in children], normalize_weights=False)
    if kind is Split:
        return Split(*children, splits=sizes)
    return BatchSplit(*children, batch_sizes=sizes) if kind is BatchSplit else Stack(*children)


def check(variant: str, block, seed: int) -> None:
    batch = make_batch([9, 4, 7, 2], _TOKENS, DTYPE, seed)
    try:
        wanted = expected_states(variant, batch, block)
    except Exception:
        with pytest.raises(torchgraft.GraftError):
            torchgraft.compose(bank(variant, *parts_of(block)), "c", block, verify=False)
        return
    module = torchgraft.compose(bank(variant, *parts_of(block)), "c", block, verify=False)
    ids = torch.full([_ROWS], len(parts_of(block)))
    found = run(module, variant, batch, adapter_ids=ids)
    assert difference(found, wanted) <= TOLERANCE, block


@pytest.mark.parametrize("seed", range(12))
def test_drawn_compositions_of_bottlenecks(seed: int) -> None:
    drawn = random.Random(seed)
    check("bert_sdpa", draw(drawn, _BOTTLENECKS, list(_NESTED), _ROWS, _TOKENS), seed)


@pytest.mark.parametrize("seed", range(8))
def test_drawn_compositions_of_loras(seed: int) -> None:
    drawn = random.Random(100 + seed)
    check("bert_sdpa", draw(drawn, _LORAS, [Stack, BatchSplit, Average], _ROWS, _TOKENS), seed)


@pytest.mark.parametrize("seed", range(8))
def test_drawn_compositions_of_all_methods(seed: int) -> None:
    drawn = random.Random(200 + seed)
    check("bert_sdpa", draw(drawn, list(PARTS), list(_NESTED), _ROWS, _TOKENS), seed)


def test_sizes_of_a_batch_are_named() -> None:
    block = BatchSplit("bn", "bn2", batch_sizes=[1, 2])
    module = torchgraft.compose(bank("bert_sdpa", "bn", "bn2"), "c", block, verify=False)
    module.activate("c")
    with pytest.raises(Exception, match=r"batch has a size of 4 which is not equal to the sum of batch_sizes \[1, 2\]"):
        run(module, "bert_sdpa", make_batch([9, 4, 7, 2], 9, DTYPE))
    block = Split("bn", "bn2", splits=4)
    module = torchgraft.compose(bank("bert_sdpa", "bn", "bn2"), "c", block, verify=False)
    module.activate("c")
    with pytest.raises(Exception, match=r"length 9 which is not equal to the sum of splits \[4, 4\]"):
        run(module, "bert_sdpa", make_batch([9, 4], 9, DTYPE))
