"""Draws gates: which method of a union acts in which layer, as Mao et al. 2022 draw it for UniPELT."""

import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._files import write_whole
from .errors import GraftError

# Rows of the picture, from the input of a layer to its end. Other locations follow in alphabetical order.
_ORDER = ("self_prefix", "encoder_prefix", "cross_prefix", "selfattn_lora", "mh_adapter", "cross_adapter",
          "intermediate_lora", "output_lora", "output_adapter")  # fmt: skip
_FORMATS = (".png", ".svg", ".pdf")

# gates[layer][location]: floating, [rows, columns], as forward_with_gates returns them for one adapter.
AdapterGates = Mapping[int, Mapping[str, Tensor]]


def gather_gates(batches: Iterable[AdapterGates]) -> dict[int, dict[str, Tensor]]:
    """Returns the gates of several batches as the gates of one batch.

    Args:
        batches: for each batch the gates of one adapter, [layer][location]: floating, [rows, columns].

    Returns:
        The same, with the rows of all batches one behind the other: float32 [all rows, columns], on the CPU. NaN
        where a batch has no gates of a layer: its branch did not run.

    Raises:
        GraftError: an entry holds the gates of several adapters, by name.
    """
    parts: dict[int, dict[str, dict[int, Tensor]]] = {}
    rows: list[int] = []
    for index, gates in enumerate(batches):
        rows.append(0)
        for layer in gates:
            for location in gates[layer]:
                if not isinstance(gates[layer][location], Tensor):
                    names = ", ".join(map(str, gates))
                    raise GraftError(
                        f"plot_gates: expected the gates of one adapter, gates[name]; got those of: {names}"
                    )
                gate = gates[layer][location].detach().to("cpu", torch.float32)
                parts.setdefault(layer, {}).setdefault(location, {})[index] = gate
                rows[-1] = gate.size(0)
    return {
        layer: {location: _whole(found, rows) for location, found in parts[layer].items()} for layer in sorted(parts)
    }


def _whole(found: dict[int, Tensor], rows: list[int]) -> Tensor:
    """The gates of all batches: NaN where the layer did not run, in a branch."""
    columns = next(iter(found.values())).size(1)
    missing = (torch.full((count, columns), float("nan")) for count in rows)
    return torch.cat([found.get(index, absent) for index, absent in enumerate(missing)])


def _locations(gates: AdapterGates) -> list[str]:
    found = {location for layer in gates for location in gates[layer]}
    return sorted(found, key=lambda name: (_ORDER.index(name) if name in _ORDER else len(_ORDER), name))


def gate_table(gates: AdapterGates, example: int | None = None) -> tuple[list[str], list[int], Tensor]:
    """Returns the mean gate of each location in each layer.

    Args:
        gates: of one adapter, [layer][location]: floating, [rows, columns].
        example: the row to read. None: the mean over all rows.

    Returns:
        (locations, layers, values): values is float32 [locations, layers], on the CPU. It is NaN where a layer has no
        gate at a location.
    """
    locations, layers = _locations(gates), sorted(gates)
    values = torch.full((len(locations), len(layers)), float("nan"))
    for j, layer in enumerate(layers):
        for location in gates[layer]:
            gate = gates[layer][location].detach().to("cpu", torch.float32)
            rows = gate if example is None else gate[example : example + 1]
            values[locations.index(location), j] = rows.nanmean()
    return locations, layers, values


def plot_gates(
    gates: AdapterGates | Iterable[AdapterGates],
    path: str | Path | None = None,
    *,
    per_example: bool = False,
    labels: Iterable[str] | None = None,
    title: str | None = None,
) -> Any:
    """Draws a heat map of locations by layers, from 0 (the module is off) to 1.

    Args:
        gates: the gates of one adapter, `forward_with_gates(...)[1][name]`: by layer and location, floating [rows,
            columns]. Or an iterable of such gates, one entry per batch of a data set. If a location has several gates
            (LoRA on q, k and v), the map shows their mean.
        path: where to write the picture. Its suffix gives the format: .png, .svg or .pdf. None: write no file.
        per_example: draw one map per row of the batch. False: draw one map of the mean over all rows.
        labels: the names of the rows, in order, for `per_example`.
        title: the title of the picture.

    Returns:
        The matplotlib Figure. The function changes no global state of matplotlib.

    Raises:
        GraftError: there are no gates (the adapter has none, or no row of the batch used it), `gates` holds the gates
            of several adapters, the suffix is unknown, or the file cannot be written.
    """
    from matplotlib.figure import Figure  # takes a second to load, and most users draw nothing

    batches: Any = [gates] if isinstance(gates, Mapping) or hasattr(gates, "keys") else gates
    gathered = gather_gates(batches)
    if not gathered:
        raise GraftError("plot_gates: no gates; is the adapter gated (use_gating=True), and did a row use it?")
    if path is not None and Path(path).suffix not in _FORMATS:
        raise GraftError(f"{path}: expected a file ending in one of {', '.join(_FORMATS)}")
    rows = max(gate.size(0) for by_location in gathered.values() for gate in by_location.values())
    if rows == 0:
        raise GraftError("plot_gates: the batch has no rows")
    examples: list[int | None] = list(range(rows)) if per_example else [None]
    names = list(labels) if labels is not None else [f"example {i}" for i in range(rows)]
    locations, layers, _ = gate_table(gathered)
    figure = Figure(figsize=(2.6 + 0.55 * len(layers), len(examples) * (0.9 + 0.42 * len(locations)) + 0.4),
                    layout="constrained")  # fmt: skip
    axes = figure.subplots(len(examples), 1, squeeze=False)[:, 0]
    for ax, example in zip(axes, examples, strict=True):
        image = _draw_map(ax, gathered, example)
        if example is not None and example < len(names):
            ax.set_title(names[example], fontsize=9, parse_math=False)
    figure.colorbar(image, ax=list(axes), label="mean gate", shrink=0.9)
    axes[-1].set_xlabel("layer")
    figure.suptitle(title if title is not None else f"Gates, mean of {rows} rows" if not per_example else "Gates",
                    parse_math=False)  # fmt: skip
    if path is not None:
        buffer = io.BytesIO()
        figure.savefig(buffer, format=Path(path).suffix[1:], dpi=150)
        write_whole(buffer.getvalue(), Path(path))
    return figure


def _draw_map(ax: Any, gates: AdapterGates, example: int | None) -> Any:
    locations, layers, values = gate_table(gates, example)
    image = ax.imshow(values.numpy(), vmin=0.0, vmax=1.0, cmap="viridis", aspect="auto")
    ax.set_xticks(range(len(layers)), [str(layer) for layer in layers])
    ax.set_yticks(range(len(locations)), locations)
    for i in range(len(locations)):
        for j in range(len(layers)):
            value = values[i, j].item()
            if value == value:  # not NaN
                ax.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7,
                        color="white" if value < 0.6 else "black")  # fmt: skip
    return image
