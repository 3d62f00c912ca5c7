"""The limits of a text encoder that its graph shows: the model runs at them, and fails one beyond."""

from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2Model, T5Config, T5EncoderModel

import torchgraft
from grafted import base, grafted, reloaded
from models import POSITIONS, VOCABULARY
from scripts_here import run_here

# RoBERTa counts positions from behind that of the padding, 1.
_MODELS = {
    "bert_sdpa": POSITIONS,
    "bert_eager": POSITIONS,
    "roberta_sdpa": POSITIONS - 2,
    "distilbert_eager": POSITIONS,
    "own_post_ids_matmul": POSITIONS,
}


def _runs(module: torch.jit.ScriptModule, tokens: int, token: int) -> bool:
    ids = torch.full((1, tokens), token)
    try:
        with torch.no_grad():
            module(*torchgraft.forward_inputs(module.forward).arguments(ids, torch.ones_like(ids)))
    except (RuntimeError, torch.jit.Error):
        return False
    return True


def _check(module: torch.jit.ScriptModule, vocabulary: int, positions: int | None) -> None:
    limits = torchgraft.text_limits(module)
    assert limits == torchgraft.TextLimits(vocabulary, positions)
    assert _runs(module, 2, vocabulary - 1) and not _runs(module, 2, vocabulary)
    if positions is not None:
        assert _runs(module, positions, 2) and not _runs(module, positions + 1, 2)


@pytest.mark.quick
@pytest.mark.parametrize("name", _MODELS)
def test_limits_are_those_at_which_the_model_fails(name: str) -> None:
    module = base(name, torch.float32)
    _check(module, VOCABULARY, _MODELS[name])
    _check(reloaded(module), VOCABULARY, _MODELS[name])


def test_a_frozen_and_a_grafted_module_show_the_same() -> None:
    _check(torch.jit.freeze(base("roberta_sdpa", torch.float32)), VOCABULARY, POSITIONS - 2)
    _check(grafted("roberta_sdpa", torch.float32, "unipelt"), VOCABULARY, POSITIONS - 2)


class _Decoder(torch.nn.Module):
    """GPT-2, with its mask from outside: transformers makes it in a way that no trace can follow."""

    def __init__(self) -> None:
        super().__init__()
        sizes = dict(n_embd=16, n_layer=1, n_head=2, vocab_size=40, n_positions=24)
        self.model = GPT2Model(GPT2Config(**sizes, use_cache=False, return_dict=False))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        tokens = ids.size(1)
        return self.model(ids, attention_mask=torch.zeros(1, 1, tokens, tokens))[0]


def test_a_decoder_s_positions_and_relative_ones() -> None:
    ids = torch.ones(2, 5, dtype=torch.long)
    _check(torch.jit.trace(_Decoder().eval(), ids, check_trace=False), 40, 24)
    small = dict(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=40, return_dict=False)
    _check(torch.jit.trace(T5EncoderModel(T5Config(**small)).eval(), ids, check_trace=False), 40, None)


class _Scripted(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = torch.nn.Embedding(30, 16), torch.nn.Embedding(12, 16)
        self.layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.layer(self.tokens(ids) + self.positions(torch.arange(ids.size(1))))


class _Writes(_Scripted):
    """What its positions are only the run shows."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(ids.size(1))
        positions[5:] = 5
        return self.layer(self.tokens(ids) + self.positions(positions))


def test_a_scripted_model() -> None:
    _check(torch.jit.script(_Scripted().eval()), 30, 12)
    assert torchgraft.text_limits(torch.jit.script(_Writes().eval())).positions is None


def test_a_model_that_looks_up_no_tokens_shows_none() -> None:
    assert torchgraft.text_limits(torch.jit.script(torch.nn.Identity())) == torchgraft.TextLimits(None, None)


class _Layered(_Scripted):
    """What the others vary: how ids are looked up, and what else is added to them."""

    def __init__(self) -> None:
        super().__init__()
        self.more = torch.nn.Embedding(12, 16)

    def looked_up(self, ids: torch.Tensor) -> torch.Tensor:
        return self.tokens(ids)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.layer(self.looked_up(ids))


class _Clamped(_Layered):
    """-1 pads: it is no token, and read by the model itself."""

    def looked_up(self, ids: torch.Tensor) -> torch.Tensor:
        return self.tokens(ids.clamp(min=0)) * (ids >= 0).unsqueeze(-1).to(torch.float32)


class _Segments(_Layered):
    """The last token begins a new one of 12 segments. A text may have any number of others."""

    def looked_up(self, ids: torch.Tensor) -> torch.Tensor:
        return self.tokens(ids) + self.more((ids == 29).to(torch.int64).cumsum(1))


class _SomeTokens(_Layered):
    """Tokens from 15 begin a segment."""

    def looked_up(self, ids: torch.Tensor) -> torch.Tensor:
        return self.tokens(ids) + self.more((ids >= 15).to(torch.int64).cumsum(1))


class _PadIsLast(_Layered):
    """Positions as RoBERTa counts them, padded by the last token."""

    def looked_up(self, ids: torch.Tensor) -> torch.Tensor:
        real = (ids != 29).to(torch.int64)
        return self.tokens(ids) + self.more(real.cumsum(1) * real)


class _TwoTables(_Layered):
    """A second table, smaller, for the same ids."""

    def looked_up(self, ids: torch.Tensor) -> torch.Tensor:
        return self.tokens(ids) + self.more(ids)


class _InABranch(_Layered):
    """A table that a text of two tokens does not read."""

    def looked_up(self, ids: torch.Tensor) -> torch.Tensor:
        found = self.tokens(ids)
        if ids.size(1) > 2:
            found = found + self.more(ids.clamp(max=11)) + self.more(ids)
        return found


@pytest.mark.parametrize(
    ("kind", "vocabulary", "positions"),
    [
        (_Clamped, None, None),
        (_Segments, 30, None),
        (_SomeTokens, 30, None),
        (_PadIsLast, 30, 11),
        (_TwoTables, 12, None),
        (_InABranch, 30, None),
    ],
)
def test_limits_hold_for_every_text(kind: type[_Layered], vocabulary: int | None, positions: int | None) -> None:
    module = torch.jit.script(kind().eval())
    assert torchgraft.text_limits(module) == torchgraft.TextLimits(vocabulary, positions)
    if vocabulary is not None:
        _check(module, vocabulary, positions)


def test_ids_that_the_model_reads_itself_are_taken() -> None:
    module = torch.jit.script(_Clamped().eval())
    ids = torch.tensor([[3, 4, -1], [5, -1, -1]])
    torchgraft.verify(torchgraft.graft(module, "lora", "task", example=(ids,)), example=(ids,))


@pytest.mark.parametrize("by_name", [False, True])
def test_examples_beyond_the_limits_name_the_row(by_name: bool, tmp_path: Path) -> None:
    module = grafted("bert_sdpa", torch.float32, "lora_all")
    good = torch.ones(2, 5, dtype=torch.long)
    wrong = good.clone()
    wrong[1, 2] = VOCABULARY
    long = torch.ones(1, POSITIONS + 1, dtype=torch.long)
    cases = {f"row 1: .*token ids from 0 and below {VOCABULARY}.*got {VOCABULARY}": wrong, "at most 64 tokens": long}
    for message, ids in cases.items():
        example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)} if by_name else (ids, torch.ones_like(ids))
        for call in (torchgraft.verify, torchgraft.ungraft):
            with pytest.raises(torchgraft.GraftError, match=message) as raised:
                call(module, example=example)
            assert "\n" not in str(raised.value)
        torch.save(example, tmp_path / "example.pt")
        module.save(tmp_path / "model.pt")
        done = run_here("graft.py", "verify", tmp_path / "model.pt", "--example", tmp_path / "example.pt")
        assert done.returncode == 1 and len(done.stderr) < 200 and "the model" in done.stderr


@pytest.mark.parametrize("load", [torch.jit.script, reloaded, torchgraft.load_module, None])
def test_the_name_of_no_adapter_is_one_line(load, tmp_path: Path) -> None:
    module = grafted("bert_sdpa", torch.float32, "lora_all")
    if load is torchgraft.load_module:
        module.save(tmp_path / "model.pt")
        module = torchgraft.load_module(tmp_path / "model.pt")
    elif load is reloaded:
        module = torchgraft.rename_adapter(reloaded(module), "task", "task2")
        module = torchgraft.rename_adapter(module, "task2", "task")
    for method in (module.activate, module.adapter_config):
        with pytest.raises(torchgraft.GraftError, match="no adapter is called 'nosuch'; there are: task$") as raised:
            method("nosuch")
        assert "\n" not in str(raised.value) and raised.value.__context__ is None
    module.activate("task")
    assert module.active_adapter() == "task" and "lora" in module.adapter_config("task")


class _Outer(torch.nn.Module):
    def __init__(self, inner: torch.jit.ScriptModule) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, name: str) -> torch.Tensor:
        self.inner.activate(name)
        return self.inner(ids, mask)[0]


def test_a_grafted_module_is_scripted_inside_another() -> None:
    outer = torch.jit.script(_Outer(grafted("bert_sdpa", torch.float32, "lora_all")))
    ids = torch.ones(1, 3, dtype=torch.long)
    reloaded(outer)(ids, ids, "task")
    with pytest.raises(torch.jit.Error, match="no adapter is called 'nosuch'"):
        outer(ids, ids, "nosuch")


def test_gates_on_the_command_line(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    grafted("bert_sdpa", torch.float32, "unipelt").save(tmp_path / "model.pt")
    words = {f"w{number}": number for number in range(VOCABULARY + 1)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))

    def gates(*arguments: object) -> str:
        done = run_here("graft.py", "gates", tmp_path / "model.pt", "--text", "w2", *arguments)
        assert done.returncode == 1 and done.stderr.count("\n") == 1 and len(done.stderr) < 250, done.stderr
        return done.stderr

    assert "no adapter is called 'nosuch'; there are: task" in gates("--adapter", "nosuch")
    wrong = gates("--text", f"w{VOCABULARY}")
    assert "text 2: expected token ids from 0 and below 97, which the model has, got 97; give the tokenizer" in wrong
    long = gates("--text", "w2 " * (POSITIONS + 1))
    assert "text 2: expected at most 64 tokens" in long and "got 65; give --max-length 64" in long
