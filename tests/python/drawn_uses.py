"""Draws Transformers of two layers whose weights have several uses: packed, tied, sliced, shared by layers, read beside
the attention or by another method, with heads at once or one by one. Each comes with its restatement in plain PyTorch,
to which LoRAs are added by their formula."""

import importlib.util
import random
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

HIDDEN = 32
MATRICES = "qkv"
Update = Mapping[tuple[int, str], tuple[Tensor, Tensor]]  # (layer, matrix) -> A [r, in], and B [out, r] times alpha / r

# How queries, keys and values are projected: what __init__ makes, and the lines of forward. {q} stands for what a LoRA
# on q adds, {k} and {v} likewise.
_SEPARATE = "self.q, self.k, self.v = [nn.Linear(32, 32) for _ in range(3)]"
_PROJECTIONS = {
    "separate": (_SEPARATE, "q, k, v = self.q(x){q}, self.k(x){k}, self.v(x){v}"),
    "packed": (
        "self.qkv = nn.Linear(32, 96)",
        "q, k, v = self.qkv(x).chunk(3, -1)\nq, k, v = q{q}, k{k}, v{v}",
    ),
    "tied": (_SEPARATE + "\nself.k.weight = self.v.weight", "q, k, v = self.q(x){q}, self.k(x){k}, self.v(x){v}"),
    "sliced": (
        "self.big = nn.Parameter(torch.randn(96, 32) / 6)",
        "q, k, v = F.linear(x, self.big[:32]){q}, F.linear(x, self.big[32:64]){k}, F.linear(x, self.big[64:]){v}",
    ),
    "one map": (_SEPARATE, "q = self.q(x){q}{k}\nk, v = q, self.v(x){v}"),
}
# What else reads a weight: the line, by projection, and whose LoRA has that weight. The same map of the same input is
# one map, whichever way it is written: there a LoRA acts in both places, as the library's does.
_BESIDE = {
    "separate": [
        ("x = x + torch.tanh(self.v(x.flip(1)))", "v"),
        ("x = x + x @ self.q.weight.t() / 4", "q"),
        ("x = x * self.k.weight.mean()", "k"),
        ("x = x + torch.cat([self.v(x[:, :3]), self.v(x[:, 3:]) * 2.0], 1) / 4", "v"),
    ],
    "packed": [("x = x + self.qkv(x.flip(1))[..., 64:] / 4", "qkv"), ("x = x + x @ self.qkv.weight[:32].t() / 4", "q")],
    "tied": [("x = x + self.q(x.flip(1)) / 4", "q"), ("x = x + (self.q(x){q}) / 4", "")],
    "sliced": [("x = x + x @ self.big[64:].t() / 4", "v"), ("x = x * self.big.mean()", "qkv")],
    "one map": [("x = x + torch.tanh(self.q(x.flip(1)))", "qk"), ("x = x + torch.tanh(self.q(x){q}{k})", "")],
}
_AT_ONCE = """\
q = q.view(x.size(0), x.size(1), 4, 8).transpose(1, 2)
k = k.reshape(x.size(0), x.size(1), 4, 8).transpose(1, 2)
v = v.reshape(x.size(0), x.size(1), 4, 8).transpose(1, 2)
c = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)"""
_ONE_BY_ONE = """\
heads = []
for h in range(4):
    a, b, w = q[..., 8 * h:8 * h + 8], k[..., 8 * h:8 * h + 8], v[..., 8 * h:8 * h + 8]
    heads.append(torch.softmax(a @ b.transpose(-1, -2) / 8 ** 0.5, -1) @ w)
c = torch.cat(heads, -1)"""

_MODULE = """
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        {init}
        self.out = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        {forward}
        return x


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Layer(), Layer()
        {shared}

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))
{method}
"""
_METHOD = """
    @torch.jit.export
    def encode(self, x: Tensor) -> Tensor:
        return self.first.v(x)
"""


@dataclass
class Drawn:
    """base: the module. reference: it with LoRAs, see with_updates(). uses: the (layer, matrix) whose LoRA cannot be
    merged, because its weight has another use. may_refuse: whether merging may be refused besides. source: of both."""

    base: nn.Module
    reference: nn.Module
    uses: set[tuple[int, str]]
    may_refuse: bool
    is_script: bool
    source: str

    def with_updates(self, x: Tensor, *updates: Update) -> Tensor:
        for number, layer in enumerate((self.reference.first, self.reference.second)):
            layer.updates, layer.number = updates, number
        return self.reference(x)


def _add(self: nn.Module, matrix: str, x: Tensor) -> Tensor:
    """What all LoRAs on one matrix add."""
    result = torch.zeros(x.size(0), x.size(1), HIDDEN, dtype=x.dtype)
    for update in self.updates:
        if (self.number, matrix) in update:
            a, b = update[self.number, matrix]
            result = result + x @ a.t() @ b.t()
    return result


def _module(name: str, folder: Path, **parts: str) -> nn.Module:
    indented = {key: text.replace("\n", "\n        ") for key, text in parts.items() if key != "method"}
    path = folder / f"{name}.py"
    path.write_text(_MODULE.format(**indented, method=parts["method"]))
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    return module.Model().double().eval()


def draw(seed: int, folder: Path) -> Drawn:
    """The model of `seed`; its sources are written to `folder`, which TorchScript reads."""
    generator = random.Random(seed)
    kind = generator.choice(list(_PROJECTIONS))
    init, projected = _PROJECTIONS[kind]
    uses = {(layer, matrix) for layer in range(2) for matrix in "kv" if kind == "tied"}
    beside = ""
    if generator.random() < 0.4:
        beside, matrices = generator.choice(_BESIDE[kind])
        uses |= {(layer, matrix) for layer in range(2) for matrix in matrices}
    is_script = generator.random() < 0.5
    shared = method = ""
    has_v = kind in ("separate", "one map")
    if has_v and generator.random() < 0.25:
        shared = "self.second.v = self.first.v"
        uses |= {(0, "v"), (1, "v")}
    if has_v and is_script and generator.random() < 0.25:
        method = _METHOD
        uses |= {(0, "v"), (1, "v")} if shared else {(0, "v")}
    heads = _ONE_BY_ONE if generator.random() < 0.15 else _AT_ONCE
    lines = "\n".join(["y = x", projected, heads, *filter(None, [beside]), "x = x + self.out(c)"])
    plain = lines.format(q="", k="", v="")
    added = lines.format(**{matrix: f" + self.add('{matrix}', x)" for matrix in MATRICES})
    base = _module(f"uses_{seed}", folder, init=init, forward=plain, shared=shared, method=method)
    reference = _module(f"uses_{seed}_added", folder, init=init, forward=added, shared=shared, method="")
    for layer in {reference.first, reference.second}:
        type(layer).add = _add
    reference.load_state_dict(base.state_dict())
    return Drawn(base, reference, uses, kind == "sliced", is_script, f"{init}\n{plain}\n{shared}{method}")


def inputs(seed: int = 3) -> Tensor:
    return torch.randn(3, 6, HIDDEN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
