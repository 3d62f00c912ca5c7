"""AdapterPlus: as the library computes it; its stochastic depth drops whole rows in training, and only there.

The library needs torchvision for stochastic depth. Where it is not installed, adapters are made without, and the field
is written into their directories.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch

import adapters
import torchgraft
from grafted import base, saved_adapter
from models import VARIANTS, make_batch
from oracle import TOLERANCE, difference, oracle_for

FLOAT = torch.float32
VARIANT = VARIANTS["bert_sdpa"]


def _directory(folder: Path) -> Path:
    """The library's adapter with the field's default, 0.1."""
    shutil.copytree(saved_adapter(VARIANT, FLOAT, "adapter_plus").directory, folder)
    path = folder / "adapter_config.json"
    content = json.loads(path.read_text())
    content["config"]["stochastic_depth"] = 0.1
    path.write_text(json.dumps(content))
    return folder


def test_the_names_are_those_of_the_class() -> None:
    expected = adapters.AdapterPlusConfig().to_dict()
    for name in ("adapter_plus", "AdapterPlusConfig", torchgraft.AdapterPlusConfig()):
        module = torchgraft.graft(base("bert_sdpa", FLOAT), name, "task")
        assert json.loads(torchgraft.list_adapters(module)[0].config) == json.loads(json.dumps(expected))


@pytest.mark.parametrize("trainable", [False, True])
def test_a_directory_with_stochastic_depth_equals_the_library(trainable: bool, tmp_path: Path) -> None:
    module = torchgraft.load_adapter(base("bert_sdpa", FLOAT), _directory(tmp_path / "a"), "task", trainable=trainable)
    batch = make_batch([9, 6, 4], 9, FLOAT)
    expected = oracle_for(VARIANT, FLOAT).run(VARIANT, batch, saved_adapter(VARIANT, FLOAT, "adapter_plus"))
    with torch.no_grad():
        assert difference(VARIANT.hidden(module(*VARIANT.arguments(batch))), expected.hidden) <= TOLERANCE[FLOAT]
    torchgraft.save_adapter(module, "task", tmp_path / "b")
    written = json.loads((tmp_path / "b" / "adapter_config.json").read_text())["config"]
    assert written == adapters.AdapterPlusConfig(reduction_factor=12).to_dict()


def test_a_parallel_bottleneck_drops_no_rows() -> None:
    """The library's ParallelAdapter has the field and does not read it."""
    module = torchgraft.graft(
        base("bert_sdpa", FLOAT), "par_bn[stochastic_depth=0.9, dropout=0.0]", "task", trainable=True
    )
    batch = make_batch([9] * 8, 9, FLOAT)
    with torch.no_grad():
        for parameter in torchgraft.trainable_parameters(module, "task").values():
            parameter.normal_()
        expected = VARIANT.hidden(module(*VARIANT.arguments(batch)))
        module.adapters.train()
        assert torch.equal(VARIANT.hidden(module(*VARIANT.arguments(batch))), expected)


def test_stochastic_depth_drops_whole_rows_in_training() -> None:
    """What is left is scaled: a row's share is 0 or 1 / (1 - p) of what it is in serving."""
    torch.manual_seed(0)
    settings = dict(batch_first=True, dropout=0.0)
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, norm_first=True, **settings)
    plain = torch.jit.script(torch.nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval())
    ln = "original_ln_before=False, original_ln_after=True, residual_before_ln=True"
    config = f"adapter_plus[stochastic_depth=0.75, reduction_factor=2, {ln}]"
    module = torchgraft.graft(plain, config, "task", trainable=True)
    with torch.no_grad():
        for parameter in torchgraft.trainable_parameters(module, "task").values():
            parameter.normal_()
        x = torch.randn(800, 3, 16)
        share = module(x) - plain(x)
        torch.testing.assert_close(torchgraft.freeze_adapter(module, "task")(x), module(x))
        module.adapters.train()
        ratios = (module(x) - plain(x)).flatten(1) / share.flatten(1)
    rows = ratios.median(1).values
    torch.testing.assert_close(ratios, rows[:, None].expand_as(ratios), atol=2e-2, rtol=0)
    kept = rows > 2
    torch.testing.assert_close(rows, torch.where(kept, 4.0, 0.0), atol=2e-3, rtol=0)
    assert 0.18 < kept.float().mean() < 0.32
