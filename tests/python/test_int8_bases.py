"""What a module on a dynamic int8 base does beside its results, which architectures/test_int8.py compares."""

import functools
import io
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

import models
import torchgraft
from grafted import reloaded, saved_adapter
from models import VARIANTS, make_batch
from oracle import difference

sys.path.append(str(Path(__file__).parent / "architectures"))
from int8_reference import quantised  # noqa: E402

pytestmark = pytest.mark.quick
_VARIANT = VARIANTS["bert_sdpa"]
_CONFIGS = ["unipelt", "mam", "lora_all", "prefix_two_gates"]


@functools.cache
def _base(scheme: str = "per_channel") -> torch.jit.ScriptModule:
    model = quantised(models.hugging_face("bert", "sdpa", torch.float32), scheme)
    return torch.jit.trace(model, _VARIANT.arguments(_batch()), check_trace=False)


def _batch(seed: int = 0) -> models.Batch:
    return make_batch([9, 5, 7, 9], 9, torch.float32, seed)


def _directory(config: str) -> str:
    return saved_adapter(_VARIANT, torch.float32, config).directory


@functools.cache
def _grafted(scheme: str = "per_channel") -> torch.jit.ScriptModule:
    return torchgraft.graft(_base(scheme), adapters={config: _directory(config) for config in _CONFIGS})


def _run(module: torch.jit.ScriptModule, **keywords) -> Tensor:
    with torch.no_grad():
        return module(*_VARIANT.arguments(_batch(3)), **keywords)[0]


def _frozen(module: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    return torch.jit.freeze(reloaded(module).eval())


def _optimised(module: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    return torch.jit.optimize_for_inference(reloaded(module).eval())


@pytest.mark.parametrize("form", [reloaded, _frozen, _optimised])
@pytest.mark.parametrize("scheme", ["per_channel", "per_tensor", "float16"])
def test_deactivated_it_is_the_base_bit_for_bit(scheme: str, form) -> None:
    expected = _run(_base(scheme))
    module = torchgraft.graft(form(_base(scheme)), adapters={"task": _directory("unipelt")})
    with_adapter = _run(_grafted(scheme), adapter_ids=torch.zeros(4, dtype=torch.int64))
    assert difference(_run(module), with_adapter) <= 1e-5
    assert difference(with_adapter, expected) > 1e-2
    module.deactivate()
    assert torch.equal(_run(module), expected)
    assert torch.equal(_run(reloaded(module)), expected)


def test_rows_without_an_adapter_in_a_batch_of_base_rows_are_the_bases() -> None:
    assert difference(_run(_grafted(), adapter_ids=torch.full((4,), -1)), _run(_base())) <= 1e-5


def test_each_row_of_a_mixed_batch_gets_its_adapter() -> None:
    """With float16 weights, where rows do not share a scale as the int8 activations of a batch do."""
    module = _grafted("float16")
    mixed = _run(module, adapter_ids=torch.tensor([2, -1, 0, 1]))
    for row, adapter in enumerate([2, -1, 0, 1]):
        alone = _run(module, adapter_ids=torch.full((4,), adapter))
        assert difference(mixed[row], alone[row]) <= 1e-5


def test_a_lowered_module_gives_the_same_without_the_library() -> None:
    lowered = torchgraft.lower(_grafted())
    ids = torch.tensor([2, -1, 0, 1])
    assert difference(_run(reloaded(lowered), adapter_ids=ids), _run(_grafted(), adapter_ids=ids)) <= 1e-5
    assert "torchgraft::" not in str(lowered.grafted_forward.inlined_graph)


def test_life_of_adapters(tmp_path: Path) -> None:
    """Verified, listed, saved, loaded, renamed, removed; the int8 weights stay in one copy."""
    module = _grafted()
    assert torchgraft.verify(module, example=_VARIANT.arguments(_batch())) == []
    torchgraft.save_adapter(module, "mam", tmp_path / "mam")
    fresh = torchgraft.graft(_base(), adapters={"again": tmp_path / "mam"})
    module.activate("mam")
    assert difference(_run(fresh), _run(module)) <= 1e-6
    renamed = torchgraft.rename_adapter(torchgraft.remove_adapter(module, "unipelt"), "mam", "other")
    assert renamed.adapter_names() == ["other", "lora_all", "prefix_two_gates"]
    renamed.activate("other")
    assert difference(_run(renamed), _run(module)) <= 1e-6
    assert torch.equal(_run(torchgraft.ungraft(module)), _run(_base()))


def test_a_peft_directory_is_loaded_by_path(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["query", "value", "intermediate.dense"], init_lora_weights=False
    )
    model = models.hugging_face("bert", "sdpa", torch.float32)
    peft.get_peft_model(model, config).eval().save_pretrained(tmp_path)
    module = torchgraft.graft(_base(), adapters={"task": tmp_path})
    in_float = torch.jit.trace(
        models.hugging_face("bert", "sdpa", torch.float32), _VARIANT.arguments(_batch()), check_trace=False
    )
    expected = _run(torchgraft.graft(in_float, adapters={"task": tmp_path}))
    assert difference(_run(module), expected) < 0.3 * difference(_run(_base()), _run(module))


@pytest.mark.parametrize("form", [reloaded, _frozen])
def test_what_needs_the_weights_numbers_is_refused(form) -> None:
    base = form(_base())
    with pytest.raises(
        torchgraft.GraftError, match=r"merge_adapter: the weight that selfattn_lora_q of layer 0 .*int8"
    ):
        torchgraft.merge_adapter(torchgraft.graft(base, config="lora", name="task"), "task")
    with pytest.raises(torchgraft.GraftError, match=r"DoRA on selfattn_lora_q of layer 0 .* packed int8.*use LoRA"):
        torchgraft.graft(base, adapters={"task": _directory("dora")})


def test_training_is_refused() -> None:
    """The packed product has no gradient: what lies before it would not be trained, in silence."""
    with pytest.raises(torchgraft.GraftError, match="no adapter can be trained on a base with packed int8.*float32"):
        torchgraft.graft(_base(), config="seq_bn", name="task", trainable=True)
    with pytest.raises(torchgraft.GraftError, match="no adapter can be trained on a base with packed int8"):
        torchgraft.unfreeze_adapter(_grafted(), "mam")


def test_export_is_refused() -> None:
    with pytest.raises(torchgraft.GraftError, match="export: the module has packed int8 or float16 weights"):
        torchgraft.export(_grafted(), _VARIANT.arguments(_batch()))


@pytest.mark.parametrize("only_linear", [False, True])
@pytest.mark.parametrize("how", ["script", "trace"])
def test_static_quantisation_is_named(how: str, only_linear: bool) -> None:
    source = models.hugging_face("bert", "sdpa", torch.float32)
    model = models.own_encoder(source, post_norm=True, core="sdpa", packed=False, kind="unmasked", dropout=0.0).eval()
    x = _batch().embeddings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        qconfig = torch.ao.quantization.get_default_qconfig("x86")
        mapping = torch.ao.quantization.QConfigMapping().set_object_type(nn.Linear, qconfig)
        mapping = mapping if only_linear else torch.ao.quantization.get_default_qconfig_mapping("x86")
        prepared = prepare_fx(model, mapping, (x,))
        prepared(x)
        static = convert_fx(prepared)
    module = torch.jit.script(static) if how == "script" else torch.jit.trace(static, x)
    with pytest.raises(
        torchgraft.GraftError, match=r"int8 layers were left out.*quantized::linear at.*quantize_dynamic"
    ):
        torchgraft.graft(module, config="seq_bn", name="task")


def test_one_static_layer_of_several_stops_a_graft() -> None:
    """Else the layers behind it would have other numbers than their adapters' directories say."""
    source = models.hugging_face("bert", "sdpa", torch.float32)
    model = models.own_encoder(source, post_norm=True, core="sdpa", packed=False, kind="unmasked", dropout=0.0).eval()
    x = _batch().embeddings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        qconfig = torch.ao.quantization.get_default_qconfig("x86")
        name = next(name for name, module in model.named_modules() if name.endswith("1.attn.wo"))
        prepared = prepare_fx(model, torch.ao.quantization.QConfigMapping().set_module_name(name, qconfig), (x,))
        prepared(x)
        module = torch.jit.script(convert_fx(prepared))
    for config in ("seq_bn", "unipelt"):
        with pytest.raises(torchgraft.GraftError, match="int8 layers were left out"):
            torchgraft.graft(module, config=config, name="task")
    with pytest.raises(torchgraft.GraftError, match="no adapter can be trained on a base with packed int8"):
        torchgraft.graft(module, config="lora", name="task", trainable=True, allow_partial=True)
    with pytest.raises(torchgraft.GraftError, match="export: the module has packed int8 or float16 weights"):
        torchgraft.export(module, (x,))


def test_the_reference_form_of_pt2e_is_named() -> None:
    """Its weights are int8 tensors that the graph multiplies out."""
    import torch.ao.quantization.fx._decomposed  # noqa: F401, PLC0415  registers quantized_decomposed

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = 4
            for role in "qkvo":
                self.register_buffer(role, torch.randint(-127, 128, (48, 48), dtype=torch.int8))

        def product(self, x: Tensor, weight: Tensor) -> Tensor:
            ops = torch.ops.quantized_decomposed
            x = ops.quantize_per_tensor(x, 0.02, 128, 0, 255, torch.uint8)
            x = ops.dequantize_per_tensor(x, 0.02, 128, 0, 255, torch.uint8)
            weight = ops.dequantize_per_tensor(weight, 0.01, 0, -128, 127, torch.int8)
            return nn.functional.linear(x, weight)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (self.product(x, w).view(x.size(0), -1, 4, 12).transpose(1, 2) for w in (self.q, self.k, self.v))
            mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.size(0), -1, 48)
            return x + self.product(mixed, self.o)

    module = torch.jit.trace(Layer().eval(), _batch().embeddings, check_trace=False)
    for config in ("prefix_tuning", "lora"):
        with pytest.raises(torchgraft.GraftError, match=r"int8 layers were left out.*quantized_decomposed::"):
            torchgraft.graft(module, config=config, name="task")


def test_a_saved_module_holds_no_float_copy_of_its_weights() -> None:
    def size(module: torch.jit.ScriptModule) -> int:
        file = io.BytesIO()
        torch.jit.save(module, file)
        return file.tell()

    in_float = torch.jit.trace(
        models.hugging_face("bert", "sdpa", torch.float32), _VARIANT.arguments(_batch()), check_trace=False
    )
    weights = sum(p.numel() for n, p in in_float.named_parameters() if p.dim() == 2 and "embeddings" not in n)
    grown = size(torchgraft.graft(_base(), config="lora", name="task")) - size(_base())
    in_float_grown = size(torchgraft.graft(in_float, config="lora", name="task")) - size(in_float)
    assert grown < in_float_grown + weights // 2


class _TwoProducts(nn.Module):
    """Scores that add two products: of queries and keys, and of queries and positions computed from the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output = (nn.Linear(32, 32) for _ in range(4))
        self.norm = nn.LayerNorm(32)
        self.positions = nn.Parameter(torch.randn(4, 8, 5))

    def forward(self, x: Tensor) -> Tensor:
        rows, tokens, width = x.shape
        query, key, value = (
            linear(x).view(rows, tokens, 4, 8).transpose(1, 2) for linear in (self.query, self.key, self.value)
        )
        scores = query @ key.transpose(-1, -2) + query @ (self.positions + 0 * x.mean())
        mixed = torch.softmax(scores / 8**0.5, -1) @ value
        return self.norm(x + self.output(mixed.transpose(1, 2).reshape(rows, tokens, width)))


@pytest.mark.parametrize("is_quantised", [False, True])
def test_of_two_products_that_of_the_keys_is_found(is_quantised: bool) -> None:
    torch.manual_seed(0)
    model, x = _TwoProducts().eval(), torch.randn(2, 5, 32)
    if is_quantised:
        model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    base = torch.jit.trace(model, x)
    module = torchgraft.graft(base, "lora[attn_matrices=['q','k','v']]", "task", example=(x,))
    assert torchgraft.inspect(module)["layers"][0]["key"]["path"] == "key"
    with torch.no_grad():
        torch.testing.assert_close(module(x, adapter_ids=torch.tensor([-1, -1])), base(x))
