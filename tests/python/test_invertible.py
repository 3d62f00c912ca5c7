"""Invertible adapters: equal to adapters==1.3.0, live, before the layers and before the output embeddings."""

import functools
import json
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import adapters
import torchgraft
from adapters import (
    BnConfig,
    ConfigUnion,
    DoubleSeqBnInvConfig,
    LoRAConfig,
    SeqBnConfig,
    SeqBnInvConfig,
)
from grafted import base, reloaded
from models import VARIANTS, hugging_face, make_batch
from oracle import TOLERANCE, difference, randomise, varied_batches

DOUBLE = torch.float64
VARIANT = VARIANTS["bert_sdpa"]
CONFIGS = {
    "seq_bn_inv": SeqBnInvConfig(),
    "double_seq_bn_inv": DoubleSeqBnInvConfig(inv_adapter_reduction_factor=3.5, non_linearity="gelu"),
    "gated_inv": SeqBnInvConfig(use_gating=True, inv_adapter_reduction_factor=1, leave_out=[0, 1]),
    "union_inv": ConfigUnion(SeqBnInvConfig(), LoRAConfig(r=3, use_gating=True)),
    "seq_bn": SeqBnConfig(reduction_factor=6),
    "lora": LoRAConfig(r=4),
}
INVERTIBLE = [name for name in CONFIGS if name.endswith("_inv")]


@functools.cache
def _library() -> nn.Module:
    model = hugging_face("bert", "sdpa", DOUBLE)
    adapters.init(model)
    for seed, (name, config) in enumerate(CONFIGS.items()):
        model.add_adapter(name, config=config)
        model.double()
        randomise(model, name, seed)
    return model.eval()


@functools.cache
def _directory(name: str) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="torchgraft_invertible_")) / name
    _library().save_adapter(str(folder), name)
    return folder


def _expected(name: str | None, batch) -> Tensor:
    model = _library()
    model.set_active_adapters(name)
    return model(batch.ids, batch.mask)[0]


def _hidden(module, batch, **options) -> Tensor:
    return VARIANT.hidden(module(*VARIANT.arguments(batch), **options))


@functools.cache
def _bank() -> torch.jit.ScriptModule:
    return torchgraft.graft(base("bert_sdpa", DOUBLE), adapters={name: _directory(name) for name in CONFIGS})


@pytest.mark.quick
@pytest.mark.parametrize("name", INVERTIBLE)
def test_an_adapter_equals_the_library(name: str) -> None:
    module = torchgraft.graft(base("bert_sdpa", DOUBLE), adapters={"task": _directory(name)})
    for batch in varied_batches(VARIANT, DOUBLE):
        with torch.no_grad():
            assert difference(_hidden(module, batch), _expected(name, batch)) <= TOLERANCE[DOUBLE]
            assert difference(_hidden(reloaded(module), batch), _expected(name, batch)) <= TOLERANCE[DOUBLE]
            module.deactivate()
            assert torch.equal(_hidden(module, batch), _hidden(base("bert_sdpa", DOUBLE), batch))
            module.activate("task")


@pytest.mark.quick
@pytest.mark.parametrize("form", ["plain", "lowered", "optimised", "loaded"])
def test_each_row_of_a_mixed_batch_equals_the_library(form: str) -> None:
    bank = _bank()
    rows = [None, *CONFIGS, None]
    batch = make_batch([9 - i % 5 for i in range(len(rows))], 9, DOUBLE)
    ids = torch.tensor([-1 if name is None else bank.adapter_names().index(name) for name in rows])
    module = {"plain": lambda: bank, "lowered": lambda: torchgraft.lower(bank), "loaded": lambda: reloaded(bank),
              "optimised": lambda: torchgraft.optimize(bank)}[form]()  # fmt: skip
    with torch.no_grad():
        hidden = _hidden(module, batch, adapter_ids=ids)
        for row, name in enumerate(rows):
            found = difference(hidden[row : row + 1], _expected(name, batch.row(row)))
            assert found <= TOLERANCE[DOUBLE], f"row {row} ({name}) differs by {found}"


@pytest.mark.parametrize("name", ["own_post_sdpa", "own_pre_sdpa_bool", "encoder_script_post",
                                  "encoder_slow_pre_seq_first"])  # fmt: skip
def test_stacks_take_it_at_their_input(name: str) -> None:
    """The rows of a stack that reads embeddings: the block of the library, applied to its input."""
    variant = VARIANTS[name]
    bottleneck = dict(mh_adapter=False, output_adapter=False, reduction_factor=2, non_linearity="relu")
    config = BnConfig(**bottleneck, inv_adapter="nice", inv_adapter_reduction_factor=2)
    torch.manual_seed(0)
    module = torchgraft.graft(base(name, DOUBLE), config, "task")
    weights = {key.rsplit(".", 1)[1]: value[0] for key, value in module.adapters.named_parameters()}
    block = adapters.methods.modeling.NICECouplingBlock([[48]], non_linearity="relu", reduction_factor=2).double()
    with torch.no_grad():
        for parameter in module.adapters.parameters():
            if parameter.is_floating_point():
                parameter.normal_(std=0.3)
        for net, side in (("F", "f"), ("G", "g")):
            for layer, part in ((0, "down"), (2, "up")):
                for kind in ("weight", "bias"):
                    target = getattr(getattr(block, net)[layer], kind)
                    target.copy_(weights[f"{side}_{part}_{kind}"])
        batch = make_batch([9, 6] if variant.masked else [9, 9], 9, DOUBLE)
        changed = type(batch)(batch.ids, batch.mask, block(batch.embeddings))
        found = variant.hidden(module(*variant.arguments(batch)))
        expected = variant.hidden(base(name, DOUBLE)(*variant.arguments(changed)))
    assert difference(variant.compared(found, batch), variant.compared(expected, batch)) <= TOLERANCE[DOUBLE]


@pytest.mark.parametrize("name", INVERTIBLE)
def test_a_directory_comes_back_bit_for_bit(name: str, tmp_path) -> None:
    module = torchgraft.load_adapter(base("bert_sdpa", DOUBLE), _directory(name), name)
    torchgraft.save_adapter(module, name, tmp_path)
    theirs = torch.load(_directory(name) / "pytorch_adapter.bin", weights_only=True)
    ours = load_file(tmp_path / "adapter.safetensors")
    assert sorted(ours) == sorted(theirs)
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())
    written, read = (json.loads((path / "adapter_config.json").read_text()) for path in (tmp_path, _directory(name)))
    assert adapters.AdapterConfig.load(written["config"]) == adapters.AdapterConfig.load(read["config"])
    model = hugging_face("bert", "sdpa", DOUBLE)
    adapters.init(model)
    model.load_adapter(str(tmp_path), use_safetensors=True, set_active=True)
    batch = make_batch([9, 6], 9, DOUBLE)
    with torch.no_grad():
        found = model.double().eval()(batch.ids, batch.mask)[0]
        assert difference(found, _expected(name, batch)) <= 1e-5  # the library loads into float32


@pytest.mark.quick
@pytest.mark.parametrize("name", INVERTIBLE)
def test_gradients_equal_the_library(name: str) -> None:
    module = torchgraft.load_adapter(base("bert_sdpa", DOUBLE), _directory(name), "task", trainable=True)
    named = torchgraft.trainable_parameters(module, "task")
    batch = make_batch([7, 4], 7, DOUBLE)
    weights = torch.randn(2, 7, 48, dtype=DOUBLE, generator=torch.Generator().manual_seed(8))
    ours = torch.autograd.grad((_hidden(module, batch) * weights).sum(), [*named.values()])
    model = _library()
    model.train_adapter(name)
    theirs = {key: value for key, value in model.named_parameters() if f".{name}." in key and value.requires_grad}
    model.eval()
    gradients = torch.autograd.grad((_expected(name, batch) * weights).sum(), [*theirs.values()])
    found = set()
    for (key, value), gradient in zip(theirs.items(), gradients, strict=True):
        pairs = [(mine, grad) for (mine, parameter), grad in zip(named.items(), ours, strict=True)
                 if torch.equal(parameter, value)]  # fmt: skip
        assert len(pairs) == 1, key
        found.add(pairs[0][0])
        torch.testing.assert_close(pairs[0][1], gradient, rtol=1e-9, atol=1e-10, msg=key)
    assert found == set(named)


def test_a_learner_in_a_bank_moves_alone() -> None:
    module = torchgraft.graft(_bank(), "seq_bn_inv", "learner", trainable=True)
    batch = make_batch([9, 6], 9, DOUBLE)
    own = len(CONFIGS)
    with torch.no_grad():
        before = [_hidden(module, batch, adapter_ids=torch.full((2,), i)) for i in range(-1, own + 1)]
    optimizer = torch.optim.AdamW([*torchgraft.trainable_parameters(module, "learner").values()], lr=0.01)
    _hidden(module, batch, adapter_ids=torch.tensor([own, 0])).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        after = [_hidden(module, batch, adapter_ids=torch.full((2,), i)) for i in range(-1, own + 1)]
        assert all(torch.equal(before[i], after[i]) for i in range(own + 1))
        assert (before[-1] - after[-1]).abs().max() > 1e-4
        frozen = torchgraft.freeze_adapter(module, "learner")
        assert difference(_hidden(frozen, batch, adapter_ids=torch.full((2,), own)), after[-1]) <= TOLERANCE[DOUBLE]


@pytest.mark.quick
def test_a_pool_mixes_rows() -> None:
    names = [*CONFIGS]
    pool = torchgraft.AdapterPool(base("bert_sdpa", DOUBLE), capacity=8, room=["seq_bn_inv"])
    batch = make_batch([9] * len(names), 9, DOUBLE)
    for _ in range(2):
        for name in names:
            pool.insert(name, _directory(name))
        with pool.acquire([*names]) as lease, torch.no_grad():
            hidden = VARIANT.hidden(lease.module(*VARIANT.arguments(batch), adapter_ids=lease.ids))
            for row, name in enumerate(names):
                assert difference(hidden[row : row + 1], _expected(name, batch.row(row))) <= TOLERANCE[DOUBLE], name


def test_an_exported_bank_gives_the_same() -> None:
    bank = _bank()
    batch = make_batch([9, 6, 8, 4], 9, DOUBLE)
    ids = torch.tensor([0, 1, -1, 5])
    program = torchgraft.export(bank, VARIANT.arguments(make_batch([7, 7], 7, DOUBLE)))
    with torch.no_grad():
        found = VARIANT.hidden(program.module()(*VARIANT.arguments(batch), ids))
        assert difference(found, _hidden(bank, batch, adapter_ids=ids)) <= TOLERANCE[DOUBLE]


def test_averages_are_the_librarys() -> None:
    model = hugging_face("bert", "sdpa", DOUBLE)
    adapters.init(model)
    module = base("bert_sdpa", DOUBLE)
    with tempfile.TemporaryDirectory() as folder:
        for seed, each in enumerate("xy"):
            model.add_adapter(each, config=CONFIGS["gated_inv"])
            model.double()
            randomise(model, each, 50 + seed)
            model.save_adapter(f"{folder}/{each}", each)
            module = torchgraft.load_adapter(module, f"{folder}/{each}")
    model.average_adapter("mean", ["x", "y"], weights=[1.0, 3.0])
    model.double().eval().set_active_adapters("mean")
    average = torchgraft.average_adapter(module, "mean", {"x": 1.0, "y": 3.0})
    average.activate("mean")
    batch = make_batch([9, 6], 9, DOUBLE)
    with torch.no_grad():
        found = difference(_hidden(average, batch), model(batch.ids, batch.mask)[0])
    assert found <= 1e-6  # the library averages into float32


@pytest.mark.quick
def test_what_the_library_cannot_run_is_refused(tmp_path) -> None:
    plain = base("bert_sdpa", DOUBLE)
    refused = {
        "seq_bn_inv[inv_adapter=glow]": "BnConfig.inv_adapter=glow is not supported yet (supported: nice)",
        "seq_bn_inv[inv_adapter_reduction_factor=None]": "needs BnConfig.inv_adapter_reduction_factor, got None",
        "seq_bn[inv_adapter=nice]": "needs BnConfig.inv_adapter_reduction_factor, got None",
    }
    for config, message in refused.items():
        with pytest.raises(torchgraft.GraftError) as error:
            torchgraft.graft(plain, config, "task")
        assert message in str(error.value), config
    model = hugging_face("bert", "sdpa", torch.float32)
    adapters.init(model)
    model.add_adapter("glow", config=SeqBnInvConfig(inv_adapter="glow"), set_active=True)
    batch = make_batch([9, 6], 9, torch.float32)
    with pytest.raises(Exception):  # noqa: B017, PT011 (its block gives a list)
        model(batch.ids, batch.mask)
    module = torchgraft.graft(plain, adapters={"task": _directory("seq_bn_inv")})
    with pytest.raises(torchgraft.GraftError, match="merge_adapter: 'task' cannot be merged: no weight can hold"):
        torchgraft.merge_adapter(module, "task")
    directory = tmp_path / "whisper"
    directory.mkdir()
    for file in _directory("seq_bn_inv").iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "whisper"}))
    with pytest.raises(torchgraft.GraftError, match="puts invertible adapters of this model between the embeddings"):
        torchgraft.load_adapter(plain, directory)
