"""lower(): the same results without the operator library."""

import functools
import subprocess
import sys

import pytest
import torch
import transformers

import torchgraft
from grafted import EVERY_WAY, base, grafted, reloaded, saved_adapter
from models import VARIANTS, make_batch
from oracle import CONFIGS, difference, varied_batches
from thinned import thinned
from torchgraft.configs import BnConfig


def _assert_same(lowered: torch.jit.ScriptModule, module: torch.jit.ScriptModule, name: str, tolerance: float) -> None:
    variant = VARIANTS[name]
    dtype = next(p.dtype for p in module.adapters.parameters() if p.is_floating_point())
    count = len(module.adapter_names())
    for batch in varied_batches(variant, dtype):
        mixed = torch.arange(batch.rows) % (count + 1) - 1
        for ids in (None, mixed, torch.full((batch.rows,), -1)):
            with torch.no_grad():
                expected, gates = module.forward_with_gates(*variant.arguments(batch), adapter_ids=ids)
                actual, lowered_gates = lowered.forward_with_gates(*variant.arguments(batch), adapter_ids=ids)
            hidden = [variant.compared(variant.hidden(result), batch) for result in (actual, expected)]
            assert difference(*hidden) <= tolerance
            assert sorted(gates) == sorted(lowered_gates)
            for adapter, layers in gates.items():
                for layer, locations in layers.items():
                    for location, gate in locations.items():
                        torch.testing.assert_close(
                            lowered_gates[adapter][layer][location], gate, rtol=tolerance, atol=tolerance
                        )


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        pytest.param(torch.float32, 1e-5, id="f32", marks=pytest.mark.slow(seconds=3)),
        pytest.param(torch.float64, 1e-12, id="f64"),
    ],
)
@pytest.mark.parametrize(
    "name", thinned(EVERY_WAY, lambda name: name in ("bert_eager", "encoder_slow_pre_seq_first"), seconds=4)
)
def test_a_bank_lowered_gives_the_same(name: str, dtype: torch.dtype, tolerance: float) -> None:
    variant = VARIANTS[name]
    directories = {
        key: saved_adapter(variant, dtype, config).directory
        for key, config in {"a": "union_everything", "b": "unipelt", "c": "mam", "d": "lora_all"}.items()
    }
    module = torchgraft.graft(base(name, dtype), adapters=directories)
    lowered = torchgraft.lower(module)
    assert "torchgraft" not in str(lowered.grafted_forward.inlined_graph).replace("__torch__.torchgraft", "")
    _assert_same(reloaded(lowered), module, name, tolerance)


# test_a_bank_lowered_gives_the_same has all of them in one bank.
_ALONE = ("seq_bn", "lora", "prefix_tuning", "unipelt", "union_everything", "ia3")


@pytest.mark.parametrize(
    "config",
    [pytest.param(each, marks=[pytest.mark.slow(seconds=1)] * (each not in _ALONE)) for each in CONFIGS],
)
def test_every_method_lowered_gives_the_same(config: str) -> None:
    module = grafted("bert_sdpa", torch.float64, config)
    _assert_same(torchgraft.lower(module), module, "bert_sdpa", 1e-12)


def test_an_error_inside_a_lowered_module_is_an_error() -> None:
    """Also in one that was not saved in between, whose nodes point to the functions that they were compiled from."""
    lowered = torchgraft.lower(grafted("bert_sdpa", torch.float32, "lora"))
    arguments = VARIANTS["bert_sdpa"].arguments(varied_batches(VARIANTS["bert_sdpa"], torch.float32)[0])
    with pytest.raises(
        (RuntimeError, torch.jit.Error), match=r"gated_lora.*: expected adapter_ids in \[-1, 1\), got 5 in row 0"
    ):
        lowered(*arguments, adapter_ids=torch.full((arguments[0].size(0),), 5))


_KINDS = ["lora[r=2]", "lora[r=2,use_gating=True]", "lora[use_dora=True]", "ia3", "vera[r=3]", "mtl_lora[r=2]",
          "double_seq_bn[reduction_factor=8,use_gating=True]", 'par_bn[scaling="learned"]', "seq_bn_inv",
          "seq_bn[ln_before=True,ln_after=True]", "compacter[reduction_factor=4]",
          "prefix_tuning_flat[prefix_length=3]", "loreft[r=2]", "mam[reduction_factor=8]", "unipelt[r=2]"]  # fmt: skip


@pytest.mark.parametrize("config", _KINDS)
@pytest.mark.parametrize("number", [float("nan"), pytest.param(float("inf"), marks=pytest.mark.slow(seconds=1))])
def test_what_is_wrong_in_an_adapter_stays_with_its_rows(config: str, number: float) -> None:
    """The rows of the base are computed beside those of adapter 0."""
    module = torchgraft.graft(base("bert_sdpa", torch.float64), config, "wrong", verify=False)
    module = torchgraft.graft(module, config, "right", verify=False)
    variant = VARIANTS["bert_sdpa"]
    batch = varied_batches(variant, torch.float64)[0]
    ids = torch.tensor([-1, 1, -1, 1, -1, 1, -1, 1])[: batch.rows]
    expected = module(*variant.arguments(batch), adapter_ids=ids)
    with torch.no_grad():
        for weight in [*module.adapters.parameters(), *module.adapters.buffers()]:
            if weight.is_floating_point() and weight.dim() > 1 and weight.size(0) == 2:
                weight[0] = number
    for form in (module, torchgraft.lower(module, verify=False)):
        actual = form(*variant.arguments(batch), adapter_ids=ids)
        assert difference(variant.hidden(actual), variant.hidden(expected)) <= 1e-12
        if torchgraft.list_adapters(form):
            form.deactivate()
        base_rows = form(*variant.arguments(batch))
        assert bool(variant.hidden(base_rows).isfinite().all())


@functools.cache
def _in_form(method: str, form: str) -> torch.jit.ScriptModule:
    module = grafted("bert_sdpa", torch.float32, method)
    return {"as it is": lambda m: m, "lowered": torchgraft.lower, "saved and loaded": reloaded}[form](module)


@pytest.mark.parametrize("method", ["lora", "seq_bn", "bn_norms", "compacter_factors", "prefix_gated", "ia3", "mam"])
@pytest.mark.parametrize(
    "form", ["as it is", "lowered", pytest.param("saved and loaded", marks=pytest.mark.slow(seconds=1))]
)
@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([0], r"expected adapter_ids of shape \[2\], got \[1\]"),
        ([0, 0, 0], r"expected adapter_ids of shape \[2\], got \[3\]"),
        ([0, -2], r"expected adapter_ids in \[-1, 1\), got -2 in row 1"),
        ([1, 0], r"expected adapter_ids in \[-1, 1\), got 1 in row 0"),
        ([True, False], "expected adapter_ids of dtype Long, got "),
        ([[0], [0]], r"expected adapter_ids of shape \[2\], got \[2, 1\]"),
    ],
)
def test_wrong_adapter_ids_are_refused_in_every_form(method: str, form: str, ids: list, message: str) -> None:
    """Also where no operator of torchgraft reads them: (IA)^3 is plain ATen code, and so is a lowered module."""
    module = _in_form(method, form)
    variant = VARIANTS["bert_sdpa"]
    with pytest.raises((RuntimeError, torch.jit.Error), match=message):
        module(*variant.arguments(make_batch([5, 3], 5, torch.float32)), adapter_ids=torch.tensor(ids))


@pytest.mark.parametrize("pooling", ["unpadded"])
@pytest.mark.parametrize("name", ["bert_sdpa", "own_pre_sdpa_bool"])
def test_gates_over_real_tokens_are_lowered(name: str, pooling: str) -> None:
    module = grafted(name, torch.float64, "unipelt", gate_pooling=pooling)
    _assert_same(torchgraft.lower(module), module, name, 1e-12)


class OfPairs(torch.nn.Module):
    """One layer, whose mask [B, S, S] says for each pair of tokens whether the first sees the second."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (torch.nn.Linear(8, 8) for _ in range(4))
        self.norm = torch.nn.LayerNorm(8)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = [each(x).unflatten(-1, (2, 4)).transpose(1, 2) for each in (self.q, self.k, self.v)]
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask.unsqueeze(1))
        return self.norm(x + self.o(mixed.transpose(1, 2).flatten(2)))


def test_which_tokens_count_is_lowered_for_any_mask() -> None:
    torch.manual_seed(0)
    example = (torch.randn(2, 5, 8), torch.ones(2, 5, 5, dtype=torch.bool))
    base = torch.jit.trace(OfPairs().eval(), example)
    module = torchgraft.graft(base, "lora[use_gating=True,init_weights='bert']", "task", gate_pooling="unpadded")
    lowered = torchgraft.lower(module)
    refused = 0
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        mask = torch.rand(2, 5, 5, generator=generator) < torch.rand((), generator=generator)
        mask |= torch.eye(5, dtype=torch.bool) if seed % 2 else torch.ones(5, 5, dtype=torch.bool).tril()
        try:
            expected = module.forward_with_gates(example[0], mask)[1]["task"][0]
        except (RuntimeError, torch.jit.Error):
            refused += 1
            for refusing in (module, lowered):
                with pytest.raises((RuntimeError, torch.jit.Error), match="attention_token_mask: .* cannot be told"):
                    refusing.forward_with_gates(example[0], mask)
            continue
        actual = lowered.forward_with_gates(example[0], mask)[1]["task"][0]
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    assert 5 <= refused <= 55


class Hidden(torch.nn.Module):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.model(ids, mask)[0]


def test_gates_of_bfloat16_are_lowered_in_float32() -> None:
    """bfloat16 cannot count to 259, nor add so many sigmoids."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        return_dict=False,
        attn_implementation="sdpa",
    )
    model = Hidden(transformers.BertModel(config, add_pooling_layer=False).to(torch.bfloat16).eval())
    arguments = (torch.randint(50, (8, 300)), (torch.arange(300) < 259).long().expand(8, -1).contiguous())
    module = torchgraft.graft(torch.jit.trace(model, arguments), config="unipelt", name="a", gate_pooling="unpadded")
    with torch.no_grad():
        for path, parameter in module.named_parameters():
            if "gate_" in path:
                parameter.normal_(std=0.5)
        found = [each.forward_with_gates(*arguments)[1]["a"] for each in (module, torchgraft.lower(module))]
    gates, lowered = [
        torch.cat([gate.flatten() for layer in layers.values() for gate in layer.values()]) for layers in found
    ]
    assert gates.dtype == torch.bfloat16 and gates.unique().numel() > 20
    assert (gates == lowered).float().mean() > 0.9


def _non_linearities() -> list[str]:
    from transformers.activations import ACT2FN

    known = []
    for name in [*ACT2FN, "leakyrelu"]:
        try:
            torchgraft._libraries.patcher().check_supported(
                torchgraft.configs.config_to_json(BnConfig(True, True, 4, name))
            )
            known.append(name)
        except torchgraft.GraftError:
            pass
    return known


@pytest.mark.parametrize(
    "non_linearity",
    [
        pytest.param(each, marks=[pytest.mark.slow(seconds=1)] * (i % 4 > 0))
        for i, each in enumerate(_non_linearities())
    ],
)
def test_every_non_linearity(non_linearity: str) -> None:
    torch.manual_seed(0)
    config = BnConfig(mh_adapter=True, output_adapter=True, reduction_factor=2, non_linearity=non_linearity)
    module = torchgraft.graft(base("bert_sdpa", torch.float64), config, "task")
    with torch.no_grad():
        for parameter in module.adapters.parameters():
            if parameter.is_floating_point() and parameter.dim() > 2:
                parameter.normal_()
    _assert_same(torchgraft.lower(module), module, "bert_sdpa", 1e-12)


def test_a_lowered_file_loads_without_the_library(tmp_path) -> None:
    path = tmp_path / "lowered.pt"
    torchgraft.lower(grafted("bert_sdpa", torch.float32, "unipelt")).save(str(path))
    script = f"""
import torch
module = torch.jit.load({str(path)!r})
ids = torch.randint(0, 5, (2, 4))
module.forward_with_gates(ids, torch.ones_like(ids))
module(ids, torch.ones_like(ids), torch.tensor([0, -1]))
assert not hasattr(torch.ops.torchgraft, "gated_lora")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_gradients_of_a_lowered_module_are_the_modules() -> None:
    variant = VARIANTS["bert_sdpa"]
    saved = saved_adapter(variant, torch.float64, "unipelt")
    module = torchgraft.graft(base("bert_sdpa", torch.float64), adapters={"task": saved.directory}, trainable=True)
    lowered = torchgraft.lower(module)
    batch = varied_batches(variant, torch.float64)[0]
    gradients = []
    for each in (module, lowered):
        parameters = [p for p in each.adapters.parameters() if p.requires_grad]
        loss = variant.compared(variant.hidden(each(*variant.arguments(batch))), batch).square().sum()
        gradients.append(torch.autograd.grad(loss, parameters))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_more_can_be_grafted_onto_it() -> None:
    module = torchgraft.graft(torchgraft.lower(grafted("bert_sdpa", torch.float32, "lora")), "mam", "more")
    assert module.adapter_names() == ["task", "more"]
