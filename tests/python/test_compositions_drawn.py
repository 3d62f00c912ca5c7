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


# How the library says that it cannot run a composition: names and blocks that it lacks, and shapes that do not fit.
_REFUSALS = (
    AttributeError,
    IndexError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
    ZeroDivisionError,
)


def check(variant: str, block, seed: int) -> bool:
    """Returns whether the library runs the composition, so that results were compared."""
    batch = make_batch([9, 4, 7, 2], _TOKENS, DTYPE, seed)
    try:
        wanted = expected_states(variant, batch, block)
    except _REFUSALS:
        with pytest.raises(torchgraft.GraftError):
            torchgraft.compose(bank(variant, *parts_of(block)), "c", block, verify=False)
        return False
    module = torchgraft.compose(bank(variant, *parts_of(block)), "c", block, verify=False)
    ids = torch.full([_ROWS], len(parts_of(block)))
    found = run(module, variant, batch, adapter_ids=ids)
    assert difference(found, wanted) <= TOLERANCE, block
    return True


# (seed, names, kinds) of all draws.
_DRAWS = [
    *((seed, _BOTTLENECKS, list(_NESTED)) for seed in range(12)),
    *((seed, _LORAS, [Stack, BatchSplit, Average]) for seed in range(100, 108)),
    *((seed, list(PARTS), list(_NESTED)) for seed in range(200, 208)),
]

# Those that the library refuses. All others are compared.
_REFUSED = {2, 4, 5, 6, 10, 11, 101, 104, 105, 106, 202, 204, 205, 207}


@pytest.mark.parametrize(("seed", "names", "kinds"), _DRAWS, ids=lambda value: str(value) if type(value) is int else "")
def test_drawn_compositions(seed: int, names: list[str], kinds: list) -> None:
    block = draw(random.Random(seed), names, kinds, _ROWS, _TOKENS)
    assert check("bert_sdpa", block, seed) == (seed not in _REFUSED)


def test_most_draws_are_compared() -> None:
    assert len(_REFUSED) <= len(_DRAWS) // 2


# The vector of an (IA)^3 has one row for all tokens. Blocks cut and join vectors by rows.
@pytest.mark.parametrize(
    "block",
    [
        BatchSplit("ia3", "ia3b", batch_sizes=[2, 2]),
        BatchSplit("ia3", "ia3b", batch_sizes=[3, 1]),
        BatchSplit("ia3", "ia3b", batch_sizes=[4, 0]),
        BatchSplit("ia3", "ia3b", batch_sizes=[0, 4]),
        BatchSplit("ia3", "ia3b", "ia3", batch_sizes=[2, 1, 1]),
        BatchSplit("ia3", Stack("ia3b", "ia3"), batch_sizes=[1, 3]),
        BatchSplit(Average("ia3", "ia3b", weights=[0.25, 0.75]), "ia3", batch_sizes=[3, 1]),
        Stack("ia3", BatchSplit("ia3b", "ia3", batch_sizes=[2, 2])),
        Stack("lora", BatchSplit("ia3b", "ia3", batch_sizes=[1, 3])),
        Stack(BatchSplit("ia3b", "ia3", batch_sizes=[1, 3]), "ia3"),
        Stack("ia3", Average("ia3b", "ia3", weights=[0.25, 0.75])),
    ],
    ids=repr,
)
def test_vectors_of_rows(block) -> None:
    assert check("bert_sdpa", block, 5)


# The library joins what its bottlenecks' up projections made where the first part has some.
@pytest.mark.parametrize(
    ("block", "runs"),
    [
        (BatchSplit("both", "bn", batch_sizes=[2, 2]), False),
        (BatchSplit("both", "bn", "both", batch_sizes=[2, 1, 1]), False),
        (Stack(BatchSplit("both", "bn", batch_sizes=[2, 2]), "both"), False),
        (Stack("both", BatchSplit("both", "bn", "both", batch_sizes=[2, 1, 1])), True),
        (BatchSplit("bn", Split("bn2", "bn", splits=[4, 5]), batch_sizes=[2, 2]), False),
        (BatchSplit(Split("bn2", "bn", splits=[4, 5]), "bn", batch_sizes=[2, 2]), True),
    ],
    ids=repr,
)
def test_parts_that_the_library_can_join(block, runs: bool) -> None:
    assert check("bert_sdpa", block, 7) == runs


# Behind a BatchSplit the library cuts a prefix as it has cut the first part, and repeats it.
@pytest.mark.parametrize(
    ("block", "runs"),
    [
        (Stack(BatchSplit("prefix", "prefix3", batch_sizes=[2, 2]), "prefix"), True),
        (Stack(BatchSplit("prefix", "prefix3", batch_sizes=[1, 3]), "prefix"), True),
        (Stack(BatchSplit("prefix", "prefix3", batch_sizes=[3, 1]), "prefix"), False),
        (Stack(BatchSplit("prefix", "prefix3", batch_sizes=[0, 4]), "prefix"), False),
        (Stack(BatchSplit("prefix", "prefix3", batch_sizes=[4, 0]), "prefix"), True),
        (Stack(BatchSplit("prefix", "prefix3", batch_sizes=[1, 3]), "prefix2"), True),
        (Stack(BatchSplit("prefix", "prefix3", batch_sizes=[2, 2]), "prefix2"), False),
        (Stack(BatchSplit("bn", "bn2", batch_sizes=[2, 2]), "prefix"), True),
        (Stack(BatchSplit("bn", "bn2", batch_sizes=[3, 1]), "prefix"), False),
        (Stack(BatchSplit("bn", "lora", batch_sizes=[2, 2]), "bn2"), False),
        (Stack("prefix2", BatchSplit("prefix", "prefix3", batch_sizes=[2, 2])), True),
        (Stack(BatchSplit("prefix", "prefix3", batch_sizes=[2, 2]), "lora"), True),
        (BatchSplit(Stack("prefix", "prefix2"), Stack("prefix2", "prefix3"), batch_sizes=[2, 2]), True),
    ],
    ids=repr,
)
def test_prefixes_behind_a_batch_split(block, runs: bool) -> None:
    assert check("bert_sdpa", block, 6) == runs


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
