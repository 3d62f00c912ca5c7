"""How long grafting takes, and how much memory, by layers.

    .venv/bin/pip install -c requirements/constraints.txt -r requirements/docs.txt     # matplotlib, for the picture
    .venv/bin/python benchmarks/graft_time.py --picture docs/graft_time.png

Seconds are medians of grafts of freshly loaded modules. Memory is the peak of the process's resident set while it
grafts (VmHWM, reset before), less what it held before, as a multiple of the weights: a graft that copied the model would
say 1. Each measurement runs in a process of its own.
"""

import argparse
import gc
import io
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
sys.path.insert(0, str(ROOT / "python"))

import torch  # noqa: E402
import torchgraft  # noqa: E402
import transformers  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402


def traced_bert(layers: int, hidden: int) -> torch.jit.ScriptModule:
    """A random BertModel of BERT-base's shape, but for layers and width; sdpa attention."""
    config = transformers.BertConfig(
        num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=12, intermediate_size=4 * hidden
    )
    config.return_dict = False
    model = transformers.BertModel(config).eval()
    ids = torch.randint(5, 100, (2, 16))
    with torch.no_grad():
        return torch.jit.trace(model, (ids, torch.ones_like(ids)), check_trace=False, strict=False)


def scripted_encoder(layers: int, hidden: int) -> torch.jit.ScriptModule:
    """torch.nn.TransformerEncoder, whose scripted form is the largest graph there is."""
    layer = torch.nn.TransformerEncoderLayer(hidden, 12, 4 * hidden, batch_first=True)
    return torch.jit.script(torch.nn.TransformerEncoder(layer, layers).eval())


MODELS = {"traced BERT": traced_bert, "scripted nn.TransformerEncoder": scripted_encoder}


def _status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def measure(model: str, layers: int, hidden: int, method: str, runs: int) -> dict:
    """One row: seconds [runs], bytes of weights, peak and remaining growth of the resident set in bytes."""
    file = io.BytesIO()
    torch.jit.save(MODELS[model](layers, hidden), file)
    seconds = []
    for _ in range(runs):
        file.seek(0)
        module = torch.jit.load(file)
        started = time.perf_counter()
        torchgraft.graft(module, config=method, name="task")
        seconds.append(time.perf_counter() - started)
    with tempfile.NamedTemporaryFile() as saved:
        saved.write(file.getvalue())
        saved.flush()
        del file, module
        gc.collect()
        module = torch.jit.load(saved.name)
    weights = sum(parameter.nbytes for parameter in module.parameters())
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before = _status("VmRSS")
    grafted = torchgraft.graft(module, config=method, name="task")
    peak, after = _status("VmHWM") - before, _status("VmRSS") - before
    adapters = sum(parameter.nbytes for parameter in grafted.adapters.parameters())
    row = dict(model=model, layers=layers, hidden=hidden, method=method, seconds=seconds, weights=weights)
    return row | dict(adapters=adapters, peak=max(peak, 0), remaining=max(after, 0))


def _in_a_process(**arguments) -> dict:
    command = [sys.executable, __file__, "--measure", json.dumps(arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{arguments}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def exponent(rows: list[dict]) -> float:
    """k in seconds ~ layers ** k, by least squares on logarithms."""
    points = [(math.log(row["layers"]), math.log(statistics.median(row["seconds"]))) for row in rows]
    mean_x, mean_y = (statistics.mean(axis) for axis in zip(*points, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread


def print_table(rows: list[dict], console: Console) -> None:
    table = Table(title="Grafting")
    for column in ("model", "layers", "hidden", "method", "seconds", "weights", "adapters", "peak / weights"):
        table.add_column(column, justify="left" if column in ("model", "method") else "right")
    for row in rows:
        table.add_row(
            row["model"],
            str(row["layers"]),
            str(row["hidden"]),
            row["method"],
            f"{statistics.median(row['seconds']):.2f}",
            f"{row['weights'] / 2**20:.0f} MiB",
            f"{row['adapters'] / 2**20:.1f} MiB",
            f"{row['peak'] / row['weights']:.2f}" if row["weights"] > 2**26 else "",  # else it is the graph's
        )
    console.print(table)


def draw(rows: list[dict], path: Path) -> None:
    """Seconds by layers, a curve for each model with the exponent that fits it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for model in sorted({row["model"] for row in rows}):
        points = sorted((row["layers"], statistics.median(row["seconds"])) for row in rows if row["model"] == model)
        layers, seconds = zip(*points, strict=True)
        own = [row for row in rows if row["model"] == model]
        axes.plot(layers, seconds, "o-", label=f"{model}: seconds ~ layers^{exponent(own):.2f}")
    axes.set(xlabel="layers", ylabel="seconds to graft UniPELT (median)", xlim=(0, None), ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[3, 6, 12, 24, 48], help="layers of the curve")
    parser.add_argument("--hidden", type=int, default=48, help="width of the curve's models, a multiple of 12")
    parser.add_argument("--base-hidden", type=int, default=768, help="width of the 12-layer model whose memory counts")
    parser.add_argument("--method", default="unipelt")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--picture", type=Path, help="draw the curve there (PNG or SVG)")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    if given.measure:
        print(json.dumps(measure(**json.loads(given.measure))))
        return
    common = dict(method=given.method, runs=given.runs)
    base = _in_a_process(model="traced BERT", layers=12, hidden=given.base_hidden, **common)
    curve = [
        _in_a_process(model=model, layers=layers, hidden=given.hidden, **common)
        for model in MODELS
        for layers in given.layers
    ]
    print_table([base, *curve], Console())
    for model in MODELS:
        print(f"{model}: seconds ~ layers^{exponent([row for row in curve if row['model'] == model]):.2f}")
    if given.json:
        given.json.write_text(json.dumps([base, *curve], indent=1) + "\n")
    if given.picture:
        draw(curve, given.picture)


if __name__ == "__main__":
    main()
