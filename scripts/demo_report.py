"""The tables of scripts/demo.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from demo_models import Run, gate_difference, output_difference


def _table(*headings: str) -> Table:
    """Makes a table whose first column is text and whose others are numbers."""
    table = Table()
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left", overflow="fold")
    return table


def _print(console: Console, title: str, table: Table) -> None:
    console.print(
        f"\n[bold]{title}[/bold]", highlight=False
    )  # rich would wrap a table's own title at the table's width
    console.print(table)


class Agreement:
    """The differences between C++, Python and the oracle, case by case. `failures` lists those above the limit.

    The encoder's results at padding tokens are ill-conditioned: there the oracle's float32 results differ from its
    float64 results by up to 1e-4, at real tokens by 4e-6. So float32 results are compared at real tokens, float64
    results at all.
    """

    LIMITS = {torch.float32: 1e-5, torch.float64: 1e-10}

    def __init__(self, mask: Tensor):
        """mask: int64 [B, S], 1 = real token."""
        self.failures: list[str] = []
        self._real = mask == 1
        self._title = f"Largest absolute difference over {mask.size(0)} sentences: output (gates)"
        self._table = _table("", "Python - oracle", "C++ - Python", "C++ - oracle", "limit", "tokens")

    def add(self, case: str, dtype: torch.dtype, python: Run, cpp: Run, oracle: Run) -> None:
        limit, exact, cells = self.LIMITS[dtype], dtype == torch.float64, []
        tokens = torch.ones_like(self._real) if exact else self._real
        pairs = (
            ("Python and the oracle", python, oracle),
            ("C++ and Python", cpp, python),
            ("C++ and the oracle", cpp, oracle),
        )
        for who, first, second in pairs:
            output, gate = output_difference(first, second, tokens), gate_difference(first, second)
            gates = "" if gate is None else f" ({gate:.1e})"
            # "not <=", so that a NaN fails.
            if not output <= limit or (gate is not None and not gate <= limit):
                self.failures.append(f"{case}: {who} differ by {output:.1e}{gates}, the limit is {limit:.0e}")
            cells.append(f"{output:.1e}{gates}")
        self._table.add_row(case, *cells, f"{limit:.0e}", "all" if exact else "real")

    def print(self, console: Console) -> None:
        _print(console, self._title, self._table)


def embed(hidden: Tensor, mask: Tensor) -> Tensor:
    """Computes MiniLM's sentence vectors: the masked mean over tokens, scaled to length 1.

    Args:
        hidden: floating, [B, S, H].
        mask: int64 [B, S], 1 = real token.

    Returns:
        [B, H], in the dtype of `hidden`.
    """
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return torch.nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=1)


def print_similarities(
    console: Console, sentences: list[str], pairs: list[tuple[int, int]], hidden: dict[str, Tensor], mask: Tensor
) -> None:
    table = _table("sentences", *hidden)
    vectors = {name: embed(value, mask) for name, value in hidden.items()}
    for a, b in pairs:
        cells = [f"{(vector[a] @ vector[b]).item():.3f}" for vector in vectors.values()]
        table.add_row(f"{sentences[a]}\n{sentences[b]}", *cells, end_section=True)
    _print(console, "Cosine similarity (the adapters are random: they shift it, they mean nothing)", table)


def print_gates(console: Console, title: str, gates: dict[tuple[int, str], Tensor]) -> None:
    """Prints mean gates by layer and location. Several gates at one location (q and v of LoRA) stand side by side."""
    locations = list(dict.fromkeys(location for _, location in gates))
    table = _table("layer", *locations)
    for layer in sorted({layer for layer, _ in gates}):
        means = [gates[layer, location].mean(0).tolist() for location in locations]
        table.add_row(str(layer), *[" ".join(f"{value:.3f}" for value in mean) for mean in means])
    _print(console, title, table)


def print_sentiment(
    console: Console, sentences: list[str], probabilities: dict[str, Tensor], labels: Sequence[str]
) -> None:
    """probabilities: [B, L] by adapter."""
    table = _table("sentence", *probabilities)
    for row, sentence in enumerate(sentences):
        cells = []
        for values in probabilities.values():
            share, label = values[row].max(-1)
            cells.append(f"{labels[int(label)]} {share.item():.2f}")
        table.add_row(sentence, *cells)
    _print(console, "Sentiment by adapters that were trained on three domains (UniPELT, MAM, UniPELT)", table)


def print_mean_gates(console: Console, gates: dict[str, dict[int, dict[str, Tensor]]]) -> None:
    """Prints the mean gate of each location over layers and sentences, by adapter."""
    locations = list(dict.fromkeys(name for layers in gates.values() for layer in layers.values() for name in layer))
    table = _table("adapter", *locations)
    for adapter, layers in gates.items():
        means = [torch.cat([layer[name].flatten() for layer in layers.values()]).mean() for name in locations]
        table.add_row(adapter, *[f"{mean.item():.3f}" for mean in means])
    _print(console, "Their gates, mean over layers and sentences (MAM has none)", table)


def print_sizes(console: Console, rows: list[tuple[str, int, int, float | None]]) -> None:
    """rows: (model, bytes of its file, number of parameters, seconds of the graft). The first row is the base."""
    table = _table("", "MB", "parameters", "more than base", "grafted in")
    base = rows[0][2]
    for name, size, parameters, seconds in rows:
        more = f"{parameters - base:,} ({(parameters - base) / base:.1%})" if parameters != base else ""
        table.add_row(name, f"{size / 1e6:.1f}", f"{parameters:,}", more, "" if seconds is None else f"{seconds:.2f} s")
    _print(console, "Files", table)


def print_times(console: Console, title: str, times: dict[str, float]) -> None:
    """times: milliseconds by name. The first is the base of the ratios."""
    table = _table("", "ms", "x base")
    base = next(iter(times.values()))
    for name, value in times.items():
        table.add_row(name, f"{value:.1f}", f"{value / base:.2f}")
    _print(console, title, table)
