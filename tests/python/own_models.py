"""Hand-written Transformer encoders for torch.jit.script, with weights taken from a Hugging Face model.

Their module names and their spelling of attention differ from Hugging Face's on purpose: what the patcher finds, it
must find by data flow. Shapes: embeddings and results [B, S, H], ids and masks [B, S] int64 with 1 = real token.
"""

import math
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, S, H] -> [B, heads, S, H / heads]."""
    return x.view(x.size(0), x.size(1), heads, x.size(2) // heads).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[B, heads, S, d] -> [B, S, heads * d]."""
    return x.transpose(1, 2).reshape(x.size(0), x.size(2), x.size(1) * x.size(3))


def additive_mask(mask: Tensor, like: Tensor) -> Tensor:
    """[B, S] with 1 = real -> [B, 1, 1, S] in the dtype of `like`, very negative at padding."""
    return (1.0 - mask[:, None, None, :].to(like.dtype)) * -1.0e9


class MatmulCore(nn.Module):
    """softmax(q k^T / sqrt(d) + mask) v, spelled out, with dropout on the probabilities."""

    def __init__(self, dropout: float):
        super().__init__()
        self.drop = nn.Dropout(dropout)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Optional[Tensor]) -> Tensor:
        scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(float(q.size(-1)))
        if mask is not None:
            scores = scores + additive_mask(mask, scores)
        return torch.matmul(self.drop(torch.softmax(scores, dim=-1)), v)


class ScaledQueryCore(nn.Module):
    """The same, with the scale on the query, masked_fill and einsum-free bmm over [B * heads, S, d]."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Optional[Tensor]) -> Tensor:
        batch, heads, length, width = q.size(0), q.size(1), q.size(2), q.size(3)
        q = q * (float(width) ** -0.5)
        scores = torch.bmm(
            q.reshape(batch * heads, length, width), k.reshape(batch * heads, length, width).transpose(1, 2)
        )
        scores = scores.view(batch, heads, length, length)
        if mask is not None:
            scores = scores.masked_fill((mask == 0)[:, None, None, :], -1.0e9)
        probabilities = F.softmax(scores, dim=3).view(batch * heads, length, length)
        return torch.bmm(probabilities, v.reshape(batch * heads, length, width)).view(batch, heads, length, width)


class SdpaCore(nn.Module):
    """F.scaled_dot_product_attention with an additive mask."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Optional[Tensor]) -> Tensor:
        bias: Optional[Tensor] = None
        if mask is not None:
            bias = additive_mask(mask, q)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


class SdpaBoolCore(nn.Module):
    """F.scaled_dot_product_attention with a bool mask (True = attend)."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Optional[Tensor]) -> Tensor:
        keep: Optional[Tensor] = None
        if mask is not None:
            keep = (mask != 0)[:, None, None, :].expand(q.size(0), 1, q.size(2), k.size(2))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)


class SeparateProjections(nn.Module):
    def __init__(self, hidden: int):
        super().__init__()
        self.wq = nn.Linear(hidden, hidden)
        self.wk = nn.Linear(hidden, hidden)
        self.wv = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.wq(x), self.wk(x), self.wv(x)

    def take(self, q: nn.Linear, k: nn.Linear, v: nn.Linear) -> None:
        copy_linear(self.wq, q)
        copy_linear(self.wk, k)
        copy_linear(self.wv, v)


class PackedProjections(nn.Module):
    """q, k and v from one product with a [3 H, H] weight."""

    def __init__(self, hidden: int):
        super().__init__()
        self.wqkv = nn.Linear(hidden, 3 * hidden)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.wqkv(x).chunk(3, dim=-1)
        return q, k, v

    def take(self, q: nn.Linear, k: nn.Linear, v: nn.Linear) -> None:
        with torch.no_grad():
            self.wqkv.weight.copy_(torch.cat([q.weight, k.weight, v.weight]))
            self.wqkv.bias.copy_(torch.cat([q.bias, k.bias, v.bias]))


class Attention(nn.Module):
    def __init__(self, hidden: int, heads: int, packed: bool, core: nn.Module):
        super().__init__()
        self.heads = heads
        self.proj = PackedProjections(hidden) if packed else SeparateProjections(hidden)
        self.core = core
        self.wo = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor, mask: Optional[Tensor]) -> Tensor:
        q, k, v = self.proj(x)
        mixed = self.core(split_heads(q, self.heads), split_heads(k, self.heads), split_heads(v, self.heads), mask)
        return self.wo(merge_heads(mixed))


class FeedForward(nn.Module):
    def __init__(self, hidden: int, inner: int):
        super().__init__()
        self.widen = nn.Linear(hidden, inner)
        self.narrow = nn.Linear(inner, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(F.gelu(self.widen(x)))


class PostNormBlock(nn.Module):
    def __init__(self, hidden: int, heads: int, inner: int, packed: bool, core: nn.Module, dropout: float, eps: float):
        super().__init__()
        self.attn = Attention(hidden, heads, packed, core)
        self.attn_norm = nn.LayerNorm(hidden, eps=eps)
        self.ffn = FeedForward(hidden, inner)
        self.ffn_norm = nn.LayerNorm(hidden, eps=eps)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Optional[Tensor]) -> Tensor:
        x = self.attn_norm(x + self.drop(self.attn(x, mask)))
        return self.ffn_norm(x + self.drop(self.ffn(x)))


class PreNormBlock(PostNormBlock):
    """The same modules; norms before the branches."""

    def forward(self, x: Tensor, mask: Optional[Tensor]) -> Tensor:
        x = x + self.drop(self.attn(self.attn_norm(x), mask))
        return x + self.drop(self.ffn(self.ffn_norm(x)))


class MaskedEncoder(nn.Module):
    """embeddings [B, S, H] and an optional mask [B, S] -> [B, S, H]."""

    def __init__(self, blocks: nn.ModuleList):
        super().__init__()
        self.blocks = blocks

    def forward(self, x: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        for block in self.blocks:
            x = block(x, mask)
        return x


class UnmaskedEncoder(nn.Module):
    """embeddings [B, S, H] -> [B, S, H]; no mask input at all."""

    def __init__(self, blocks: nn.ModuleList):
        super().__init__()
        self.blocks = blocks

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, None)
        return x


class TokenEncoder(nn.Module):
    """ids [B, S] and an optional mask [B, S] -> [B, S, H]; embeds like BERT (token type 0)."""

    def __init__(self, blocks: nn.ModuleList, vocabulary: int, positions: int, hidden: int, eps: float):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, hidden)
        self.places = nn.Embedding(positions, hidden)
        self.kind = nn.Parameter(torch.zeros(hidden))
        self.norm = nn.LayerNorm(hidden, eps=eps)
        self.blocks = blocks

    def forward(self, ids: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        x = self.tokens(ids) + self.kind + self.places(torch.arange(ids.size(1), device=ids.device))
        x = self.norm(x)
        for block in self.blocks:
            x = block(x, mask)
        return x


def copy_linear(target: nn.Module, source: nn.Module) -> None:
    """Weight and bias of a Linear or LayerNorm."""
    with torch.no_grad():
        target.weight.copy_(source.weight)
        target.bias.copy_(source.bias)


def copy_block(block: PostNormBlock, layer: nn.Module, post_norm: bool) -> None:
    """Takes the weights of a Hugging Face BertLayer (post-norm) or ViTLayer (pre-norm)."""
    inner = layer.attention.self if post_norm else layer.attention.attention
    block.attn.proj.take(inner.query, inner.key, inner.value)
    copy_linear(block.attn.wo, layer.attention.output.dense)
    copy_linear(block.attn_norm, layer.attention.output.LayerNorm if post_norm else layer.layernorm_before)
    copy_linear(block.ffn.widen, layer.intermediate.dense)
    copy_linear(block.ffn.narrow, layer.output.dense)
    copy_linear(block.ffn_norm, layer.output.LayerNorm if post_norm else layer.layernorm_after)


CORES = {
    "matmul": MatmulCore,
    "scaled_query": lambda dropout: ScaledQueryCore(),
    "sdpa": lambda dropout: SdpaCore(),
    "sdpa_bool": lambda dropout: SdpaBoolCore(),
}


def own_encoder(source: nn.Module, *, post_norm: bool, core: str, packed: bool, kind: str, dropout: float) -> nn.Module:
    """An eager encoder of ours that computes what `source` (BertModel or ViTModel) computes.

    kind: "ids" (TokenEncoder, post-norm only), "embeddings" (MaskedEncoder) or "unmasked" (UnmaskedEncoder).
    """
    config = source.config
    hidden, eps = config.hidden_size, config.layer_norm_eps
    block_class = PostNormBlock if post_norm else PreNormBlock
    blocks = nn.ModuleList()
    for layer in source.encoder.layer:
        block = block_class(
            hidden, config.num_attention_heads, config.intermediate_size, packed, CORES[core](dropout), dropout, eps
        )
        copy_block(block, layer, post_norm)
        blocks.append(block)
    if kind == "embeddings":
        return MaskedEncoder(blocks)
    if kind == "unmasked":
        return UnmaskedEncoder(blocks)
    embeddings = source.embeddings
    encoder = TokenEncoder(blocks, config.vocab_size, config.max_position_embeddings, hidden, eps)
    with torch.no_grad():
        encoder.tokens.weight.copy_(embeddings.word_embeddings.weight)
        encoder.places.weight.copy_(embeddings.position_embeddings.weight)
        encoder.kind.copy_(embeddings.token_type_embeddings.weight[0])
    copy_linear(encoder.norm, embeddings.LayerNorm)
    return encoder
