#!/usr/bin/env python3
"""Draws the pictures of this folder, after scripts/setup:

    .venv/bin/python docs/make_pictures.py

grafted_layer.svg and .png show a post-norm Transformer layer, and the same layer with UniPELT grafted on. Coordinates
are in the picture's own units, x to the right and y upwards; data flows upwards. inspect.svg is the output of
`graft.py inspect --svg` for a grafted encoder; gates.png is the output of plot_gates.
"""

import itertools
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Circle, FancyBboxPatch

matplotlib.use("Agg")
matplotlib.rcParams.update(
    {"svg.hashsalt": "torchgraft", "font.family": "DejaVu Sans", "mathtext.fontset": "dejavusans"}
)

HERE = Path(__file__).resolve().parent
GRAFT = [sys.executable, HERE.parent / "scripts" / "graft.py"]
INK, PALE = "#334155", "#eef2f6"  # the base model
ADAPTERS = {  # line colour, fill
    "prefix": ("#0f766e", "#ccf0ea"),
    "lora": ("#c2570c", "#fde6d0"),
    "bottleneck": ("#6d28d9", "#e7defc"),
}
MUTED = "#64748b"


class Canvas:
    """Draws boxes, gates, sums and arrows on one axes."""

    def __init__(self, axes):
        self.axes = axes

    def box(self, x, y, text, width=1.15, height=0.56, adapter=None):
        line, fill = ADAPTERS[adapter] if adapter else (INK, PALE)
        corner = (x - width / 2, y - height / 2)
        shape = FancyBboxPatch(
            corner, width, height, boxstyle="round,pad=0,rounding_size=0.12", fc=fill, ec=line, lw=1.4, zorder=3
        )
        self.axes.add_patch(shape)
        self.axes.text(x, y, text, ha="center", va="center", fontsize=10, color=line, zorder=4)

    def gate(self, x, y, adapter):
        """Draws a gate: it multiplies its input by g."""
        line, _ = ADAPTERS[adapter]
        self.axes.add_patch(Circle((x, y), 0.25, fc=line, ec="white", lw=1.2, zorder=5))
        self.axes.text(x, y - 0.01, r"$\times g$", ha="center", va="center", fontsize=9.5, color="white", zorder=6)

    def plus(self, x, y, adapter):
        line, _ = ADAPTERS[adapter]
        self.axes.add_patch(Circle((x, y), 0.16, fc="white", ec=line, lw=1.5, zorder=5))
        self.axes.text(x, y - 0.01, "+", ha="center", va="center", fontsize=12, color=line, zorder=6)

    def path(self, *points, adapter=None, arrow=True):
        """Draws a line through the points, with an arrow head at the last one."""
        line = ADAPTERS[adapter][0] if adapter else INK
        xs, ys = zip(*points, strict=True)
        self.axes.plot(xs, ys, color=line, lw=1.5, solid_joinstyle="round", zorder=2)
        if arrow:
            head = dict(arrowstyle="-|>", color=line, lw=0, shrinkA=0, shrinkB=0, mutation_scale=11)
            self.axes.annotate("", xy=points[-1], xytext=points[-2], arrowprops=head, zorder=2)

    def label(self, x, y, text, adapter=None, **style):
        colour = ADAPTERS[adapter][0] if adapter else style.pop("color", INK)
        self.axes.text(x, y, text, color=colour, **{"fontsize": 10, "ha": "center", "va": "center", **style})


# Heights of the layer's parts, the same in both pictures.
INPUT, SPLIT, QKV, JOIN, ATTENTION, OUT, NORM1, FFN_IN, FFN_OUT, LATE_SUM, NORM2, RESULT = (
    0.0, 0.75, 1.75, 2.75, 3.75, 4.75, 5.75, 7.0, 7.95, 9.95, 10.8, 11.7,
)  # fmt: skip
WIDE = 3.9


def base_layer(canvas, x):
    """Draws a post-norm layer with its main path at x. Returns the columns of q, k and v."""
    columns = (x - 1.35, x, x + 1.35)
    canvas.label(x, INPUT - 0.2, "hidden states")
    canvas.path((x, INPUT), (x, SPLIT), arrow=False)
    for column, name in zip(columns, "qkv", strict=True):
        canvas.path((x, SPLIT), (column, SPLIT), (column, QKV - 0.28))
        canvas.box(column, QKV, f"$W_{name}$", width=0.95)
        canvas.path((column, QKV + 0.28), (column, ATTENTION - 0.28))
    canvas.box(x, ATTENTION, "attention", width=WIDE)
    canvas.path((x, ATTENTION + 0.28), (x, OUT - 0.28))
    canvas.box(x, OUT, "$W_o$")
    canvas.path((x, OUT + 0.28), (x, NORM1 - 0.28))
    canvas.box(x, NORM1, "add, layer norm", width=2.3)
    canvas.path((x, NORM1 + 0.28), (x, FFN_IN - 0.28))
    canvas.box(x, FFN_IN, "FFN in, GELU", width=2.0)
    canvas.path((x, FFN_IN + 0.28), (x, FFN_OUT - 0.28))
    canvas.box(x, FFN_OUT, "FFN out", width=2.0)
    canvas.path((x, FFN_OUT + 0.28), (x, NORM2 - 0.28))
    canvas.box(x, NORM2, "add, layer norm", width=2.3)
    canvas.path((x, NORM2 + 0.28), (x, RESULT))
    return columns


def residuals(canvas, x, side):
    """Draws the two residual connections, at the column `side`."""
    for start, norm in ((SPLIT - 0.3, NORM1), (NORM1 + 0.55, NORM2)):
        canvas.path((x, start), (side, start), (side, norm), (x - 1.15, norm))


def lora(canvas, column, side):
    """Draws a low-rank branch at `side`, from the layer's input to the projection at `column`."""
    canvas.path((column, SPLIT), (side, SPLIT), (side, 1.1), adapter="lora")
    canvas.box(side, 1.36, "A", width=0.8, height=0.46, adapter="lora")
    canvas.path((side, 1.6), (side, 1.77), adapter="lora")
    canvas.box(side, 2.02, "B", width=0.8, height=0.46, adapter="lora")
    canvas.path((side, 2.25), (side, JOIN), (column + (0.16 if side > column else -0.16), JOIN), adapter="lora")
    canvas.gate((side + column) / 2 + (0.12 if side > column else -0.12), JOIN, "lora")
    canvas.plus(column, JOIN, "lora")


def prefix(canvas, x, side):
    for row, name in ((ATTENTION + 0.62, "key"), (ATTENTION, "value")):
        canvas.box(side, row, f"prefix {name}s", width=1.84, height=0.46, adapter="prefix")
    edge = x + WIDE / 2
    middle = (side - 0.92 + edge) / 2
    canvas.path((side - 0.92, ATTENTION), (edge, ATTENTION), adapter="prefix")
    canvas.path(
        (side - 0.92, ATTENTION + 0.62), (middle, ATTENTION + 0.62), (middle, ATTENTION), adapter="prefix", arrow=False
    )
    canvas.gate(middle, ATTENTION, "prefix")


def bottleneck(canvas, x, side, residual):
    """Draws a bottleneck that reads the normalised sum and adds to the FFN's output, before the layer's own norm."""
    fork = FFN_OUT + 0.55
    canvas.path(
        (x, fork),
        (side - 1.45, fork),
        (side - 1.45, NORM1 + 0.9),
        (side, NORM1 + 0.9),
        (side, 6.9),
        adapter="bottleneck",
    )
    canvas.path((residual, NORM1 + 0.55), (side + 0.55, NORM1 + 0.55), (side + 0.55, 6.9), adapter="bottleneck")
    names = ("add, layer norm", "down", "ReLU", "up")
    heights = (7.18, 7.92, 8.54, 9.16)
    for height, name in zip(heights, names, strict=True):
        wide = {"add, layer norm": 2.25, "down": 1.45, "ReLU": 0.95, "up": 1.45}[name]
        canvas.box(side, height, name, width=wide, height=0.46, adapter="bottleneck")
    for low, high in itertools.pairwise(heights):
        canvas.path((side, low + 0.23), (side, high - 0.23), adapter="bottleneck")
    canvas.path((side, heights[-1] + 0.23), (side, LATE_SUM), (x + 0.16, LATE_SUM), adapter="bottleneck")
    canvas.gate((x + side) / 2, LATE_SUM, "bottleneck")
    canvas.plus(x, LATE_SUM, "bottleneck")


def grafted_layer():
    figure, axes = plt.subplots(figsize=(11.6, 10.2))
    axes.set(xlim=(-0.4, 14.6), ylim=(-1.75, 12.9), aspect="equal")
    axes.axis("off")
    canvas = Canvas(axes)

    left, right = 2.9, 9.4
    canvas.label(left, 12.45, "before", fontsize=14, weight="bold")
    base_layer(canvas, left)
    residuals(canvas, left, left - 2.35)

    canvas.label(right, 12.45, "after: UniPELT", fontsize=14, weight="bold")
    query, _, value = base_layer(canvas, right)
    residuals(canvas, right, right - 3.35)
    lora(canvas, query, query - 1.15)
    lora(canvas, value, value + 1.15)
    canvas.label(value + 1.75, 1.7, "LoRA\n(at q and v)", "lora", ha="left")
    prefix(canvas, right, right + 4.0)
    canvas.label(right + 4.0, ATTENTION + 1.12, "prefix tuning", "prefix")
    bottleneck(canvas, right, right + 3.4, right)
    canvas.label(right + 4.75, 8.54, "bottleneck", "bottleneck", ha="left", rotation=90)

    formula = r"$g = \mathrm{mean}_{\mathrm{tokens}}\ \sigma(W_g\,x + b_g)$"
    canvas.label(
        7.1,
        -1.05,
        f"every gate   {formula}   is one number per batch row, computed from the input of what it gates",
        color=INK,
        fontsize=10.5,
    )
    canvas.label(7.1, -1.55, "grey: the base model, unchanged      coloured: grafted on", color=MUTED, fontsize=9.5)

    for name, options in (("grafted_layer.svg", {"metadata": {"Date": None}}), ("grafted_layer.png", {"dpi": 110})):
        figure.savefig(HERE / name, bbox_inches="tight", facecolor="white", **options)


def inspected_encoder():
    layer = torch.nn.TransformerEncoderLayer(256, 8, 1024, batch_first=True)
    with tempfile.TemporaryDirectory() as folder:
        base, model = Path(folder) / "base.pt", Path(folder) / "encoder.pt"
        torch.jit.script(torch.nn.TransformerEncoder(layer, 12).eval()).save(base)
        subprocess.run([*GRAFT, "add", base, "-o", model, "--config", "unipelt", "--name", "reviews"], check=True)
        subprocess.run([*GRAFT, "inspect", model, "--svg", HERE / "inspect.svg"], check=True)


def gates():
    """Draws the gates of a UniPELT adapter with random weights on MiniLM, over a few sentences (needs the demo's
    model)."""
    sys.path[:0] = [str(HERE.parent / "python"), str(HERE.parent / "scripts")]
    import torchgraft
    from demo_models import Batch, load_tokenizer, trace_encoder

    texts = ["A gate says how much of a method a layer uses.", "The adapters share one base.", "Rows choose their own."]
    tokens = load_tokenizer()(texts, padding=True, return_tensors="pt")
    batch = Batch(tokens["input_ids"], tokens["attention_mask"])
    torch.manual_seed(0)
    module = torchgraft.graft(trace_encoder(batch, torch.float32), "unipelt", "task")
    with torch.no_grad():
        for name, parameter in module.adapters.named_parameters():
            if name.endswith("gate_weight"):
                parameter.normal_(std=0.1)
        found = module.forward_with_gates(batch.ids, batch.mask)[1]["task"]
    torchgraft.plot_gates(found, HERE / "gates.png", title="UniPELT gates, random weights, MiniLM")


def main():
    grafted_layer()
    inspected_encoder()
    gates()


if __name__ == "__main__":
    main()
