"""A small byte-level transformer whose attention is an argument; everything else is the same for all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnx.demo.attentions import Attention, CausalAttention

if TYPE_CHECKING:
    from attnx.demo.caches import Cache

VOCABULARY = 256


@dataclass(frozen=True)
class ModelConfig:
    layers: int = 4
    width: int = 128
    heads: int = 4
    context: int = 512


class Rotary(nn.Module):
    """Rotary positions (Su et al., arXiv 2104.09864): pairs of features turn by an angle that grows with position."""

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, length: int) -> None:
        super().__init__()
        frequency = 10000.0 ** -torch.arange(0, 1, 2 / head_dim)
        angle = torch.outer(torch.arange(length), frequency)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, x: Tensor, first: int = 0) -> Tensor:
        """x: (batch, length, heads, head_dim), at the positions from ``first`` on."""
        positions = slice(first, first + x.shape[1])
        cos, sin = self.cos[positions, None], self.sin[positions, None]
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)


class Block(nn.Module):
    """Pre-norm attention and MLP. Queries, keys and the attention's output are normalised for every attention
    alike, as the source of sigmoid attention recommends (arXiv 2409.04431)."""

    def __init__(self, config: ModelConfig, attention: Attention) -> None:
        super().__init__()
        width, self.head_dim = config.width, config.width // config.heads
        self.attention = attention.build(self.head_dim)
        self.rotary = Rotary(self.head_dim, config.context)
        self.attention_norm = nn.LayerNorm(width, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.query_norm = nn.LayerNorm(self.head_dim, bias=False)
        self.key_norm = nn.LayerNorm(self.head_dim, bias=False)
        # The weights of a sigmoid row may sum to little; the default eps would swallow what they carry.
        self.output_norm = nn.LayerNorm(self.head_dim, eps=1e-8, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width, bias=False),
            nn.Linear(width, 4 * width, bias=False),
            nn.GELU(),
            nn.Linear(4 * width, width, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self._with(self.attention, x, 0)

    def decode(self, x: Tensor, first: int, cache: Cache) -> Tensor:
        """The same for positions from ``first`` on, with the keys and values of those before them in ``cache``."""

        def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            cache.append(key, value)
            return cache.attend(query)

        return self._with(attention, x, first)

    def _with(self, attention: CausalAttention, x: Tensor, first: int) -> Tensor:
        qkv = self.qkv(self.attention_norm(x)).unflatten(2, (3, -1, self.head_dim))
        query, key, value = qkv.unbind(2)
        query, key = self.rotary(self.query_norm(query), first), self.rotary(self.key_norm(key), first)
        # (batch, length, heads, head_dim) storage, read as (batch, heads, length, head_dim) without a copy.
        output = attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        x = x + self.output(self.output_norm(output.transpose(1, 2)).flatten(2))
        return x + self.mlp(x)


class Transformer(nn.Module):
    def __init__(self, config: ModelConfig, attention: Attention) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, config.width)
        self.blocks = nn.Sequential(*(Block(config, attention) for _ in range(config.layers)))
        self.norm = nn.LayerNorm(config.width, bias=False)
        self.head = nn.Linear(config.width, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: (batch, length + 1). Returns the mean cross entropy of every next byte in bits, float32."""
        logits = self.head(self.norm(self.blocks(self.embedding(tokens[:, :-1]))))
        nats = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        return nats / math.log(2)

    def decode(self, tokens: Tensor, first: int, caches: Sequence[Cache]) -> Tensor:
        """tokens: (batch, length) at the positions from ``first`` on, one cache a layer. Returns the logits of every
        next byte."""
        x = self.embedding(tokens)
        for block, cache in zip(self.blocks, caches, strict=True):
            assert isinstance(block, Block)
            x = block.decode(x, first, cache)
        return self.head(self.norm(x))
