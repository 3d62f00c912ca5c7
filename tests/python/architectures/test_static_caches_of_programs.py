"""A program that writes keys and values into tensors of a fixed length: the same as the trace of the same decoder."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import own_cached_models as decoders
import torchgraft
from models import POSITIONS, VOCABULARY
from thinned import thinned

AUTO = torch.export.Dim.AUTO


def _arguments(rows: int, tokens: int, cached: int) -> tuple:
    places = torch.arange(cached, cached + tokens)
    hidden = torch.arange(POSITIONS) > places[:, None]
    mask = torch.zeros(rows, 1, tokens, POSITIONS).masked_fill(hidden, -torch.inf)
    keys, values = (
        [torch.randn(rows, POSITIONS, decoders.KV_HEADS, decoders.HEAD_DIM) for _ in range(decoders.LAYERS)]
        for _ in range(2)
    )
    return torch.randint(0, VOCABULARY, (rows, tokens)), mask, places[None].repeat(rows, 1), places, keys, values


def _copied(arguments: tuple) -> tuple:
    return tree_map(torch.clone, arguments)


def _program(model: torch.nn.Module, example: tuple, one_token: bool) -> torch.jit.ScriptModule:
    tokens = {} if one_token else {1: AUTO}
    cache = [{0: AUTO}] * decoders.LAYERS
    shapes = (
        {0: AUTO} | tokens,
        {0: AUTO} | ({} if one_token else {2: AUTO}),
        {0: AUTO} | tokens,
        None if one_token else {0: AUTO},
        cache,
        cache,
    )
    return torchgraft.from_program(torch.export.export(model, example, dynamic_shapes=shapes, strict=False))


@pytest.mark.parametrize(
    "decoder",
    thinned(
        [decoders.IndexCopyInPlace, decoders.IndexCopy, decoders.Scatter, decoders.Where, decoders.OneHot],
        lambda decoder: decoder is decoders.IndexCopyInPlace,
        seconds=4,
    ),
    ids=lambda decoder: decoder.__name__,
)
def test_a_program_with_a_static_cache_equals_the_trace(decoder: type, tmp_path: Path) -> None:
    torch.manual_seed(0)
    one_token = decoder in (decoders.Where, decoders.OneHot)
    model, example = decoder(fused=True).eval(), _arguments(2, 1 if one_token else 3, 4)
    program = _program(model, _copied(example), one_token)
    assert [layer["cache"] for layer in torchgraft.inspect(program)["layers"]] == ["static"] * decoders.LAYERS
    traced = torch.jit.trace(model, _copied(example), check_trace=False, strict=False)
    written = torchgraft.graft(traced, "unipelt", "task", verify=False)
    with torch.no_grad():
        for bank in written.adapters.parameters():
            bank.normal_(std=0.2)
    torchgraft.save_adapter(written, "task", tmp_path)
    read = torchgraft.load_adapter(program, tmp_path, "task")
    arguments = _arguments(3, 1 if one_token else 2, 7)
    with torch.no_grad():
        wanted: list[Tensor] = tree_leaves(written(*_copied(arguments)))
        found: list[Tensor] = tree_leaves(read(*tree_leaves(_copied(arguments))))
        plain = model(*_copied(arguments))[0]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert (wanted[0] - plain).abs().max() > 1e-3


def test_a_write_through_a_slice_is_refused_with_its_reason() -> None:
    example = _arguments(2, 3, 4)
    program = _program(decoders.IndexPut(fused=True).eval(), _copied(example), one_token=False)
    with pytest.raises(torchgraft.GraftError, match="read it behind the write"):
        torchgraft.graft(program, "prefix_tuning_flat", "task")
