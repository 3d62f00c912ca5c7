"""Decoders behind an encoder: one file begins with the encoder's states and fills the caches, another goes on with
them. Both take their half of one adapter; steps equal those of the library."""

import copy
import functools
import tempfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import WhisperConfig, WhisperModel
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.models.whisper.modeling_whisper import WhisperDecoder

import adapters
import oracle
import torchgraft
from cached_decoders import PROMPT, masks_and_positions, tokens_of
from hugging_face_models import FAMILIES, Family
from scripts_here import run_here

METHODS = ("lora_all", "double_seq_bn", "prefix_flat")
GATED = ("unipelt",)
IDS = torch.tensor([0, 1, 2, -1])
_SOURCE = 7  # tokens of the encoder
_WHISPER = dict(vocab_size=97, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1) | dict(
    d_model=48, encoder_layers=2, decoder_layers=3, encoder_attention_heads=4, decoder_attention_heads=4
)
_MODELS = {
    "bart": FAMILIES["bart"],
    "t5": FAMILIES["t5"],
    "whisper": Family(WhisperConfig, WhisperModel, _WHISPER | dict(encoder_ffn_dim=80, decoder_ffn_dim=72)),
}


class Begin(nn.Module):
    """Projects the encoder's states to keys and values, and runs the first tokens."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.decoder = model.decoder

    def forward(self, ids: Tensor, mask: Tensor, states: Tensor, source_mask: Tensor) -> tuple:
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        return run_decoder(self.decoder, cache, ids, mask, states, source_mask)


class GoOn(nn.Module):
    """Reads the encoder's keys and values from the cache. `past`: (keys, values, the encoder's keys and values)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.decoder = model.decoder

    def forward(self, ids: Tensor, mask: Tensor, states: Tensor, source_mask: Tensor, past: tuple) -> tuple:
        cache = EncoderDecoderCache.from_legacy_cache(past)
        return run_decoder(self.decoder, cache, ids, mask, states, source_mask)


def run_decoder(decoder: nn.Module, cache: EncoderDecoderCache, ids, mask, states, source_mask) -> tuple:
    named = {} if isinstance(decoder, WhisperDecoder) else dict(encoder_attention_mask=source_mask)  # sounds have none
    hidden = decoder(
        input_ids=ids,
        attention_mask=mask,
        encoder_hidden_states=states,
        past_key_values=cache,
        use_cache=True,
        **named,
    )[0]
    return hidden, cache.to_legacy_cache()


def _source(name: str) -> tuple[Tensor, Tensor]:
    """The encoder's states, and its mask [B, S], padded on the right."""
    generator = torch.Generator().manual_seed(4)
    mask = (torch.arange(_SOURCE)[None, :] < torch.tensor([7, 4, 6, 5])[:, None]).long()
    return torch.randn(4, _SOURCE, 48, generator=generator).to(_dtype(name)), mask


def _dtype(name: str) -> torch.dtype:
    """T5 has large activations: in float32 their rounding passes 1e-5."""
    return torch.float64 if name == "t5" else torch.float32


def _make(name: str) -> nn.Module:
    return _MODELS[name].make("eager", _dtype(name)).model


@functools.cache
def _library(name: str) -> tuple[nn.Module, dict[str, Path]]:
    model = _make(name)
    adapters.init(model)
    folder = Path(tempfile.mkdtemp(prefix="torchgraft_encoder_decoder_"))
    for seed, method in enumerate(METHODS + GATED):
        oracle.make_oracle_adapter(model, oracle.CONFIGS[method], method, seed)
        model.save_adapter(str(folder / method), method)
    return model.eval(), {method: folder / method for method in METHODS + GATED}


@functools.cache
def _bases(name: str) -> tuple[torch.jit.ScriptModule, torch.jit.ScriptModule]:
    model, (ids, real), (states, source_mask) = _make(name), tokens_of(), _source(name)
    first = (ids[:, :3], masks_and_positions(real[:, :3], 3)[0], states, source_mask)
    begin = torch.jit.trace(Begin(model).eval(), first, check_trace=False, strict=False)
    with torch.no_grad():
        past = begin(*first)[1]
    second = (ids[:, 3:5], masks_and_positions(real[:, :5], 2)[0], states, source_mask, past)
    return begin, torch.jit.trace(GoOn(model).eval(), second, check_trace=False, strict=False)


@functools.cache
def _grafted(name: str, methods: tuple[str, ...]) -> tuple[torch.jit.ScriptModule, ...]:
    directories = {method: _library(name)[1][method] for method in methods}
    return tuple(torchgraft.graft(base, adapters=directories) for base in _bases(name))


@torch.no_grad()
def _steps(name: str, begin, go_on, **named: Tensor) -> tuple[Tensor, tuple]:
    (ids, real), source = tokens_of(), _source(name)
    hidden, past = begin(ids[:, :PROMPT], masks_and_positions(real[:, :PROMPT], PROMPT)[0], *source, **named)
    parts = [hidden]
    for end in range(PROMPT + 1, ids.size(1) + 1):
        mask, _ = masks_and_positions(real[:, :end], 1)
        hidden, past = go_on(ids[:, end - 1 : end], mask, *source, past, **named)
        parts.append(hidden)
    return torch.cat(parts, 1), past


def _library_steps(name: str, method: str | None) -> Tensor:
    model, _ = _library(name)
    model.set_active_adapters(method)
    return _steps(name, _InContext(model, Begin(model)), _InContext(model, GoOn(model)))[0]


class _InContext:
    """Calls a part of the library's model as its forward would."""

    def __init__(self, model: nn.Module, part: nn.Module):
        self.model, self.part = model, part

    def __call__(self, *arguments) -> tuple:
        named = dict(decoder_input_ids=arguments[0], decoder_attention_mask=arguments[1])
        with adapters.context.ForwardContext(self.model, **named):
            return self.part(*copy.copy(arguments))


_ALL = pytest.mark.parametrize("name", _MODELS)


@_ALL
def test_steps_equal_the_librarys(name: str) -> None:
    methods = METHODS[:2] if name == "t5" else METHODS  # prefixes of T5 are refused: docs/models.md
    ids = IDS.where(len(methods) > IDS, torch.tensor(-1))
    hidden, _ = _steps(name, *_grafted(name, methods), adapter_ids=ids)
    real = tokens_of()[1]
    for row, number in enumerate(ids.tolist()):
        expected = _library_steps(name, None if number < 0 else methods[number])
        assert oracle.difference(hidden[row][real[row]], expected[row][real[row]]) <= 1e-5, number


def test_gates_pool_over_the_tokens_of_the_pass_as_in_the_library() -> None:
    hidden, _ = _steps("bart", *_grafted("bart", GATED))
    real = tokens_of()[1]
    assert oracle.difference(hidden[real], _library_steps("bart", "unipelt")[real]) <= 1e-5


class _Encoder(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.encoder = model.encoder

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.encoder(input_ids=ids, attention_mask=mask)[0]


@pytest.mark.parametrize(("name", "method"), [("t5", METHODS[0])] + [("bart", each) for each in METHODS + GATED])
@torch.no_grad()
def test_an_encoder_in_a_file_of_its_own_takes_its_half(name: str, method: str) -> None:
    model, directories = _library(name)
    ids, mask = tokens_of(4)[0][:, :_SOURCE], _source(name)[1]
    base = torch.jit.trace(_Encoder(_make(name)).eval(), (ids, mask), check_trace=False, strict=False)
    with pytest.raises(torchgraft.GraftError, match='say so: part="encoder"'):
        torchgraft.graft(base, adapters={method: directories[method]})
    module = torchgraft.graft(base, adapters={method: directories[method]}, part="encoder")
    model.set_active_adapters(method)
    with adapters.context.ForwardContext(model, input_ids=ids, attention_mask=mask):
        expected = model.encoder(input_ids=ids, attention_mask=mask)[0]
    real = mask.bool()
    assert oracle.difference(module(ids, mask)[real], expected[real]) <= 1e-5
    again = torchgraft.graft(module, adapters={"again": directories[method]}, part="encoder")  # the module remembers
    assert oracle.difference(again(ids, mask)[real], expected[real]) <= 1e-5


@torch.no_grad()
def test_the_command_takes_the_part(tmp_path: Path) -> None:
    _, directories = _library("bart")
    inputs = tokens_of(4)[0][:, :_SOURCE], _source("bart")[1]
    base = torch.jit.trace(_Encoder(_make("bart")).eval(), inputs, check_trace=False, strict=False)
    base.save(str(tmp_path / "base.pt"))
    words = ("add", tmp_path / "base.pt", "-o", tmp_path / "out.pt", "--adapter", f"task={directories[METHODS[0]]}")
    done = run_here("graft.py", *words)
    assert done.returncode == 1 and 'part="encoder"' in done.stderr and not (tmp_path / "out.pt").exists()
    done = run_here("graft.py", *words, "--part", "encoder")
    assert done.returncode == 0, done.stderr
    expected = torchgraft.graft(base, adapters={"task": directories[METHODS[0]]}, part="encoder")
    assert torch.equal(torch.jit.load(str(tmp_path / "out.pt"))(*inputs), expected(*inputs))


def test_a_part_that_the_module_is_not_is_refused() -> None:
    begin, _ = _bases("bart")
    with pytest.raises(torchgraft.GraftError, match='part="encoder": expected self attention alone'):
        torchgraft.graft(begin, config="lora", name="task", part="encoder")
    torchgraft.graft(begin, config="lora", name="task", part="decoder", verify=False)
    with pytest.raises(torchgraft.GraftError, match='expected part to be "encoder" or "decoder"'):
        torchgraft.graft(begin, config="lora", name="task", part="both")


@_ALL
def test_deactivated_is_the_base_bit_for_bit(name: str) -> None:
    grafted = [torchgraft.graft(base, adapters={"task": _library(name)[1]["lora_all"]}) for base in _bases(name)]
    for module in grafted:
        module.deactivate()
    found, expected = _steps(name, *grafted), _steps(name, *_bases(name))
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(a, b) for a, b in zip(sum(found[1], ()), sum(expected[1], ()), strict=True))


@_ALL
def test_inspect_shows_who_fills_the_cache(name: str) -> None:
    kinds = [
        [(layer["layer"], layer["kind"], layer["cache"]) for layer in torchgraft.inspect(base)["layers"]]
        for base in _bases(name)
    ]
    assert kinds[0] == [(i, kind, "none") for i in range(3) for kind in ("self", "cross")]
    assert kinds[1] == [(i, *rest) for i in range(3) for rest in (("self", "growing"), ("cross", "filled"))]
