"""Compositions of adapters that change the stream itself: of ReFTs and invertible adapters only the first acts."""

import functools
import tempfile
from pathlib import Path

import pytest
import torch
from torch import nn

import adapters
import torchgraft
from adapters import DoubleSeqBnInvConfig, LoReftConfig, SeqBnConfig, SeqBnInvConfig
from grafted import base, reloaded
from models import VARIANTS, Batch, hugging_face, make_batch
from oracle import TOLERANCE, difference, make_oracle_adapter, say_subtraction
from torchgraft import Average, BatchSplit, Split, Stack

pytestmark = pytest.mark.quick

DOUBLE = torch.float64
VARIANT = VARIANTS["bert_sdpa"]
CONFIGS = {
    "inv": SeqBnInvConfig(),
    "inv2": DoubleSeqBnInvConfig(inv_adapter_reduction_factor=3.5, non_linearity="gelu"),
    "loreft": LoReftConfig(suffix_positions=1),
    "loreft2": LoReftConfig(r=2, prefix_positions=1, suffix_positions=2),
    "bn": SeqBnConfig(use_gating=True, reduction_factor=6),
}


@functools.cache
def _library() -> nn.Module:
    model = hugging_face("bert", "sdpa", DOUBLE)
    adapters.init(model)
    for seed, (name, config) in enumerate(CONFIGS.items()):
        make_oracle_adapter(model, config, name, 40 + seed)
    return model.eval()


@functools.cache
def _bank() -> torch.jit.ScriptModule:
    folder = Path(tempfile.mkdtemp(prefix="torchgraft_streams_"))
    for name, config in CONFIGS.items():
        _library().save_adapter(str(folder / name), name)
        say_subtraction(folder / name, config)
    return torchgraft.graft(base("bert_sdpa", DOUBLE), adapters={name: folder / name for name in CONFIGS})


def _library_block(block):
    if isinstance(block, str):
        return block
    children = [_library_block(child) for child in block.children]
    return getattr(adapters.composition, type(block).__name__)(*children, **block._kwargs())


def _expected(block, batch) -> torch.Tensor:
    model = _library()
    model.set_active_adapters(None if block is None else _library_block(block))
    with torch.no_grad():
        return model(batch.ids, batch.mask)[0]


def _hidden(module, batch, **options) -> torch.Tensor:
    with torch.no_grad():
        return VARIANT.hidden(module(*VARIANT.arguments(batch), **options))


BLOCKS = {
    "mad_x": Stack("inv", "bn"),
    "mad_x_behind": Stack("bn", "inv"),
    "mad_x_twice": Stack("inv", "inv2", "bn"),
    "reft_first": Stack("loreft", "bn"),
    "reft_behind": Stack("bn", "loreft"),
    "refts": Stack("loreft2", "loreft", "bn"),
    "reft_inv": Stack("loreft", "inv"),
    "average": Stack("inv", Average("bn", "inv", weights=[0.25, 0.75])),
    "nested": Stack(Average("inv2", "bn", weights=[0.25, 0.75]), "bn"),
    "split": Split("inv", "bn", splits=[4, 5]),
    "rows": BatchSplit("inv", "bn", batch_sizes=[1, 2]),
    "rows_behind": BatchSplit("bn", "inv", batch_sizes=[2, 1]),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_all_rows_equal_the_library(name: str) -> None:
    module = torchgraft.compose(_bank(), "c", BLOCKS[name], verify=not name.startswith("rows"))
    module.activate("c")
    batch = make_batch([9, 4, 7], 9, DOUBLE)
    wanted = _expected(BLOCKS[name], batch)
    first = torchgraft.composition.adapters_in(BLOCKS[name])[0]
    if first != "bn":  # what the test would not see otherwise
        assert difference(wanted, _expected("bn", batch)) > 1e-3
    for each in (module, reloaded(module)):
        assert difference(_hidden(each, batch), wanted) <= TOLERANCE[DOUBLE]


@functools.cache
def _composed() -> torch.jit.ScriptModule:
    module = _bank()
    for name, block in BLOCKS.items():
        if not name.startswith("rows"):
            module = torchgraft.compose(module, name, block, verify=False)
    return module


def test_each_row_of_a_mixed_batch_equals_itself_alone() -> None:
    module = _composed()
    names = module.adapter_names()
    rows = [None, *names, "mad_x", None]
    batch = make_batch([9 - i % 6 for i in range(len(rows))], 9, DOUBLE)
    ids = torch.tensor([-1 if name is None else names.index(name) for name in rows])
    found = _hidden(module, batch, adapter_ids=ids)
    for row, name in enumerate(rows):
        wanted = _expected(BLOCKS.get(name, name), batch.row(row))
        assert difference(found[row : row + 1], wanted) <= TOLERANCE[DOUBLE], f"row {row}, {name}"


@pytest.mark.parametrize("sizes", [[1, 2], [3, 0], [0, 3]])
def test_parts_of_a_mixed_batch_keep_their_first_adapter(sizes: list[int]) -> None:
    """The rows of a BatchSplit stand between others'; all of them have the invertible adapter of its first child."""
    block = BatchSplit("inv", "bn", batch_sizes=sizes)
    module = torchgraft.compose(_bank(), "c", block, verify=False)
    names = module.adapter_names()
    ids = torch.tensor([names.index("c"), -1, names.index("c"), names.index("loreft"), names.index("c")])
    batch = make_batch([9, 9, 9, 9, 9], 9, DOUBLE)
    found = _hidden(module, batch, adapter_ids=ids)
    at = [0, 2, 4]
    own = Batch(batch.ids[at], batch.mask[at], batch.embeddings[at])
    assert difference(found[at], _expected(block, own)) <= TOLERANCE[DOUBLE]
    assert difference(found[1:2], _expected(None, batch.row(1))) <= TOLERANCE[DOUBLE]
    assert difference(found[3:4], _expected("loreft", batch.row(3))) <= TOLERANCE[DOUBLE]
