"""Bases that compute in several dtypes: where an adapter cannot follow, the error names the other dtype and the
remedy."""

import functools
import re
from pathlib import Path

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import models
import torchgraft
from models import make_batch

_IDS, _MASK = (make_batch([7, 4], 7, torch.float32).ids, make_batch([7, 4], 7, torch.float32).mask)
_REMEDY = ": trace the base without torch.autocast and with all weights in one dtype$"


class _Text(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = models.hugging_face("bert", "eager", dtype)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids, attention_mask)[0]


def _trace(model: nn.Module) -> torch.jit.ScriptModule:
    return torch.jit.trace(model.eval(), (_IDS, _MASK), check_trace=False, strict=False)


@functools.cache
def _under_autocast() -> torch.jit.ScriptModule:
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        return _trace(_Text(torch.float32))


class _InFloat32(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear.float()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.float()).to(x.dtype)


def _in_float32(model: _Text) -> _Text:
    for layer in model.model.encoder.layer:
        layer.output.dense = _InFloat32(layer.output.dense)
    return model


@functools.cache
def _one_map_in_float32() -> torch.jit.ScriptModule:
    return _trace(_in_float32(_Text(torch.bfloat16)))


@pytest.mark.parametrize("config", ["lora", "mam", "unipelt", "ia3", "seq_bn"])
def test_a_base_traced_under_autocast_is_refused_with_the_remedy(config: str) -> None:
    message = "adapters are Float, as the first query projection, but its forward casts to 16 bits, as under torch.auto"
    with pytest.raises(torchgraft.GraftError, match=message) as caught:
        torchgraft.graft(_under_autocast(), config, "task")
    assert "verify=False" not in str(caught.value)  # the result would fail at every run
    with pytest.raises(torchgraft.GraftError, match=_REMEDY):
        torchgraft.graft(_under_autocast(), config, "task", example=(_IDS, _MASK))


@pytest.mark.parametrize("config", ["lora", "mam", "unipelt", "ia3", "double_seq_bn"])
def test_a_map_whose_result_is_cast_back_disturbs_no_adapter_beside_it(config: str) -> None:
    base = _one_map_in_float32()
    grafted = torchgraft.graft(base, config, "task", example=(_IDS, _MASK))
    with torch.no_grad():
        result = grafted(_IDS, _MASK)
        assert result.dtype == torch.bfloat16 and result.isfinite().all()


def _dtypes(module: torch.jit.ScriptModule, location: str) -> set[torch.dtype]:
    """Of the LoRAs there."""
    return {value.dtype for path, value in module.named_parameters() if re.search(rf"\.{location}.*\.lora_a$", path)}


def test_a_lora_on_such_a_map_has_its_dtype_as_in_peft(tmp_path: Path) -> None:
    model = _in_float32(_Text(torch.bfloat16)).eval()
    torch.manual_seed(0)
    names = ["query", "value", "linear"]
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=names, init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    wrapped.save_pretrained(tmp_path)
    module = torchgraft.load_adapter(_one_map_in_float32(), tmp_path, "task", example=(_IDS, _MASK))
    assert _dtypes(module, "output_lora") == {torch.float32}
    assert _dtypes(module, "selfattn_lora") == {torch.bfloat16}
    with torch.no_grad():
        wanted, got = wrapped(_IDS, _MASK), module(_IDS, _MASK)
        base = module.base_forward(_IDS, _MASK)
    assert got.dtype == wanted.dtype
    assert (wanted - base).abs().max() > 0.1
    torch.testing.assert_close(got, wanted, atol=0.05, rtol=0.02)


class _T5(nn.Module):
    """As transformers loads T5 in float16: the last map of a feed-forward block stays float32."""

    def __init__(self) -> None:
        super().__init__()
        config = transformers.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=100)
        torch.manual_seed(0)
        self.model = transformers.T5Model(config).half()
        for name, part in self.model.named_modules():
            if name.endswith(".wo"):
                part.float()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor) -> Tensor:
        given = {"attention_mask": attention_mask, "decoder_input_ids": decoder_input_ids}
        return self.model(input_ids=input_ids, **given).last_hidden_state


def _t5_in_float16() -> tuple[_T5, tuple[Tensor, ...], torch.jit.ScriptModule]:
    """The model, arguments for it, and its trace."""
    model = _T5().eval()
    ids = torch.randint(2, 100, (2, 7))
    arguments = (ids, torch.ones_like(ids), torch.randint(2, 100, (2, 5)))
    return model, arguments, torch.jit.trace(model, arguments, check_trace=False, strict=False)


def test_loras_of_a_t5_in_float16_have_the_dtype_of_their_maps_as_in_peft(tmp_path: Path) -> None:
    model, arguments, base = _t5_in_float16()
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q", "v", "wi", "wo"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    wrapped.save_pretrained(tmp_path)
    module = torchgraft.load_adapter(base, tmp_path, "task", example=arguments)
    assert _dtypes(module, "output_lora") == {torch.float32}
    assert _dtypes(module, "intermediate_lora") == _dtypes(module, "selfattn_lora") == {torch.float16}
    with torch.no_grad():
        wanted, got, of_base = wrapped(*arguments), module(*arguments), module.base_forward(*arguments)
    assert got.dtype == wanted.dtype
    assert (wanted - of_base).abs().max() > 0.1
    torch.testing.assert_close(got, wanted, atol=0.02, rtol=0.02)
    with pytest.raises(torchgraft.GraftError, match=r"wo.* is Float" + _REMEDY):
        torchgraft.graft(base, "seq_bn", "task", example=arguments)


@pytest.mark.parametrize("use_dora", [False, True])
def test_such_loras_are_the_same_however_they_come(use_dora: bool, tmp_path: Path) -> None:
    """Added to a module with adapters, replaced, or inserted into a pool: each is rounded once, to its map's dtype."""
    model, arguments, base = _t5_in_float16()
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q", "wo"], init_lora_weights=False, use_dora=use_dora)
    peft.get_peft_model(model, config, autocast_adapter_dtype=False).save_pretrained(tmp_path)
    module = torchgraft.load_adapter(base, tmp_path, "a", example=arguments)
    module = torchgraft.load_adapter(module, tmp_path, "b", example=arguments)
    module = torchgraft.load_adapter(module, tmp_path, "b", example=arguments)
    banks = {name: bank for name, bank in module.named_parameters() if "lora" in name and bank.dim() == 3}
    assert len(banks) > 4 and all(torch.equal(bank[0], bank[1]) for bank in banks.values())
    pool = torchgraft.AdapterPool(base, 2)
    pool.insert("a", tmp_path)
    with pool.acquire(["a", "a"]) as lease, torch.no_grad():
        assert torch.equal(lease.module(*arguments, lease.ids), module(*arguments, torch.zeros(2).long()))


def test_a_union_with_a_trained_prefix_has_its_lora_in_the_map_s_dtype() -> None:
    _, arguments, base = _t5_in_float16()
    lora = torchgraft.LoRAConfig(selfattn_lora=False, output_lora=True, attn_matrices=[])
    config = torchgraft.ConfigUnion(torchgraft.PrefixTuningConfig(flat=False, prefix_length=3), lora)
    module = torchgraft.graft(base, config, "task", example=arguments, trainable=True)
    assert _dtypes(module, "output_lora") == {torch.float32}
    shared = torchgraft.VeraConfig(selfattn_lora=False, output_lora=True, attn_matrices=[])
    message = (
        "has output_lora in layer 0 with matrices that all of its layers share, in Half, where the linear map is Fl"
    )
    with pytest.raises(torchgraft.GraftError, match=message):
        torchgraft.graft(module, shared, "shared", verify=False)


def test_without_a_comparison_it_fails_at_run_time_by_name() -> None:
    grafted = torchgraft.graft(_under_autocast(), "lora", "task", verify=False)
    grafted.base_forward(_IDS, _MASK)
    with pytest.raises(RuntimeError, match=r"layer 0, selfattn_lora_q(.|\n)*expected lora_a of dtype BFloat16"):
        grafted(_IDS, _MASK)


class _EntersAutocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        q = self.q(x).view(x.size(0), x.size(1), 4, 8).transpose(1, 2)
        k = self.k(x).view(x.size(0), x.size(1), 4, 8).transpose(1, 2)
        v = self.v(x).view(x.size(0), x.size(1), 4, 8).transpose(1, 2)
        return self.o(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def rest(self, x: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        x = self.norm(x + mixed.float())
        return x + self.down(nn.functional.gelu(self.up(x)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = self.mix(x)
        return self.rest(x, mixed)


class _TurnsAutocastOff(_EntersAutocast):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            mixed = self.mix(x)
        return self.rest(x, mixed)


@pytest.mark.parametrize("config", ["lora", "double_seq_bn", "prefix_tuning", "ia3"])
def test_attention_under_a_scripted_autocast_is_refused(config: str) -> None:
    """Its casts reach no adapter. Autocast that is turned off casts nothing."""
    x = torch.randn(2, 5, 32)
    for example in (None, (x,)):
        with pytest.raises(torchgraft.GraftError, match="layer 0 runs under torch.autocast, which the module's code"):
            torchgraft.graft(torch.jit.script(_EntersAutocast().eval()), config, "task", example=example)
    module = torch.jit.script(_TurnsAutocastOff().eval())
    torch.testing.assert_close(
        torchgraft.graft(module, config, "task")(x, adapter_ids=torch.tensor([-1, -1])), module(x)
    )


class _Nested(_EntersAutocast):
    """Autocast of CUDA that is turned off leaves that of the CPU on."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cuda", enabled=False):
            mixed = self.mix(x)
        return self.rest(x, mixed)


class _OfAnotherDevice(_EntersAutocast):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cuda"):
            mixed = self.mix(x)
        return self.rest(x, mixed)


class _Profiled(_EntersAutocast):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autograd.profiler.record_function("attention"):
            mixed = self.mix(x)
        return self.rest(x, mixed)


def test_each_device_has_an_autocast_of_its_own() -> None:
    with pytest.raises(torchgraft.GraftError, match="layer 0 runs under torch.autocast"):
        torchgraft.graft(torch.jit.script(_Nested().eval()), "lora", "task")


@pytest.mark.parametrize("model", [_OfAnotherDevice, _Profiled])
def test_what_casts_nothing_is_no_autocast(model: type[_EntersAutocast]) -> None:
    x = torch.randn(2, 5, 32)
    module = torch.jit.script(model().eval())
    grafted = torchgraft.graft(module, "prefix_tuning", "task")
    torch.testing.assert_close(grafted(x, adapter_ids=torch.tensor([-1, -1])), module(x))
