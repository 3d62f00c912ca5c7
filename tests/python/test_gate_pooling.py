"""gate_pooling="unpadded": a row's result does not depend on how far its batch was padded."""

import pytest
import torch
from transformers import GPT2Config, GPT2Model

import torchgraft
from grafted import base, grafted, saved_adapter
from models import VARIANTS, make_batch
from oracle import difference

_MASKED = ["bert_sdpa", "bert_eager", "own_post_packed_matmul", "own_pre_sdpa_bool", "own_post_scaled_query",
           "encoder_script_post", "encoder_fast_post_nested", "encoder_slow_post_seq_first"]  # fmt: skip


def _moved_by_padding(name: str, module: torch.jit.ScriptModule, dtype: torch.dtype = torch.float64) -> float:
    """How far 8 more pad tokens move the real tokens of a row."""
    variant = VARIANTS[name]
    short = make_batch([9, 5], 9, dtype)
    long = short.padded(8)
    with torch.no_grad():
        a = variant.hidden(module(*variant.arguments(short)))
        b = variant.hidden(module(*variant.arguments(long)))
    return difference(b[long.mask == 1], a[short.mask == 1])


@pytest.mark.parametrize("config", [pytest.param("unipelt", marks=pytest.mark.slow(seconds=1)), "union_everything"])
@pytest.mark.parametrize("name", _MASKED)
def test_padding_does_not_move_a_row(name: str, config: str) -> None:
    assert _moved_by_padding(name, grafted(name, torch.float64, config, "unpadded")) <= 1e-12
    assert _moved_by_padding(name, grafted(name, torch.float64, config)) > 1e-3  # what the oracle does


@pytest.mark.parametrize("name", _MASKED)
def test_in_float32_padding_moves_a_row_no_more_than_the_base(name: str) -> None:
    """Longer rows are summed in another order, so BERT's own result moves too: 1e-6 on these steep random weights."""
    moved = _moved_by_padding(name, grafted(name, torch.float32, "unipelt", "unpadded"), torch.float32)
    of_base = _moved_by_padding("bert_eager", base("bert_eager", torch.float32), torch.float32)
    assert moved <= max(1e-6, 4 * of_base)


def test_without_padding_both_poolings_agree() -> None:
    variant = VARIANTS["bert_sdpa"]
    batch = make_batch([8, 8], 8, torch.float32)
    with torch.no_grad():
        results = [
            grafted("bert_sdpa", torch.float32, "unipelt", pooling)(*variant.arguments(batch))[0]
            for pooling in ("all", "unpadded")
        ]
    assert difference(*results) <= 1e-6


class _Decoder(torch.nn.Module):
    """GPT-2 with transformers' causal mask: under sdpa, what padding on the left sees is everything."""

    def __init__(self, attention: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50, "n_positions": 16}
        self.model = GPT2Model(GPT2Config(**sizes, attn_implementation=attention)).eval()
        self.unmasks_empty_rows = attention == "sdpa"

    def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        tokens = ids.shape[1]
        allowed = torch.ones(tokens, tokens, dtype=torch.bool).tril() & (attention_mask[:, None, None, :] == 1)
        if self.unmasks_empty_rows:
            allowed = allowed | ~allowed.any(-1, keepdim=True)
        mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
        return self.model(ids, attention_mask=mask, use_cache=False, return_dict=False)[0]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_a_decoder_is_found_on_either_side(attention: str, side: str) -> None:
    ids = torch.randint(50, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, :2] = mask[2, :5] = 0
    mask = mask if side == "left" else mask.flip(1)
    base = torch.jit.trace(_Decoder(attention), (ids, mask), check_trace=False)
    results = []
    for options in ({}, {"token_mask": "attention_mask"}, {"gate_pooling": "all"}):
        torch.manual_seed(1)
        module = torchgraft.graft(base, config="unipelt", name="task", **{"gate_pooling": "unpadded", **options})
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for bank in module.adapters.parameters():
                if bank.is_floating_point():
                    bank += torch.randn(bank.shape, generator=generator) * 0.3
            results.append(module(ids, mask)[mask == 1])
            lowered = torchgraft.lower(module)(ids, mask)[mask == 1]
        assert difference(lowered, results[-1]) <= 1e-5
    assert difference(results[0], results[1]) <= 1e-5
    assert difference(results[0], results[2]) > 1e-3


def test_the_mask_can_be_an_input_by_name() -> None:
    variant = VARIANTS["bert_sdpa"]
    saved = saved_adapter(variant, torch.float64, "unipelt")
    named = torchgraft.graft(
        base("bert_sdpa", torch.float64),
        adapters={"task": saved.directory},
        gate_pooling="unpadded",
        token_mask="attention_mask",
    )
    assert _moved_by_padding("bert_sdpa", named) <= 1e-12
    batch = make_batch([9, 5], 9, torch.float64)
    derived = grafted("bert_sdpa", torch.float64, "unipelt", "unpadded")
    with torch.no_grad():
        assert torch.equal(named(*variant.arguments(batch))[0], derived(*variant.arguments(batch))[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(gate_pooling="some"), 'expected gate_pooling "all" or "unpadded"'),
        (dict(gate_pooling="unpadded", token_mask="mask"), "no argument 'mask'; it has: input_ids, attention_mask"),
        (dict(token_mask="attention_mask"), 'with gate_pooling "unpadded" and with ReFT only'),
    ],
)
def test_bad_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(torchgraft.GraftError, match=message):
        torchgraft.graft(base("bert_sdpa", torch.float32), config="unipelt", name="task", **options)


class _Unmasked(torch.nn.Module):
    """Attention written out, without a mask: nobody says that there is padding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.o = (torch.nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (f(x).view(x.size(0), x.size(1), 4, 8).transpose(1, 2) for f in (self.q, self.k, self.v))
        weights = torch.softmax(torch.matmul(q, k.transpose(-1, -2)) / 2.8284271247461903, -1)
        return x + self.o(torch.matmul(weights, v).transpose(1, 2).flatten(2))


def test_without_any_mask_all_tokens_count() -> None:
    x = torch.randn(3, 5, 32)
    traced = torch.jit.trace(_Unmasked().eval(), x)
    results = []
    for pooling in ("all", "unpadded"):
        torch.manual_seed(1)
        module = torchgraft.graft(
            traced, "lora[r=2,use_gating=True]|prefix_tuning[use_gating=True]", "task", gate_pooling=pooling
        )
        results.append(module(x))
    torch.testing.assert_close(*results, rtol=0, atol=1e-6)
    assert (results[0] - traced(x)).abs().max() > 1e-4
