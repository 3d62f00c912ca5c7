"""Trainable adapters: parameters of their own, frozen ones beside them, dropout, and what is saved of them."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import adapters
import torchgraft
from grafted import base, grafted, reloaded, saved_adapter
from models import VARIANTS, make_batch
from oracle import CONFIGS, oracle_for

DOUBLE = torch.float64
VARIANT = VARIANTS["bert_sdpa"]


def _arguments(lengths=(9, 6)) -> tuple:
    return VARIANT.arguments(make_batch(list(lengths), max(lengths), DOUBLE))


def _hidden(module, **options) -> Tensor:
    return VARIANT.hidden(module(*_arguments(), **options))


def _trainable(config: str, name: str = "task") -> torch.jit.ScriptModule:
    saved = saved_adapter(VARIANT, DOUBLE, config)
    return torchgraft.graft(base("bert_sdpa", DOUBLE), adapters={name: saved.directory}, trainable=True)


@pytest.mark.parametrize(
    "config", ["unipelt", "mam", "union_everything", "prefix_two_gates", "par_bn_both", "ia3_gated", "dora_gated"]
)
def test_a_trainable_adapter_computes_what_a_frozen_one_does(config: str) -> None:
    module = _trainable(config)
    expected = grafted("bert_sdpa", DOUBLE, config)
    with torch.no_grad():
        torch.testing.assert_close(_hidden(module), _hidden(expected), rtol=0, atol=1e-12)
        frozen = torchgraft.freeze_adapter(module, "task")
        assert not any(parameter.requires_grad for parameter in frozen.adapters.parameters())
        torch.testing.assert_close(_hidden(frozen), _hidden(expected), rtol=0, atol=1e-12)
        again = torchgraft.unfreeze_adapter(frozen, "task")
        torch.testing.assert_close(_hidden(again), _hidden(expected), rtol=0, atol=1e-12)
    assert torchgraft.list_adapters(module)[0].trainable and not torchgraft.list_adapters(frozen)[0].trainable


def test_in_a_bank_only_the_trainable_adapter_moves() -> None:
    """Weight decay and all: the frozen ones have no parameters that an optimizer could be given."""
    saved = {
        config: saved_adapter(VARIANT, DOUBLE, config).directory for config in ("lora_all", "prefix_two_gates", "mam")
    }
    bank = torchgraft.graft(base("bert_sdpa", DOUBLE), adapters=saved)
    bank = torchgraft.load_adapter(bank, saved_adapter(VARIANT, DOUBLE, "unipelt").directory, "learner", trainable=True)
    ids = torch.tensor([3, 0])
    with torch.no_grad():
        before = [_hidden(bank, adapter_ids=torch.full((2,), i)) for i in range(-1, 4)]
    trained = [parameter for parameter in bank.parameters() if parameter.requires_grad]
    named = torchgraft.trainable_parameters(bank, "learner")
    assert {id(p) for p in trained} == {id(p) for p in named.values()}
    optimizer = torch.optim.AdamW(trained, lr=0.1, weight_decay=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        _hidden(bank, adapter_ids=ids).square().sum().backward()
        optimizer.step()
    with torch.no_grad():
        after = [_hidden(bank, adapter_ids=torch.full((2,), i)) for i in range(-1, 4)]
    for index in range(4):  # the base, then those that are frozen
        assert torch.equal(before[index], after[index]), index
    assert (before[4] - after[4]).abs().max() > 1e-2


def test_a_learner_beside_dora_has_finite_gradients() -> None:
    """Rows of others divide by norms that the bank has none for, and use nothing of the quotient."""
    saved = {"dora": saved_adapter(VARIANT, DOUBLE, "dora").directory}
    module = torchgraft.graft(base("bert_sdpa", DOUBLE), adapters=saved)
    module = torchgraft.graft(module, "lora[init_weights='bert']", "learner", trainable=True)
    named = torchgraft.trainable_parameters(module, "learner")
    for ids in ([1, 1], [1, 0], [1, -1]):
        gradients = torch.autograd.grad(_hidden(module, adapter_ids=torch.tensor(ids)).pow(3).sum(), [*named.values()])
        assert all(bool(gradient.isfinite().all()) for gradient in gradients)


def test_gradients_in_a_bank_are_those_alone() -> None:
    """The bank's larger rank and longer prefix are padding, through which gradients come back unchanged."""
    alone = _trainable("unipelt", "learner")
    directory = saved_adapter(VARIANT, DOUBLE, "unipelt").directory
    others = {
        config: saved_adapter(VARIANT, DOUBLE, config).directory for config in ("prefix", "lora", "union_everything")
    }
    bank = torchgraft.load_adapter(
        torchgraft.graft(base("bert_sdpa", DOUBLE), adapters=others), directory, "learner", trainable=True
    )

    def gradients(module, **options) -> dict[str, Tensor]:
        named = torchgraft.trainable_parameters(module, "learner")
        loss = _hidden(module, **options).pow(3).sum()
        return dict(zip(named, torch.autograd.grad(loss, [*named.values()]), strict=True))

    expected = gradients(alone)
    found = gradients(bank, adapter_ids=torch.full((2,), 3))
    assert found.keys() == expected.keys()
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-9, atol=1e-10, msg=key)


def test_names_and_order_survive_saving() -> None:
    module = torchgraft.add_head(_trainable("unipelt"), "task", torchgraft.HeadConfig())
    again = reloaded(module)
    named, found = (torchgraft.trainable_parameters(each, "task") for each in (module, again))
    assert list(named) == list(found) and len(named) > 30
    assert all(torch.equal(named[key], found[key]) and found[key].requires_grad for key in named)


def test_a_frozen_or_unknown_adapter_has_no_parameters_to_train() -> None:
    module = grafted("bert_sdpa", DOUBLE, "lora")
    with pytest.raises(torchgraft.GraftError, match="'task' is frozen; .* unfreeze_adapter"):
        torchgraft.trainable_parameters(module, "task")
    with pytest.raises(torchgraft.GraftError, match="no adapter is called 'other'; there are: task"):
        torchgraft.trainable_parameters(module, "other")
    with pytest.raises(torchgraft.GraftError, match="merged"):
        torchgraft.unfreeze_adapter(torchgraft.merge_adapter(module, "task"), "task")


_DROPPING = {
    "bottleneck": adapters.SeqBnConfig(dropout=0.4, use_gating=True),
    "bottleneck_norm": adapters.SeqBnConfig(dropout=0.4, ln_after=True),
    "lora": adapters.LoRAConfig(dropout=0.4, use_gating=True, init_weights="bert"),
    "dora": adapters.LoRAConfig(dropout=0.4, use_dora=True, init_weights="bert"),
    "prefix": adapters.PrefixTuningConfig(dropout=0.4, prefix_length=5, bottleneck_size=9),
    "prefix_flat": adapters.PrefixTuningConfig(dropout=0.4, prefix_length=5, flat=True),
}


@pytest.mark.parametrize("config", _DROPPING)
def test_dropout_acts_in_training_and_only_there(config: str) -> None:
    torch.manual_seed(0)
    module = torchgraft.graft(base("bert_sdpa", DOUBLE), _DROPPING[config], "task", trainable=True)
    with torch.no_grad():
        served = _hidden(torchgraft.freeze_adapter(module, "task"))
        torch.testing.assert_close(_hidden(module), served, rtol=0, atol=1e-12)
        module.adapters.train()  # of the base nothing is dropped, so that what differs is the adapter's
        first, second = _hidden(module), _hidden(module)
        assert (first - second).abs().max() > 1e-6
        module.eval()
        torch.testing.assert_close(_hidden(module), served, rtol=0, atol=1e-12)


@pytest.mark.parametrize("config", ["bottleneck", "lora"])
def test_dropout_drops_what_the_library_drops(config: str) -> None:
    """A model of one layer whose adapter's share of the result is linear in what is dropped: its mean over many draws
    is the result without dropout, and its variance the library's."""
    torch.manual_seed(1)
    x = torch.randn(1, 3, 16, dtype=DOUBLE)
    settings = dict(batch_first=True, dropout=0.0, dtype=DOUBLE)
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, norm_first=True, **settings)
    plain = torch.jit.script(torch.nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval())
    made = {
        "bottleneck": "seq_bn[dropout=0.5, original_ln_before=False, non_linearity='linear']",
        "lora": "lora[dropout=0.5, attn_matrices=[], selfattn_lora=False, output_lora=True, init_weights='bert']",
    }
    module = torchgraft.graft(plain, made[config], "task", trainable=True)
    with torch.no_grad():
        for parameter in torchgraft.trainable_parameters(module, "task").values():
            parameter.normal_()
        base_result, served = plain(x), module(x)
        module.adapters.train()
        draws = torch.stack([module(x) - base_result for _ in range(4000)])
    share = served - base_result
    error = (draws.mean(0) - share).abs() / (draws.std(0) / draws.size(0) ** 0.5)
    assert error.max() < 5  # standard errors
    if config == "bottleneck":  # each element is dropped by itself: 0 or twice its share
        assert set((draws / share).round(decimals=6).unique().tolist()) == {0.0, 2.0}


def _perturb(module: torch.jit.ScriptModule) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in torchgraft.trainable_parameters(module, "task").values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=DOUBLE))


_COMPUTED = ["mam", "compacter", "compacter_factors", "dora", "dora_gated"]


@pytest.mark.parametrize("config", _COMPUTED)
def test_what_weights_are_computed_from_is_saved_and_read_by_the_library(config: str, tmp_path: Path) -> None:
    module = _trainable(config)
    _perturb(module)
    torchgraft.save_adapter(module, "task", tmp_path / "saved")
    written = json.loads((tmp_path / "saved/adapter_config.json").read_text())["config"]
    if config.startswith("compacter"):
        assert written["phm_layer"]
    elif config == "mam":
        assert not written["configs"][0]["flat"]
    library = oracle_for(VARIANT, DOUBLE)
    name = library.model.load_adapter(str(tmp_path / "saved"), load_as=f"trained_{config}", use_safetensors=True)
    library.model.to(DOUBLE).eval()
    library.model.set_active_adapters(name)
    batch = make_batch([9, 6], 9, DOUBLE)
    with torch.no_grad():
        expected = library.model(batch.ids, batch.mask)[0]
        torch.testing.assert_close(_hidden(module), expected, rtol=0, atol=1e-5)  # the library loads into float32
        loaded = torchgraft.load_adapter(base("bert_sdpa", DOUBLE), tmp_path / "saved", trainable=True)
        torch.testing.assert_close(_hidden(loaded), _hidden(module), rtol=0, atol=1e-12)
    library.model.delete_adapter(name)


@pytest.mark.parametrize("config", _COMPUTED)
def test_freezing_keeps_what_was_learned(config: str) -> None:
    module = _trainable(config)
    with torch.no_grad():
        before = _hidden(module)
        _perturb(module)
        learned = _hidden(module)
        assert (learned - before).abs().max() > 1e-3
        frozen = torchgraft.freeze_adapter(module, "task")
        torch.testing.assert_close(_hidden(frozen), learned, rtol=0, atol=1e-12)
        renamed = torchgraft.rename_adapter(module, "task", "other")  # built anew, and still trainable
        torch.testing.assert_close(_hidden(renamed), learned, rtol=0, atol=1e-12)
    assert len(torchgraft.trainable_parameters(renamed, "other")) == len(
        torchgraft.trainable_parameters(module, "task")
    )
    if config.startswith("compacter"):
        with pytest.raises(
            torchgraft.GraftError, match="factors of Compacter's projections were dropped .* load it from"
        ):
            torchgraft.unfreeze_adapter(frozen, "task")
    else:
        again = torchgraft.unfreeze_adapter(frozen, "task")
        torch.testing.assert_close(_hidden(again), learned, rtol=0, atol=1e-12)


def test_computed_weights_of_two_adapters_in_one_bank() -> None:
    """Each row of a mixed batch is what its adapter computes alone, and gets that one's gradients."""
    bank = _trainable("dora_gated", "first")
    bank = torchgraft.load_adapter(
        bank, saved_adapter(VARIANT, DOUBLE, "compacter").directory, "second", trainable=True
    )
    bank = torchgraft.load_adapter(bank, saved_adapter(VARIANT, DOUBLE, "dora").directory, "third", trainable=True)
    mixed = _hidden(bank, adapter_ids=torch.tensor([2, 1]))
    with torch.no_grad():
        for row, config in enumerate(("dora", "compacter")):
            torch.testing.assert_close(mixed[row], _hidden(_trainable(config))[row], rtol=0, atol=1e-12)
    named = {name: torchgraft.trainable_parameters(bank, name) for name in ("first", "second", "third")}
    gradients = dict(
        zip(
            [(name, key) for name in named for key in named[name]],
            torch.autograd.grad(mixed.pow(3).sum(), [tensor for each in named.values() for tensor in each.values()]),
            strict=True,
        )
    )
    moved = {name for (name, _), gradient in gradients.items() if bool((gradient != 0).any())}
    assert moved == {"second", "third"}


def test_a_new_compacter_and_dora_can_be_trained() -> None:
    for config in (
        "compacter++[reduction_factor=4]",
        "compacter[phm_bias=False, shared_W_phm=True, reduction_factor=4]",
        "lora[use_dora=True, dropout=0.3]",
    ):
        module = torchgraft.graft(base("bert_sdpa", DOUBLE), config, "task", trainable=True)
        named = torchgraft.trainable_parameters(module, "task")
        assert not any(key.endswith("down_bias") for key in named) or "phm_bias=False" not in config
        assert sum(p.numel() for p in named.values()) == torchgraft.list_adapters(module)[0].parameters
        with torch.no_grad():
            torch.testing.assert_close(
                _hidden(module), _hidden(torchgraft.freeze_adapter(module, "task")), rtol=0, atol=1e-12
            )
        module.train()
        for gradient in torch.autograd.grad(_hidden(module).pow(3).sum(), [*named.values()]):
            assert bool(gradient.isfinite().all())


def test_in_bfloat16_a_frozen_prefix_is_the_loaded_one(tmp_path: Path) -> None:
    """Both are computed in float32 and rounded once."""
    directory = saved_adapter(VARIANT, torch.float32, "mam").directory
    plain = base("bert_sdpa", torch.bfloat16)
    torchgraft.save_adapter(torchgraft.load_adapter(plain, directory, trainable=True), _only_name(directory), tmp_path)
    loaded = torchgraft.load_adapter(plain, tmp_path)
    frozen = torchgraft.freeze_adapter(torchgraft.load_adapter(plain, tmp_path, trainable=True), _only_name(directory))
    for (key, value), (_, other) in zip(
        loaded.adapters.named_parameters(), frozen.adapters.named_parameters(), strict=True
    ):
        assert torch.equal(value, other), key


def _only_name(directory: str) -> str:
    return json.loads((Path(directory) / "adapter_config.json").read_text())["name"]


@pytest.mark.parametrize("config", ["unipelt", "mam", "union_everything", "prefix_two_gates", "lora_all_gated"])
def test_in_training_mode_every_parameter_gets_a_gradient(config: str) -> None:
    """Also where the base drops attention, and in float32, which the fused kernels take."""
    layer = torch.nn.TransformerEncoderLayer(48, 4, 64, dropout=0.1, batch_first=True)
    encoder = torch.nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    module = torchgraft.graft(torch.jit.script(encoder.eval()), CONFIGS[config], "task", trainable=True)
    module.train()
    for parameter in (named := torchgraft.trainable_parameters(module, "task")).values():
        torch.nn.init.normal_(parameter, std=0.1)
    module(torch.randn(2, 7, 48)).pow(3).sum().backward()
    assert [key for key, parameter in named.items() if parameter.grad is None or not parameter.grad.any()] == []
