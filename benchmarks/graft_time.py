"""Measures how much time and memory grafting takes, by layers.

    .venv/bin/python benchmarks/graft_time.py --picture docs/graft_time.png

Models have random weights; the script downloads nothing. Seconds are medians of grafts of freshly loaded modules, on
one thread.

Memory is that of the first graft in a process: later grafts use the heap that the first one has grown, and look cheaper
than they are. "peak" is the highest resident set while grafting (VmHWM, reset just before), minus the resident set
before. "remains" is the resident set afterwards, when malloc has given free memory back, minus the resident set before.
If a graft copied the model, its peak would be 1 of its weights.
"""

import argparse
import ctypes
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "python"), str(ROOT / "benchmarks")]

import rich.box  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from rich.table import Table  # noqa: E402

import torchgraft  # noqa: E402
from table_console import table_console  # noqa: E402
from this_machine import memory, processor, reset_peak  # noqa: E402

MIB = 2**20


def traced_bert(layers: int, hidden: int) -> torch.jit.ScriptModule:
    """Traces a random BertModel with sdpa attention: BERT-base except for layers and width."""
    config = transformers.BertConfig(
        num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=12, intermediate_size=4 * hidden
    )
    config.return_dict = False
    model = transformers.BertModel(config).eval()
    ids = torch.randint(5, 100, (2, 16))
    with torch.no_grad():
        return torch.jit.trace(model, (ids, torch.ones_like(ids)), check_trace=False, strict=False)


def scripted_encoder(layers: int, hidden: int) -> torch.jit.ScriptModule:
    """Scripts torch.nn.TransformerEncoder. No other model of these sizes has so large a graph."""
    layer = torch.nn.TransformerEncoderLayer(hidden, 12, 4 * hidden, batch_first=True)
    return torch.jit.script(torch.nn.TransformerEncoder(layer, layers).eval())


MODELS = {"traced BERT": traced_bert, "scripted nn.TransformerEncoder": scripted_encoder}


def measure_seconds(model: str, layers: int, hidden: int, path: str, method: str, runs: int) -> dict:
    """Returns {"seconds": one number for each run}, and leaves the model in the file `path`."""
    torch.jit.save(MODELS[model](layers, hidden), path)
    seconds = []
    for _ in range(runs):
        module = torch.jit.load(path)
        started = time.perf_counter()
        torchgraft.graft(module, config=method, name="task")
        seconds.append(time.perf_counter() - started)
    return dict(seconds=seconds)


def _bytes(module: torch.nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def measure_memory(path: str, method: str) -> dict:
    """Returns bytes: of the base's weights, of the adapters, and the growth of the resident set at its peak and
    afterwards."""
    trim = ctypes.CDLL("libc.so.6").malloc_trim
    module = torch.jit.load(path)
    trim(0)
    reset_peak()
    before = memory("VmRSS")
    grafted = torchgraft.graft(module, config=method, name="task")
    peak = memory("VmHWM") - before
    trim(0)
    remaining = memory("VmRSS") - before
    return dict(
        weights=_bytes(module), adapters=_bytes(grafted.adapters), peak=max(peak, 0), remaining=max(remaining, 0)
    )


STEPS = {step.__name__: step for step in (measure_seconds, measure_memory)}


def _in_a_process(step: str, **arguments) -> dict:
    command = [sys.executable, __file__, "--step", json.dumps([step, arguments])]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{step} {arguments}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(model: str, layers: int, hidden: int, method: str, runs: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "base.pt")
        row = dict(model=model, layers=layers, hidden=hidden, method=method)
        row |= _in_a_process("measure_seconds", **row, path=path, runs=runs)
        return row | _in_a_process("measure_memory", path=path, method=method)


def fit(rows: list[dict]) -> dict:
    """Fits by least squares: seconds = start + per_layer * layers, with its R²; and seconds ~ layers ** exponent."""
    layers = [row["layers"] for row in rows]
    seconds = [statistics.median(row["seconds"]) for row in rows]
    line = statistics.linear_regression(layers, seconds)
    power = statistics.linear_regression([math.log(n) for n in layers], [math.log(s) for s in seconds])
    r2 = statistics.correlation(layers, seconds) ** 2
    return dict(start=line.intercept, per_layer=line.slope, r2=r2, exponent=power.slope)


def curves(rows: list[dict]) -> dict[tuple[str, int], list[dict]]:
    """Groups rows by (model, hidden). Leaves out groups of a single row, which are no curve."""
    result = {}
    for row in rows:
        result.setdefault((row["model"], row["hidden"]), []).append(row)
    return {name: curve for name, curve in result.items() if len(curve) > 1}


def make_table(rows: list[dict], markdown: bool) -> Table:
    table = Table(box=rich.box.MARKDOWN) if markdown else Table(title="Grafting")
    columns = ("model", "layers", "hidden", "seconds", "weights", "adapters", "peak", "remains", "peak / weights")
    for column in columns:
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in rows:
        megabytes = [f"{row[key] / MIB:.1f} MiB" for key in ("weights", "adapters", "peak", "remaining")]
        # With weights of a few MiB, other memory decides the ratio.
        ratio = f"{row['peak'] / row['weights']:.2f}" if row["weights"] > 64 * MIB else ""
        seconds = f"{statistics.median(row['seconds']):.2f}"
        table.add_row(row["model"], str(row["layers"]), str(row["hidden"]), seconds, *megabytes, ratio)
    return table


def draw(rows: list[dict], path: Path) -> None:
    """Draws a panel for each model: medians by layers as points, and the straight line that fits them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(MODELS), figsize=(8.6, 3.6), layout="constrained", squeeze=False)
    for axes, model in zip(panels[0], MODELS, strict=True):
        for (name, hidden), curve in curves(rows).items():
            if name != model:
                continue
            found = fit(curve)
            label = f"hidden {hidden}: layers^{found['exponent']:.2f}, line R² {found['r2']:.3f}"
            layers = [row["layers"] for row in curve]
            points = axes.plot(layers, [statistics.median(row["seconds"]) for row in curve], "o", label=label)
            ends = [0, layers[-1]]
            line = [found["start"] + found["per_layer"] * end for end in ends]
            axes.plot(ends, line, "--", color=points[0].get_color(), linewidth=1)
        axes.set(title=model, xlabel="layers", ylabel=f"seconds to graft (median), {rows[0]['method']}")
        axes.set(xlim=(0, None), ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", loc="lower right")
    figure.savefig(path, dpi=110)


def machine() -> str:
    return f"{os.cpu_count()} x {processor()}, torch {torch.__version__}, one thread"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[3, 6, 12, 24, 36, 48])
    hidden = "widths, multiples of 12; 768 is BERT-base's; in a narrow model most of the time goes into the graph"
    parser.add_argument("--hidden", type=int, nargs="+", default=[48, 768], help=hidden)
    parser.add_argument("--method", default="unipelt", help="name of the adapter's configuration")
    parser.add_argument("--runs", type=int, default=5, help="grafts for each median")
    parser.add_argument("--json", type=Path, help="write machine, rows and fits to this file")
    parser.add_argument("--picture", type=Path, help="draw the curves into this file (PNG or SVG)")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--step", help=argparse.SUPPRESS)  # [function, arguments] as JSON
    return parser.parse_args()


def main() -> None:
    warnings.simplefilter("ignore")
    given = _arguments()
    if given.step:
        step, arguments = json.loads(given.step)
        print(json.dumps(STEPS[step](**arguments)))
        return
    rows = [
        measure(model=model, layers=layers, hidden=hidden, method=given.method, runs=given.runs)
        for model in MODELS
        for hidden in sorted(given.hidden)
        for layers in sorted(given.layers)
    ]
    fits = [dict(model=model, hidden=hidden) | fit(curve) for (model, hidden), curve in curves(rows).items()]
    # If the output is no terminal, rich would take 80 columns, which is too narrow.
    table_console().print(make_table(rows, given.markdown))
    for found in fits:
        line = f"{found['start']:.3f} s + {found['per_layer']:.4f} s * layers (R² {found['r2']:.3f})"
        print(f"{found['model']}, hidden {found['hidden']}: seconds = {line}; ~ layers^{found['exponent']:.2f}")
    print(machine())
    if given.json:
        given.json.write_text(json.dumps(dict(machine=machine(), rows=rows, fits=fits), indent=1) + "\n")
    if given.picture:
        draw(rows, given.picture)


if __name__ == "__main__":
    main()
