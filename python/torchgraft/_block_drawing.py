"""Draws one Transformer layer, or a group of layers that look alike, for the picture of `inspect --svg`."""

import html
import textwrap
from collections.abc import Iterable
from typing import Any

import graphviz

from ._layers import ROLES, Group, Slot

INK, PALE, MUTED, PAPER = "#334155", "#eef2f6", "#64748b", "#fbfcfd"  # the base model
WARNING = "#b91c1c"
METHODS = {  # line colour, fill: as in docs/grafted_layer.svg
    "prefix": ("#0f766e", "#ccf0ea"),
    "LoRA": ("#c2570c", "#fde6d0"),
    "bottleneck": ("#6d28d9", "#e7defc"),
    "ReFT": ("#1d4ed8", "#dbe7fd"),
}
NOTE_WIDTH = 36  # columns

# For each kind of attention: title, slot of its prefix, beginning of its LoRA slots' names, location of its bottleneck.
_KINDS = {
    "self": ("self attention", "self_prefix", "selfattn_lora", "mh_adapter"),
    "encoder": ("self attention", "encoder_prefix", "selfattn_lora", "mh_adapter"),
    "cross": ("cross attention", "cross_prefix", "crossattn_lora", "cross_adapter"),
}
_MATRICES = {"query": "q", "key": "k", "value": "v"}
_FFN_LORA = {"ffn_in": "intermediate_lora", "ffn_out": "output_lora"}
# How the names of bottlenecks' slots continue after the location. "seq" also begins "seq_ln", which therefore comes
# first.
_WAYS = {"seq_ln": "sequential, reads the normed sum", "seq": "sequential", "par": "parallel"}

Edge = tuple[str, tuple[str, ...]]  # (the node or port of a box of projections, the roles of the projections)


class Style:
    """The style of a whole picture, and the methods drawn so far.

    Attributes:
        grafted: whether the picture shows grafted modules. False: it shows, dashed, the locations for them.
        drawn: the methods drawn so far, keys of METHODS.
    """

    def __init__(self, grafted: bool):
        self.grafted = grafted
        self.drawn: set[str] = set()
        self._names = 0

    def new_name(self, kind: str) -> str:
        self._names += 1
        return f"{kind}_{self._names}"

    def badge(self, method: str, title: str, detail: str = "") -> str:
        """Makes a cell for a grafted module, or for a location."""
        self.drawn.add(method)
        line, fill = METHODS[method]
        if self.grafted:
            return _cell(title, detail, line, fill)
        return _cell(title, detail, line, "white", ' STYLE="dashed"')


class BlockDrawing:
    """Draws one group as a cluster. A `node` is the name of a box, perhaps with one of its ports.

    Args:
        root: the whole graph, which gets the arrows between clusters.
        memory: the node that cross attention reads.
    """

    def __init__(self, root: graphviz.Digraph, group: Group, style: Style, memory: str | None):
        self.root, self.graph = root, root
        self.group, self.style, self.memory = group, style, memory
        self.slots = sorted(group.first.slots, key=lambda slot: slot.name)
        self.prefix = _common_prefix(group)
        self.column = style.new_name("column")  # the group of boxes that dot should put below each other

    def draw(self, parent: graphviz.Digraph, start: str) -> str:
        """Draws into `parent`, behind the node `start`; returns the last node."""
        with parent.subgraph(name=self.style.new_name("cluster")) as self.graph:
            self.graph.attr(label=self.label(), labeljust="l", style="rounded,filled", color=MUTED, fillcolor=PAPER,
                            margin="16")  # fmt: skip
            end = self.node("point", shape="point", width="0.05")
            self.root.edge(start, end, weight="4")
            for index in range(len(self.group.first.attentions)):
                end = self.feed_forward(index, self.attention(index, end))
        return end

    def attention(self, index: int, start: str) -> str:
        """Draws norm? -> q, k, v and attention -> output -> bottleneck? -> add -> norm?; returns the last node."""
        entry = self.group.first.attentions[index]
        source = self.norm(start) if entry["norm_order"] == "pre" else start
        core, projections = self.core(index)
        if entry["notes"]:  # beside the main path
            notes = self.style.new_name("notes")
            self.graph.node(notes, label=_note_text(entry["notes"]))
            self.graph.edge(core, notes, style="invis", weight="0")
        for port, roles in projections or [(core, ("query",))]:
            reads_memory = entry["kind"] == "cross" and roles != ("query",)
            if not reads_memory or "query" in roles:
                self.flow(source, port)
            if reads_memory and self.memory:
                self.root.edge(self.memory, port, style="bold", weight="0")
        end = core
        for out in self.boxes(index, ("output",)):
            self.flow(core, out)
            end = out
        location = _KINDS[entry["kind"]][3]
        return self.residual(entry["attention_residual"], entry["norm_order"], location, start, [end])

    def feed_forward(self, index: int, start: str) -> str:
        """Draws norm? -> in, beside the gate -> out -> bottleneck? -> add -> norm?; returns the last node."""
        entry = self.group.first.attentions[index]
        if not (entry["ffn_in"] or entry["ffn_out"] or entry["ffn_residual"]):
            return start
        source = self.norm(start) if entry["ffn_norm_order"] == "pre" else start
        ends = [source]
        for roles in (("ffn_gate", "ffn_in"), ("ffn_out",)):
            nodes = self.boxes(index, roles)
            for node in nodes:
                for end in ends:
                    self.flow(end, node)
            ends = nodes or ends
        end = self.residual(entry["ffn_residual"], entry["ffn_norm_order"], "output_adapter", start, ends)
        return self.reft(entry, end)

    def reft(self, entry: dict[str, Any], end: str) -> str:
        """Draws what changes the end of the layer, or the location for it; returns the last node."""
        cells = [self.style.badge("ReFT", f"ReFT, r = {slot.size}", slot.name.removeprefix("output_reft_"))
                 for slot in self.slots if slot.name.startswith("output_reft_")]  # fmt: skip
        if not self.style.grafted and "output_reft" in entry["locations"]:
            cells.append(self.style.badge("ReFT", "ReFT"))
        if not cells:
            return end
        node = self.box("reft", cells)
        self.flow(end, node)
        return node

    def residual(self, present: bool, order: str, location: str, start: str, ends: list[str]) -> str:
        """Draws the end of a branch, behind the nodes `ends`: sequential bottlenecks in it, parallel ones beside it,
        the add and the norm. Draws nothing without a residual connection. Returns the last node."""
        if not present:
            return ends[-1]
        here = [slot for slot in self.slots if slot.name.startswith(f"{location}_")]
        lines = [_bottleneck_lines(slot) for slot in here if not _is_parallel(slot)]
        if not self.style.grafted:
            lines = [("location for a bottleneck", location)]
        for title, detail in lines:
            node = self.box("bottleneck", [self.style.badge("bottleneck", title, detail)])
            for end in ends:
                self.flow(end, node)
            ends = [node]
        add = self.node("add", label="+", shape="circle", width="0.24", fixedsize="true", fontsize="13")
        for end in ends:
            self.flow(end, add)
        for slot in filter(_is_parallel, here):
            cell = self.style.badge("bottleneck", *_bottleneck_lines(slot))
            node = self.style.new_name("bottleneck")  # not in the column
            self.graph.node(node, label=_row([cell]))
            self.graph.edge(start, node, color=METHODS["bottleneck"][0])
            self.graph.edge(node, add, color=METHODS["bottleneck"][0])
        self.graph.edge(start, add, color=MUTED, weight="0", style="dashed")
        return self.norm(add) if order == "post" else add

    # Boxes

    def node(self, kind: str, **look: str) -> str:
        """Adds a node to the main path."""
        name = self.style.new_name(kind)
        self.graph.node(name, group=self.column, **look)
        return name

    def box(self, kind: str, cells: Iterable[str]) -> str:
        return self.node(kind, label=_row(cells))

    def norm(self, start: str) -> str:
        name = self.box("norm", [_cell("norm")])
        self.flow(start, name)
        return name

    def boxes(self, index: int, roles: tuple[str, ...]) -> list[str]:
        """Draws a box for each linear map of these roles; returns the nodes."""
        return [self.box("projection", cells) for cells, _ in self.projections(index, roles)]

    def core(self, index: int) -> tuple[str, list[Edge]]:
        """Draws an attention with its q, k and v above it, in one node, so that they keep their order. Returns the
        node, and the ports of q, k and v."""
        entry = self.group.first.attentions[index]
        title, location, _, _ = _KINDS[entry["kind"]]
        heads = f"{entry['num_heads']} heads of {entry['head_dim']}" if entry["num_heads"] else "not recognised"
        if entry["num_kv_heads"] != entry["num_heads"]:
            heads += f", {entry['num_kv_heads']} for keys and values"
        cells = [_cell(title, heads + (", masked" if entry["attention_mask"] else ""))]
        cells += [self.style.badge("prefix", _with_gate(f"prefix of {slot.size}", slot))
                  for slot in self.slots if slot.name == location]  # fmt: skip
        if not self.style.grafted and location in entry["locations"]:
            cells.append(self.style.badge("prefix", "prefix"))
        # Keys and values come from the encoder, which stands on the left: they stay on the left.
        order = ("key", "value", "query") if entry["kind"] == "cross" else ("query", "key", "value")
        projections = self.projections(index, order)
        upper = "".join(f'<TD PORT="{roles[0]}">{_table(inner)}</TD>' for inner, roles in projections)
        upper = f'<TR><TD><TABLE BORDER="0" CELLSPACING="0" CELLPADDING="6"><TR>{upper}</TR></TABLE></TD></TR>'
        lower = f"<TR><TD>{_table(cells)}</TD></TR>"
        label = f'<<TABLE BORDER="1" STYLE="rounded" COLOR="{MUTED}" CELLBORDER="0" CELLSPACING="2" CELLPADDING="2">'
        core = self.node("attention", label=f"{label}{upper if projections else ''}{lower}</TABLE>>")
        return core, [(f"{core}:{roles[0]}:n", roles) for _, roles in projections]

    def projections(self, index: int, roles: tuple[str, ...]) -> list[tuple[list[str], tuple[str, ...]]]:
        """Returns the cells of each linear map, its own and those of its LoRAs, and the roles of the map. Projections
        that share a weight are one map."""
        entry = self.group.first.attentions[index]
        maps: dict[str, list[str]] = {}  # path -> roles; a constant has no path, and its role is the key
        for role in roles:
            if entry[role] is not None:
                maps.setdefault(self.group.path(index, role) or role, []).append(role)
        result = []
        for path, members in maps.items():
            names = ", ".join(member.replace("ffn_", "FFN ") for member in members)
            cells = [_cell(names, path.removeprefix(self.prefix) if entry[members[0]]["path"] else "a constant")]
            for member in members:
                cells += self.lora(entry, member, f" on {member.removeprefix('ffn_')}" if len(members) > 1 else "")
            result.append((cells, tuple(members)))
        return result

    def lora(self, entry: dict[str, Any], role: str, where: str) -> list[str]:
        """Makes the LoRA badges of one projection. `where` names it in a box of several projections."""
        location = name = _FFN_LORA.get(role, "")
        if role in _MATRICES:
            location, name = "selfattn_lora", f"{_KINDS[entry['kind']][2]}_{_MATRICES[role]}"
        badges = [self.style.badge("LoRA", _with_gate(f"LoRA{where}, r = {slot.size}", slot))
                  for slot in self.slots if slot.name == name]  # fmt: skip
        if not self.style.grafted and location in entry["locations"]:
            badges.append(self.style.badge("LoRA", f"LoRA{where}"))
        return badges

    def flow(self, start: str, end: str) -> None:
        """Draws an arrow of the main path."""
        self.graph.edge(start, end, weight="4")

    def label(self) -> str:
        """Returns HTML: which layers the group holds, and the common path of their modules."""
        blocks = self.group.blocks
        count = f" ({len(blocks)} alike)" if len({block.number for block in blocks}) > 1 else ""
        lines = [f'<FONT POINT-SIZE="13" COLOR="{INK}"><B>{text_of(self.group.label)}</B>{count}</FONT>']
        if self.prefix:
            lines.append(f'<FONT POINT-SIZE="9" COLOR="{MUTED}">in {text_of(self.prefix.rstrip("."))}</FONT>')
        return f"<{_left(lines)}>"


def text_of(text: str) -> str:
    """Escapes text for HTML labels, in which Graphviz still substitutes \\N and the like."""
    return html.escape(text).replace("\\", "\\\\")


def _cell(title: str, detail: str = "", line: str = INK, fill: str = PALE, look: str = "") -> str:
    text = f'<FONT COLOR="{line}">{text_of(title)}</FONT>'
    if detail:
        small = MUTED if line == INK else line
        text += f'<BR/><FONT POINT-SIZE="9" COLOR="{small}">{text_of(detail)}</FONT>'
    return f'<TD BORDER="1" BGCOLOR="{fill}" COLOR="{line}"{look}>{text}</TD>'


def _note_text(notes: Iterable[str]) -> str:
    """Returns HTML with the notes: what was not found, and why."""
    lines = [text_of(line) for note in notes for line in textwrap.wrap(note, NOTE_WIDTH)]
    return f'<<FONT POINT-SIZE="9" COLOR="{WARNING}">{_left(lines)}</FONT>>'


def _left(lines: Iterable[str]) -> str:
    return "".join(f'{line}<BR ALIGN="LEFT"/>' for line in lines)


def _table(cells: Iterable[str]) -> str:
    return f'<TABLE BORDER="0" CELLSPACING="2" CELLPADDING="4"><TR>{"".join(cells)}</TR></TABLE>'


def _row(cells: Iterable[str]) -> str:
    return f"<{_table(cells)}>"


def _is_parallel(slot: Slot) -> bool:
    return "_adapter_par_" in slot.name


def _bottleneck_lines(slot: Slot) -> tuple[str, str]:
    """Returns title and detail of a bottleneck: "bottleneck of 48, gated", "parallel, relu" for
    output_adapter_par_relu."""
    suffix = slot.name.partition("_adapter_")[2]
    way = next(way for way in _WAYS if suffix.startswith(f"{way}_"))
    return _with_gate(f"bottleneck of {slot.size}", slot), f"{_WAYS[way]}, {suffix.removeprefix(f'{way}_')}"


def _with_gate(text: str, slot: Slot) -> str:
    return f"{text}, gated" if slot.gated else text


def _common_prefix(group: Group) -> str:
    """Returns the longest common beginning, up to a dot, of the paths of a block's modules."""
    paths = [group.path(index, role).split(".")[:-1] for index, entry in enumerate(group.first.attentions)
             for role in ROLES if entry[role] is not None and entry[role]["path"]]  # fmt: skip
    common = []
    for column in zip(*paths, strict=False):
        if len(set(column)) > 1:
            break
        common.append(column[0] + ".")
    return "".join(common)
