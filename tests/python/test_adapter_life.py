"""Removing, renaming, replacing, averaging, merging adapters, and taking all of them off."""

import pytest
import torch

import torchgraft
from grafted import EVERY_WAY, base, grafted, reloaded, saved_adapter
from models import VARIANTS, make_batch
from oracle import difference

pytestmark = pytest.mark.quick


def _run(module: torch.jit.ScriptModule, name: str, **keywords) -> torch.Tensor:
    variant = VARIANTS[name]
    batch = make_batch([9, 9, 9], 9, next(iter(module.state_dict().values())).dtype, 3)
    with torch.no_grad():
        return variant.hidden(module(*variant.arguments(batch), **keywords))


def _bank(name: str, dtype: torch.dtype = torch.float64) -> torch.jit.ScriptModule:
    """Three trained adapters of different methods and sizes: a, b, c; c is active."""
    variant = VARIANTS[name]
    directories = {
        key: saved_adapter(variant, dtype, config).directory
        for key, config in {"a": "lora_all", "b": "unipelt", "c": "mam"}.items()
    }
    return torchgraft.graft(base(name, dtype), adapters=directories)


@pytest.mark.parametrize("name", EVERY_WAY)
def test_removed_and_renamed_adapters_leave_the_others_alone(name: str) -> None:
    module = _bank(name)
    before = {key: _run(module, name, adapter_ids=torch.full((3,), i)) for i, key in enumerate("abc")}
    smaller = torchgraft.remove_adapter(module, "a")
    assert smaller.adapter_names() == ["b", "c"] and smaller.active_adapter() == "c"
    renamed = torchgraft.rename_adapter(smaller, "c", "third")
    assert renamed.adapter_names() == ["b", "third"] and renamed.active_adapter() == "third"
    for i, key in enumerate("bc"):
        torch.testing.assert_close(
            _run(reloaded(renamed), name, adapter_ids=torch.full((3,), i)), before[key], rtol=0, atol=1e-12
        )
    assert torchgraft.remove_adapter(module, "c").active_adapter() is None
    assert module.adapter_names() == ["a", "b", "c"]


def test_a_replaced_adapter_keeps_its_number() -> None:
    module = _bank("bert_sdpa")
    directory = saved_adapter(VARIANTS["bert_sdpa"], torch.float64, "seq_bn_gated").directory
    replaced = torchgraft.replace_adapter(module, "b", directory=directory)
    assert replaced.adapter_names() == ["a", "b", "c"]
    alone = grafted("bert_sdpa", torch.float64, "seq_bn_gated")
    ids = torch.full((3,), 1)
    torch.testing.assert_close(
        _run(replaced, "bert_sdpa", adapter_ids=ids), _run(alone, "bert_sdpa"), rtol=0, atol=1e-12
    )
    with pytest.raises(torchgraft.GraftError, match="a config or a directory"):
        torchgraft.replace_adapter(module, "b")


def test_listed_sizes_are_those_of_the_weights() -> None:
    module = _bank("bert_sdpa", torch.float32)
    for info in torchgraft.list_adapters(module):
        alone = torchgraft.remove_adapter(module, *[name for name in "abc" if name != info.name])
        trained = dict(alone.adapters.named_parameters())
        fixed = sum(p.numel() for key, p in trained.items() if key.endswith(".scaling"))
        assert info.parameters == sum(p.numel() for p in trained.values()) - fixed
        assert info.bytes == 4 * info.parameters == 4 * sum(info.by_location.values())
        assert (info.active, info.merged) == (info.name == "c", False)


@pytest.mark.parametrize("weights", [{"x": 1.0, "y": 3.0}, ["x", "y"]], ids=["weighted", "plain"])
def test_an_average_is_the_mean_of_the_weights(weights) -> None:
    torch.manual_seed(0)
    module = torchgraft.graft(base("bert_sdpa", torch.float64), "unipelt", "x")
    module = torchgraft.graft(module, "unipelt", "y")
    for key, parameter in module.adapters.named_parameters():
        if parameter.is_floating_point() and not key.endswith(".scaling"):
            parameter.data.normal_()
    average = torchgraft.average_adapter(module, "mean", weights)
    assert average.adapter_names() == ["x", "y", "mean"] and average.active_adapter() == "y"
    share = 0.25 if isinstance(weights, dict) else 0.5
    total = torchgraft.average_adapter(module, "sum", {"x": 1.0, "y": 3.0}, normalize_weights=False)
    sums = dict(total.adapters.named_parameters())
    for key, bank in average.adapters.named_parameters():
        if bank.is_floating_point() and not key.endswith(".scaling"):  # not trained here: a number
            torch.testing.assert_close(bank[2], share * bank[0] + (1 - share) * bank[1], msg=key)
            torch.testing.assert_close(sums[key][2], bank[0] + 3 * bank[1], msg=key)


def test_averages_of_what_cannot_be_averaged_are_refused() -> None:
    module = _bank("bert_sdpa")
    with pytest.raises(torchgraft.GraftError, match="different configurations"):
        torchgraft.average_adapter(module, "mean", ["a", "b"])
    with pytest.raises(torchgraft.GraftError, match="sum to 0 .*normalize_weights=False"):
        torchgraft.average_adapter(module, "mean", {"a": 1.0, "b": -1.0})
    with pytest.raises(torchgraft.GraftError, match="already has an adapter 'a'"):
        torchgraft.average_adapter(module, "a", ["a"])
    for weight in (True, "1.0", None):
        with pytest.raises(torchgraft.GraftError, match="average_adapter: expected weights to be numbers, got"):
            torchgraft.average_adapter(module, "mean", {"a": weight, "b": 1.0})
        with pytest.raises(torchgraft.GraftError, match="Average: expected weights to be numbers, got"):
            torchgraft.Average("a", "b", weights=[1.0, weight])


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        pytest.param(torch.float32, 1e-5, id="f32", marks=pytest.mark.slow(seconds=2)),
        pytest.param(torch.float64, 1e-12, id="f64"),
    ],
)
@pytest.mark.parametrize("name", EVERY_WAY)
def test_a_merged_lora_gives_the_same_results(name: str, dtype: torch.dtype, tolerance: float) -> None:
    module = _bank(name, dtype)
    module.activate("a")
    weights = {key: tensor.clone() for key, tensor in base(name, dtype).state_dict().items()}
    plain, expected = _run(base(name, dtype), name), _run(module, name)
    assert (plain - expected).abs().max() > 1e-2
    merged = torchgraft.merge_adapter(module, "a", into_base=True)
    assert [info.merged for info in torchgraft.list_adapters(merged)] == [True, False, False]
    for result in (merged, reloaded(merged), torchgraft.ungraft(merged)):
        assert difference(_run(result, name), expected) <= tolerance
    restored = torchgraft.unmerge_adapter(reloaded(merged), "a")
    assert difference(_run(restored, name), expected) <= tolerance
    assert difference(_run(torchgraft.ungraft(restored), name), plain) <= tolerance
    for key, tensor in weights.items():
        assert torch.equal(tensor, base(name, dtype).state_dict()[key]), key  # nothing was written through


@pytest.mark.parametrize(
    ("config", "reason"),
    [("lora_gated", "its gate depends on the input"), ("seq_bn", "non-linearity"), ("mam", "adds keys and values")],
)
def test_what_cannot_be_merged_says_why(config: str, reason: str) -> None:
    with pytest.raises(torchgraft.GraftError, match=reason):
        torchgraft.merge_adapter(grafted("bert_sdpa", torch.float32, config), "task")


def test_the_states_of_merging_are_checked() -> None:
    merged = torchgraft.merge_adapter(_bank("bert_sdpa"), "a", into_base=True)
    with pytest.raises(torchgraft.GraftError, match="merged already"):
        torchgraft.merge_adapter(merged, "a", into_base=True)
    with pytest.raises(torchgraft.GraftError, match="is merged into the base's weights; unmerge it first"):
        torchgraft.remove_adapter(merged, "a")
    with pytest.raises(torchgraft.GraftError, match="'b' is not merged"):
        torchgraft.unmerge_adapter(merged, "b")


def test_merging_changes_the_base_of_other_adapters_only_if_that_is_said() -> None:
    """Two LoRA: merged into the base, each row gets the merged one's update beside its own."""
    directories = {
        key: saved_adapter(VARIANTS["bert_sdpa"], torch.float64, config).directory
        for key, config in {"a": "lora_all", "b": "lora_gated"}.items()
    }
    module = torchgraft.graft(base("bert_sdpa", torch.float64), adapters=directories)
    with pytest.raises(torchgraft.GraftError, match=r"has other adapters too \(b\).*into_base=True"):
        torchgraft.merge_adapter(module, "a")
    alone = torchgraft.remove_adapter(module, "b")
    rows = {key: torch.full((3,), i) for i, key in enumerate(["a", "b", "base"])} | {"base": torch.full((3,), -1)}
    with_a = _run(module, "bert_sdpa", adapter_ids=rows["a"])
    merged = torchgraft.merge_adapter(module, "a", into_base=True)
    on_top = torchgraft.graft(
        torchgraft.ungraft(torchgraft.merge_adapter(alone, "a")), adapters={"b": directories["b"]}
    )
    for row, expected in (("a", with_a), ("base", with_a), ("b", _run(on_top, "bert_sdpa"))):
        assert difference(_run(merged, "bert_sdpa", adapter_ids=rows[row]), expected) <= 1e-12
    merged.deactivate()
    assert difference(_run(merged, "bert_sdpa"), with_a) <= 1e-12


def test_a_trainable_adapter_is_not_merged() -> None:
    module = torchgraft.graft(base("bert_sdpa", torch.float32), "lora", "task", trainable=True)
    with pytest.raises(torchgraft.GraftError, match="'task' is trainable, and would go on changing; freeze it first"):
        torchgraft.merge_adapter(module, "task")


def test_after_a_merge_dora_divides_by_the_norms_of_the_merged_weights() -> None:
    """As in the library, which computes them in every pass."""
    saved = {
        key: saved_adapter(VARIANTS["bert_sdpa"], torch.float64, config).directory
        for key, config in {"a": "lora_all", "d": "dora_gated"}.items()
    }
    module = torchgraft.graft(base("bert_sdpa", torch.float64), adapters=saved)
    merged = torchgraft.merge_adapter(module, "a", into_base=True)
    merged.activate("d")
    live = torchgraft.unfreeze_adapter(merged, "d")  # computes the norms in every pass, too
    assert difference(_run(merged, "bert_sdpa"), _run(live, "bert_sdpa")) <= 1e-12


@pytest.mark.parametrize("name", EVERY_WAY)
def test_ungrafted_it_is_the_base(name: str) -> None:
    plain = base(name, torch.float32)
    bare = torchgraft.ungraft(grafted(name, torch.float32, "unipelt"))
    assert not hasattr(bare, "adapters") and not hasattr(bare, "adapter_names")
    assert sorted(bare.state_dict()) == sorted(plain.state_dict())
    assert bare.code == plain.code
    assert torch.equal(_run(bare, name), _run(plain, name))
    assert torch.equal(_run(reloaded(bare), name), _run(plain, name))


def test_a_bare_module_has_no_life() -> None:
    with pytest.raises(torchgraft.GraftError, match="has no adapters"):
        torchgraft.ungraft(base("bert_sdpa", torch.float32))
    with pytest.raises(torchgraft.GraftError, match="removes the last adapter"):
        torchgraft.remove_adapter(grafted("bert_sdpa", torch.float32, "lora"), "task")
