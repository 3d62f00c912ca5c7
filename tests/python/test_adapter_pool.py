"""torchgraft.AdapterPool: adapters in few rows, each row of a batch as its adapter alone."""

import functools
import threading

import pytest
import torch

import torchgraft
from grafted import base, saved_adapter
from models import VARIANTS, make_batch
from oracle import TOLERANCE, difference

pytestmark = pytest.mark.quick

CONFIGS = ["unipelt", "lora_all", "prefix_two_gates"]
# What the first two need.
ROOM = ["unipelt", "lora[r=8,intermediate_lora=True,output_lora=True,attn_matrices=['q','k','v']]"]
FLOAT = torch.float32
VARIANT = VARIANTS["bert_sdpa"]


@functools.cache
def directory(config: str):
    return saved_adapter(VARIANT, FLOAT, config).directory


@functools.cache
def alone(config: str, row: int) -> torch.Tensor:
    """What a row gets of a module with this adapter only; "" is the base."""
    module = base("bert_sdpa", FLOAT)
    if config:
        module = torchgraft.graft(module, adapters={"x": directory(config)}, gate_pooling="unpadded")
    with torch.no_grad():
        return VARIANT.hidden(module(*VARIANT.arguments(BATCH.row(row))))


BATCH = make_batch([9, 7, 4], 9, FLOAT)


def make_pool(**options) -> torchgraft.AdapterPool:
    return torchgraft.AdapterPool(base("bert_sdpa", FLOAT), gate_pooling="unpadded", **options)


def check(lease: torchgraft.Lease, configs: list[str]) -> None:
    """A batch of the lease's rows is what each of these adapters gives alone, in that order."""
    with torch.no_grad():
        hidden = VARIANT.hidden(lease.module(*VARIANT.arguments(BATCH), adapter_ids=lease.ids))
    for row, config in enumerate(configs):
        length = int(BATCH.mask[row].sum())
        assert difference(hidden[row, :length], alone(config, row)[0, :length]) <= TOLERANCE[FLOAT], config


def test_rows_are_as_each_adapter_alone() -> None:
    pool = make_pool(capacity=4)
    pool.insert("unipelt", directory("unipelt"))
    check(pool.acquire(["unipelt", "", ""]), ["unipelt", "", ""])
    for config in CONFIGS[1:]:
        pool.insert(config, directory(config))  # needs more than there is
    with pool.acquire(["lora_all", "", "unipelt"]) as lease:
        assert lease.ids.dtype == torch.int64 and lease.ids[1] == -1
        check(lease, ["lora_all", "", "unipelt"])
    assert pool.resident() == sorted(CONFIGS)
    stats = pool.stats()
    assert stats["capacity"] == 4 and stats["resident"] == stats["loads"] == 3 and stats["rebuilds"] > 0
    assert stats["bank_bytes"] == 4 * stats["row_bytes"] > 0


def test_room_is_made_beforehand() -> None:
    pool = make_pool(capacity=2, room=["unipelt", torchgraft.LoRAConfig(r=4)])
    pool.insert("unipelt", directory("unipelt"))
    assert pool.stats()["rebuilds"] == 0


def test_the_one_used_longest_ago_makes_room_and_a_lease_keeps_its_rows() -> None:
    pool = make_pool(capacity=2)
    pool.insert("a", directory("unipelt"))
    pool.insert("b", directory("lora_all"))
    lease = pool.acquire(["a", "a", "a"])
    pool.insert("c", directory("unipelt"))
    assert pool.resident() == ["a", "c"]  # b, though a is older: a is in use
    assert pool.try_acquire(["b"]) is None
    pool.insert("a", directory("lora_all"))  # another row; the lease's stays
    check(lease, ["unipelt"] * 3)
    check(pool.acquire(["a", "", ""]), ["lora_all", "", ""])
    assert pool.evict("a") and not pool.evict("a")
    check(lease, ["unipelt"] * 3)


def test_leases_of_one_module_share_a_batch() -> None:
    pool = make_pool(capacity=3, room=ROOM)
    pool.insert("a", directory("unipelt"))
    first = pool.acquire(["a"])
    pool.insert("b", directory("lora_all"))
    second, third = pool.acquire(["b"]), pool.acquire([""])
    assert first.module is second.module is third.module
    ids = torch.cat([first.ids, second.ids, third.ids])
    with torch.no_grad():
        hidden = VARIANT.hidden(first.module(*VARIANT.arguments(BATCH), adapter_ids=ids))
    assert difference(hidden[1, :7], alone("lora_all", 1)[0, :7]) <= TOLERANCE[FLOAT]


def test_insert_waits_for_a_lease_without_stopping_python() -> None:
    pool = make_pool(capacity=1)
    pool.insert("a", directory("unipelt"))
    lease = pool.acquire(["a"])
    thread = threading.Thread(target=pool.insert, args=("b", directory("unipelt")))
    thread.start()
    thread.join(timeout=0.5)
    assert thread.is_alive()
    lease.__exit__()
    thread.join(timeout=60)
    assert not thread.is_alive() and pool.resident() == ["b"]


def test_errors_leave_the_pool_as_it_was(tmp_path) -> None:
    pool = make_pool(capacity=2)
    pool.insert("a", directory("unipelt"))
    with pytest.raises(torchgraft.GraftError, match="no adapter 'b' is in memory: .* In memory: a"):
        pool.acquire(["a", "b"])
    with pytest.raises(torchgraft.GraftError):
        pool.insert("b", tmp_path)
    with pytest.raises(torchgraft.GraftError, match="at least 1, got 0"):
        make_pool(capacity=0)
    assert pool.resident() == ["a"]


def test_what_has_no_room_is_said(tmp_path) -> None:
    module = base("bert_sdpa", FLOAT)
    nothing = torchgraft.LoRAConfig(leave_out=list(range(99)))
    room = ["lora", nothing, torchgraft.LoRAConfig(r=2**20), "unipelt"]
    faults = torchgraft.check_room(module, room, max_row_bytes=10_000_000)
    assert [bool(fault) for fault in faults] == [False, True, True, False]
    assert "asks for nothing" in faults[1] and "at most 10000000 bytes" in faults[2]
    pool = make_pool(capacity=2, room=["lora"], max_row_bytes=10_000_000)
    large = torchgraft.graft(module, torchgraft.LoRAConfig(r=40_000), "large")
    torchgraft.save_adapter(large, "large", tmp_path)
    with pytest.raises(torchgraft.GraftError, match="adapters of at most 10000000 bytes each"):
        pool.insert("large", tmp_path)
    pool.insert("lora_all", directory("lora_all"))
    check(pool.acquire(["lora_all", "", ""]), ["lora_all", "", ""])
