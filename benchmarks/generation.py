"""Measures decoders that generate, of GPT-2 small's size with random weights: a step behind a cache, and greedy
generation.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/generation.py
    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/generation.py --processor-time    # on a machine that others use

A step: one new token for each row, behind a cache of so many tokens. All modules went through torch.jit.freeze and run
in turns; the table has ratios of medians, with the quartiles of the rounds' own ratios. "one of 16" has 16 adapters, of
which every row uses the first; in "16 distinct" each row of 16 uses another.

Greedy generation: tokens per second of transformers, `adapters` and PEFT, whose generate() runs eager modules with a
cache, of traced and frozen modules in a loop of a few lines, and of the same modules in ONNX Runtime. A variant's
tokens are compared with those of the library that has the same adapter.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import peft
import torch
import transformers
from rich.table import Table
from torch import Tensor
from transformers.cache_utils import DynamicCache

import adapters
import models  # puts python/ on the path
import torchgraft
from mixed_batch import cell
from table_console import table_console
from this_machine import processor, silence
from turns import in_turns, seconds_of

Past = tuple[tuple[Tensor, Tensor], ...]
ADAPTERS = 16
SIZES = dict(n_layer=12, n_embd=768, n_head=12)
STRENGTH = 0.05  # the standard deviation of an adapter's weights


class Step(torch.nn.Module):
    """GPT-2 as a function of tensors, as docs/generation.md exports it."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor, positions: Tensor, past: Past) -> tuple[Tensor, Past]:
        cache = DynamicCache.from_legacy_cache(past)
        logits = self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )[0]
        return logits, cache.to_legacy_cache()


def hugging_face(sizes: dict, attention: str = "sdpa") -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(**sizes, attn_implementation=attention)
    return transformers.GPT2LMHeadModel(config).eval()


def empty_past(config: transformers.GPT2Config, rows: int, tokens: int = 0) -> Past:
    shape = rows, config.n_head, tokens, config.n_embd // config.n_head
    return tuple((torch.randn(shape), torch.randn(shape)) for _ in range(config.n_layer))


def step_inputs(config: transformers.GPT2Config, rows: int, cached: int, tokens: int = 1) -> tuple:
    """Ids of `tokens` new tokens, their mask [rows, 1, tokens, cached + tokens] and positions, and a random cache."""
    ids = torch.randint(5, min(config.vocab_size, 1000), (rows, tokens))
    mask = torch.full((tokens, cached + tokens), torch.finfo(torch.float32).min).triu(cached + 1)
    positions = torch.arange(cached, cached + tokens).expand(rows, tokens)
    return ids, mask.expand(rows, 1, -1, -1), positions, empty_past(config, rows, cached)


def traced(model: torch.nn.Module) -> torch.jit.ScriptModule:
    example = step_inputs(model.config, 2, 4, tokens=3)
    with torch.no_grad():
        return torch.jit.trace(Step(model), example, check_trace=False, strict=False)


def frozen(module: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    return torch.jit.freeze(module.eval())


def random_adapters(base: torch.jit.ScriptModule, folder: Path, count: int) -> dict[str, Path]:
    """Directories of UniPELT adapters with random weights, by name."""
    module = torchgraft.graft(base, "unipelt", "task", verify=False)
    directories = {f"task_{index}": folder / f"task_{index}" for index in range(count)}
    for directory in directories.values():
        with torch.no_grad():
            for parameter in module.adapters.parameters():
                if parameter.dim() > 2:  # [adapters, ...]; a gate's bias may be infinite
                    parameter.normal_(std=STRENGTH)
        torchgraft.save_adapter(module, "task", directory)
    return directories


def step_variants(base: torch.jit.ScriptModule, folder: Path, rows: int) -> dict[str, Callable]:
    directories = random_adapters(base, folder, ADAPTERS if rows == ADAPTERS else 1)
    first = dict(list(directories.items())[:1])
    variants = {"base": frozen(base), "UniPELT": frozen(torchgraft.graft(base, adapters=first, verify=False))}
    if rows == ADAPTERS:
        many = frozen(torchgraft.graft(base, adapters=directories, verify=False))
        same, distinct = torch.zeros(rows, dtype=torch.int64), torch.arange(rows)
        variants[f"one of {ADAPTERS}"] = lambda *batch: many(*batch, adapter_ids=same)
        variants[f"{ADAPTERS} distinct"] = lambda *batch: many(*batch, adapter_ids=distinct)
    return variants


def step_table(arguments: argparse.Namespace, clock: Callable[[], float]) -> Table:
    table = Table("rows", "cached tokens", "variant", "ms", "to the base", "to UniPELT")
    base = traced(hugging_face(arguments.sizes))
    config = transformers.GPT2Config(**arguments.sizes)
    for rows in arguments.rows:
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
            variants = step_variants(base, Path(folder), rows)
            for cached in arguments.cached:
                batch = step_inputs(config, rows, cached)
                runs = {name: partial(seconds_of, partial(run, *batch), clock) for name, run in variants.items()}
                for row in step_rows(in_turns(runs, arguments.rounds, warm_up=3)):
                    table.add_row(str(rows), str(cached), *row)
    return table


def step_rows(seconds: Mapping[str, list[float]]) -> Iterator[tuple[str, ...]]:
    for name, values in seconds.items():
        milliseconds = f"{1e3 * statistics.median(values):.1f}"
        yield name, milliseconds, cell(values, seconds["base"]), cell(values, seconds["UniPELT"])


Generate = Callable[[Tensor, int], Tensor]  # prompts [B, S] and a number of tokens to the new ones, [B, number]


def by_steps(run: Callable, config: transformers.GPT2Config) -> Generate:
    """Greedy: the prompt in one pass, then token by token."""

    def generate(ids: Tensor, count: int) -> Tensor:
        rows, past, tokens = ids.size(0), empty_past(config, ids.size(0)), []
        for _ in range(count):
            size, before = ids.size(1), past[0][0].size(2)
            mask = torch.full((size, before + size), torch.finfo(torch.float32).min).triu(before + 1)
            positions = torch.arange(before, before + size).expand(rows, size)
            logits, past = run(ids, mask.expand(rows, 1, -1, -1), positions, past)
            ids = logits[:, -1].argmax(-1, keepdim=True)
            tokens.append(ids)
        return torch.cat(tokens, 1)

    return generate


def by_library(model: torch.nn.Module, active: Callable[[], object] = lambda: None) -> Generate:
    """generate() of transformers, greedily and with a cache. active: called before, to choose an adapter."""
    model.generation_config.eos_token_id = None

    def generate(ids: Tensor, count: int) -> Tensor:
        active()
        given = dict(attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, pad_token_id=0)
        return model.generate(ids, **given)[:, ids.size(1) :]

    return generate


class FlatStep(Step):
    """A step whose cache is one tensor after another, which ONNX can have."""

    def forward(self, ids: Tensor, mask: Tensor, positions: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        logits, present = super().forward(ids, mask, positions, tuple(zip(past[::2], past[1::2], strict=True)))
        return (logits, *flat(present))


def flat(past: Past) -> tuple[Tensor, ...]:
    return tuple(tensor for pair in past for tensor in pair)


def in_onnx_runtime(model: torch.nn.Module, folder: Path) -> Callable:
    """A step of the base in ONNX Runtime, with as many threads as torch has."""
    import onnxruntime

    ids, mask, positions, past = step_inputs(model.config, 3, 7, tokens=5)
    example = (ids, mask.contiguous(), positions.contiguous(), *flat(past))
    module = torch.jit.trace(FlatStep(model), example, check_trace=False, strict=False)
    file = folder / "base.onnx"
    torchgraft.save_onnx(torchgraft.export(module, example, lowered=True), file)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]

    def run(ids: Tensor, mask: Tensor, positions: Tensor, past: Past) -> tuple[Tensor, Past]:
        given = [tensor.contiguous().numpy() for tensor in (ids, mask, positions, *flat(past))]
        logits, *present = map(torch.from_numpy, session.run(None, dict(zip(names, given, strict=True))))
        return logits, tuple(zip(present[::2], present[1::2], strict=True))

    return run


def library_with_adapters(sizes: dict, folder: Path) -> torch.nn.Module:
    """A model of `adapters` with "unipelt" and "lora", also saved below `folder`. Its prefixes are then ejected."""
    model = hugging_face(sizes, "eager")  # under sdpa the library hides prefixes from queries
    adapters.init(model)
    for name in ("unipelt", "lora"):
        model.add_adapter(name, config=name)
        for key, parameter in model.named_parameters():
            if f".{name}." in key:
                torch.nn.init.normal_(parameter, std=STRENGTH)
        model.save_adapter(str(folder / name), name)
    model.eject_prefix_tuning("unipelt")
    return model.eval()


def peft_with_adapter(sizes: dict, folder: Path) -> torch.nn.Module:
    """A model of PEFT with a LoRA on queries, keys and values, also saved in folder/peft."""
    config = peft.LoraConfig(r=8, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    model = peft.get_peft_model(hugging_face(sizes), config).eval()
    model.save_pretrained(str(folder / "peft"))
    return model


def generating_variants(arguments: argparse.Namespace, folder: Path) -> tuple[dict[str, Generate], dict[str, str]]:
    """The variants by name, and of some the name of another that writes the same tokens."""
    eager = hugging_face(arguments.sizes)
    base, config = traced(eager), eager.config
    library, tuned = library_with_adapters(arguments.sizes, folder), peft_with_adapter(arguments.sizes, folder)

    def grafted(name: str) -> Generate:
        return by_steps(frozen(torchgraft.graft(base, adapters={"task": folder / name}, verify=False)), config)

    def of_library(name: str) -> Generate:
        return by_library(library, lambda: library.set_active_adapters(name))

    variants = {"base, transformers": by_library(eager), "base": by_steps(frozen(base), config)}
    same = {"base": "base, transformers"}
    if arguments.onnx:
        variants["base, ONNX Runtime"] = by_steps(in_onnx_runtime(eager, folder), config)
        same["base, ONNX Runtime"] = "base, transformers"
    for method, name in (("UniPELT", "unipelt"), ("LoRA", "lora")):
        variants |= {f"{method}, adapters": of_library(name), f"{method}, torchgraft": grafted(name)}
        same[f"{method}, torchgraft"] = f"{method}, adapters"
    variants |= {"PEFT's LoRA, PEFT": by_library(tuned), "PEFT's LoRA, torchgraft": grafted("peft")}
    same["PEFT's LoRA, torchgraft"] = "PEFT's LoRA, PEFT"
    return variants, same


def generation_table(arguments: argparse.Namespace, clock: Callable[[], float]) -> Table:
    table = Table("rows", "variant", "tokens per second", "seconds, to the base", "same tokens as its library")
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        variants, same = generating_variants(arguments, Path(folder))
        for rows in arguments.rows:
            prompts = torch.randint(5, 97, (rows, arguments.prompt))
            tokens = {name: run(prompts, arguments.tokens) for name, run in variants.items()}
            runs = {
                name: partial(seconds_of, partial(run, prompts, arguments.tokens), clock)
                for name, run in variants.items()
            }
            seconds = in_turns(runs, arguments.generations, warm_up=1)
            for name, values in seconds.items():
                rate = f"{tokens[name].numel() / statistics.median(values):.0f}"
                equal = f"{(tokens[name] == tokens[same[name]]).float().mean():.0%}" if name in same else ""
                table.add_row(str(rows), name, rate, cell(values, seconds["base"]), equal)
    return table


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, ADAPTERS])
    parser.add_argument("--cached", type=int, nargs="+", default=[128, 512], help="tokens in the cache of a step")
    parser.add_argument("--rounds", type=int, default=30, help="of steps, 0: none")
    parser.add_argument("--generations", type=int, default=5, help="rounds of greedy generation, 0: none")
    parser.add_argument("--prompt", type=int, default=16, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens of each row")
    parser.add_argument("--layers", type=int, default=SIZES["n_layer"])
    parser.add_argument("--vocabulary", type=int, default=50257)
    parser.add_argument("--no-onnx", dest="onnx", action="store_false", help="leave out ONNX Runtime")
    parser.add_argument("--processor-time", action="store_true", help="of all threads, instead of seconds that passed")
    arguments = parser.parse_args()
    arguments.sizes = SIZES | dict(n_layer=arguments.layers, vocab_size=arguments.vocabulary)
    return arguments


def main() -> int:
    arguments = parsed()
    status = models.run_with_allocator(__file__, sys.argv[1:])
    if status is not None:
        return status
    silence()
    clock = time.process_time if arguments.processor_time else time.perf_counter
    console = table_console()
    what = "processor time of all threads" if arguments.processor_time else "seconds that passed"
    threads = os.environ.get("OMP_NUM_THREADS", "not set")
    console.print(f"{processor()}, torch {torch.__version__}, {torch.get_num_threads()} threads (OMP_NUM_THREADS "
                  f"{threads}), {what}")  # fmt: skip
    if arguments.rounds > 0:
        console.print(step_table(arguments, clock))
    if arguments.generations > 0:
        console.print(generation_table(arguments, clock))
    return 0


if __name__ == "__main__":
    sys.exit(main())
