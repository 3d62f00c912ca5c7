"""Decoders with caches: a step equals the same tokens in one pass of the library, and deactivated the base."""

import functools
import tempfile
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

import adapters
import oracle
import torchgraft
from cached_decoders import (
    PACKED,
    PROMPT,
    TRACED,
    CachedDecoder,
    CachedModel,
    StaticModel,
    masks_and_positions,
    run_steps,
    tokens_of,
)
from models import POSITIONS
from restated_reference import RestatedReference

METHODS = ("lora_all", "double_seq_bn", "prefix_flat")  # without gates: a gate pools over the tokens of its pass
IDS = torch.tensor([0, 1, 2, -1])  # of the rows of tokens_of()


@functools.cache
def _library(decoder: CachedDecoder, methods: tuple[str, ...]) -> tuple[nn.Module, dict[str, Path]]:
    """The library's model with random adapters of these methods, and their directories."""
    model = decoder.make("eager")
    adapters.init(model)
    folder = Path(tempfile.mkdtemp(prefix="torchgraft_cached_"))
    for seed, method in enumerate(methods):
        oracle.make_oracle_adapter(model, oracle.CONFIGS[method], method, seed)
        model.save_adapter(str(folder / method), method)
    return model.eval(), {method: folder / method for method in methods}


@functools.cache
def _grafted(decoder: CachedDecoder, methods: tuple[str, ...] = METHODS) -> torch.jit.ScriptModule:
    return torchgraft.graft(decoder.trace(), adapters=_library(decoder, methods)[1])


@torch.no_grad()
def _full_pass(
    decoder: CachedDecoder, method: str | None, ids: Tensor, real: Tensor, methods: tuple[str, ...] = METHODS
) -> Tensor:
    model, _ = _library(decoder, methods)
    model.set_active_adapters(method)
    mask, positions = masks_and_positions(real, ids.size(1))
    return model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)[0]


_ALL = pytest.mark.parametrize("decoder", TRACED, ids=lambda decoder: decoder.name)


@_ALL
@torch.no_grad()
def test_steps_with_mixed_adapters_equal_full_passes_of_the_library(decoder: CachedDecoder) -> None:
    ids, real = tokens_of()
    hidden, past = run_steps(decoder, _grafted(decoder), ids, real, adapter_ids=IDS)
    for row, method in enumerate([*METHODS, None]):
        expected = _full_pass(decoder, method, ids, real)[row][real[row]]
        assert oracle.difference(hidden[row][real[row]], expected) <= 1e-5, method
    assert [tensor.shape for pair in past for tensor in pair] == [(4, decoder.kv_heads, ids.size(1), 12)] * 4


@pytest.mark.parametrize(
    "decoder", [each for each in TRACED if each.name in ("gpt2_eager", "gpt2_sdpa")], ids=lambda d: d.name
)
@pytest.mark.parametrize("method", ["unipelt", "prefix_two_gates"])
@torch.no_grad()
def test_gates_pool_over_the_tokens_of_the_pass_as_in_the_library(decoder: CachedDecoder, method: str) -> None:
    """LLaMA and Mistral lose their cache in the library."""
    methods = ("unipelt", "prefix_two_gates")
    model, _ = _library(decoder, methods)
    model.set_active_adapters(method)
    ids, real = tokens_of()
    numbers = torch.full((4,), methods.index(method))
    hidden, _ = run_steps(decoder, _grafted(decoder, methods), ids, real, adapter_ids=numbers)
    expected, _ = run_steps(decoder, CachedModel(model), ids, real)
    assert oracle.difference(hidden[real], expected[real]) <= 1e-5
    in_one_pass = _full_pass(decoder, method, ids, real, methods)
    assert oracle.difference(hidden[real], in_one_pass[real]) > 0.05  # a gate means another thing there


@_ALL
@torch.no_grad()
def test_unpadded_gates_of_a_step_are_those_of_its_token(decoder: CachedDecoder) -> None:
    """So a row does not depend on how far its batch was padded, from the prompt to the last step."""
    ids, real = tokens_of()
    directories = _library(decoder, ("unipelt",))[1]
    module = torchgraft.graft(decoder.trace(), adapters=directories, gate_pooling="unpadded")
    together, _ = run_steps(decoder, module, ids, real)
    for row in range(ids.size(0)):
        own = real[row]
        prompt = int(own[:PROMPT].sum())
        past, parts = decoder.empty(1), []
        alone, seen = ids[row : row + 1, own], torch.ones(1, int(own.sum()), dtype=torch.bool)
        for begin, end in [(0, prompt), *((i, i + 1) for i in range(prompt, alone.size(1)))]:
            part, past = decoder.call(module, seen[:, :end], alone[:, begin:end], past)
            parts.append(part)
        assert oracle.difference(together[row][own], torch.cat(parts, 1)[0]) <= 1e-5


@_ALL
@torch.no_grad()
def test_deactivated_steps_are_the_bases_bit_for_bit(decoder: CachedDecoder) -> None:
    ids, real = tokens_of()
    module = torchgraft.graft(decoder.trace(), adapters=_library(decoder, METHODS)[1])
    module.deactivate()
    found, expected = (run_steps(decoder, each, ids, real) for each in (module, decoder.trace()))
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(a, b) for a, b in zip(sum(found[1], ()), sum(expected[1], ()), strict=True))


_PEFT = [(TRACED[0], ["c_attn"]), (TRACED[4], ["k_proj", "v_proj", "up_proj"])] + [
    (decoder, ["qkv_proj"] if "phi3" in decoder.name else ["query_key_value", "dense_4h_to_h"]) for decoder in PACKED
]


@pytest.mark.parametrize(("decoder", "maps"), _PEFT, ids=lambda each: getattr(each, "name", ""))
@torch.no_grad()
def test_steps_with_a_lora_of_peft_equal_its_full_pass(decoder: CachedDecoder, maps: list[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=maps, fan_in_fan_out=maps == ["c_attn"])
    tuned = peft.get_peft_model(decoder.make("eager"), config)
    for path, parameter in tuned.named_parameters():
        if "lora_" in path:
            parameter.normal_(std=0.1 if decoder in PACKED else 0.3)  # Phi-3 rounds to 1.7e-5 with larger ones
    tuned.eval().save_pretrained(str(tmp_path))
    ids, real = tokens_of()
    hidden, _ = run_steps(decoder, torchgraft.load_adapter(decoder.trace(), tmp_path, "task"), ids, real)
    mask, positions = masks_and_positions(real, ids.size(1))
    expected = tuned(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)[0]
    assert oracle.difference(hidden[real], expected[real]) <= 1e-5


@pytest.mark.parametrize("decoder", PACKED, ids=lambda decoder: decoder.name)
@torch.no_grad()
def test_steps_of_a_packed_projection_equal_one_pass(decoder: CachedDecoder) -> None:
    module = RestatedReference(None, lambda model: []).graft(decoder.trace(), list(METHODS), torch.float32)
    ids, real = tokens_of()
    hidden, past = run_steps(decoder, module, ids, real, adapter_ids=IDS)
    expected, whole = decoder.call(module, real, ids, decoder.empty(ids.size(0)), adapter_ids=IDS)
    assert oracle.difference(hidden[real], expected[real]) <= 1e-5
    assert all(a.shape == b.shape for a, b in zip(sum(past, ()), sum(whole, ()), strict=True))
    layers = torchgraft.inspect(decoder.trace())["layers"]
    assert [(layer["cache"], layer["num_kv_heads"]) for layer in layers] == [("growing", decoder.kv_heads)] * 2


@pytest.mark.parametrize(
    "decoder", [each for each in TRACED if each.name in ("gpt2_eager", "gpt2_sdpa")], ids=lambda d: d.name
)
@torch.no_grad()
def test_steps_with_a_static_cache_equal_full_passes_of_the_library(decoder: CachedDecoder) -> None:
    model = StaticModel(decoder.make(decoder.name.partition("_")[2]), POSITIONS).eval()
    ids, real = tokens_of()

    def arguments(begin: int, end: int) -> tuple:
        mask, positions = masks_and_positions(real[:, :end], end - begin)
        hidden = torch.full((*mask.shape[:3], POSITIONS - end), torch.finfo(torch.float32).min)
        return ids[:, begin:end], torch.cat([mask, hidden], -1), positions, torch.arange(begin, end)

    def empty() -> list[Tensor]:
        return [torch.zeros(ids.size(0), decoder.kv_heads, POSITIONS, 12) for _ in range(4)]

    base = torch.jit.trace(model, (*arguments(4, 7), *empty()), check_trace=False, strict=False)
    layers = torchgraft.inspect(base)["layers"]
    assert [(layer["kind"], layer["cache"], layer["num_kv_heads"]) for layer in layers] == [
        ("self", "static", decoder.kv_heads)
    ] * 2
    module = torchgraft.graft(base, adapters=_library(decoder, METHODS)[1])
    cache, parts = empty(), []
    for begin, end in [(0, PROMPT), *((i, i + 1) for i in range(PROMPT, ids.size(1)))]:
        part, pairs = module(*arguments(begin, end), *cache, adapter_ids=IDS)
        cache = [each for pair in pairs for each in pair]
        parts.append(part)
    for row, method in enumerate([*METHODS, None]):
        expected = _full_pass(decoder, method, ids, real)[row][real[row]]
        assert oracle.difference(torch.cat(parts, 1)[row][real[row]], expected) <= 1e-5, method


@torch.no_grad()
def test_graft_compares_with_the_base_on_an_example(recwarn: pytest.WarningsRecorder) -> None:
    decoder = TRACED[0]
    ids, real = tokens_of()
    past = decoder.call(decoder.trace(), real[:, :4], ids[:, :4], decoder.empty(4))[1]
    example = (ids[:, 4:6], *masks_and_positions(real[:, :6], 2), past)
    torchgraft.graft(decoder.trace(), config="lora", name="task", example=example)
    assert not [warning for warning in recwarn if "compared" in str(warning.message)]


@_ALL
def test_inspect_shows_the_cache(decoder: CachedDecoder) -> None:
    layers = torchgraft.inspect(decoder.trace())["layers"]
    assert [(layer["kind"], layer["cache"], layer["num_kv_heads"]) for layer in layers] == [
        ("self", "growing", decoder.kv_heads)
    ] * decoder.layers
