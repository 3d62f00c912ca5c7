"""Prompt tuning: equal to adapters==1.3.0, live; the results have the prompt's tokens, too."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import adapters
import torchgraft
from adapters import (
    ConfigUnion,
    DoubleSeqBnInvConfig,
    LoRAConfig,
    PromptTuningConfig,
    SeqBnConfig,
    SeqBnInvConfig,
    UniPELTConfig,
)
from grafted import base, check_refused, reloaded
from library_bank import DOUBLE, VARIANT, LibraryBank, check_learner, hidden, plain
from models import VARIANTS, Batch, hugging_face, make_batch
from oracle import TOLERANCE, difference, randomise, varied_batches

CONFIGS = {
    "prompt": PromptTuningConfig(prompt_length=3),
    "behind_first": PromptTuningConfig(prompt_length=3, combine="prefix_after_bos"),
    "longer": PromptTuningConfig(),
    "union": ConfigUnion(
        PromptTuningConfig(prompt_length=4), LoRAConfig(r=3, use_gating=True), SeqBnConfig(use_gating=True)
    ),
    "union_inv": ConfigUnion(PromptTuningConfig(prompt_length=2, combine="prefix_after_bos"), SeqBnInvConfig()),
    "inverse": DoubleSeqBnInvConfig(),
    "lora": LoRAConfig(r=4),
    "unipelt": UniPELTConfig(),
}
ALONE = ("prompt", "behind_first", "longer")
PROMPTS = [name for name in CONFIGS if name not in ("inverse", "lora", "unipelt")]
LIBRARY = LibraryBank(CONFIGS, lambda: hugging_face("bert", "sdpa", DOUBLE))


@pytest.mark.quick
@pytest.mark.parametrize("name", PROMPTS)
def test_an_adapter_equals_the_library(name: str) -> None:
    module = LIBRARY.check_alone(name)
    module.deactivate()
    for batch in varied_batches(VARIANT, DOUBLE):
        with torch.no_grad():
            assert torch.equal(hidden(module, batch), hidden(plain(), batch))


def check_rows(module: torch.jit.ScriptModule, names: list[str | None], expected: Callable) -> None:
    """Each row begins with what `expected` gives for it alone; behind it there is padding."""
    batch = make_batch([9 - i % 5 for i in range(len(names))], 9, DOUBLE)
    ids = torch.tensor([-1 if name is None else module.adapter_names().index(name) for name in names])
    found = hidden(module, batch, adapter_ids=ids)
    for row, name in enumerate(names):
        wanted = expected(name, batch.row(row))
        apart = difference(found[row : row + 1, : wanted.size(1)], wanted)
        assert apart <= TOLERANCE[DOUBLE], f"row {row} ({name}) differs by {apart}"
    longest = max(CONFIGS[name].prompt_length if name in ALONE else 0 for name in names)
    assert found.size(1) >= 9 + longest


@torch.no_grad()
@pytest.mark.quick
@pytest.mark.parametrize("form", ["plain", "lowered", "optimised", "loaded"])
def test_each_row_of_a_mixed_batch_equals_the_library(form: str) -> None:
    """Rows with prompts of all lengths, rows without one and rows of the base."""
    bank = LIBRARY.bank
    module = {"plain": lambda: bank, "lowered": lambda: torchgraft.lower(bank), "loaded": lambda: reloaded(bank),
              "optimised": lambda: torchgraft.optimize(bank)}[form]()  # fmt: skip
    check_rows(module, [None, *CONFIGS, None], LIBRARY.expected)
    check_rows(module, ["lora", None, "unipelt"], LIBRARY.expected)
    check_rows(module, ["longer"], LIBRARY.expected)


@torch.no_grad()
@pytest.mark.parametrize("name", ["bert_eager", "roberta_sdpa", "own_post_ids_matmul"])
def test_families_equal_the_library(name: str, tmp_path) -> None:
    """Whole batches with one prompt, and batches of rows with either prompt and none."""
    variant = VARIANTS[name]
    model = hugging_face(variant.family, variant.attention, DOUBLE)
    adapters.init(model)
    configs = {"prompt": CONFIGS["prompt"], "behind": PromptTuningConfig(prompt_length=6, combine="prefix_after_bos")}
    for seed, (each, config) in enumerate(configs.items()):
        model.add_adapter(each, config=config)
        model.double()
        randomise(model, each, seed)
        model.save_adapter(str(tmp_path / each), each)
    model.eval()
    module = torchgraft.graft(base(name, DOUBLE), adapters={each: tmp_path / each for each in configs})

    def expected(each: str | None, batch: Batch) -> Tensor:
        model.set_active_adapters(each)
        return model(batch.ids, batch.mask)[0]

    for each in configs:
        module.activate(each)
        for batch in varied_batches(variant, DOUBLE):
            found = variant.hidden(module(*variant.arguments(batch)))
            assert difference(found, expected(each, batch)) <= TOLERANCE[DOUBLE]
    rows = ["prompt", None, "behind", "prompt"]
    batch = make_batch([9, 5, 7, 9], 9, DOUBLE)
    ids = torch.tensor([-1 if each is None else module.adapter_names().index(each) for each in rows])
    found = variant.hidden(module(*variant.arguments(batch), adapter_ids=ids))
    for row, each in enumerate(rows):
        wanted = expected(each, batch.row(row))
        assert difference(found[row : row + 1, : wanted.size(1)], wanted) <= TOLERANCE[DOUBLE]


@torch.no_grad()
@pytest.mark.parametrize("name", ["own_post_unmasked_packed_sdpa", "own_pre_sdpa_bool", "encoder_fast_post",
                                  "encoder_slow_pre_seq_first"])  # fmt: skip
def test_stacks_take_it_at_their_input(name: str) -> None:
    """Each row is what the base gives for embeddings with the row's prompt before them, with and without a mask."""
    variant = VARIANTS[name]
    module = base(name, DOUBLE)
    for length in (3, 5):
        module = torchgraft.graft(module, PromptTuningConfig(prompt_length=length), f"of_{length}")
    (bank,) = [value for key, value in module.adapters.state_dict().items() if key.endswith(".prompt")]
    batch = make_batch([9, 6, 9] if variant.masked else [9, 9, 9], 9, DOUBLE)
    found = variant.hidden(module(*variant.arguments(batch), adapter_ids=torch.tensor([1, 0, -1])))
    for row, prompt in enumerate((bank[1], bank[0, :3], bank[0, :0])):
        one = batch.row(row)
        flags = torch.ones(1, len(prompt), dtype=torch.int64)
        longer = Batch(torch.cat([flags, one.ids], 1), torch.cat([flags, one.mask], 1),
                       torch.cat([prompt[None], one.embeddings], 1))  # fmt: skip
        expected = variant.hidden(base(name, DOUBLE)(*variant.arguments(longer)))
        mine = found[row : row + 1, : expected.size(1)]
        assert difference(variant.compared(mine, longer), variant.compared(expected, longer)) <= TOLERANCE[DOUBLE]


@pytest.mark.parametrize("name", ["prompt", "union_inv"])
def test_a_directory_comes_back_bit_for_bit(name: str, tmp_path) -> None:
    LIBRARY.check_written(name, tmp_path)


@pytest.mark.parametrize("name", ["prompt", "behind_first"])
def test_gradients_equal_the_library(name: str) -> None:
    LIBRARY.check_gradients(name)


def test_a_learner_in_a_bank_moves_alone() -> None:
    bank = torchgraft.graft(plain(), adapters={each: LIBRARY.directory(each) for each in ("prompt", "behind_first")})
    module = torchgraft.graft(bank, PromptTuningConfig(prompt_length=3), "learner", trainable=True)
    check_same = check_learner(module, 2, 1e-4)
    check_same(torchgraft.freeze_adapter(module, "learner"))


def test_a_pool_holds_prompts() -> None:
    LIBRARY.check_pool(["prompt", "behind_first"], "prompt_tuning")


@torch.no_grad()
def test_a_head_reads_token_0_of_a_mixed_batch() -> None:
    """The library's head takes hidden[:, 0], a token of the prompt with "prefix"; its mask plays no part."""
    module = LIBRARY.bank
    names, batch = ["longer", "behind_first", "prompt"], make_batch([9, 7, 8], 9, DOUBLE)
    for name in names:
        module = torchgraft.add_head(module, name, torchgraft.HeadConfig(num_labels=2, layers=1))
    ids = torch.tensor([module.adapter_names().index(name) for name in names])
    found = module.forward_with_head(*VARIANT.arguments(batch), adapter_ids=ids)
    for row, name in enumerate(names):
        weight, bias = (getattr(module.adapters.heads, f"out_{each}")[ids[row]] for each in ("weight", "bias"))
        expected = torch.nn.functional.linear(LIBRARY.expected(name, batch.row(row))[:, 0], weight, bias)
        assert difference(found[row : row + 1], expected) <= TOLERANCE[DOUBLE]


def test_a_pool_mixes_rows_with_and_without_prompts() -> None:
    pool = torchgraft.AdapterPool(plain(), capacity=4, room=["prompt_tuning", "lora[r=4]"])
    rows, batch = ["prompt", "longer", "", "lora"], make_batch([9, 7, 5, 9], 9, DOUBLE)
    for name in filter(None, rows):
        pool.insert(name, LIBRARY.directory(name))
    with pool.acquire(rows) as lease, torch.no_grad():
        found = hidden(lease.module, batch, adapter_ids=lease.ids)
        for row, name in enumerate(rows):
            wanted = LIBRARY.expected(name or None, batch.row(row))
            assert difference(found[row : row + 1, : wanted.size(1)], wanted) <= TOLERANCE[DOUBLE], name


class _Mean(torch.nn.Module):
    """An encoder that gives the mean of its tokens, which filler would change."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dtype=DOUBLE)
        self.layers = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).mean(1)


def test_rows_of_other_lengths_are_refused_where_tokens_meet() -> None:
    base_of_mean = torch.jit.script(_Mean().eval())
    module = torchgraft.graft(base_of_mean, "prompt_tuning[prompt_length=2]", "task")
    x = torch.randn(3, 5, 16, dtype=DOUBLE)
    (prompt,) = [value for key, value in module.adapters.state_dict().items() if key.endswith(".prompt")]
    expected = base_of_mean(torch.cat([prompt.expand(3, 2, 16), x], 1))
    assert difference(module(x, adapter_ids=torch.tensor([0, 0, 0])), expected) <= TOLERANCE[DOUBLE]
    with pytest.raises(Exception, match="got 0 and 2 tokens; put them in .* at aten::mean"):
        module(x, adapter_ids=torch.tensor([0, -1, 0]))


class _TimesTokens(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = hugging_face("bert", "sdpa", DOUBLE)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.model(ids, mask)[0]
        return x * x.size(1)


def test_a_trace_that_reads_how_many_tokens_there_are_takes_equal_rows_alone() -> None:
    """A traced number of tokens is a tensor."""
    given = (torch.tensor([[3, 4, 5], [6, 7, 8]]), torch.ones(2, 3, dtype=torch.int64))
    traced = torch.jit.trace(_TimesTokens().eval(), given, check_trace=False)
    module = torchgraft.graft(traced, "prompt_tuning[prompt_length=2]", "task")
    module(*given, adapter_ids=torch.tensor([0, 0]))
    with pytest.raises(Exception, match="got 0 and 2 tokens; put them in .* at aten::mul"):
        module(*given, adapter_ids=torch.tensor([0, -1]))


class _Causal(torch.nn.Module):
    """One layer, whose mask is made of the numbers of ids."""

    def __init__(self):
        super().__init__()
        self.words = torch.nn.Embedding(30, 16)
        self.q, self.k, self.v, self.o = (torch.nn.Linear(16, 16) for _ in range(4))
        self.norm, self.norm2 = torch.nn.LayerNorm(16), torch.nn.LayerNorm(16)
        self.wide, self.narrow = torch.nn.Linear(16, 32), torch.nn.Linear(32, 16)

    def forward(self, ids: Tensor) -> Tensor:
        at = torch.arange(ids.size(1), device=ids.device)
        mask = torch.full([ids.size(1), ids.size(1)], 0.0).masked_fill(at[None] > at[:, None], float("-inf"))
        x = self.words(ids)
        q, k, v = [f(x).view(x.size(0), x.size(1), 2, 8).transpose(1, 2) for f in (self.q, self.k, self.v)]
        y = torch.softmax(q @ k.transpose(-1, -2) / 8**0.5 + mask, -1) @ v
        x = self.norm(x + self.o(y.transpose(1, 2).reshape(x.size(0), x.size(1), 16)))
        return self.norm2(x + self.narrow(torch.relu(self.wide(x))))


def test_a_mask_that_differs_by_query_is_refused() -> None:
    """What a prompt's tokens see there is not known: a causal model would show them the tokens behind them."""
    ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
    with pytest.raises(torchgraft.GraftError, match="expected attention masks that are the same for all queries"):
        torchgraft.graft(
            torch.jit.trace(_Causal().eval(), ids), "prompt_tuning[prompt_length=2]", "task", example=(ids,)
        )


@pytest.mark.quick
def test_what_cannot_be_is_refused() -> None:
    bare = base("bert_sdpa", DOUBLE)
    refused = {
        "prompt_tuning[prompt_length=0]": "expected PromptTuningConfig.prompt_length to be from 1 to",
        "prompt_tuning[combine=suffix]": "PromptTuningConfig.combine=suffix is not supported yet",
        "prompt_tuning[prompt_init=from_string]": "needs the tokenizer of the model",
    }
    check_refused(bare, refused)
    two = {name: LIBRARY.directory(name) for name in ("prompt", "lora")}
    module = torchgraft.graft(bare, adapters=two)
    check_refused(module, {"loreft": "a module with prompt_tuning cannot have ReFT"})
    with pytest.raises(torchgraft.GraftError, match="no weight can hold prompt_tuning of layer 0, because a prompt"):
        torchgraft.merge_adapter(module, "prompt")
    with pytest.raises(torchgraft.GraftError, match="a module with prompt_tuning cannot have compositions"):
        torchgraft.compose(module, "both", torchgraft.Average("lora", "lora"))
    with pytest.raises(torchgraft.GraftError, match='beside prompt_tuning gate_pooling="unpadded" is not supported'):
        torchgraft.graft(module, "unipelt", "unpadded", gate_pooling="unpadded")
    with pytest.raises(torchgraft.GraftError, match='a head must have pooling="first", that of \'lora\' has .*"mean"'):
        torchgraft.add_head(module, "lora", torchgraft.HeadConfig(num_labels=2, pooling="mean"))
    with pytest.raises(torchgraft.GraftError, match="export: the module has prompts"):
        torchgraft.export(module, VARIANT.arguments(make_batch([7, 7], 7, DOUBLE)))
