"""VeRA, DvoRA and MTL-LoRA: equal to adapters==1.3.0, live, in banks, in training, in files and in pools."""

import io
import tempfile

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertForSequenceClassification

import adapters
import torchgraft
from adapters import ConfigUnion, LoRAConfig, MTLLoRAConfig, SeqBnConfig, VeraConfig
from grafted import base, check_refused, reloaded
from library_bank import DOUBLE, LibraryBank, check_exported, check_learner, hidden
from models import hugging_face, make_batch
from oracle import TOLERANCE, difference, randomise

CONFIGS = {
    "vera": VeraConfig(),
    "vera_gated": VeraConfig(r=3, vera_d=1.0, use_gating=True, attn_matrices=["k", "v"], leave_out=[1]),
    "dvora": adapters.DvoRAConfig(alpha=16),
    "dvora_gated": adapters.DvoRAConfig(r=2, use_gating=True, attn_matrices=["q", "k", "v"]),
    "mtl_lora": MTLLoRAConfig(),
    "mtl_lora_gated": MTLLoRAConfig(n_up_projection=3, weights_sharpness=0.7, use_gating=True, output_lora=True),
    "union": ConfigUnion(VeraConfig(r=5), SeqBnConfig(reduction_factor=6, use_gating=True)),
    "lora": LoRAConfig(r=4, alpha=16),
    "seq_bn": SeqBnConfig(reduction_factor=6),
}
FACTORED = [name for name in CONFIGS if name not in ("lora", "seq_bn")]


def _make_model() -> BertForSequenceClassification:
    """With a head: without one the library does not save what all modules share."""
    plain_model = hugging_face("bert", "sdpa", DOUBLE)
    model = BertForSequenceClassification(plain_model.config).double()
    model.bert.load_state_dict(plain_model.state_dict(), strict=False)
    return model


LIBRARY = LibraryBank(CONFIGS, _make_model, "bert", with_head=False)


@pytest.mark.quick
@pytest.mark.parametrize("name", FACTORED)
def test_an_adapter_equals_the_library(name: str) -> None:
    LIBRARY.check_alone(name)


@pytest.mark.quick
def test_each_row_of_a_mixed_batch_equals_the_library() -> None:
    LIBRARY.check_rows(LIBRARY.bank)


@pytest.mark.parametrize("seed", [5, None])
@pytest.mark.parametrize("name", FACTORED)
def test_fresh_ones_are_the_librarys(name: str, seed: int | None) -> None:
    """With a seed, what is written is what the library draws, bit for bit."""
    config = CONFIGS[name]
    parts = config.configs if isinstance(config, ConfigUnion) else [config]
    parts = [part.replace(init_weights_seed=seed) for part in parts]
    config = ConfigUnion(*parts) if len(parts) > 1 else parts[0]
    model = BertForSequenceClassification(hugging_face("bert", "sdpa", torch.float32).config)
    model.bert.load_state_dict(hugging_face("bert", "sdpa", torch.float32).state_dict(), strict=False)
    adapters.init(model)
    model.add_adapter("task", config=config)
    module = torchgraft.graft(base("bert_sdpa", torch.float32), config, "task", trainable=True)
    with tempfile.TemporaryDirectory() as folder:
        model.save_adapter(f"{folder}/theirs", "task", with_head=False, use_safetensors=True)
        torchgraft.save_adapter(module, "task", f"{folder}/ours")
        theirs, ours = (load_file(f"{folder}/{name}/adapter.safetensors") for name in ("theirs", "ours"))
    theirs = {key.removeprefix("bert."): value for key, value in theirs.items()}
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}
    for key, value in theirs.items():
        if seed is not None and ".m.weight" not in key:
            assert torch.equal(ours[key], value), key


@pytest.mark.parametrize("name", FACTORED)
def test_a_directory_comes_back_bit_for_bit(name: str, tmp_path) -> None:
    LIBRARY.check_written(name, tmp_path, trainable=True)


@pytest.mark.parametrize("name", FACTORED)
def test_the_library_loads_what_is_written(name: str, tmp_path) -> None:
    """As it is while it is trained, and as a LoRA when it is frozen."""
    trained = torchgraft.load_adapter(base("bert_sdpa", DOUBLE), LIBRARY.directory(name), name, trainable=True)
    model = LIBRARY.model
    batch = make_batch([9, 6], 9, DOUBLE)
    with torch.no_grad():
        expected = LIBRARY.expected(name, batch)
    for kind, module in (("trained", trained), ("frozen", torchgraft.freeze_adapter(trained, name))):
        torchgraft.save_adapter(module, name, tmp_path / kind)
        fresh = BertForSequenceClassification(model.config)
        fresh.bert.load_state_dict(hugging_face("bert", "sdpa", DOUBLE).state_dict(), strict=False)
        adapters.init(fresh)
        fresh.load_adapter(str(tmp_path / kind), use_safetensors=True, set_active=True)
        with torch.no_grad():
            found = fresh.double().eval().bert(batch.ids, batch.mask)[0]
        assert difference(found, expected) <= 1e-5  # the library loads into float32


@pytest.mark.quick
@pytest.mark.parametrize("name", FACTORED)
def test_gradients_equal_the_library(name: str) -> None:
    LIBRARY.check_gradients(name, compared=lambda tensor: tensor.squeeze(-1))


@pytest.mark.quick
@pytest.mark.parametrize("name", FACTORED)
def test_training_moves_the_factors_and_freezing_keeps_them(name: str) -> None:
    module = torchgraft.load_adapter(LIBRARY.bank, LIBRARY.directory(name), "learner", trainable=True)
    check_same = check_learner(module, len(CONFIGS), 1e-3, weight_decay=0.5)
    frozen = reloaded(torchgraft.freeze_adapter(reloaded(module), "learner"))
    check_same(frozen)
    with pytest.raises(torchgraft.GraftError, match="its VeRA or MTL-LoRA were dropped when it was frozen"):
        torchgraft.unfreeze_adapter(frozen, "learner")


def _library_to_train(name: str) -> BertForSequenceClassification:
    """A model of the library that trains the adapter of the directory, in float64."""
    model = BertForSequenceClassification(LIBRARY.model.config).double()
    model.bert.load_state_dict(hugging_face("bert", "sdpa", DOUBLE).state_dict(), strict=False)
    adapters.init(model)
    model.load_adapter(str(LIBRARY.directory(name)), load_as=name)
    model.double().train_adapter(name)
    exact = LIBRARY.model.state_dict()  # the library loads into float32
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f".{name}." in key:
                parameter.copy_(exact[key])
    return model.eval()


@pytest.mark.parametrize("name", ["vera", "dvora", "mtl_lora_gated"])
def test_the_librarys_weights_move_as_ours(name: str) -> None:
    """Five steps of AdamW on each side, from one directory: the results agree."""
    module = torchgraft.load_adapter(base("bert_sdpa", DOUBLE), LIBRARY.directory(name), "task", trainable=True)
    model = _library_to_train(name)
    batch = make_batch([9, 6], 9, DOUBLE)
    trained = [value for key, value in model.named_parameters() if f".{name}." in key and value.requires_grad]
    sides = {
        "ours": ([*torchgraft.trainable_parameters(module, "task").values()], lambda: hidden(module, batch)),
        "theirs": (trained, lambda: model.bert(batch.ids, batch.mask)[0]),
    }
    results = {}
    for side, (parameters, run) in sides.items():
        optimizer = torch.optim.AdamW(parameters, lr=1e-3)
        for _ in range(5):
            optimizer.zero_grad()
            run().square().sum().backward()
            optimizer.step()
        results[side] = run().detach()
    assert difference(results["ours"], results["theirs"]) <= 1e-8


def _storages(module: torch.jit.ScriptModule, ending: str) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for key, tensor in module.adapters.state_dict().items()
            if key.endswith(ending)}  # fmt: skip


def _file_size(module: torch.jit.ScriptModule) -> int:
    file = io.BytesIO()
    torch.jit.save(module, file)
    return file.tell()


@pytest.mark.quick
def test_the_random_matrix_is_held_and_stored_once() -> None:
    """In memory, in a file, after loading, in a bank with others, and in a second graft."""
    directories = {"a": LIBRARY.directory("vera"), "b": LIBRARY.directory("lora")}
    module = torchgraft.graft(base("bert_sdpa", DOUBLE), adapters=directories)
    for each in (module, reloaded(module), torchgraft.graft(reloaded(module), "seq_bn", "c")):
        keys = [key for key in each.adapters.state_dict() if key.endswith("_vera.lora_a")]
        assert len(keys) == 6 and len(_storages(each, "_vera.lora_a")) == 1
        assert len(_storages(each, "_vera.lora_b")) == 6
    sizes = {}
    for kind in ("vera", "lora"):
        config = {"vera": "vera[r=96]", "lora": "lora[r=96]"}[kind]
        sizes[kind] = _file_size(torchgraft.graft(base("bert_sdpa", DOUBLE), config, "t"))
    assert sizes["lora"] - sizes["vera"] > 4 * 96 * 48 * 8  # of six matrices, five are not there


@pytest.mark.quick
def test_a_pool_holds_it_once_and_mixes_rows() -> None:
    LIBRARY.check_pool(["vera", "dvora_gated", "mtl_lora", "lora", "vera_gated", "union"], "vera")
    single = torchgraft.AdapterPool(base("bert_sdpa", DOUBLE), capacity=4, room=["vera[r=8]"])
    plain = torchgraft.AdapterPool(base("bert_sdpa", DOUBLE), capacity=4, room=["lora[r=8]"])
    assert plain.stats()["row_bytes"] - single.stats()["row_bytes"] == 5 * 8 * 48 * 8


def test_an_exported_bank_gives_the_same() -> None:
    check_exported(torchgraft.graft(LIBRARY.bank, "vera", "fresh"), [0, 5, -1, 3])


@pytest.mark.parametrize("pair", [("vera", "vera"), ("mtl_lora_gated", "mtl_lora_gated"), ("dvora", "dvora")])
def test_averages_are_the_librarys(pair: tuple[str, str]) -> None:
    name = pair[0]
    model = BertForSequenceClassification(LIBRARY.model.config).double()
    model.bert.load_state_dict(hugging_face("bert", "sdpa", DOUBLE).state_dict(), strict=False)
    adapters.init(model)
    module = base("bert_sdpa", DOUBLE)
    with tempfile.TemporaryDirectory() as folder:
        for seed, each in enumerate("xy"):
            model.add_adapter(each, config=CONFIGS[name])
            model.double()
            randomise(model, each, 50 + seed)
            model.save_adapter(f"{folder}/{each}", each, with_head=False)
            module = torchgraft.load_adapter(module, f"{folder}/{each}", trainable=True)
    model.average_adapter("mean", ["x", "y"], weights=[1.0, 3.0])
    model.double().eval().set_active_adapters("mean")
    average = torchgraft.average_adapter(module, "mean", {"x": 1.0, "y": 3.0})
    average.activate("mean")
    batch = make_batch([9, 6], 9, DOUBLE)
    with torch.no_grad():
        found = difference(hidden(average, batch), model.bert(batch.ids, batch.mask)[0])
    assert found <= 1e-6  # the library averages into float32
    frozen = torchgraft.freeze_adapter(module, "y")
    with pytest.raises(torchgraft.GraftError, match="'y' is VeRA or MTL-LoRA, whose average is that of its factors"):
        torchgraft.average_adapter(frozen, "mean", ["x", "y"])


@pytest.mark.parametrize("name", ["vera", "mtl_lora"])
def test_merging_is_exact_without_gates(name: str) -> None:
    module = torchgraft.graft(base("bert_sdpa", DOUBLE), adapters={"task": LIBRARY.directory(name)})
    batch = make_batch([9, 6], 9, DOUBLE)
    merged = torchgraft.merge_adapter(module, "task")
    with torch.no_grad():
        expected = LIBRARY.expected(name, batch)
        assert difference(hidden(torchgraft.ungraft(merged), batch), expected) <= TOLERANCE[DOUBLE]
        restored = torchgraft.unmerge_adapter(merged, "task")
        assert difference(hidden(restored, batch), expected) <= TOLERANCE[DOUBLE]
        assert len(_storages(restored, "_vera.lora_a")) == (1 if name == "vera" else 0)


def test_what_the_library_refuses_is_refused() -> None:
    refused = {
        "vera[intermediate_lora=True]": "VeRA's random matrices are one pair for all projections",
        "vera[vera_b=None]": "VeRA needs both LoRAConfig.vera_d and LoRAConfig.vera_b, got no vera_b",
        "lora[vera_d=1, vera_b=0]": "only where one of them is a float; write 1.0 for 1",
        "mtl_lora[task_specific_matrix_type=linear]": "MTLLoRAConfig.task_specific_matrix_type=linear is not supported",
        "mtl_lora[use_dora=True]": "MTL-LoRA cannot be joined with use_dora",
        "mtl_lora[composition_mode=scale, r=1]": 'MTL-LoRA needs composition_mode="add"',
        "vera[composition_mode=scale, r=1]": 'VeRA needs LoRAConfig.composition_mode="add"',
        "vera[leave_out=[0]]|lora[leave_out=[1, 2]]": "the library takes at most one LoRA config in such a union",
    }
    check_refused(base("bert_sdpa", DOUBLE), refused)
    model = hugging_face("bert", "sdpa", DOUBLE)
    adapters.init(model)
    with pytest.raises(AttributeError, match="before Module.__init__"):  # the library's own answer
        model.add_adapter("task", config=MTLLoRAConfig(task_specific_matrix_type="linear"))


def test_a_file_without_the_shared_matrices_says_so(tmp_path) -> None:
    model = hugging_face("bert", "sdpa", torch.float32)
    adapters.init(model)
    model.add_adapter("task", config=VeraConfig())
    model.save_adapter(str(tmp_path), "task")
    with pytest.raises(torchgraft.GraftError, match="lora_A of VeRA, which all modules .* save from one with a head"):
        torchgraft.load_adapter(base("bert_sdpa", torch.float32), tmp_path)


@pytest.mark.quick
def test_task_ids_are_adapter_ids() -> None:
    """What the library's MultiTask gives for task_ids, a bank of the tasks' adapters gives for adapter_ids."""
    model = hugging_face("bert", "sdpa", DOUBLE)
    adapters.init(model)
    names = ["a", "b", "c"]
    for seed, name in enumerate(names):
        model.add_adapter(name, config=CONFIGS["mtl_lora_gated"])
        model.double()
        randomise(model, name, 70 + seed)
    model.share_parameters(adapters.composition.MultiTask(*names))
    batch = make_batch([9, 6, 8, 9], 9, DOUBLE)
    tasks = torch.tensor([2, 0, 1, 0])
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            model.save_adapter(f"{folder}/{name}", name)
        module = torchgraft.graft(base("bert_sdpa", DOUBLE), adapters={name: f"{folder}/{name}" for name in names})
    model.eval().active_adapters = adapters.composition.MultiTask(*names)
    with torch.no_grad():
        expected = model(batch.ids, batch.mask, task_ids=tasks)[0]
        assert difference(hidden(module, batch, adapter_ids=tasks), expected) <= TOLERANCE[DOUBLE]
