"""ReFT in banks, pools, files and training, against the library live."""

import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

import adapters
import torchgraft
from grafted import base, reloaded, saved_adapter
from hugging_face_models import FAMILIES
from models import VARIANTS, hugging_face
from oracle import CONFIGS, TOLERANCE, difference, oracle_for, randomise
from reft_support import FLOAT, MASKS, text_arguments, traced, write_library_adapter


def _bert_directory(config: str) -> str:
    return saved_adapter(VARIANTS["bert_sdpa"], FLOAT, config).directory


def _bert(padding: str) -> tuple[Tensor, Tensor]:
    return text_arguments(padding, 5)


def _hidden(module: torch.jit.ScriptModule, *arguments: Tensor, **options: Tensor) -> Tensor:
    with torch.no_grad():
        return module(*arguments, **options)[0]


@pytest.mark.parametrize("padding", MASKS)
def test_rows_of_one_batch_equal_the_library_row_by_row(padding: str) -> None:
    """Also rows that are shorter than the positions, for which the library fails in a padded batch."""
    configs = ["loreft", "lora", "reft_tied", "prefix", "union_reft", "noreft"]
    bank = torchgraft.graft(base("bert_sdpa", FLOAT), adapters={name: _bert_directory(name) for name in configs})
    ids, mask = _bert(padding)
    library = oracle_for(VARIANTS["bert_sdpa"], FLOAT)
    for shift in range(len(configs) + 1):
        chosen = [(row + shift) % (len(configs) + 1) - 1 for row in range(len(ids))]
        together = _hidden(bank, ids, mask, adapter_ids=torch.tensor(chosen))
        for row, adapter in enumerate(chosen):
            saved = saved_adapter(VARIANTS["bert_sdpa"], FLOAT, configs[adapter]) if adapter >= 0 else None
            real = mask[row] == 1
            library.model.set_active_adapters(saved.name if saved else None)
            with torch.no_grad():
                expected = library.model(ids[row : row + 1], mask[row : row + 1])[0][0, real]
            assert difference(together[row, real], expected) <= TOLERANCE[FLOAT], (row, adapter)


def test_a_short_row_gets_what_it_gets_alone() -> None:
    """Two tokens and five positions: the library fails in a padded batch, and so there is no other answer."""
    saved = saved_adapter(VARIANTS["bert_sdpa"], FLOAT, "reft_tied")
    grafted = torchgraft.graft(base("bert_sdpa", FLOAT), adapters={"task": saved.directory})
    library = oracle_for(VARIANTS["bert_sdpa"], FLOAT).model
    ids, mask = torch.tensor([[9, 4, 7, 8, 2], [5, 1, 1, 1, 1]]), torch.tensor([[1] * 5, [1, 0, 0, 0, 0]])
    library.set_active_adapters(saved.name)
    with torch.no_grad(), pytest.raises((RuntimeError, IndexError)):
        library(ids, mask)
    together = _hidden(grafted, ids, mask)
    assert together.isfinite().all()
    alone = _hidden(grafted, ids[1:], mask[1:])
    assert difference(together[1:, :1], alone[:, :1]) <= TOLERANCE[FLOAT]


class _Bert(torch.nn.Module):
    """BERT under a mask [B, S, S] of the caller."""

    def __init__(self) -> None:
        super().__init__()
        self.model = hugging_face("bert", "sdpa", FLOAT)

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor]:
        return (self.model(ids, mask, return_dict=False)[0],)


@pytest.mark.parametrize("form", ["plain", "lowered", "loaded"])
def test_masks_that_cannot_be_read_hinder_rows_with_positions_only(form: str) -> None:
    """A token that sees itself alone may be text or padding. Rows of the base, of LoRA and of the first layer's ReFT
    only, beside ReFT of the last layer."""
    ids = torch.randint(4, 40, (3, 6), generator=torch.Generator().manual_seed(2))
    mask = torch.ones(3, 6, 6)
    mask[:2] = torch.eye(6)
    mask[2, :, 4:] = 0
    torch.manual_seed(1)
    plain = torch.jit.trace(_Bert().eval(), (ids, mask), check_trace=False)
    bank = torchgraft.graft(
        plain,
        adapters={name: _bert_directory(name) for name in ("lora", "loreft")},
        example=(ids, mask[2:].expand_as(mask)),
    )
    bank = torchgraft.graft(bank, "noreft[layers=[1]]", "last", example=(ids, mask[2:].expand_as(mask)))
    lora = torchgraft.graft(plain, adapters={"lora": _bert_directory("lora")}, example=(ids, mask))
    module = {"plain": lambda: bank, "lowered": lambda: torchgraft.lower(bank), "loaded": lambda: reloaded(bank)}[
        form
    ]()
    for reft in (1, 2):
        found = _hidden(module, ids, mask, adapter_ids=torch.tensor([-1, 0, reft]))
        alone = _hidden(module, ids[2:], mask[2:], adapter_ids=torch.tensor([reft]))
        expected = [_hidden(plain, ids, mask)[0], _hidden(lora, ids, mask)[1], alone[0]]
        assert difference(found, torch.stack(expected)) <= TOLERANCE[FLOAT]
        with pytest.raises((RuntimeError, torch.jit.Error), match="row 1"):
            _hidden(module, ids, mask, adapter_ids=torch.tensor([-1, reft, reft]))
    module.activate("lora")
    assert difference(_hidden(module, ids, mask), _hidden(lora, ids, mask)) <= TOLERANCE[FLOAT]


def test_a_token_mask_may_be_named() -> None:
    named = torchgraft.graft(
        base("bert_sdpa", FLOAT), adapters={"task": _bert_directory("noreft")}, token_mask="attention_mask"
    )
    found = torchgraft.graft(base("bert_sdpa", FLOAT), adapters={"task": _bert_directory("noreft")})
    assert difference(_hidden(named, *_bert("left")), _hidden(found, *_bert("left"))) == 0
    assert "attention_token_mask" not in str(named.grafted_forward.inlined_graph)
    with pytest.raises(torchgraft.GraftError, match="a token mask is used with .* and with ReFT only"):
        torchgraft.graft(base("bert_sdpa", FLOAT), "lora", "task", token_mask="attention_mask")


@pytest.mark.parametrize("config", ["loreft", "noreft", "direft", "reft_tied", "union_reft"])
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_directories_go_both_ways(config: str, trainable: bool, tmp_path: Path) -> None:
    source = Path(_bert_directory(config))
    module = torchgraft.graft(base("bert_sdpa", FLOAT), adapters={"task": source}, trainable=trainable)
    torchgraft.save_adapter(module, "task", tmp_path / "saved")
    library = oracle_for(VARIANTS["bert_sdpa"], FLOAT).model
    name = library.load_adapter(str(tmp_path / "saved"), load_as=f"again_{config}", use_safetensors=True)
    library.eval().set_active_adapters(name)
    with torch.no_grad():
        expected = library(*_bert("left"))[0]
    library.set_active_adapters(None)
    library.delete_adapter(name)
    if config != "direft":  # which the library cannot load
        assert difference(_hidden(module, *_bert("left")), expected) <= TOLERANCE[FLOAT]
    again = torchgraft.load_adapter(base("bert_sdpa", FLOAT), tmp_path / "saved", trainable=trainable)
    assert torch.equal(_hidden(again, *_bert("left")), _hidden(module, *_bert("left")))
    written = torchgraft.load_adapter_directory(tmp_path / "saved").weights
    saved_as = saved_adapter(VARIANTS["bert_sdpa"], FLOAT, config).name
    held = torchgraft.load_adapter_directory(source).weights
    read = {key.replace(f".{saved_as}.", ".task."): value for key, value in held.items() if ".refts." in key}
    assert {key for key in written if ".refts." in key} == set(read)
    is_kept = trainable or "loreft" not in config
    for key, value in read.items():
        if is_kept or "parametrizations" not in key:
            assert torch.equal(written[key], value) or "parametrizations" in key and not trainable, key


def test_direft_is_said_in_what_we_write_and_open_in_the_librarys(tmp_path: Path) -> None:
    module = torchgraft.graft(base("bert_sdpa", FLOAT), torchgraft.DiReftConfig(r=2), "di")
    module = torchgraft.graft(module, "noreft", "no")
    for name, subtracts in (("di", False), ("no", True)):
        torchgraft.save_adapter(module, name, tmp_path / name)
        written = json.loads((tmp_path / name / "adapter_config.json").read_text())["config"]
        assert written["subtract_projection"] is subtracts
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again = torchgraft.load_adapter(base("bert_sdpa", FLOAT), tmp_path / name)
        module.activate(name)
        expected = _hidden(module, *_bert("none"))
        assert difference(_hidden(again, *_bert("none")), expected) <= TOLERANCE[FLOAT]
        library = oracle_for(VARIANTS["bert_sdpa"], FLOAT).model
        library.load_adapter(str(tmp_path / name), use_safetensors=True, set_active=True)
        with torch.no_grad():
            # The library has no way to load a DiReFT: it drops what says so.
            assert (difference(library.eval()(*_bert("none"))[0], expected) <= TOLERANCE[FLOAT]) == subtracts
        library.set_active_adapters(None)
        library.delete_adapter(name)
    path = tmp_path / "no" / "adapter_config.json"
    content = json.loads(path.read_text()) | {"model_type": "bert"}
    del content["config"]["subtract_projection"]  # as the library writes it
    path.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match='loads it as NoReFT, as torchgraft does; for a DiReFT add "subtract_proj'):
        torchgraft.load_adapter(base("bert_sdpa", FLOAT), tmp_path / "no")


def test_what_there_is_of_it() -> None:
    module = torchgraft.graft(base("bert_sdpa", FLOAT), adapters={"a": _bert_directory("reft_tied")})
    [info] = torchgraft.list_adapters(module)
    assert info.by_location == {"output_reft": 3 * (2 * 5 * 48 + 5)} and info.gate_pooling == ""
    with torch.no_grad():
        _, gates = module.forward_with_gates(*_bert("none"))
    assert dict(gates["a"]) == {}
    assert torchgraft.inspect(module)["layers"][0]["locations"][-1] == "output_reft"
    with pytest.raises(torchgraft.GraftError, match="cannot be merged: .* ReFT changes some tokens only"):
        torchgraft.merge_adapter(module, "a")


def test_a_pool_takes_it() -> None:
    pool = torchgraft.AdapterPool(base("bert_sdpa", FLOAT), capacity=3)
    names = ["loreft", "lora", "reft_tied", "direft"]
    ids, mask = _bert("right")
    for name in names:
        pool.insert(name, _bert_directory(name))
        alone = torchgraft.graft(base("bert_sdpa", FLOAT), adapters={"x": _bert_directory(name)})
        with pool.acquire([name, "", name]) as lease:
            result = _hidden(lease.module, ids, mask, adapter_ids=lease.ids)
        expected = _hidden(alone, ids, mask, adapter_ids=torch.tensor([0, -1, 0]))
        assert difference(result, expected) <= TOLERANCE[FLOAT], name


def test_it_is_exported_and_saved() -> None:
    module = torchgraft.graft(base("bert_sdpa", FLOAT), adapters={n: _bert_directory(n) for n in ("loreft", "noreft")})
    ids = torch.tensor([1, -1, 0])
    expected = _hidden(module, *_bert("left"), adapter_ids=ids)
    assert torch.equal(_hidden(reloaded(module), *_bert("left"), adapter_ids=ids), expected)
    program = torchgraft.export(module, _bert("right"))
    result = program.module()(*_bert("left"), ids)[0]
    assert difference(result.detach(), expected) <= TOLERANCE[FLOAT]


@pytest.mark.parametrize("config", ["loreft", "noreft", "direft", "reft_tied", "reft_square"])
def test_training_is_the_librarys(config: str, tmp_path: Path) -> None:
    """The same steps of the same optimiser from the same directory; orthogonal projections stay so."""
    square = adapters.LoReftConfig(r=48, tied_weights=True, dropout=0.0)
    model = FAMILIES["bert"].make("sdpa", FLOAT)
    chosen = {"reft_square": square} | {
        name: oracle_for(VARIANTS["bert_sdpa"], FLOAT).model.adapters_config.get(f"{name}_0")
        for name in ("loreft", "noreft", "direft", "reft_tied")
        if saved_adapter(VARIANTS["bert_sdpa"], FLOAT, name)
    }
    made = chosen[config].replace(dropout=0.0)
    if config == "direft":
        made = adapters.DiReftConfig(**{k: v for k, v in made.to_dict().items() if k != "subtract_projection"})
    plain = traced(FAMILIES["bert"].make("sdpa", FLOAT), _bert("right"))
    write_library_adapter(model.model, made, tmp_path)
    model.model.train_adapter("task")
    model.eval()
    module = torchgraft.load_adapter(plain, tmp_path, trainable=True)
    ours = torchgraft.trainable_parameters(module, "task")
    theirs = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in ours.values()) == sum(parameter.numel() for parameter in theirs)
    for parameters, run in ((list(ours.values()), module), (theirs, model)):
        optimizer = torch.optim.SGD(parameters, lr=0.003)
        for _ in range(3):
            optimizer.zero_grad()
            run(*_bert("left")).pow(2).mean().backward()
            optimizer.step()
    with torch.no_grad():
        assert difference(module(*_bert("right")), model(*_bert("right"))) <= 2e-5
        start = torchgraft.load_adapter(plain, tmp_path)
        assert difference(start(*_bert("right")), model(*_bert("right"))) > 4e-4
    frozen = torchgraft.freeze_adapter(module, "task")
    if made.orthogonality:
        projection = frozen.adapters.layer_0.output_reft_linear.projection[0, 0]
        rows = projection @ projection.T
        torch.testing.assert_close(rows, torch.eye(len(rows)), atol=1e-4, rtol=0)
    again = torchgraft.unfreeze_adapter(frozen, "task")
    with torch.no_grad():
        torch.testing.assert_close(again(*_bert("left")), module(*_bert("left")), atol=1e-5, rtol=0)


def test_dropout_drops_numbers_of_changed_tokens() -> None:
    torch.manual_seed(0)
    config = torchgraft.LoReftConfig(r=2, prefix_positions=1, suffix_positions=1, dropout=0.5, layers=[2])
    module = torchgraft.graft(base("bert_sdpa", FLOAT), config, "task", trainable=True)
    ids, mask = _bert("right")
    served = _hidden(module, ids, mask)
    module.adapters.train()
    draws = torch.stack([_hidden(module, ids, mask) for _ in range(300)])
    changed = torch.zeros_like(mask, dtype=torch.bool)
    changed[:, 0] = True
    changed[torch.arange(len(mask)), mask.sum(1) - 1] = True
    assert torch.equal(draws[:, ~changed], served[~changed].expand(300, -1, -1))
    ratios = (draws[:, changed] / served[changed]).round(decimals=3)
    assert set(ratios.unique().tolist()) == {0.0, 2.0}
    assert (ratios.mean() - 1).abs() < 0.02


@pytest.mark.parametrize("config", ["loreft", "union_reft"])
def test_a_frozen_and_a_trainable_one_share_a_bank(config: str) -> None:
    module = torchgraft.graft(base("bert_sdpa", FLOAT), adapters={"frozen": _bert_directory("noreft")})
    module = torchgraft.load_adapter(module, _bert_directory(config), "learner", trainable=True)
    ids, mask = _bert("right")
    result = module(ids, mask, adapter_ids=torch.tensor([1, 0, 1]))[0]
    result.square().sum().backward()
    named = torchgraft.trainable_parameters(module, "learner")
    assert all(parameter.grad is not None for parameter in named.values())
    for index, name in enumerate(("noreft", config)):
        alone = torchgraft.graft(base("bert_sdpa", FLOAT), adapters={"x": _bert_directory(name)})
        expected = _hidden(alone, ids, mask)
        found = _hidden(module, ids, mask, adapter_ids=torch.full((3,), index))
        assert difference(found, expected) <= TOLERANCE[FLOAT]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("loreft[layers=[0, 7]]", "layers names layer 7; the model has layers 0 to 2"),
        ("loreft[layers=[]]", "the config asks for nothing on this model"),
        ("loreft|noreft", "a union has two ReFT configs .* give one config all their layers"),
        ("loreft[suffix_positions=9223372036854775807]", "suffix_positions to be at most 1000000000, got 92233"),
        ("loreft[r=0]", "expected ReftConfig.r to be at least 1, got 0"),
    ],
)
def test_configurations_that_mean_nothing_are_refused(config: str, message: str) -> None:
    with pytest.raises(torchgraft.GraftError, match=message):
        torchgraft.graft(base("bert_sdpa", FLOAT), config, "task")


@pytest.mark.parametrize("config", ["loreft", "reft_tied", "noreft"])
def test_averages_are_the_librarys(config: str, tmp_path: Path) -> None:
    """Orthogonal projections are averaged by what they are computed from, so that the average is not orthogonal."""
    library = hugging_face("bert", "sdpa", FLOAT)
    adapters.init(library)
    for seed, name in enumerate("xy"):
        library.add_adapter(name, config=CONFIGS[config])
        randomise(library, name, 40 + seed)
        library.save_adapter(str(tmp_path / name), name)
    library.average_adapter("mean", ["x", "y"], weights=[1.0, 3.0])
    library.eval().set_active_adapters("mean")
    ids, mask = _bert("left")
    with torch.no_grad():
        expected = library(ids, mask)[0]
    weights = {"x": 1.0, "y": 3.0}
    plain = base("bert_sdpa", FLOAT)
    both = torchgraft.load_adapter(plain, tmp_path / "x", trainable=True)
    both = torchgraft.load_adapter(both, tmp_path / "y", trainable=True)
    average = torchgraft.average_adapter(both, "mean", weights)
    average.activate("mean")
    assert difference(_hidden(average, ids, mask), expected) <= TOLERANCE[FLOAT]
    torchgraft.save_adapter(average, "mean", tmp_path / "mean")
    again = torchgraft.load_adapter(plain, tmp_path / "mean")
    assert difference(_hidden(again, ids, mask), expected) <= TOLERANCE[FLOAT]
    frozen = torchgraft.graft(plain, adapters={name: tmp_path / name for name in "xy"})
    if config == "noreft":
        average = torchgraft.average_adapter(frozen, "mean", weights)
        average.activate("mean")
        assert difference(_hidden(average, ids, mask), expected) <= TOLERANCE[FLOAT]
        return
    with pytest.raises(torchgraft.GraftError, match="orthogonal projections, whose average is that of its factors"):
        torchgraft.average_adapter(frozen, "mean", weights)
    with pytest.raises(torchgraft.GraftError, match="drops the fractions of their signs"):
        torchgraft.average_adapter(both, "mean", {"x": 0.3, "y": 0.4}, normalize_weights=False)


def test_a_damaged_directory_names_the_key(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    torchgraft.save_adapter(torchgraft.graft(base("bert_sdpa", FLOAT), "noreft[r=2]", "task"), "task", folder)
    path = folder / "adapter_config.json"
    for change, message in (
        ({"r": 3}, r"expected .*learned_source.weight of shape \[3, 48\], got \[2, 48\]"),
        ({"orthogonality": True}, "original_0 of output_reft of layer 0 is missing in the checkpoint"),
        ({"tied_weights": True}, r"units\.1\..*, for which the config has no location"),
    ):
        content = json.loads(path.read_text())
        broken = content | {"config": content["config"] | change}
        path.write_text(json.dumps(broken))
        with pytest.raises(torchgraft.GraftError, match=message):
            torchgraft.load_adapter(base("bert_sdpa", FLOAT), folder)
        path.write_text(json.dumps(content))


def test_a_batch_that_the_library_mixes_up_is_refused() -> None:
    grafted = torchgraft.graft(base("bert_sdpa", FLOAT), "loreft[suffix_positions=9]", "task")
    with pytest.raises(RuntimeError, match=re.escape("reft: expected at least 9 tokens")):
        _hidden(grafted, *_bert("right"))
    assert _hidden(grafted, torch.randint(2, 97, (1, 9)), torch.ones(1, 9, dtype=torch.int64)).isfinite().all()
