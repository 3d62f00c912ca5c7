"""A Transformer spelled as plainly as it can be; the models of torch_cases.py and own_cases.py are restated by it.

Every projection is a Linear of its own, attention is F.scaled_dot_product_attention, hidden states are [B, S, H].
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from restated_reference import Attention, FeedForward, Layer

_WEIGHT_STD = 0.15


@dataclass(frozen=True)
class Shape:
    """Sizes and structure.

    memory: the width of what cross attention reads, which is the result of the encoder (encoder_layers > 0) or an
    argument. order: which layer runs when; None: each once.
    """

    hidden: int = 48
    heads: int = 4
    kv_heads: int = 4
    ffn: int = 80
    layers: int = 2
    encoder_layers: int = 0
    memory: int = 48
    norm_first: bool = False
    activation: str = "gelu"
    gated: bool = False
    parallel: bool = False
    cross: bool = False
    rms: bool = False
    rotary: bool = False
    final_norm: bool = False
    bias: bool = True
    order: tuple[int, ...] | None = None

    def head_size(self) -> int:
        return self.hidden // self.heads

    def norm(self) -> nn.Module:
        return nn.RMSNorm(self.hidden, eps=1e-5) if self.rms else nn.LayerNorm(self.hidden, eps=1e-5, bias=self.bias)


def rotate(x: Tensor) -> Tensor:
    """Rotary position embedding of x [B, h, S, d], halves rotated against each other (Su et al. 2021)."""
    half = x.size(3) // 2
    frequencies = 100.0 ** (-torch.arange(half, dtype=x.dtype) / half)
    angles = torch.arange(x.size(2), dtype=x.dtype)[:, None] * frequencies
    first, second = x[..., :half], x[..., half:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class PlainAttention(nn.Module):
    def __init__(self, shape: Shape, memory: int):
        super().__init__()
        self.shape = shape
        inner = shape.kv_heads * shape.head_size()
        self.q = nn.Linear(shape.hidden, shape.hidden, bias=shape.bias)
        self.k = nn.Linear(memory, inner, bias=shape.bias)
        self.v = nn.Linear(memory, inner, bias=shape.bias)
        self.o = nn.Linear(shape.hidden, shape.hidden, bias=shape.bias)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
        heads = [
            states.unflatten(-1, (-1, self.shape.head_size())).transpose(1, 2)
            for states in (self.q(x), self.k(memory), self.v(memory))
        ]
        if self.shape.rotary:
            heads[:2] = map(rotate, heads[:2])
        heads[1:] = [states.repeat_interleave(self.shape.heads // self.shape.kv_heads, dim=1) for states in heads[1:]]
        return self.o(F.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(1, 2).flatten(2))


class PlainFeedForward(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.act = getattr(F, shape.activation)
        self.up = nn.Linear(shape.hidden, shape.ffn, bias=shape.bias)
        self.gate = nn.Linear(shape.hidden, shape.ffn, bias=shape.bias) if shape.gated else None
        self.down = nn.Linear(shape.ffn, shape.hidden, bias=shape.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)) if self.gate is None else self.act(self.gate(x)) * self.up(x))


class PlainLayer(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        self.attention, self.norm = PlainAttention(shape, shape.hidden), shape.norm()
        if shape.cross:
            self.cross, self.cross_norm = PlainAttention(shape, shape.memory), shape.norm()
        self.ffn = PlainFeedForward(shape)
        self.ffn_norm = None if shape.parallel else shape.norm()

    def forward(self, x: Tensor, mask: Tensor | None, memory: Tensor | None, memory_mask: Tensor | None) -> Tensor:
        if self.shape.parallel:
            h = self.norm(x)
            return x + self.attention(h, h, mask) + self.ffn(h)
        if self.shape.norm_first:
            h = self.norm(x)
            x = x + self.attention(h, h, mask)
            if self.shape.cross:
                x = x + self.cross(self.cross_norm(x), memory, memory_mask)
            return x + self.ffn(self.ffn_norm(x))
        x = self.norm(x + self.attention(x, x, mask))
        if self.shape.cross:
            x = self.cross_norm(x + self.cross(x, memory, memory_mask))
        return self.ffn_norm(x + self.ffn(x))

    def described(self, path: str, number: int, feeds_cross: bool) -> Layer:
        """Where in a model, in which this layer is at `path`, everything is."""
        first = self.shape.norm_first or self.shape.parallel
        attentions = [
            Attention(
                query=f"{path}.{name}.q",
                key=f"{path}.{name}.k",
                value=f"{path}.{name}.v",
                branch=f"{path}.{name}.o",
                residual=f"{path}.{norm}" if first else f"{path}.{name}.q",
                norm=None if first else f"{path}.{norm}",
                kind=kind,
            )
            for name, norm, kind in (
                ("attention", "norm", "encoder" if feeds_cross else "self"),
                ("cross", "cross_norm", "cross"),
            )
            if hasattr(self, name)
        ]
        norm = f"{path}.norm" if self.shape.parallel else f"{path}.ffn_norm"
        feed_forward = FeedForward(
            up=f"{path}.ffn.up",
            down=f"{path}.ffn.down",
            branch=f"{path}.ffn.down",
            residual=norm if first else f"{path}.ffn.up",
            norm=None if first else norm,
        )
        return Layer(number, tuple(attentions), feed_forward)


class PlainTransformer(nn.Module):
    """Encoder, decoder or both, without embeddings: [B, S, H] -> [B, S, H]."""

    def __init__(self, shape: Shape, dtype: torch.dtype, seed: int = 0):
        super().__init__()
        self.shape = shape
        encoder_shape = replace(shape, cross=False, encoder_layers=0)
        self.encoder = nn.ModuleList(PlainLayer(encoder_shape) for _ in range(shape.encoder_layers))
        self.encoder_norm = shape.norm() if shape.final_norm and shape.encoder_layers else None
        self.layers = nn.ModuleList(PlainLayer(shape) for _ in range(shape.layers))
        self.final_norm = shape.norm() if shape.final_norm else None
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for path, parameter in self.named_parameters():
                value = _WEIGHT_STD * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(value + 1.0 if "norm" in path and path.endswith("weight") else value)
        self.to(dtype).eval()

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
    ) -> Tensor:
        """Masks as F.scaled_dot_product_attention takes them. With an encoder, memory is what the encoder reads."""
        for layer in self.encoder:
            memory = layer(memory, memory_mask, None, None)
        if self.encoder_norm is not None:
            memory = self.encoder_norm(memory)
        for index in self.shape.order or range(self.shape.layers):
            x = self.layers[index](x, mask, memory, memory_mask)
        return x if self.final_norm is None else self.final_norm(x)

    def described(self, path: str = "") -> list[Layer]:
        """Every layer, numbered as they first run: encoder layers before decoder layers."""
        stages = [(f"{path}encoder.{i}", layer) for i, layer in enumerate(self.encoder)]
        stages += [(f"{path}layers.{i}", self.layers[i]) for i in self.shape.order or range(self.shape.layers)]
        distinct = dict(stages)
        return [
            layer.described(at, number, feeds_cross="encoder." in at)
            for number, (at, layer) in enumerate(distinct.items())
        ]
