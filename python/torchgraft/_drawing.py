"""Draws the picture of `inspect --svg`: a model's layers with their grafted modules, or with the locations for them.

Data flows downwards. Layers that look alike are drawn once. An encoder and a decoder stand side by side.
"""

from typing import Any

import graphviz

from ._block_drawing import INK, METHODS, MUTED, PALE, WARNING, BlockDrawing, Style, text_of
from ._layers import Pattern, Slot, blocks_of, patterns_of
from .errors import GraftError

FONT = "Helvetica,Arial,sans-serif"


def draw(structure: dict[str, Any], slots: dict[int, frozenset[Slot]], title: str) -> bytes:
    """Returns the content of an SVG file.

    Args:
        structure: the result of inspect(), with at least one layer.
        slots: the slots of each Transformer layer. If there are none, the picture shows the locations where adapters
            can act.
        title: the title of the picture, one line.

    Raises:
        GraftError: Graphviz's program `dot` is missing, or fails.
    """
    try:
        return make_graph(structure, slots, title).pipe(format="svg")
    except graphviz.ExecutableNotFound as error:
        raise GraftError(
            "a picture needs Graphviz's program 'dot', which is not on PATH: run scripts/setup as root, or install "
            "your system's package graphviz"
        ) from error
    except graphviz.CalledProcessError as error:
        raise GraftError(f"dot could not draw the picture: {error.stderr.decode(errors='replace').strip()}") from error
    except BrokenPipeError as error:
        raise GraftError(
            "dot could not draw the picture: it ended before it had read it; run 'dot -V' to see why"
        ) from error


def make_graph(structure: dict[str, Any], slots: dict[int, frozenset[Slot]], title: str) -> graphviz.Digraph:
    """Returns the graph that draw() gives to `dot`."""
    patterns = patterns_of(blocks_of(structure["layers"], slots))
    encoder = [pattern for pattern in patterns if _kinds(pattern) == {"encoder"}]
    decoder = [pattern for pattern in patterns if pattern not in encoder]
    drawing = _Drawing(grafted=bool(slots))
    memory = drawing.stack("encoder", encoder, None) if encoder else None
    if decoder:
        if memory is None and any("cross" in _kinds(pattern) for pattern in decoder):
            memory = drawing.text("memory (an input)")
        drawing.stack("decoder" if encoder else "", decoder, memory)
    return drawing.finish(title, len(structure["near_misses"]))


def _kinds(pattern: Pattern) -> set[str]:
    return {entry["kind"] for group in pattern for entry in group.first.attentions}


class _Drawing:
    """Draws a whole model: blocks, inputs, outputs, title and legend. A `node` is the name of a box."""

    def __init__(self, grafted: bool):
        self.style = Style(grafted)
        self.graph = graphviz.Digraph(
            graph_attr={"rankdir": "TB", "fontname": FONT, "fontsize": "12", "nodesep": "0.3", "ranksep": "0.32",
                        "labelloc": "t", "bgcolor": "white", "pad": "0.2"},
            node_attr={"shape": "plain", "fontname": FONT, "fontsize": "11", "fontcolor": INK, "color": INK},
            edge_attr={"color": INK, "arrowsize": "0.6"},
        )  # fmt: skip

    def stack(self, name: str, patterns: list[Pattern], memory: str | None) -> str:
        """Draws consecutive layers with their input and output.

        Args:
            memory: the node that cross attention reads.

        Returns:
            The node of the output.
        """
        end = self.text(f"{name} input".strip())
        for pattern in patterns:
            if len(pattern) == 1:
                end = BlockDrawing(self.graph, pattern[0], self.style, memory).draw(self.graph, end)
                continue
            with self.graph.subgraph(name=self.style.new_name("cluster")) as outer:
                outer.attr(label=f"these {len(pattern)} in turn, {len(pattern[0].blocks)} times", labeljust="l",
                           style="rounded,dashed", color=MUTED, fontcolor=MUTED)  # fmt: skip
                for group in pattern:
                    end = BlockDrawing(self.graph, group, self.style, memory).draw(outer, end)
        output = self.text(f"{name} output".strip())
        self.graph.edge(end, output)
        return output

    def text(self, text: str) -> str:
        name = self.style.new_name("text")
        self.graph.node(name, label=text, shape="plaintext", fontcolor=MUTED)
        return name

    def finish(self, title: str, near_misses: int) -> graphviz.Digraph:
        """Adds the title, and a legend of the methods that were drawn."""
        cells = [f'<TD BGCOLOR="{PALE}" COLOR="{INK}"><FONT COLOR="{INK}">base model</FONT></TD>']
        for method, (line, fill) in METHODS.items():
            if method in self.style.drawn:
                text = method if self.style.grafted else f"location for {method}"
                look = f'BGCOLOR="{fill}"' if self.style.grafted else 'STYLE="dashed"'
                cells.append(f'<TD {look} COLOR="{line}"><FONT COLOR="{line}">{text}</FONT></TD>')
        cells.append(f'<TD BORDER="0"><FONT COLOR="{MUTED}">dashed arrows: residual connections</FONT></TD>')
        legend = f'<TABLE BORDER="0" CELLBORDER="1" CELLSPACING="6" CELLPADDING="4"><TR>{"".join(cells)}</TR></TABLE>'
        rows = [f'<FONT POINT-SIZE="16" COLOR="{INK}"><B>{text_of(title)}</B></FONT>', legend]
        if near_misses:
            missed = f"not taken: {near_misses} more (inspect says where and why)"
            rows.append(f'<FONT COLOR="{WARNING}">{missed}</FONT>')
        table = "".join(f"<TR><TD>{row}</TD></TR>" for row in rows)
        self.graph.attr(label=f'<<TABLE BORDER="0" CELLBORDER="0" CELLSPACING="0">{table}</TABLE>>')
        return self.graph
