"""optimize(): the same results from torchgraft::linear; and what works on an optimised module."""

from pathlib import Path

import pytest
import torch

import torchgraft
from grafted import EVERY_WAY, base, grafted, reloaded, saved_adapter
from models import VARIANTS, make_batch
from oracle import difference, varied_batches
from scripts_here import run_here

OPERATOR = "torchgraft::linear"
FORMS = {
    "as it is": lambda module: module,
    "frozen before": torch.jit.freeze,
}


def _operators(module: torch.jit.ScriptModule, method: str = "forward") -> dict[str, int]:
    """How often each linear map or non-linearity stands in a method."""
    graph = str(getattr(module, method).inlined_graph)
    return {kind: graph.count(f"{kind}(") for kind in (OPERATOR, "aten::linear", "aten::gelu", "aten::addmm")}


def _result(module: torch.jit.ScriptModule, name: str, batch, **named) -> torch.Tensor:
    variant = VARIANTS[name]
    with torch.no_grad():
        return variant.compared(variant.hidden(module(*variant.arguments(batch), **named)), batch)


@pytest.mark.quick
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", EVERY_WAY)
def test_a_bare_module_gives_the_same(name: str, form: str) -> None:
    module = FORMS[form](base(name, torch.float32))
    optimized = torchgraft.optimize(module)
    found = _operators(optimized)
    assert found[OPERATOR] >= 12 and not found["aten::linear"] and not found["aten::addmm"]
    ready = reloaded(optimized) if form == "frozen before" else torch.jit.freeze(optimized)
    for batch in varied_batches(VARIANTS[name], torch.float32):
        for each in (optimized, ready):
            actual, wanted = _result(each, name, batch), _result(module, name, batch)
            assert (actual - wanted).norm() <= 1e-6 * wanted.norm()


def test_the_function_after_a_linear_map_is_part_of_it() -> None:
    optimized = torchgraft.optimize(base("bert_sdpa", torch.float32))
    graph = str(optimized.forward.graph)
    assert _operators(optimized)["aten::gelu"] == 0 and graph.count('value="gelu"') == 3 and graph.count('"tanh"') == 1


@pytest.mark.parametrize("name", EVERY_WAY)
def test_a_bank_gives_the_same(name: str) -> None:
    variant = VARIANTS[name]
    directories = {
        key: saved_adapter(variant, torch.float32, config).directory
        for key, config in {"a": "union_everything", "b": "unipelt", "c": "mam", "d": "lora_all"}.items()
    }
    module = torchgraft.graft(base(name, torch.float32), adapters=directories)
    optimized = reloaded(torchgraft.optimize(module))
    assert _operators(optimized, "grafted_forward")[OPERATOR] >= 3
    assert _operators(optimized, "base_forward")[OPERATOR] >= 12
    for batch in varied_batches(variant, torch.float32):
        for ids in (None, torch.arange(batch.rows) % 5 - 1, torch.full((batch.rows,), -1)):
            actual, wanted = (_result(each, name, batch, adapter_ids=ids) for each in (optimized, module))
            assert (actual - wanted).norm() <= 3e-6 * wanted.norm()
        module.deactivate(), optimized.deactivate()
        actual, wanted = (_result(each, name, batch) for each in (optimized, module))
        assert (actual - wanted).norm() <= 1e-6 * wanted.norm()
        module.activate("b"), optimized.activate("b")
        arguments = variant.arguments(batch)
        gates = [each.forward_with_gates(*arguments)[1]["b"] for each in (optimized, module)]
        torch.testing.assert_close(*gates, rtol=1e-5, atol=1e-6)


def test_the_exact_base_keeps_its_bits() -> None:
    module = grafted("bert_eager", torch.float32, "unipelt")
    optimized = torchgraft.optimize(module, exact_base=True)
    assert _operators(optimized, "base_forward")[OPERATOR] == 0
    assert _operators(optimized, "grafted_forward")[OPERATOR] > 0
    optimized.deactivate()
    for batch in varied_batches(VARIANTS["bert_eager"], torch.float32):
        assert torch.equal(
            _result(optimized, "bert_eager", batch), _result(base("bert_eager", torch.float32), "bert_eager", batch)
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes_give_the_same(dtype: torch.dtype) -> None:
    module = base("bert_sdpa", dtype)
    optimized = torchgraft.optimize(module)
    for batch in varied_batches(VARIANTS["bert_sdpa"], dtype):
        tolerance = 1e-12 if dtype == torch.float64 else 0.1
        assert difference(_result(optimized, "bert_sdpa", batch), _result(module, "bert_sdpa", batch)) <= tolerance


def test_gradients_flow_through_an_optimised_base() -> None:
    module = base("own_pre_sdpa_bool", torch.float64)
    optimized = torchgraft.optimize(module)
    batch = varied_batches(VARIANTS["own_pre_sdpa_bool"], torch.float64)[0]
    grads = []
    for each in (module, optimized):
        x, *others = VARIANTS["own_pre_sdpa_bool"].arguments(batch)
        x = x.clone().requires_grad_()
        each(x, *others).square().sum().backward()
        grads.append(x.grad)
    assert grads[0].abs().max() > 0
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-10)


CHANGES = {
    "rename": lambda module: torchgraft.rename_adapter(module, "task", "other"),
    "graft": lambda module: torchgraft.graft(module, "lora", "second", active="task"),
    "lower": torchgraft.lower,
    "merge": lambda module: torchgraft.merge_adapter(module, "task"),
    "ungraft": torchgraft.ungraft,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_takes_an_optimised_module_and_gives_one_that_is_not(change: str) -> None:
    module = grafted("bert_sdpa", torch.float32, "lora_all")
    optimized = torchgraft.optimize(module)
    changed, wanted = CHANGES[change](optimized), CHANGES[change](module)
    for method in ("forward",) if change == "ungraft" else ("base_forward", "grafted_forward"):
        assert _operators(changed, method)[OPERATOR] == 0
    for batch in varied_batches(VARIANTS["bert_sdpa"], torch.float32):
        assert difference(_result(changed, "bert_sdpa", batch), _result(wanted, "bert_sdpa", batch)) <= 1e-5
    again = torchgraft.optimize(changed)
    assert sum(_operators(again)[kind] for kind in ("aten::linear", "aten::addmm")) <= 6


def test_an_optimised_module_tells_the_same_of_itself() -> None:
    for module in (base("bert_sdpa", torch.float32), grafted("bert_sdpa", torch.float32, "unipelt")):
        optimized = torchgraft.optimize(module)
        assert str(torchgraft.inspect(optimized)) == str(torchgraft.inspect(module))
    assert torchgraft.list_adapters(optimized) == torchgraft.list_adapters(module)
    assert torchgraft.verify(optimized) == []
    twice = torchgraft.optimize(optimized)
    assert _operators(twice) == _operators(optimized)


def test_an_optimised_base_can_be_grafted_and_quantised() -> None:
    module = base("bert_sdpa", torch.float32)
    optimized = torchgraft.optimize(module)
    batch = varied_batches(VARIANTS["bert_sdpa"], torch.float32)[0]
    directory = saved_adapter(VARIANTS["bert_sdpa"], torch.float32, "unipelt").directory
    pairs = [torchgraft.graft(each, adapters={"task": directory}) for each in (optimized, module)]
    assert difference(*(_result(each, "bert_sdpa", batch) for each in pairs)) <= 1e-5
    assert [entry.path for entry in torchgraft.linear_maps(optimized)] == [
        entry.path for entry in torchgraft.linear_maps(module)
    ]


def test_attributes_that_the_graph_keeps_are_guarded() -> None:
    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = 2.0
            self.linear = torch.nn.Linear(6, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x) * self.scale

    module = torchgraft.optimize(torch.jit.script(Scaled().eval()))
    module(torch.randn(2, 6))
    module.scale = 3.0
    with pytest.raises(torch.jit.Error, match="'scale' was 2"):
        module(torch.randn(2, 6))


def test_what_cannot_be_optimised_is_named() -> None:
    class Nothing(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    with pytest.raises(torchgraft.GraftError, match="optimize: forward has no linear map and no norm of a sum whose"):
        torchgraft.optimize(torch.jit.script(Nothing().eval()))
    with pytest.raises(torchgraft.GraftError, match="optimize: expected a grafted module with exact_base"):
        torchgraft.optimize(base("bert_sdpa", torch.float32), exact_base=True)


def test_a_trainable_adapter_is_refused() -> None:
    module = torchgraft.graft(base("bert_sdpa", torch.float32), "lora", "task", trainable=True)
    with pytest.raises(torchgraft.GraftError, match="optimize: 'task' is trainable; .* make it a frozen one"):
        torchgraft.optimize(module)
    torchgraft.optimize(torchgraft.freeze_adapter(module, "task"))


class Holder(torch.nn.Module):
    def __init__(self, inside: torch.jit.ScriptModule) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        return self.inside(x, padding)


def test_nothing_of_an_optimised_module_inside_another_is_left_by_lower() -> None:
    name = "own_pre_sdpa_bool"
    batch = make_batch([5, 3], 5, torch.float32)
    outer = torch.jit.trace(Holder(torchgraft.optimize(base(name, torch.float32))), VARIANTS[name].arguments(batch))
    module = torchgraft.lower(torchgraft.graft(outer, "unipelt", "task"))
    for each in module.modules():
        for method in each._c._method_names():
            graph = str(each._c._get_method(method).graph).replace("__torch__.torchgraft", "")
            assert "torchgraft::" not in graph, method


def test_an_optimised_module_is_exported() -> None:
    module = grafted("bert_sdpa", torch.float32, "unipelt")
    arguments = VARIANTS["bert_sdpa"].arguments(make_batch([9, 5], 9, torch.float32))
    program = torchgraft.export(torchgraft.optimize(module), arguments)
    assert "torchgraft.linear" in str(program.graph)
    ids = torch.tensor([0, -1])
    leaves = [torch.utils._pytree.tree_leaves(each(*arguments, ids)) for each in (program.module(), module)]
    for actual, wanted in zip(*leaves, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.quick
def test_the_command_writes_a_file(tmp_path: Path) -> None:
    grafted("bert_sdpa", torch.float32, "unipelt").save(str(tmp_path / "model.pt"))
    shown = run_here("graft.py", "optimize", tmp_path / "model.pt", "-o", tmp_path / "out.pt")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout == f"{tmp_path / 'out.pt'}: optimised; it needs libtorchgraft.so\n"
    module, wanted = (torch.jit.load(str(tmp_path / name)) for name in ("out.pt", "model.pt"))
    assert _operators(module)[OPERATOR] > 0
    arguments = VARIANTS["bert_sdpa"].arguments(make_batch([9, 5], 9, torch.float32))
    with torch.no_grad():
        torch.testing.assert_close(module(*arguments), wanted(*arguments), rtol=1e-4, atol=1e-5)


def test_norms_of_sums_are_one_operator_with_the_sum() -> None:
    optimized = torchgraft.optimize(base("bert_sdpa", torch.float32))
    graph = str(optimized.forward.graph)
    assert graph.count("torchgraft::residual_norm(") == 6  # two in each of three layers
    assert graph.count("aten::layer_norm(") == 1  # behind the embeddings, which are added in place
    grafted_again = torchgraft.graft(optimized, "seq_bn", "task")  # finds the norms
    assert "torchgraft::residual_norm(" not in str(grafted_again.base_forward.inlined_graph)


def test_an_int8_module_has_its_norms_optimised() -> None:
    module = torchgraft.quantize(grafted("bert_sdpa", torch.float32, "unipelt"))
    optimized = torchgraft.optimize(module)
    assert "torchgraft::residual_norm(" in str(optimized.grafted_forward.inlined_graph)
    for batch in varied_batches(VARIANTS["bert_sdpa"], torch.float32):
        found, wanted = (_result(each, "bert_sdpa", batch) for each in (optimized, module))
        assert (found - wanted).norm() <= 1e-2 * wanted.norm()  # activations are rounded to int8 anew
