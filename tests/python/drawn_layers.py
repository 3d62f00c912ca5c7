"""Draws Transformers of two layers in two spellings of one mathematics: a plain one, and an odd one that writes in
place, through views, with out=, in other orders and shapes."""

import importlib.util
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

# A step in its plain spelling and in odd ones. Each spelling is a block of lines; `x`, `mask` [B, T], `q`, `k`, `v`
# [B, 4, T, 8], `s` (scores), `p` (probabilities), `c` (context), `y` (branch) are the names they read and write.
_PROJECT = [
    (
        "q, k, v = self.q(x), self.k(x), self.v(x)",
        [
            "q, k, v = F.linear(x, self.q.weight, self.q.bias), self.k(x), x @ self.v.weight.t() + self.v.bias",
            "q, k, v = self.q(x), torch.matmul(x, self.k.weight.t()).add_(self.k.bias), self.v(x)",
            "q = torch.addmm(self.q.bias, x.view(-1, 32), self.q.weight.t()).view(x.size(0), x.size(1), 32)\n"
            "k, v = self.k(x), self.v(x)",
            "qkv = F.linear(x, torch.cat([self.q.weight, self.k.weight, self.v.weight]),\n"
            "               torch.cat([self.q.bias, self.k.bias, self.v.bias]))\n"
            "q, k, v = qkv.chunk(3, dim=-1)",
        ],
    ),
]
_SPLIT = [
    (
        "q = q.view(x.size(0), x.size(1), 4, 8).transpose(1, 2)\n"
        "k = k.view(x.size(0), x.size(1), 4, 8).transpose(1, 2)\n"
        "v = v.view(x.size(0), x.size(1), 4, 8).transpose(1, 2)",
        [
            "q, k, v = [t.reshape(x.size(0), -1, 4, 8).permute(0, 2, 1, 3) for t in [q, k, v]]",
            "q = q.unflatten(-1, (4, 8)).transpose(2, 1).contiguous()\n"
            "k = k.unflatten(-1, (4, 8)).transpose(-2, -3)\n"
            "v = v.reshape(x.size(0), -1, 4, 8).permute(0, 2, 1, 3)",
            "q = q.view(x.shape[0], x.shape[1], 4, 8).permute(0, 2, 1, 3)\n"
            "k = torch.stack(k.split(8, dim=-1), dim=1)\n"
            "v = v.unflatten(2, (4, 8)).swapaxes(1, 2)",
        ],
    ),
]
_CHANGE = [
    ("", []),
    ("", []),
    # Of some columns: a scale of all keys is a scale of the scores, also of those of prefixes.
    (
        "k = torch.cat([k[..., :4] * 1.5, k[..., 4:]], -1)",
        [
            "k[..., :4] *= 1.5",
            "k = k.contiguous()\nk.narrow(-1, 0, 4).mul_(1.5)",
            "k.detach()[..., :4].mul_(1.5)",
            "w = k.transpose(1, 2)[:, :, :, :4]\nw *= 1.5",
        ],
    ),
    (
        "q = torch.cat([q[:, :, :2] * 2.0, q[:, :, 2:]], 2)",
        [
            "q[:, :, :2] *= 2.0",
            "q = q.clone()\nq[:, :, :2] = q[:, :, :2] * 2.0",
            "q = q.contiguous()\nq.narrow(2, 0, 2).mul_(2.0)",
        ],
    ),
    ("v = torch.cat([v[:, :1] + 1.0, v[:, 1:]], 1)", ["v.select(1, 0).add_(1.0)", "v[:, 0] += 1.0"]),
]
_SCORES = [
    (
        "s = torch.matmul(q, k.transpose(-1, -2)) / 2.5",
        [
            "s = (q / 2.5) @ k.transpose(2, 3)",
            "s = torch.einsum('bhid,bhjd->bhij', q, k).div_(2.5)",
            "s = (q @ k.permute(0, 1, 3, 2)).mul(0.4)",
            "s = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)).view(-1, 4, q.size(2), k.size(2)) / 2.5",
            "s = torch.matmul(q * 0.5, k.transpose(-1, -2) * 0.8)",
            "s = q @ k.transpose(-1, -2)\ns /= 2.5",
            "s = torch.empty(q.size(0), 4, q.size(2), k.size(2))\n"
            "torch.matmul(q, k.transpose(-1, -2), out=s)\ns = s / 2.5",
        ],
    ),
]
_HIDDEN = "(mask == 0)[:, None, None, :]"
_MASK = [
    ("", []),
    (
        f"s = s.masked_fill({_HIDDEN}, -1e9)",
        [
            f"s.masked_fill_({_HIDDEN}, -1e9)",
            f"s = s + {_HIDDEN}.float() * -1e9",
            f"s.add_({_HIDDEN}.float().mul(-1e9))",
            f"s = torch.where({_HIDDEN}, -1e9, s)",
            "s += torch.zeros(mask.shape).masked_fill(mask == 0, -1e9)[:, None, None, :]",
        ],
    ),
    (
        "s = s + torch.ones(x.size(1), x.size(1)).triu(1) * -1e9",
        [
            "for i in range(x.size(1)):\n    s[:, :, i, i + 1:] = -1e9",
            "s = s.masked_fill(torch.ones(x.size(1), x.size(1)).triu(1) > 0, -1e9)",
            "s.masked_fill_(torch.ones(x.size(1), x.size(1), dtype=torch.bool).triu(1), -1e9)",
        ],
    ),
]
_NO_MASK = [  # what these fill in takes part
    (f"s = s.masked_fill({_HIDDEN}, 0.0)", [f"s.masked_fill_({_HIDDEN}, 0.0)", f"s = torch.where({_HIDDEN}, 0.0, s)"]),
    (
        "s = torch.where(s > 0, s, 0.1 * s)",
        ["s = F.leaky_relu(s, 0.1)", "s = s.masked_fill(s <= 0, 0.0) + 0.1 * s.clamp(max=0.0)"],
    ),
    (
        "s = torch.cat([torch.full_like(s[..., :1], 0.3), s[..., 1:]], -1)",
        ["s[..., 0] = 0.3", "s.select(-1, 0).fill_(0.3)"],
    ),
    ("s = s + 0.1", ["s += 0.1", "s = s.add(0.1)"]),
    ("s = s.tanh() * 3.0", ["s = 3.0 * torch.tanh(s)", "s.tanh_().mul_(3.0)"]),
]
_SOFTMAX = [
    (
        "p = s.softmax(-1)",
        [
            "p = F.softmax(s, dim=3)",
            "p = torch.softmax(s.double(), -1).type_as(s)",
            "p = F.dropout(s.softmax(-1), 0.1, training=False)",
            "p = s.log_softmax(-1).exp()",
            "e = (s - s.amax(-1, keepdim=True)).exp()\np = e / e.sum(-1, keepdim=True)",
        ],
    ),
]
_MIX = [
    (
        "c = torch.matmul(p, v).transpose(1, 2).reshape(x.size(0), x.size(1), 32)",
        [
            "c = (p @ v).permute(0, 2, 1, 3).flatten(2)",
            "c = torch.einsum('bhij,bhjd->bihd', p, v).reshape(x.size(0), -1, 32)",
            "c = torch.bmm(p.flatten(0, 1), v.flatten(0, 1)).view(x.size(0), 4, -1, 8).transpose(1, 2).flatten(2, 3)",
            "c = torch.cat(torch.matmul(p, v).unbind(1), -1)",
        ],
    ),
]
_RESIDUAL = [
    (
        "x = self.n1(x + self.o(c))",
        [
            "x = self.n1(self.o(c) + x)",
            "y = self.o(c)\ny += x\nx = self.n1(y)",
            "x = F.layer_norm(torch.add(x, self.o(c), alpha=1), [32], self.n1.weight, self.n1.bias)",
            "x = self.n1((x + c @ self.o.weight.t()) + self.o.bias)",
            "x = x + self.o(c)\nm = x.mean(-1, keepdim=True)\n"
            "x = (x - m) / torch.sqrt(((x - m) ** 2).mean(-1, keepdim=True) + 1e-5) * self.n1.weight + self.n1.bias",
        ],
    ),
    (
        "x = self.n1(x + 0.5 * self.o(c))",
        ["x = self.n1(torch.add(x, self.o(c), alpha=0.5))", "x = self.n1(x + self.o(c).mul_(0.5))"],
    ),
]
_FEED_FORWARD = [
    (
        "x = self.n2(x + self.f2(F.gelu(self.f1(x))))",
        [
            "x = self.n2(self.f2(F.gelu(F.linear(x, self.f1.weight, self.f1.bias))) + x)",
            "h = self.f1(x)\nh = 0.5 * h * (1.0 + torch.erf(h / 1.4142135623730951))\nx = self.n2(x + self.f2(h))",
            "y = x.clone()\ny.add_(self.f2(F.gelu(self.f1(x))))\nx = self.n2(y)",
        ],
    ),
    (
        "x = self.n2(x + self.f2(torch.relu(self.f1(x))))",
        ["x = self.n2(x + self.f2(self.f1(x).relu_()))", "x = self.n2(self.f2(self.f1(x).clamp(min=0)) + x)",
         "h = self.f1(x)\nF.relu(h, inplace=True)\nx = self.n2(x + self.f2(h))"],
    ),
]  # fmt: skip
_STEPS = [_PROJECT, _SPLIT, _CHANGE, _SCORES, _MASK, _SOFTMAX, _MIX, _RESIDUAL, _FEED_FORWARD]
_RARE = {4: _NO_MASK}  # instead of the step of that index, in one of five modules

_MODULE = """
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = [nn.Linear(32, 32) for _ in range(4)]
        self.f1, self.f2, self.n1, self.n2 = nn.Linear(32, 64), nn.Linear(64, 32), nn.LayerNorm(32), nn.LayerNorm(32)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
{body}
        return x


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.first, self.second = nn.Embedding(50, 32), Layer(), Layer()

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.second(self.first(self.words(ids), mask), mask)
"""


@dataclass
class Pair:
    """Two modules with the same weights that compute the same."""

    plain: nn.Module
    odd: nn.Module
    source: str  # of the odd layer's forward


def _module(name: str, lines: list[str], folder: Path) -> nn.Module:
    body = "\n".join("        " + line for block in lines for line in block.splitlines())
    path = folder / f"{name}.py"
    path.write_text(_MODULE.format(body=body))
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    return module.Model().eval()


def draw(seed: int, folder: Path) -> Pair:
    """The pair of `seed`; its sources are written to `folder`, which TorchScript reads."""
    generator = random.Random(seed)
    plain, odd = [], []
    changes = generator.sample(range(len(_STEPS)), 3)  # few odd steps: with many, most pairs are refused
    for index, step in enumerate(_STEPS):
        is_rare = index in _RARE and generator.random() < 0.2
        spelling, others = generator.choice(_RARE[index] if is_rare else step)
        plain.append(spelling)
        odd.append(generator.choice(others) if others and index in changes else spelling)
    return Pair(_module(f"plain_{seed}", plain, folder), _module(f"odd_{seed}", odd, folder), "\n".join(odd))


def inputs() -> tuple[Tensor, Tensor]:
    mask = torch.ones(3, 6, dtype=torch.long)
    mask[1, 4:] = 0
    return torch.randint(50, (3, 6), generator=torch.Generator().manual_seed(1)), mask
