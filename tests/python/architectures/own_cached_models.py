"""Hand-written decoders that keep keys and values in several ways. One set of weights: attention is the same."""

import math
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import FFN, HEADS, HIDDEN, POSITIONS, VOCABULARY

LAYERS = 2
HEAD_DIM = HIDDEN // HEADS
KV_HEADS = 2


class Layer(nn.Module):
    """A pre-norm layer with two heads of keys and values for four of queries."""

    fused: torch.jit.Final[bool]

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.norm, self.ffn_norm = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.q, self.o = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.k, self.v = (nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM) for _ in range(2))
        self.up, self.down = nn.Linear(HIDDEN, FFN), nn.Linear(FFN, HIDDEN)
        self.heads, self.kv_heads, self.head_dim = HEADS, KV_HEADS, HEAD_DIM  # torch.jit.script reads no globals

    def new_keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, S, heads, head size]."""
        shape = [x.size(0), x.size(1), self.kv_heads, self.head_dim]
        x = self.norm(x)
        return self.k(x).view(shape), self.v(x).view(shape)

    def attend(self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """keys, values: [B, K, heads, head size]."""
        q = self.q(self.norm(x)).view(x.size(0), x.size(1), self.heads, self.head_dim).transpose(1, 2)
        k = keys.transpose(1, 2).repeat_interleave(self.heads // self.kv_heads, dim=1)
        v = values.transpose(1, 2).repeat_interleave(self.heads // self.kv_heads, dim=1)
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            mixed = (q @ k.transpose(-1, -2) / math.sqrt(self.head_dim) + mask).softmax(-1) @ v
        x = x + self.o(mixed.transpose(1, 2).reshape(x.size(0), x.size(1), -1))
        return x + self.down(F.gelu(self.up(self.ffn_norm(x))))

    def attend_to(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """keys, values: [B, heads, K, head size]."""
        q = self.q(self.norm(x)).view(x.size(0), x.size(1), self.heads, self.head_dim).transpose(1, 2)
        mixed = (q @ keys.transpose(-1, -2) / math.sqrt(self.head_dim)).softmax(-1) @ values
        x = x + self.o(mixed.transpose(1, 2).reshape(x.size(0), x.size(1), -1))
        return x + self.down(F.gelu(self.up(self.ffn_norm(x))))


class Embeddings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(VOCABULARY, HIDDEN), nn.Embedding(POSITIONS, HIDDEN)

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        return self.words(ids) + self.places(positions)


class Decoder(nn.Module):
    """Without a cache."""

    def __init__(self, fused: bool = False) -> None:
        super().__init__()
        self.embed = Embeddings()
        self.layers = nn.ModuleList(Layer(fused) for _ in range(LAYERS))

    def forward(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        x = self.embed(ids, positions)
        for layer in self.layers:
            keys, values = layer.new_keys(x)
            x = layer.attend(x, keys, values, mask)
        return x


class OptionalList(Decoder):
    """A list of (keys, values), or None before the first token."""

    def forward(
        self, ids: Tensor, mask: Tensor, positions: Tensor, past: Optional[list[tuple[Tensor, Tensor]]] = None
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        x = self.embed(ids, positions)
        new: list[tuple[Tensor, Tensor]] = []
        for i, layer in enumerate(self.layers):
            keys, values = layer.new_keys(x)
            if past is not None:
                keys = torch.cat([past[i][0], keys], dim=1)
                values = torch.cat([past[i][1], values], dim=1)
            new.append((keys, values))
            x = layer.attend(x, keys, values, mask)
        return x, new


class Dictionary(Decoder):
    def forward(
        self, ids: Tensor, mask: Tensor, positions: Tensor, past: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        x = self.embed(ids, positions)
        new: dict[str, Tensor] = {}
        for i, layer in enumerate(self.layers):
            keys, values = layer.new_keys(x)
            keys = torch.cat((past[f"keys.{i}"], keys), 1)
            values = torch.cat((past[f"values.{i}"], values), 1)
            new[f"keys.{i}"], new[f"values.{i}"] = keys, values
            x = layer.attend(x, keys, values, mask)
        return x, new


class Stacked(Decoder):
    """One tensor [layers, 2, B, P, heads, head size]."""

    def forward(self, ids: Tensor, mask: Tensor, positions: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(ids, positions)
        new: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            keys, values = layer.new_keys(x)
            both = torch.cat([past[i], torch.stack([keys, values])], dim=2)
            new.append(both)
            x = layer.attend(x, both[0], both[1], mask)
        return x, torch.stack(new)


class HiddenStates(Decoder):
    """Keeps what it projects: [B, P, hidden] of each layer."""

    def forward(self, ids: Tensor, mask: Tensor, positions: Tensor, past: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        x = self.embed(ids, positions)
        new: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            seen = torch.cat([past[i], x], dim=1)
            new.append(seen)
            keys, values = layer.new_keys(seen)
            x = layer.attend(x, keys, values, mask)
        return x, new


class NormedStates(HiddenStates):
    """Keeps them behind the norm."""

    def forward(self, ids: Tensor, mask: Tensor, positions: Tensor, past: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        x = self.embed(ids, positions)
        new: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            seen = torch.cat([past[i], layer.norm(x)], dim=1)
            new.append(seen)
            shape = [seen.size(0), seen.size(1), layer.kv_heads, layer.head_dim]
            x = layer.attend(x, layer.k(seen).view(shape), layer.v(seen).view(shape), mask)
        return x, new


class OptionalStates(HiddenStates):
    def forward(
        self, ids: Tensor, mask: Tensor, positions: Tensor, past: Optional[list[Tensor]] = None
    ) -> tuple[Tensor, list[Tensor]]:
        x = self.embed(ids, positions)
        new: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            seen = x
            if past is not None:
                seen = torch.cat([past[i], x], dim=1)
            new.append(seen)
            keys, values = layer.new_keys(seen)
            x = layer.attend(x, keys, values, mask)
        return x, new


class StaticStates(Decoder):
    """Keeps what it projects in tensors of POSITIONS tokens."""

    def forward(
        self, ids: Tensor, mask: Tensor, positions: Tensor, places: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, tuple[list[Tensor]]]:
        x = self.embed(ids, positions)
        new: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            seen = past[i].index_copy(1, places, x)
            new.append(seen)
            keys, values = layer.new_keys(seen)
            x = layer.attend(x, keys, values, mask)
        return x, (new,)


class StaticStatesInPlace(StaticStates):
    def forward(
        self, ids: Tensor, mask: Tensor, positions: Tensor, places: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, tuple[list[Tensor]]]:
        x = self.embed(ids, positions)
        for i, layer in enumerate(self.layers):
            past[i][:, places] = x
            keys, values = layer.new_keys(past[i])
            x = layer.attend(x, keys, values, mask)
        return x, (past,)


class Static(Decoder):
    """Tensors of POSITIONS tokens, [B, T, heads, head size]. This pass writes its keys at `places` [S]."""

    def write(self, cache: Tensor, places: Tensor, new: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(
        self, ids: Tensor, mask: Tensor, positions: Tensor, places: Tensor, keys: list[Tensor], values: list[Tensor]
    ) -> tuple[Tensor, tuple[list[Tensor], list[Tensor]]]:
        x = self.embed(ids, positions)
        all_keys: list[Tensor] = []
        all_values: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            k, v = layer.new_keys(x)
            k, v = self.write(keys[i], places, k), self.write(values[i], places, v)
            all_keys.append(k)
            all_values.append(v)
            x = layer.attend(x, k, v, mask)
        return x, (all_keys, all_values)


class IndexCopy(Static):
    def write(self, cache: Tensor, places: Tensor, new: Tensor) -> Tensor:
        return cache.index_copy(1, places, new)


class IndexCopyInPlace(Static):
    def write(self, cache: Tensor, places: Tensor, new: Tensor) -> Tensor:
        cache.index_copy_(1, places, new)
        return cache


class SliceAssignment(Static):
    def write(self, cache: Tensor, places: Tensor, new: Tensor) -> Tensor:
        begin = int(places[0])
        cache[:, begin : begin + new.size(1)] = new
        return cache


class IndexPut(Static):
    def write(self, cache: Tensor, places: Tensor, new: Tensor) -> Tensor:
        cache[:, places] = new
        return cache


class Scatter(Static):
    def write(self, cache: Tensor, places: Tensor, new: Tensor) -> Tensor:
        return cache.scatter(1, places[None, :, None, None].expand_as(new), new)


class ClonedSlice(Static):
    """Writes through a slice of a copy."""

    def write(self, cache: Tensor, places: Tensor, new: Tensor) -> Tensor:
        copy, begin = cache.clone(), int(places[0])
        copy[:, begin : begin + new.size(1)] = new
        return copy


class ScaledSlice(Static):
    """The same, and the copy is a product."""

    def write(self, cache: Tensor, places: Tensor, new: Tensor) -> Tensor:
        copy, begin = cache * 1.0, int(places[0])
        copy[:, begin : begin + new.size(1)] = new
        return copy


class ReadSlice(Static):
    """Reads as many tokens of the cache as there are."""

    def forward(
        self, ids: Tensor, mask: Tensor, positions: Tensor, places: Tensor, keys: list[Tensor], values: list[Tensor]
    ) -> tuple[Tensor, tuple[list[Tensor], list[Tensor]]]:
        x = self.embed(ids, positions)
        end = int(places[-1]) + 1
        for i, layer in enumerate(self.layers):
            k, v = layer.new_keys(x)
            keys[i][:, end - ids.size(1) : end] = k
            values[i][:, end - ids.size(1) : end] = v
            x = layer.attend(x, keys[i][:, :end], values[i][:, :end], mask[..., :end])
        return x, (keys, values)


class Where(Static):
    """Passes of one token."""

    def write(self, cache: Tensor, places: Tensor, new: Tensor) -> Tensor:
        return torch.where((torch.arange(cache.size(1)) == places)[None, :, None, None], new, cache)


class OneHot(Static):
    """Passes of one token."""

    def write(self, cache: Tensor, places: Tensor, new: Tensor) -> Tensor:
        here = F.one_hot(places, cache.size(1)).to(new.dtype)[..., None, None]
        return cache * (1 - here) + new * here


class BothSides(Decoder):
    """Projects keys in both branches."""

    def forward(
        self, ids: Tensor, mask: Tensor, positions: Tensor, past: Optional[list[tuple[Tensor, Tensor]]] = None
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        x = self.embed(ids, positions)
        new: list[tuple[Tensor, Tensor]] = []
        for i, layer in enumerate(self.layers):
            if past is not None:
                keys, values = layer.new_keys(x)
                keys, values = torch.cat([past[i][0], keys], 1), torch.cat([past[i][1], values], 1)
            else:
                keys, values = layer.new_keys(x)
            new.append((keys, values))
            x = layer.attend(x, keys, values, mask)
        return x, new


class Memory(Decoder):
    """Attends to keys and values that another pass has made, [B, heads, T, head size], by products."""

    def forward(self, ids: Tensor, positions: Tensor, past: list[tuple[Tensor, Tensor]]) -> Tensor:
        x = self.embed(ids, positions)
        for i, layer in enumerate(self.layers):
            x = layer.attend_to(x, past[i][0], past[i][1])
        return x


class MemoryStates(Memory):
    """The same, of the tokens that the keys and values are made of, [B, T]."""

    def keys_of(self, memory: Tensor) -> list[tuple[Tensor, Tensor]]:
        new = [layer.new_keys(self.embed.words(memory)) for layer in self.layers]
        return [tuple(each.transpose(1, 2).repeat_interleave(2, 1) for each in pair) for pair in new]

    def forward(self, ids: Tensor, positions: Tensor, memory: Tensor) -> Tensor:
        x = self.embed(ids, positions)
        states = self.embed.words(memory)
        for layer in self.layers:
            keys, values = layer.new_keys(states)
            keys = keys.transpose(1, 2).repeat_interleave(2, 1)
            values = values.transpose(1, 2).repeat_interleave(2, 1)
            x = layer.attend_to(x, keys, values)
        return x


class ViewBeforeWrite(Decoder):
    """Reads the new keys by way of memory alone. keys, values: [layers, B, T, heads, head size]."""

    def __init__(self) -> None:
        super().__init__(fused=True)

    def write_and_read(self, cache: Tensor, places: Tensor, new: Tensor) -> Tensor:
        seen = cache[:, : int(places[-1]) + 1]
        cache.index_copy_(1, places, new)
        return seen

    def forward(
        self, ids: Tensor, mask: Tensor, positions: Tensor, places: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        x = self.embed(ids, positions)
        for i, layer in enumerate(self.layers):
            k, v = layer.new_keys(x)
            seen_keys = self.write_and_read(keys[i], places, k)
            seen_values = self.write_and_read(values[i], places, v)
            x = layer.attend(x, seen_keys, seen_values, mask)
        return x


class CopiedBehindWrite(ViewBeforeWrite):
    """Attends to a copy of a copy of the cache that the new keys were written into."""

    def write_and_read(self, cache: Tensor, places: Tensor, new: Tensor) -> Tensor:
        copy = cache.clone()
        copy[:, places] = new
        return copy.clone()


class CopiedBehindView(ViewBeforeWrite):
    """The same, written through a view of the copy."""

    def write_and_read(self, cache: Tensor, places: Tensor, new: Tensor) -> Tensor:
        copy = cache.clone()
        copy.transpose(1, 2).index_copy_(2, places, new.transpose(1, 2))
        return copy.clone()
