"""Measures how long a model takes, grafted and otherwise. All variants run in one process, in turns.

    .venv/bin/python benchmarks/models.py --json docs/performance.json --picture docs/performance.png

Models have random weights, with which a forward pass takes as long as with trained ones; the script downloads nothing.
It prints ratios of medians to the base model without adapters, traced and frozen by torch.jit.freeze, with the
quartiles of the rounds' own ratios. Variants:

    base, eager          the Hugging Face model
    base                 the same, traced and frozen: 1 by definition
    library, eager       adapters==1.3.0, unchanged
    library, ejected     the same, without the MLP behind its prefixes
    library, traced      the same, ejected, traced and frozen: the fastest way without torchgraft
    peft, eager          for LoRA only: PEFT's LoRA
    peft, traced         the same, traced and frozen
    torchgraft           grafted and frozen (with TORCHGRAFT_KERNELS=reference: ATen's compositions)
    base, optimised      the base, without adapters, by torchgraft.optimize(), frozen
    torchgraft, optimised   grafted, then optimised, and frozen
    base, compiled       with --compile: torch.compile of "base, eager", anew for each shape, which takes minutes
    library, compiled    with --compile: torch.compile of "library, ejected"
    ...                  with --engines: int8, ONNX Runtime, OpenVINO and AOTInductor, as engines.py says

With --dtype bfloat16 all of a model is in bfloat16. With --backward a pass is a forward and a backward pass: it trains
all weights of the base, and the adapters of the other variants; traced modules are not frozen, and none is optimised.
Shapes are rows x tokens; ViT's tokens are its 196 patches and one more.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "python"), str(ROOT / "benchmarks")]

import peft  # noqa: E402
import rich.box  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

import adapters  # noqa: E402
import engines  # noqa: E402
import torchgraft  # noqa: E402
from picture import draw  # noqa: E402
from rows import BASE, Row  # noqa: E402
from table_console import table_console  # noqa: E402
from this_machine import ALLOCATOR, processor, silence  # noqa: E402
from turns import in_turns, ratio  # noqa: E402

MODELS = {
    "MiniLM": dict(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536),
    "BERT-base": dict(),
    "ViT-base": dict(image_size=224),
}
CONFIGS = {"UniPELT": adapters.UniPELTConfig, "MAM": adapters.MAMConfig, "LoRA": adapters.LoRAConfig}
SHAPES = {
    "MiniLM": ["1x16", "1x32", "8x32", "32x32"],
    "BERT-base": ["1x32", "1x128", "8x128"],
    "ViT-base": ["1x197", "8x197"],
}
LARGE_SHAPES = {"MiniLM": ["32x128", "8x512"], "BERT-base": ["32x128", "8x512"], "ViT-base": ["32x197"]}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Positional(torch.nn.Module):
    """The model as a function of tensors, which torch.jit.trace needs: token ids and their mask, or pixels."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        given = dict(pixel_values=x) if mask is None else dict(input_ids=x, attention_mask=mask)
        return self.model(**given).last_hidden_state


def batch_of(shape: str, sizes: dict | None = None, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Makes the arguments of a model of these sizes: ids and mask, int64 [rows, tokens], or pixels. None: of a text
    model."""
    rows, tokens = map(int, shape.split("x"))
    if is_vision(sizes or {}):
        return (torch.randn(rows, 3, sizes["image_size"], sizes["image_size"], dtype=dtype),)
    ids = torch.randint(5, 100, (rows, tokens))
    return ids, torch.ones_like(ids)


def is_vision(sizes: dict) -> bool:
    return "image_size" in sizes


def hugging_face(sizes: dict) -> torch.nn.Module:
    torch.manual_seed(0)
    if is_vision(sizes):
        return transformers.ViTModel(transformers.ViTConfig(**sizes), add_pooling_layer=False).eval()
    return transformers.BertModel(transformers.BertConfig(**sizes), add_pooling_layer=False).eval()


def traced(module: torch.nn.Module, sizes: dict | None = None) -> torch.jit.ScriptModule:
    dtype = next(module.parameters()).dtype
    with torch.no_grad():
        return torch.jit.trace(module, batch_of("2x16", sizes, dtype), check_trace=False, strict=False)


def library(sizes: dict, config: object, ejected: bool) -> torch.nn.Module:
    """Makes a model with an adapter of adapters==1.3.0. The base requires no gradients."""
    model = hugging_face(sizes)
    adapters.init(model)
    model.add_adapter("task", config=config)
    if ejected:
        model.eject_prefix_tuning("task")
    model.train_adapter("task")
    return Positional(model).eval()


def peft_lora(sizes: dict, config: object) -> torch.nn.Module:
    names = ["query", "value"]
    like = peft.LoraConfig(r=config.r, lora_alpha=config.alpha, target_modules=names)
    return Positional(peft.get_peft_model(hugging_face(sizes), like)).eval()


def grafted(base: torch.jit.ScriptModule, config: object, trainable: bool = False) -> torch.jit.ScriptModule:
    return torchgraft.graft(base, config, "task", verify=False, trainable=trainable)


def variants_of(sizes: dict, config_name: str, arguments: argparse.Namespace) -> dict[str, Callable]:
    config, backward = CONFIGS[config_name](), arguments.backward
    dtype = DTYPES[arguments.dtype]
    # torch.jit.freeze makes parameters constants, which get no gradients.
    ready = (lambda module: module) if backward else torch.jit.freeze
    eager = Positional(hugging_face(sizes)).to(dtype).eval()
    ejected = library(sizes, config, ejected=True).to(dtype)
    base = traced(Positional(hugging_face(sizes)).to(dtype).eval(), sizes)
    result = {
        "base, eager": eager,
        BASE: ready(base),
        "library, eager": library(sizes, config, ejected=False).to(dtype),
        "library, ejected": ejected,
        "library, traced": ready(traced(ejected, sizes)),
    }
    if config_name == "LoRA":
        del result["library, ejected"]  # there are no prefixes
        result["peft, eager"] = peft_lora(sizes, config).to(dtype)
        result["peft, traced"] = ready(traced(result["peft, eager"], sizes))
    if arguments.compile:
        result["base, compiled"] = torch.compile(eager, dynamic=False)
        result["library, compiled"] = torch.compile(ejected, dynamic=False)
    module = grafted(base, config, trainable=backward)
    result["torchgraft"] = ready(module)
    if not backward:
        result["base, optimised"] = ready(torchgraft.optimize(base, verify=False))
        result["torchgraft, optimised"] = ready(torchgraft.optimize(module, verify=False))
    if arguments.engines:
        result |= engines.variants(base, module, batch_of("3x17", sizes), arguments.packages)
    return result


def passed(run: Callable, batch: tuple, backward: bool, clock: Callable[[], float] = time.perf_counter) -> float:
    """Runs one pass and returns its seconds by `clock`. Drops the gradients of the pass before."""
    if backward:
        run.zero_grad(set_to_none=True)
    with torch.inference_mode(not backward):
        start = clock()
        output = run(*batch)
        if backward:
            output.square().mean().backward()
        return clock() - start


def measured(
    variants: dict[str, Callable],
    batch: tuple,
    rounds: int,
    backward: bool,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Returns the seconds of each variant by `clock`, one number for each round."""
    warm_up = 3 if rounds > 6 else 2  # TorchScript compiles in the first two
    runs = {name: partial(passed, run, batch, backward, clock) for name, run in variants.items()}
    return in_turns(runs, rounds, warm_up)


def rounds_for(run: Callable, batch: tuple, budget: float, variants: int, backward: bool) -> int:
    once = [passed(run, batch, backward) for _ in range(2)]
    return max(3, min(60, round(budget / variants / once[-1])))


def largest_errors(variants: dict[str, Callable], batch: tuple) -> dict[str, float]:
    """Compares the variants without an adapter to the base, and those of the grafted module to it: the others have
    weights of their own."""
    with torch.inference_mode():
        base, module = variants[BASE](*batch), variants["torchgraft"](*batch)
        references = {name: base for name in variants if not name.startswith(("library", "peft", "torchgraft"))}
        references |= {name: module for name in variants if name.startswith("torchgraft")}
        return {name: (variants[name](*batch) - other).abs().max().item() for name, other in references.items()}


def rows_of(model: str, config: str, arguments: argparse.Namespace) -> list[Row]:
    sizes, backward = MODELS[model], arguments.backward
    variants = variants_of(sizes, config, arguments)
    shapes = arguments.shapes or (LARGE_SHAPES if arguments.large else SHAPES)[model]
    rows = []
    for threads, shape in itertools.product(arguments.threads, shapes):
        torch.set_num_threads(threads)
        batch = batch_of(shape, sizes, DTYPES[arguments.dtype])
        rounds = arguments.rounds or rounds_for(variants[BASE], batch, arguments.seconds, len(variants), backward)
        seconds = measured(variants, batch, rounds, backward, arguments.clock)
        base, errors = seconds[BASE], {} if backward else largest_errors(variants, batch)
        for variant, values in seconds.items():
            to_base, milliseconds = ratio(values, base), 1e3 * statistics.median(values)
            found = (milliseconds, to_base.value, to_base.quartiles, errors.get(variant))
            rows.append(Row(model, shape, threads, config, variant, *found))
    return rows


def machine() -> dict[str, str]:
    return {
        "processor": processor(),
        "cores": str(os.cpu_count()),
        "instructions": torchgraft._libraries.patcher().kernel_instruction_set(),
        "torch": torch.__version__,
        "kernels": os.environ.get("TORCHGRAFT_KERNELS", "auto"),
        "kernel table": os.environ.get("TORCHGRAFT_KERNEL_TABLE", ""),
    }


def print_tables(rows: list[Row], markdown: bool, console: Console) -> None:
    for model, config, threads in dict.fromkeys((row.model, row.config, row.threads) for row in rows):
        title = f"{model}, {config}, threads: {threads}"
        mine = [row for row in rows if (row.model, row.config, row.threads) == (model, config, threads)]
        shapes = list(dict.fromkeys(row.shape for row in mine))
        table = Table(title=title, box=rich.box.MARKDOWN if markdown else rich.box.HEAVY_HEAD)
        table.add_column("variant")
        for shape in [*shapes, "largest error"]:
            table.add_column(shape, justify="right")
        for variant in dict.fromkeys(row.variant for row in mine):
            cells = {row.shape: row for row in mine if row.variant == variant}
            if variant == BASE:
                shown = [f"{cells[shape].milliseconds:.1f} ms" for shape in shapes]
            else:
                shown = [cell(cells[shape]) for shape in shapes]
            errors = [row.largest_error for row in cells.values() if row.largest_error is not None]
            table.add_row(variant, *shown, f"{max(errors):.1e}" if errors else "")
        console.print(table)


def cell(row: Row) -> str:
    return f"{row.ratio:.2f} ({row.quartiles[0]:.2f}-{row.quartiles[1]:.2f})"


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--configs", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    shapes = parser.add_mutually_exclusive_group()
    shapes.add_argument("--shapes", nargs="+", help="rows x tokens: 8x128; default: by model")
    shapes.add_argument("--large", action="store_true", help="32x128 and 8x512 instead of the default")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, help="default: as many as --seconds allow, 3 to 60")
    parser.add_argument("--seconds", type=float, default=20.0, help="time for each shape and number of threads")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--backward", action="store_true", help="measure forward and backward passes")
    parser.add_argument("--compile", action="store_true", help="measure torch.compile, too: minutes for each shape")
    parser.add_argument("--engines", action="store_true", help="measure int8, ONNX Runtime and OpenVINO, too")
    parser.add_argument("--packages", action="store_true", help="with --engines: AOTInductor, too, minutes for each")
    parser.add_argument("--processor-time", action="store_true", help="of all threads, instead of seconds that passed")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    parser.add_argument("--json", type=Path, help="write machine and rows to this file")
    parser.add_argument(
        "--add",
        action="store_true",
        help="keep the other rows of the --json file; they must come from the same machine",
    )
    parser.add_argument("--picture", type=Path, help="draw the rows into this file (PNG or SVG)")
    given = parser.parse_args(arguments)
    given.clock = time.process_time if given.processor_time else time.perf_counter
    if given.add and not given.json:
        parser.error("--add: expected --json, the file to add to")
    if given.engines and (given.backward or given.dtype != "float32"):
        parser.error("--engines: expected float32 and forward passes")
    if given.engines and (missing := engines.missing_packages()):
        parser.error(f"--engines: no package {missing[0]}: pip install -r requirements/engines.txt")
    if given.packages and not given.engines:
        parser.error("--packages: expected --engines")
    vision = [model for model in given.models if is_vision(MODELS[model])]
    if vision and any(not shape.endswith("x197") for shape in given.shapes or []):
        parser.error(f"--shapes: {vision[0]} has 197 tokens (8x197)")
    return given


def passes_of(arguments: argparse.Namespace) -> str:
    return "forward and backward" if arguments.backward else "forward"


def header(arguments: argparse.Namespace) -> dict:
    """Returns what all rows of a file have in common."""
    return {"machine": machine(), "passes": passes_of(arguments), "dtype": arguments.dtype}


def rows_at_hand(arguments: argparse.Namespace) -> list[Row]:
    """Returns the rows of the JSON file, with --add; else none."""
    if not arguments.add or not arguments.json.exists():
        return []
    found = json.loads(arguments.json.read_text())
    rows = [Row(**row) for row in found.pop("rows")]
    if found != header(arguments):
        raise SystemExit(
            f"--add: {arguments.json} is of another machine, dtype or kind of passes: {found}, not {header(arguments)}"
        )
    return rows


def measurement(row: Row) -> tuple:
    """Returns a key that is equal for rows that were measured together."""
    return row.model, row.config, row.shape, row.threads


def write(rows: list[Row], arguments: argparse.Namespace) -> None:
    """Writes the files that the command line names."""
    if arguments.json:
        found = header(arguments) | {"rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    if arguments.picture:
        draw(rows, arguments.picture)


def run_with_allocator(script: str, arguments: list[str]) -> int | None:
    """Runs a script again with ALLOCATOR in its environment, which glibc reads only when a process starts.

    Returns:
        The exit status of that process. None: this process has ALLOCATOR already.
    """
    if "MALLOC_TRIM_THRESHOLD_" in os.environ:
        return None
    command = [sys.executable, str(Path(script).resolve()), *arguments]
    return subprocess.run(command, env=os.environ | ALLOCATOR, check=False).returncode


def main(argv: list[str] | None = None) -> int:
    arguments = parsed(argv)
    status = run_with_allocator(__file__, sys.argv[1:] if argv is None else argv)
    if status is not None:
        return status
    silence()
    console = table_console()
    console.print(", ".join(f"{key}: {value}" for key, value in machine().items()))
    rows = rows_at_hand(arguments)
    for model, config in itertools.product(arguments.models, arguments.configs):
        new = rows_of(model, config, arguments)
        done = {measurement(row) for row in new}
        rows = [row for row in rows if measurement(row) not in done] + new
        write(rows, arguments)  # now, in case that the rest is stopped
    console.print(
        f"{arguments.dtype}, {passes_of(arguments)}: multiples of the base's median, in brackets the quartiles of the "
        "rounds' ratios"
    )
    print_tables(rows, arguments.markdown, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
