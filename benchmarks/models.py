"""How long a forward pass takes, grafted and otherwise: every variant in one process, in turns.

    .venv/bin/python benchmarks/models.py --json docs/performance.json --picture docs/performance.png

Models are random and nothing is downloaded; a forward pass takes as long as that of trained weights. Each round runs
every variant once, so that a busy moment of the machine meets all of them; what is printed are ratios of medians to the
bare base model, traced and frozen, with the quartiles of the rounds' own ratios. Variants:

    base, eager                 the Hugging Face model
    base                        the same, traced and frozen: 1 by definition
    library, eager              adapters==1.3.0, as it comes
    library, traced             its prefixes ejected, traced and frozen: the best that is had without torchgraft
    torchgraft                  grafted and frozen (with TORCHGRAFT_KERNELS=reference: by ATen's compositions)
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "python"), str(ROOT / "benchmarks")]
# Large results are pages that the kernel hands out anew, unless malloc keeps them.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**32)}

import adapters  # noqa: E402
import torch  # noqa: E402
import torchgraft  # noqa: E402
import transformers  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from this_machine import processor  # noqa: E402

MODELS = {
    "MiniLM": dict(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536),
    "BERT-base": dict(),
}
CONFIGS = {"UniPELT": adapters.UniPELTConfig, "MAM": adapters.MAMConfig}
SHAPES = {"MiniLM": ["1x16", "1x32", "8x32", "32x32"], "BERT-base": ["1x32", "1x128", "8x128"]}
BASE = "base"


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
    """The model as a function of two tensors, which is what can be traced."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, attention_mask=mask).last_hidden_state


def batch_of(shape: str) -> tuple[torch.Tensor, torch.Tensor]:
    rows, tokens = map(int, shape.split("x"))
    ids = torch.randint(5, 100, (rows, tokens))
    return ids, torch.ones_like(ids)


def hugging_face(sizes: dict) -> torch.nn.Module:
    torch.manual_seed(0)
    return transformers.BertModel(transformers.BertConfig(**sizes), add_pooling_layer=False).eval()


def traced(module: torch.nn.Module) -> torch.jit.ScriptModule:
    with torch.no_grad():
        return torch.jit.trace(module, batch_of("2x16"), check_trace=False, strict=False)


def library(sizes: dict, config: object, ejected: bool) -> torch.nn.Module:
    model = hugging_face(sizes)
    adapters.init(model)
    model.add_adapter("task", config=config)
    model.set_active_adapters("task")
    if ejected:
        model.eject_prefix_tuning("task")
    return Positional(model).eval()


def variants_of(sizes: dict, config_name: str) -> dict[str, Callable]:
    base = traced(Positional(hugging_face(sizes)).eval())
    config = CONFIGS[config_name]
    grafted = torch.jit.freeze(torchgraft.graft(base, config(), "task", verify=False))
    return {
        "base, eager": Positional(hugging_face(sizes)).eval(),
        BASE: torch.jit.freeze(base),
        "library, eager": library(sizes, config(), ejected=False),
        "library, traced": torch.jit.freeze(traced(library(sizes, config(), ejected=True))),
        "torchgraft": grafted,
    }


def measured(variants: dict[str, Callable], batch: tuple, rounds: int, warm_up: int = 3) -> dict[str, list[float]]:
    """Seconds by variant, one for each round."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    with torch.inference_mode():
        for index in range(warm_up + rounds):
            for name, run in variants.items():
                start = time.perf_counter()
                run(*batch)
                if index >= warm_up:
                    seconds[name].append(time.perf_counter() - start)
    return seconds


def rounds_for(run: Callable, batch: tuple, budget: float, variants: int) -> int:
    with torch.inference_mode():
        run(*batch)
        start = time.perf_counter()
        run(*batch)
    return max(5, min(60, round(budget / variants / (time.perf_counter() - start))))


def rows_of(model: str, config: str, arguments: argparse.Namespace) -> list[Row]:
    variants = variants_of(MODELS[model], config)
    rows = []
    for threads, shape in itertools.product(arguments.threads, arguments.shapes or SHAPES[model]):
        torch.set_num_threads(threads)
        batch = batch_of(shape)
        rounds = arguments.rounds or rounds_for(variants[BASE], batch, arguments.seconds, len(variants))
        seconds = measured(variants, batch, rounds)
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
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "kernels": os.environ.get("TORCHGRAFT_KERNELS", "auto"),
    }


def print_tables(rows: list[Row], console: Console) -> None:
    for model, config in dict.fromkeys((row.model, row.config) for row in rows):
        table = Table(title=f"{model}, {config}: time as a multiple of the bare base, traced and frozen")
        mine = [row for row in rows if (row.model, row.config) == (model, config)]
        columns = list(dict.fromkeys((row.threads, row.shape) for row in mine))
        table.add_column("variant")
        for threads, shape in columns:
            table.add_column(f"{shape}, {threads} thr.", justify="right")
        for variant in dict.fromkeys(row.variant for row in mine):
            cells = {(row.threads, row.shape): row for row in mine if row.variant == variant}
            table.add_row(variant, *[f"{cells[key].ratio:.2f}" for key in columns])
        base = {(row.threads, row.shape): row for row in mine if row.variant == BASE}
        table.add_row("base, milliseconds", *[f"{base[key].milliseconds:.1f}" for key in columns])
        console.print(table)


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
            axis.bar(places, heights, width, yerr=spread, label=name, error_kw={"linewidth": 0.7})
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_xticks([position + 0.4 - width / 2 for position in range(len(columns))])
        axis.set_xticklabels([f"{shape}\n{threads} thr." for threads, shape in columns], fontsize=8)
        axis.set_ylabel("time / base")
        axis.set_title(f"{model}, {config}", fontsize=10)
        axis.set_ylim(bottom=0.8)
    axes[0, 0].legend(fontsize=8, ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--configs", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--shapes", nargs="+", help="rows x tokens, as 8x128; default: by model")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, help="default: as many as --seconds allow, 5 to 60")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each shape and number of threads")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    return parser.parse_args(arguments)


def main(argv: list[str] | None = None) -> int:
    arguments = parsed(argv)
    if "MALLOC_TRIM_THRESHOLD_" not in os.environ:  # glibc reads it when a process starts
        command = [sys.executable, str(Path(__file__).resolve()), *(sys.argv[1:] if argv is None else argv)]
        return subprocess.run(command, env=os.environ | ALLOCATOR, check=False).returncode
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    console = Console(width=110)
    console.print(", ".join(f"{key}: {value}" for key, value in machine().items()))
    rows: list[Row] = []
    for model, config in itertools.product(arguments.models, arguments.configs):
        rows += rows_of(model, config, arguments)
    print_tables(rows, console)
    if arguments.json:
        text = json.dumps({"machine": machine(), "rows": [asdict(row) for row in rows]}, indent=1)
        arguments.json.write_text(text + "\n")
    if arguments.picture:
        draw(rows, arguments.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
