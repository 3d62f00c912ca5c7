"""Invertible adapters: equal to adapters==1.3.0, live, before the layers and before the output embeddings."""

import json
import tempfile

import pytest
import torch

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
from grafted import base, check_refused, reloaded
from library_bank import DOUBLE, VARIANT, LibraryBank, check_exported, check_learner, hidden, plain
from models import VARIANTS, hugging_face, make_batch
from oracle import TOLERANCE, difference, randomise, varied_batches

CONFIGS = {
    "seq_bn_inv": SeqBnInvConfig(),
    "double_seq_bn_inv": DoubleSeqBnInvConfig(inv_adapter_reduction_factor=3.5, non_linearity="gelu"),
    "gated_inv": SeqBnInvConfig(use_gating=True, inv_adapter_reduction_factor=1, leave_out=[0, 1]),
    "union_inv": ConfigUnion(SeqBnInvConfig(), LoRAConfig(r=3, use_gating=True)),
    "seq_bn": SeqBnConfig(reduction_factor=6),
    "lora": LoRAConfig(r=4),
}
INVERTIBLE = [name for name in CONFIGS if name.endswith("_inv")]


LIBRARY = LibraryBank(CONFIGS, lambda: hugging_face("bert", "sdpa", DOUBLE))


@pytest.mark.quick
@pytest.mark.parametrize("name", INVERTIBLE)
def test_an_adapter_equals_the_library(name: str) -> None:
    module = LIBRARY.check_alone(name)
    module.deactivate()
    for batch in varied_batches(VARIANT, DOUBLE):
        with torch.no_grad():
            assert torch.equal(hidden(module, batch), hidden(plain(), batch))


@pytest.mark.quick
@pytest.mark.parametrize("form", ["plain", "lowered", "optimised", "loaded"])
def test_each_row_of_a_mixed_batch_equals_the_library(form: str) -> None:
    bank = LIBRARY.bank
    module = {"plain": lambda: bank, "lowered": lambda: torchgraft.lower(bank), "loaded": lambda: reloaded(bank),
              "optimised": lambda: torchgraft.optimize(bank)}[form]()  # fmt: skip
    LIBRARY.check_rows(module)


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
    LIBRARY.check_written(name, tmp_path)
    model = hugging_face("bert", "sdpa", DOUBLE)
    adapters.init(model)
    model.load_adapter(str(tmp_path), use_safetensors=True, set_active=True)
    batch = make_batch([9, 6], 9, DOUBLE)
    with torch.no_grad():
        found = model.double().eval()(batch.ids, batch.mask)[0]
        assert difference(found, LIBRARY.expected(name, batch)) <= 1e-5  # the library loads into float32


@pytest.mark.quick
@pytest.mark.parametrize("name", INVERTIBLE)
def test_gradients_equal_the_library(name: str) -> None:
    LIBRARY.check_gradients(name)


def test_a_learner_in_a_bank_moves_alone() -> None:
    module = torchgraft.graft(LIBRARY.bank, "seq_bn_inv", "learner", trainable=True)
    check_same = check_learner(module, len(CONFIGS), 1e-4)
    check_same(torchgraft.freeze_adapter(module, "learner"))


@pytest.mark.quick
def test_a_pool_mixes_rows() -> None:
    LIBRARY.check_pool(CONFIGS, "seq_bn_inv")


def test_an_exported_bank_gives_the_same() -> None:
    check_exported(LIBRARY.bank, [0, 1, -1, 5])


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
        found = difference(hidden(average, batch), model(batch.ids, batch.mask)[0])
    assert found <= 1e-6  # the library averages into float32


@pytest.mark.quick
def test_what_the_library_cannot_run_is_refused(tmp_path) -> None:
    bare = base("bert_sdpa", DOUBLE)
    refused = {
        "seq_bn_inv[inv_adapter=glow]": "BnConfig.inv_adapter=glow is not supported yet (supported: nice)",
        "seq_bn_inv[inv_adapter_reduction_factor=None]": "needs BnConfig.inv_adapter_reduction_factor, got None",
        "seq_bn[inv_adapter=nice]": "needs BnConfig.inv_adapter_reduction_factor, got None",
    }
    check_refused(bare, refused)
    model = hugging_face("bert", "sdpa", torch.float32)
    adapters.init(model)
    model.add_adapter("glow", config=SeqBnInvConfig(inv_adapter="glow"), set_active=True)
    batch = make_batch([9, 6], 9, torch.float32)
    with pytest.raises(Exception):  # noqa: B017, PT011 (its block gives a list)
        model(batch.ids, batch.mask)
    module = torchgraft.graft(bare, adapters={"task": LIBRARY.directory("seq_bn_inv")})
    with pytest.raises(torchgraft.GraftError, match="merge_adapter: 'task' cannot be merged: no weight can hold"):
        torchgraft.merge_adapter(module, "task")
    directory = tmp_path / "whisper"
    directory.mkdir()
    for file in LIBRARY.directory("seq_bn_inv").iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "whisper"}))
    with pytest.raises(torchgraft.GraftError, match="puts invertible adapters of this model between the embeddings"):
        torchgraft.load_adapter(bare, directory)
