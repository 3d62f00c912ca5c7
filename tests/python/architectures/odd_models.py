"""Transformers as people write them by hand, for torch.jit.script: what plain_models.py computes, spelled otherwise.

Every class takes its weights from a plain one. Hidden states [B, S, H]; masks [B, S] int64 with 1 = real token.
"""

import math
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plain_models import PlainAttention, PlainFeedForward, PlainLayer, PlainTransformer


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Optional[Tensor], causal: bool) -> Tensor:
    """Attention in a free function; q, k, v [B, h, S, d]."""
    scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(q.size(-1))
    if mask is not None:
        scores = scores.masked_fill((mask == 0)[:, None, None, :], -1e9)
    if causal:
        later = torch.ones([q.size(2), k.size(2)], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
    return torch.matmul(torch.softmax(scores, dim=-1), v)


def heads_of(x: Tensor, width: int) -> Tensor:
    """[B, S, h d] -> [B, h, S, d]."""
    return x.view(x.size(0), x.size(1), -1, width).transpose(1, 2)


class HelperAttention(nn.Module):
    def __init__(self, plain: PlainAttention):
        super().__init__()
        self.width = plain.shape.head_size()
        self.q, self.k, self.v, self.o = plain.q, plain.k, plain.v, plain.o

    def forward(self, x: Tensor, mask: Optional[Tensor]) -> Tensor:
        width = self.width
        q, k, v = heads_of(self.q(x), width), heads_of(self.k(x), width), heads_of(self.v(x), width)
        return self.o(attend(q, k, v, mask, False).transpose(1, 2).flatten(2))


class EinsumAttention(nn.Module):
    """Projections by 3-D weights [H, h, d], scores, mixing and output all by einsum."""

    def __init__(self, plain: PlainAttention):
        super().__init__()
        heads, width = plain.shape.heads, plain.shape.head_size()

        def spread(linear: nn.Linear) -> nn.Parameter:
            return nn.Parameter(linear.weight.detach().t().reshape(-1, heads, width).contiguous())

        self.w_q, self.w_k, self.w_v = spread(plain.q), spread(plain.k), spread(plain.v)
        self.w_o = nn.Parameter(plain.o.weight.detach().t().reshape(heads, width, -1).contiguous())

    def forward(self, x: Tensor, mask: Optional[Tensor]) -> Tensor:
        q = torch.einsum("bsi,ihd->bhsd", x, self.w_q)
        k = torch.einsum("bsi,ihd->bhsd", x, self.w_k)
        v = torch.einsum("bsi,ihd->bhsd", x, self.w_v)
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * (q.size(3) ** -0.5)
        if mask is not None:
            scores = scores + (1 - mask)[:, None, None, :].to(scores.dtype) * -1e9
        mixed = torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), v)
        return torch.einsum("bhqd,hdo->bqo", mixed, self.w_o)


class EinsumScoresAttention(nn.Module):
    """Linear projections; heads stay third: [B, S, h, d]."""

    def __init__(self, plain: PlainAttention):
        super().__init__()
        self.heads = plain.shape.heads
        self.q, self.k, self.v, self.o = plain.q, plain.k, plain.v, plain.o

    def forward(self, x: Tensor, mask: Optional[Tensor]) -> Tensor:
        b, s, h = x.shape
        q = self.q(x).view(b, s, self.heads, h // self.heads)
        k = self.k(x).view(b, s, self.heads, h // self.heads)
        v = self.v(x).view(b, s, self.heads, h // self.heads)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(h // self.heads)
        if mask is not None:
            scores = scores.masked_fill(mask[:, None, None, :] == 0, -10000.0)
        return self.o(torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).reshape(b, s, h))


class PackedAttention(nn.Module):
    """view(B, S, 3, h, d).permute(2, 0, 3, 1, 4) and unbind, as in ViT repositories."""

    def __init__(self, plain: PlainAttention):
        super().__init__()
        linears = (plain.q, plain.k, plain.v)
        hidden = plain.shape.hidden
        self.heads, self.scale = plain.shape.heads, plain.shape.head_size() ** -0.5
        self.qkv, self.proj = nn.Linear(hidden, 3 * hidden), plain.o
        with torch.no_grad():
            self.qkv.weight.copy_(torch.cat([linear.weight for linear in linears]))
            self.qkv.bias.copy_(torch.cat([linear.bias for linear in linears]))

    def forward(self, x: Tensor, mask: Optional[Tensor]) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        attn = (q * self.scale) @ k.transpose(-2, -1)
        if mask is not None:
            attn = attn + torch.where(mask == 0, -1e9, 0.0)[:, None, None, :]
        return self.proj((attn.softmax(dim=-1) @ v).transpose(1, 2).reshape(b, n, c))


class MatrixAttention(nn.Module):
    """x @ w + b with w [in, out] for q, k and v; x @ w.t() for the output."""

    def __init__(self, plain: PlainAttention):
        super().__init__()
        self.width = plain.shape.head_size()
        self.w = nn.ParameterList(
            nn.Parameter(linear.weight.detach().t().contiguous()) for linear in (plain.q, plain.k, plain.v)
        )
        self.b = nn.ParameterList(nn.Parameter(linear.bias.detach().clone()) for linear in (plain.q, plain.k, plain.v))
        self.w_out, self.b_out = nn.Parameter(plain.o.weight.detach()), nn.Parameter(plain.o.bias.detach())

    def forward(self, x: Tensor, mask: Optional[Tensor]) -> Tensor:
        q = heads_of(x @ self.w[0] + self.b[0], self.width)
        k = heads_of(torch.matmul(x, self.w[1]) + self.b[1], self.width)
        v = heads_of(x.matmul(self.w[2]) + self.b[2], self.width)
        return attend(q, k, v, mask, False).transpose(1, 2).flatten(2) @ self.w_out.t() + self.b_out


class RotaryAttention(nn.Module):
    """Causal, rotary, with fewer key and value heads; angles computed on the spot."""

    def __init__(self, plain: PlainAttention):
        super().__init__()
        self.heads, self.kv_heads, self.width = plain.shape.heads, plain.shape.kv_heads, plain.shape.head_size()
        self.wq, self.wk, self.wv, self.wo = plain.q, plain.k, plain.v, plain.o

    def rotated(self, x: Tensor) -> Tensor:
        half = self.width // 2
        frequencies = torch.pow(100.0, -torch.arange(half, device=x.device, dtype=x.dtype) / half)
        angles = torch.outer(torch.arange(x.size(2), device=x.device, dtype=x.dtype), frequencies)
        angles = torch.cat([angles, angles], dim=-1)
        first, second = x.chunk(2, dim=-1)
        return x * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()

    def forward(self, x: Tensor, mask: Optional[Tensor]) -> Tensor:
        b, s, _ = x.shape
        q = self.rotated(self.wq(x).view(b, s, self.heads, self.width).transpose(1, 2))
        k = self.rotated(self.wk(x).view(b, s, self.kv_heads, self.width).transpose(1, 2))
        v = self.wv(x).view(b, s, self.kv_heads, self.width).transpose(1, 2)
        groups = self.heads // self.kv_heads
        k = k[:, :, None].expand(b, self.kv_heads, groups, s, self.width).reshape(b, self.heads, s, self.width)
        v = v[:, :, None].expand(b, self.kv_heads, groups, s, self.width).reshape(b, self.heads, s, self.width)
        return self.wo(attend(q, k, v, mask, True).transpose(1, 2).flatten(2))


class HandLayerNorm(nn.Module):
    def __init__(self, plain: nn.LayerNorm):
        super().__init__()
        self.scale, self.shift, self.eps = plain.weight, plain.bias, plain.eps

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + self.eps) * self.scale + self.shift


class HandRmsNorm(nn.Module):
    def __init__(self, plain: nn.RMSNorm):
        super().__init__()
        self.scale, self.eps = plain.weight, float(plain.eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * (x * torch.rsqrt((x * x).mean(dim=-1, keepdim=True) + self.eps))


class OddFeedForward(nn.Module):
    def __init__(self, plain: PlainFeedForward):
        super().__init__()
        self.fc1, self.fc2 = plain.up, plain.down

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class MatrixFeedForward(nn.Module):
    """torch.addmm on flattened rows."""

    def __init__(self, plain: PlainFeedForward):
        super().__init__()
        self.w1, self.w2 = (nn.Parameter(linear.weight.detach().t().contiguous()) for linear in (plain.up, plain.down))
        self.b1, self.b2 = plain.up.bias, plain.down.bias

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.addmm(self.b1, x.reshape(-1, x.size(-1)), self.w1)
        return torch.addmm(self.b2, F.gelu(inner), self.w2).view(x.size(0), x.size(1), -1)


class SwigluFeedForward(nn.Module):
    def __init__(self, plain: PlainFeedForward):
        super().__init__()
        self.w1, self.w3, self.w2 = plain.gate, plain.up, plain.down

    def forward(self, x: Tensor) -> Tensor:
        gate = self.w1(x)
        return self.w2(gate * torch.sigmoid(gate) * self.w3(x))


class OddLayer(nn.Module):
    def __init__(self, plain: PlainLayer, attention: type, norm: Optional[type], ffn: type):
        super().__init__()
        self.attn, self.ff = attention(plain.attention), ffn(plain.ffn)
        self.ln1 = norm(plain.norm) if norm is not None else plain.norm
        self.ln2 = nn.Identity() if plain.ffn_norm is None else norm(plain.ffn_norm) if norm else plain.ffn_norm
        self.norm_first, self.parallel = plain.shape.norm_first, plain.shape.parallel

    def forward(self, x: Tensor, mask: Optional[Tensor]) -> Tensor:
        if self.parallel:
            h = self.ln1(x)
            return x + self.attn(h, mask) + self.ff(h)
        if self.norm_first:
            x = x + self.attn(self.ln1(x), mask)
            return self.ff(self.ln2(x)) + x
        x = self.ln1(x + self.attn(x, mask))
        return self.ln2(self.ff(x) + x)


class OddEncoder(nn.Module):
    """Layers in a loop over a ModuleList."""

    def __init__(
        self, plain: PlainTransformer, attention: type, norm: Optional[type] = None, ffn: type = OddFeedForward
    ):
        super().__init__()
        self.blocks = nn.ModuleList(OddLayer(layer, attention, norm, ffn) for layer in plain.layers)

    def forward(self, x: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        for block in self.blocks:
            x = block(x, mask)
        return x


class SharedEncoder(nn.Module):
    """One set of weights, run again and again by a real loop."""

    runs: int

    def __init__(self, plain: PlainTransformer):
        super().__init__()
        self.block = OddLayer(plain.layers[0], HelperAttention, None, OddFeedForward)
        self.runs = len(plain.shape.order)

    def forward(self, x: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        for _ in range(self.runs):
            x = self.block(x, mask)
        return x


class GroupsEncoder(nn.Module):
    """Two sets of weights, each run twice."""

    def __init__(self, plain: PlainTransformer):
        super().__init__()
        self.groups = nn.ModuleList(OddLayer(each, PackedAttention, None, OddFeedForward) for each in plain.layers)

    def forward(self, x: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        for group in self.groups:
            for _ in range(2):
                x = group(x, mask)
        return x


class SiameseEncoder(nn.Module):
    """One encoder on two inputs: what a bi-encoder exports."""

    def __init__(self, plain: PlainTransformer):
        super().__init__()
        self.tower = OddEncoder(plain, HelperAttention)

    def forward(self, first: Tensor, first_mask: Tensor, second: Tensor, second_mask: Tensor) -> tuple[Tensor, Tensor]:
        return self.tower(first, first_mask), self.tower(second, second_mask)


class Ensemble(nn.Module):
    """Two encoders of different spelling on one input."""

    def __init__(self, first: PlainTransformer, second: PlainTransformer):
        super().__init__()
        self.first, self.second = OddEncoder(first, HelperAttention), OddEncoder(second, EinsumScoresAttention)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        results: list[Tensor] = [self.first(x, mask), self.second(x, mask)]
        return torch.stack(results).mean(0)
