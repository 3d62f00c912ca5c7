"""Draws the rows of benchmarks/models.py as bars: time by shape and variant, as multiples of the base's.

.venv/bin/python benchmarks/picture.py ROWS.json PICTURE     # draws what models.py --json has written
"""

import json
import sys
from pathlib import Path

from rows import BASE, Row

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
    "base, optimised": "tab:purple",
    "torchgraft, optimised": "darkgreen",
    "int8": "plum",
    "torchgraft, int8": "limegreen",
    "int8, oneDNN": "thistle",
    "torchgraft, int8, oneDNN": "springgreen",
    "ONNX Runtime": "lightblue",
    "ONNX Runtime, int8": "steelblue",
    "torchgraft, ONNX Runtime": "navy",
    "OpenVINO": "pink",
    "torchgraft, OpenVINO": "deeppink",
    "OpenVINO, bfloat16": "wheat",
    "torchgraft, OpenVINO, bfloat16": "peru",
    "AOTInductor": "khaki",
    "torchgraft, AOTInductor": "goldenrod",
}


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
            spread = [
                [max(0.0, cells[key].ratio - cells[key].quartiles[0]) for key in columns],
                [max(0.0, cells[key].quartiles[1] - cells[key].ratio) for key in columns],
            ]
            centres = [position + index * width for position in range(len(columns))]
            axis.bar(centres, heights, width, yerr=spread, color=COLORS[name], error_kw={"linewidth": 0.7})
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_xticks([position + 0.4 - width / 2 for position in range(len(columns))])
        axis.set_xticklabels([f"{shape}\n{threads} thr." for threads, shape in columns], fontsize=8)
        axis.set_ylabel("time / base")
        axis.set_title(f"{model}, {config}", fontsize=10)
        axis.set_ylim(bottom=0.8 if min(row.ratio for row in mine) > 0.8 else 0)
    drawn = [name for name in COLORS if any(row.variant == name for row in rows)]
    patches = [pyplot.Rectangle((0, 0), 1, 1, color=COLORS[name]) for name in drawn]
    figure.tight_layout()
    columns = min(len(drawn), 6)
    figure.legend(patches, drawn, fontsize=8, ncols=columns, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.savefig(path, dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    rows_file, picture = sys.argv[1:]
    draw([Row(**row) for row in json.loads(Path(rows_file).read_text())["rows"]], Path(picture))
