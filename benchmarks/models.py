"""How long a model takes, grafted and otherwise: every variant in one process, in turns.

    .venv/bin/python benchmarks/models.py --json docs/performance.json --picture docs/performance.png

Models are random and nothing is downloaded; a forward pass takes as long as that of trained weights. Each round runs
every variant once, so that a busy moment of the machine meets all of them; what is printed are ratios of medians to the
bare base model, traced and frozen, with the quartiles of the rounds' own ratios. Variants:

    base, eager          the Hugging Face model
    base                 the same, traced and frozen: 1 by definition
    library, eager       adapters==1.3.0, as it comes
    library, ejected     the same, without the MLP behind its prefixes
    library, traced      that, traced and frozen: the best that is had without torchgraft
    peft, eager; traced  beside a LoRA: peft's, traced and frozen in the second
    torchgraft           grafted and frozen (with TORCHGRAFT_KERNELS=reference: by ATen's compositions)
    base, compiled; library, compiled    with --compile: torch.compile of the first, and of the ejected library, for
                         each shape anew, which takes minutes

With --dtype bfloat16 all of a model is in bfloat16. With --backward a pass is a forward and a backward one: all of the
base is trained, of the others the adapters, and what is traced is not frozen. Shapes are rows x tokens; ViT's tokens
are its 196 patches and one more.
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
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "python"), str(ROOT / "benchmarks")]
# Large results are pages that the kernel hands out anew, unless malloc keeps them.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**32)}

import adapters  # noqa: E402
import peft  # noqa: E402
import rich.box  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

import torchgraft  # noqa: E402
from this_machine import processor, silence  # noqa: E402

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
BASE = "base"
COLORS = {
    "base, eager": "silver",
    "base, compiled": "gray",
    "library, eager": "tab:red",
    "library, ejected": "tab:orange",
    "library, traced": "gold",
    "library, compiled": "tab:olive",
    "peft, eager": "tab:cyan",
    "peft, traced": "tab:blue",
    "torchgraft": "tab:green",
}


@dataclass
class Row:
    """ratio: of medians to the base's; quartiles: of the rounds' ratios."""

    model: str
    shape: str
    threads: int
    config: str
    variant: str
    milliseconds: float
    ratio: float
    quartiles: tuple[float, float]


class Positional(torch.nn.Module):
    """The model as a function of tensors, which is what can be traced: token ids and their mask, or pixels."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        given = dict(pixel_values=x) if mask is None else dict(input_ids=x, attention_mask=mask)
        return self.model(**given).last_hidden_state


def batch_of(shape: str, sizes: dict | None = None, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """What a model of these sizes is called with; without them, a text model."""
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
    """adapters==1.3.0; the base does not require gradients."""
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
    # A frozen module's parameters are constants, which get no gradients.
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
    return result | {"torchgraft": ready(grafted(base, config, trainable=backward))}


def passed(run: Callable, batch: tuple, backward: bool) -> float:
    """The seconds of one pass. Gradients of the pass before are gone first."""
    if backward:
        run.zero_grad(set_to_none=True)
    with torch.inference_mode(not backward):
        start = time.perf_counter()
        output = run(*batch)
        if backward:
            output.square().mean().backward()
        return time.perf_counter() - start


def measured(variants: dict[str, Callable], batch: tuple, rounds: int, backward: bool) -> dict[str, list[float]]:
    """Seconds by variant, one for each round."""
    warm_up = 3 if rounds > 6 else 2  # TorchScript compiles in the first two
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for index in range(warm_up + rounds):
        for name, run in variants.items():
            taken = passed(run, batch, backward)
            if index >= warm_up:
                seconds[name].append(taken)
    return seconds


def rounds_for(run: Callable, batch: tuple, budget: float, variants: int, backward: bool) -> int:
    once = [passed(run, batch, backward) for _ in range(2)]
    return max(3, min(60, round(budget / variants / once[-1])))


def rows_of(model: str, config: str, arguments: argparse.Namespace) -> list[Row]:
    sizes, backward = MODELS[model], arguments.backward
    variants = variants_of(sizes, config, arguments)
    shapes = arguments.shapes or (LARGE_SHAPES if arguments.large else SHAPES)[model]
    rows = []
    for threads, shape in itertools.product(arguments.threads, shapes):
        torch.set_num_threads(threads)
        batch = batch_of(shape, sizes, DTYPES[arguments.dtype])
        rounds = arguments.rounds or rounds_for(variants[BASE], batch, arguments.seconds, len(variants), backward)
        seconds = measured(variants, batch, rounds, backward)
        base = seconds[BASE]
        for variant, values in seconds.items():
            ratios = [value / one for value, one in zip(values, base, strict=True)]
            first, _, third = statistics.quantiles(ratios, n=4)
            median = statistics.median(values)
            ratio = median / statistics.median(base)
            rows.append(Row(model, shape, threads, config, variant, 1e3 * median, ratio, (first, third)))
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
        for shape in shapes:
            table.add_column(shape, justify="right")
        for variant in dict.fromkeys(row.variant for row in mine):
            cells = {row.shape: row for row in mine if row.variant == variant}
            if variant == BASE:
                table.add_row(BASE, *[f"{cells[shape].milliseconds:.1f} ms" for shape in shapes])
            else:
                table.add_row(variant, *[cell(cells[shape]) for shape in shapes])
        console.print(table)


def cell(row: Row) -> str:
    return f"{row.ratio:.2f} ({row.quartiles[0]:.2f}-{row.quartiles[1]:.2f})"


def draw(rows: list[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = list(dict.fromkeys((row.model, row.config) for row in rows))
    figure, axes = pyplot.subplots(len(groups), 1, figsize=(9, 2.6 * len(groups)), squeeze=False)
    for axis, (model, config) in zip(axes[:, 0], groups, strict=True):
        mine = [row for row in rows if (row.model, row.config) == (model, config) and row.variant != BASE]
        columns = list(dict.fromkeys((row.threads, row.shape) for row in mine))
        names = list(dict.fromkeys(row.variant for row in mine))
        width = 0.8 / len(names)
        for index, name in enumerate(names):
            cells = {(row.threads, row.shape): row for row in mine if row.variant == name}
            heights = [cells[key].ratio for key in columns]
            spread = [[max(0.0, cells[key].ratio - cells[key].quartiles[0]) for key in columns],
                      [max(0.0, cells[key].quartiles[1] - cells[key].ratio) for key in columns]]  # fmt: skip
            places = [position + index * width for position in range(len(columns))]
            axis.bar(places, heights, width, yerr=spread, color=COLORS[name], error_kw={"linewidth": 0.7})
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_xticks([position + 0.4 - width / 2 for position in range(len(columns))])
        axis.set_xticklabels([f"{shape}\n{threads} thr." for threads, shape in columns], fontsize=8)
        axis.set_ylabel("time / base")
        axis.set_title(f"{model}, {config}", fontsize=10)
        axis.set_ylim(bottom=0.8)
    drawn = [name for name in COLORS if any(row.variant == name for row in rows)]
    patches = [pyplot.Rectangle((0, 0), 1, 1, color=COLORS[name]) for name in drawn]
    figure.tight_layout()
    figure.legend(patches, drawn, fontsize=8, ncols=len(drawn), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.savefig(path, dpi=110, bbox_inches="tight")


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--configs", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    shapes = parser.add_mutually_exclusive_group()
    shapes.add_argument("--shapes", nargs="+", help="rows x tokens, as 8x128; default: by model")
    shapes.add_argument("--large", action="store_true", help="32x128 and 8x512 instead of the default")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, help="default: as many as --seconds allow, 3 to 60")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each shape and number of threads")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--backward", action="store_true", help="forward and backward passes")
    parser.add_argument("--compile", action="store_true", help="torch.compile too: minutes for each shape")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    parser.add_argument("--json", type=Path, help="write machine and rows there")
    parser.add_argument("--add", action="store_true", help="keep the file's other rows, which are of the same machine")
    parser.add_argument("--picture", type=Path, help="draw them there (PNG or SVG)")
    given = parser.parse_args(arguments)
    if given.add and not given.json:
        parser.error("--add: expected --json, the file to add to")
    vision = [model for model in given.models if is_vision(MODELS[model])]
    if vision and any(not shape.endswith("x197") for shape in given.shapes or []):
        parser.error(f"--shapes: {vision[0]} has 197 tokens (8x197)")
    return given


def passes_of(arguments: argparse.Namespace) -> str:
    return "forward and backward" if arguments.backward else "forward"


def header(arguments: argparse.Namespace) -> dict:
    """What all rows of a file have in common."""
    return {"machine": machine(), "passes": passes_of(arguments), "dtype": arguments.dtype}


def rows_at_hand(arguments: argparse.Namespace) -> list[Row]:
    """With --add: those of the JSON file."""
    if not arguments.add or not arguments.json.exists():
        return []
    found = json.loads(arguments.json.read_text())
    rows = [Row(**row) for row in found.pop("rows")]
    if found != header(arguments):
        raise SystemExit(f"--add: {arguments.json} is of another machine, dtype or kind of passes: {found}, not "
                         f"{header(arguments)}")  # fmt: skip
    return rows


def measurement(row: Row) -> tuple:
    """What is measured together."""
    return row.model, row.config, row.shape, row.threads


def write(rows: list[Row], arguments: argparse.Namespace) -> None:
    """The files that were asked for."""
    if arguments.json:
        found = header(arguments) | {"rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    if arguments.picture:
        draw(rows, arguments.picture)


def main(argv: list[str] | None = None) -> int:
    arguments = parsed(argv)
    if "MALLOC_TRIM_THRESHOLD_" not in os.environ:  # glibc reads it when a process starts
        command = [sys.executable, str(Path(__file__).resolve()), *(sys.argv[1:] if argv is None else argv)]
        return subprocess.run(command, env=os.environ | ALLOCATOR, check=False).returncode
    silence()
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(", ".join(f"{key}: {value}" for key, value in machine().items()))
    rows = rows_at_hand(arguments)
    for model, config in itertools.product(arguments.models, arguments.configs):
        new = rows_of(model, config, arguments)
        done = {measurement(row) for row in new}
        rows = [row for row in rows if measurement(row) not in done] + new
        write(rows, arguments)  # what there is, should the rest be stopped
    console.print(f"{arguments.dtype}, {passes_of(arguments)}: multiples of the base's median, in brackets the "
                  "quartiles of the rounds' ratios")  # fmt: skip
    print_tables(rows, arguments.markdown, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
