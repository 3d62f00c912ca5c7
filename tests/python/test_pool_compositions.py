"""Compositions in torchgraft.AdapterPool: each row as in a module with compose()."""

import pytest
import torch

import torchgraft

pytestmark = pytest.mark.quick

CONFIGS = {
    "a": "seq_bn[reduction_factor=4]",
    "b": "seq_bn[reduction_factor=8]",
    "c": "double_seq_bn[reduction_factor=8]",
}
TEXTS = ["Stack(a, b)", "Average(b, a, weights=[0.25, 0.75])", "Stack(c, a)", "Split(a, b, splits=[4, 6])"]

NAMES = {text: f"composition {index}" for index, text in enumerate(TEXTS)}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base, the directories of three adapters, and a module with them and with all compositions."""
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    base = torch.jit.script(torch.nn.TransformerEncoder(layer, 2).eval())
    folder = tmp_path_factory.mktemp("adapters")
    for name, config in CONFIGS.items():
        module = torchgraft.graft(base, config, name)
        with torch.no_grad():
            for parameter in module.adapters.parameters():
                if parameter.dim() > 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        torchgraft.save_adapter(module, name, folder / name)
    base_and_all = base
    for name in CONFIGS:
        base_and_all = torchgraft.load_adapter(base_and_all, folder / name, name)
    for text, name in NAMES.items():
        base_and_all = torchgraft.compose(base_and_all, name, text, verify=False)
    return base, folder, base_and_all


def pool_of(made, **options) -> torchgraft.AdapterPool:
    pool = torchgraft.AdapterPool(made[0], capacity=3, **options)
    for name in CONFIGS:
        pool.insert(name, made[1] / name)
    return pool


def rows_of(module, names: list[str], x: torch.Tensor) -> torch.Tensor:
    known = module.adapter_names()
    ids = torch.tensor([known.index(NAMES.get(name, name)) if name else -1 for name in names])
    with torch.no_grad():
        return module(x, adapter_ids=ids)


def test_a_mixed_batch_is_that_of_a_module_with_the_compositions(made) -> None:
    pool, x = pool_of(made), torch.randn(8, 10, 32)
    names = [TEXTS[0], "a", TEXTS[1], "", TEXTS[2], TEXTS[3], "c", TEXTS[0]]
    with pool.acquire(names) as lease, torch.no_grad():
        assert lease.ids[0] == lease.ids[7] >= 3 and lease.ids[3] == -1
        got = lease.module(x, adapter_ids=lease.ids)
    torch.testing.assert_close(got, rows_of(made[2], names, x), rtol=0, atol=1e-5)
    assert pool.try_acquire(["Stack(b, a)"]) is None and pool.try_acquire([TEXTS[0]]) is not None
    assert pool.stats()["compositions"] == len(TEXTS)


def test_names_are_given_to_blocks_and_taken_away(made) -> None:
    pool, x = pool_of(made), torch.randn(2, 10, 32)
    pool.compose("both", torchgraft.Stack("a", "b"))
    assert pool.compositions() == {"both": "Stack(a, b)"}
    with pool.acquire(["both", ""]) as lease, torch.no_grad():
        got = lease.module(x, adapter_ids=lease.ids)
    torch.testing.assert_close(got, rows_of(made[2], [TEXTS[0], ""], x), rtol=0, atol=1e-5)
    with pytest.raises(torchgraft.GraftError, match="a composition is called 'both'; remove it first"):
        pool.insert("both", made[1] / "a")
    assert pool.remove_composition("both") and not pool.remove_composition("both")
    with pytest.raises(torchgraft.GraftError, match="no adapter 'both' is in memory"):
        pool.acquire(["both"])


def test_a_module_keeps_its_compositions(made) -> None:
    pool = torchgraft.AdapterPool(made[2], capacity=4)
    assert pool.compositions().keys() == set(NAMES.values())
    x = torch.randn(1, 10, 32)
    with pool.acquire([NAMES[TEXTS[1]]]) as lease, torch.no_grad():
        got = lease.module(x, adapter_ids=lease.ids)
    torch.testing.assert_close(got, rows_of(made[2], [TEXTS[1]], x), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("Stack(a, b, a)", "expected at most 2 adapters in a composition, got 3; raise max_composition_parts"),
        ("Stack(Average(a, b))", "expected at most 1 blocks one in another, got 2; raise max_composition_depth"),
        ("Fuse(a, b)", "needs AdapterFusion layers, which no pool holds yet"),
        ("Stack(a, d)", "no adapter 'd' is in memory"),
        ("Stack(a", "composition: expected"),
        ("Average(a, c)", "compose: 'Average\\(a, c\\)'"),
    ],
)
def test_what_is_refused_leaves_the_pool_as_it_was(made, text, fault) -> None:
    pool, x = pool_of(made, max_composition_parts=2, max_composition_depth=1), torch.randn(1, 10, 32)
    with pytest.raises(torchgraft.GraftError, match=fault):
        pool.acquire([text])
    with pool.acquire([TEXTS[0]]) as lease, torch.no_grad():
        got = lease.module(x, adapter_ids=lease.ids)
    torch.testing.assert_close(got, rows_of(made[2], [TEXTS[0]], x), rtol=0, atol=1e-5)
