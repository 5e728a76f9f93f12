"""The attention layers of BASED as a module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attnx._operators.linear_state import features
from attnx.functional import softmax_attention
from attnx.linear import linear_attention
from attnx.nn.arguments import Rotary
from attnx.nn.projections import positive
from attnx.nn.stateful import State, StatefulAttention

__all__ = ["BasedAttention"]


class BasedAttention(StatefulAttention):
    """The two attention layers of BASED: linear attention to all earlier tokens, or softmax attention to the newest.

    A model alternates the two, so that the linear layers recall from far away what the windows do not reach, and the
    windows compare tokens as exactly as softmax does. Neither has a cache that grows: the state of a linear layer is
    a matrix for each head, that of a window the keys and values of ``window - 1`` tokens. The model gates short
    convolutions in further layers, which are no attention.

    Args:
        embed_dim: features of a token.
        num_heads: query heads.
        window: None for linear attention with the Taylor features, :func:`attnx.linear_attention`; else how many
            tokens a query sees, its own and those before it, by :func:`attnx.softmax_attention`.
        feature_dim: features of a query and a key of linear attention, from 1 to 64; those of windows have head_dim.
        head_dim: features of a head's values; embed_dim / num_heads by default.
        num_kv_heads: key and value heads, a divisor of num_heads; num_heads by default.
        linear_bias: whether the four projections have a bias.
        rotary: of windows alone: (query, key) -> (query, key), both (batch, heads, length, head_dim), called ahead of
            the attention. When a state is gone on from, its first token is the first of the state, so that the logits
            must depend on differences of positions alone, as rotary embeddings have it. A module becomes a submodule.
        device, dtype: of the parameters.

    Shapes:
        x: (batch, length, embed_dim).
        output: (batch, length, embed_dim).
        state: of linear attention ((batch, num_kv_heads, features, head_dim + 1),) in float32 (float64 for float64),
            with the 1 + d + d (d + 1) / 2 features of ``feature_dim`` d, whatever the length. Of windows (keys,
            values), (batch, num_kv_heads, tokens, head_dim) each.

    Raises:
        ValueError: an argument does not fit; the message names it, what was expected and what came.

    Source: Arora et al., "Simple linear attention language models balance the recall-throughput tradeoff", arXiv
    2402.18668. The sum of a row's weights is not kept from 0 by an epsilon, as it is half the number of keys at least.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        window: int | None = None,
        feature_dim: int = 16,
        head_dim: int | None = None,
        num_kv_heads: int | None = None,
        linear_bias: bool = False,
        rotary: Rotary | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.embed_dim, self.num_heads = positive("embed_dim", embed_dim), positive("num_heads", num_heads)
        self.num_kv_heads = positive("num_kv_heads", num_heads if num_kv_heads is None else num_kv_heads)
        if num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads: expected a divisor of num_heads = {num_heads}, got {num_kv_heads}")
        if head_dim is None and embed_dim % num_heads:
            raise ValueError(
                f"num_heads: expected a divisor of embed_dim = {embed_dim} where head_dim is not given, got {num_heads}"
            )
        self.head_dim = positive("head_dim", embed_dim // num_heads if head_dim is None else head_dim)
        self.window = None if window is None else positive("window", window)
        if positive("feature_dim", feature_dim) > 64:
            raise ValueError(f"feature_dim: expected 64 at most, got {feature_dim}")
        self.feature_dim = feature_dim if window is None else self.head_dim
        if rotary is not None and (window is None or not callable(rotary)):
            expected = "None without a window" if window is None else "a callable (query, key) -> (query, key)"
            raise ValueError(f"rotary: expected {expected}, got {rotary!r}")
        self.rotary = rotary

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=linear_bias, device=device, dtype=dtype)

        self.q_proj = linear(embed_dim, num_heads * self.feature_dim)
        self.k_proj = linear(embed_dim, self.num_kv_heads * self.feature_dim)
        self.v_proj = linear(embed_dim, self.num_kv_heads * self.head_dim)
        self.out_proj = linear(num_heads * self.head_dim, embed_dim)

    def attend(self, x: Tensor, state: State | None, wants_state: bool) -> tuple[Tensor, State]:
        # The projections say how many heads there are: under tensor parallelism each process has a share of them.
        query = self.q_proj(x).unflatten(2, (-1, self.feature_dim)).transpose(1, 2)
        key = self.k_proj(x).unflatten(2, (-1, self.feature_dim)).transpose(1, 2)
        value = self.v_proj(x).unflatten(2, (-1, self.head_dim)).transpose(1, 2)
        if self.window is not None:
            output, state = self._attend_to_window(query, key, value, state, self.window)
        else:
            result: Any = linear_attention(
                query, key, value, initial_state=state[0] if state else None, return_state=wants_state
            )
            output, state = (result[0], (result[1],)) if wants_state else (result, ())
        return self.out_proj(output.transpose(1, 2).flatten(2)), state

    def _attend_to_window(
        self, query: Tensor, key: Tensor, value: Tensor, state: State | None, window: int
    ) -> tuple[Tensor, State]:
        if state is not None:
            key, value = (torch.cat(x, 2) for x in zip(state, (key, value), strict=True))
        # As copies they do not keep the memory of a whole prompt.
        kept = tuple(x[:, :, max(x.shape[2] - window + 1, 0) :].clone() for x in (key, value))
        if self.rotary is not None:
            # The state has keys as they were before rotation, and rotary embeds queries and keys of one length.
            before = key.shape[2] - query.shape[2]
            query, key = self.rotary(nn.functional.pad(query, (0, 0, before, 0)), key)
            query = query[:, :, before:]
        output = softmax_attention(query, key, value, is_causal=True, window=(window - 1, 0))
        assert isinstance(output, Tensor)
        return output, kept

    def state_shapes(self, batch: int) -> Sequence[tuple[int | None, ...]]:
        heads = self.k_proj.out_features // self.feature_dim
        if self.window is not None:
            return [(batch, heads, None, self.head_dim)] * 2
        return [(batch, heads, features("taylor", self.feature_dim), self.head_dim + 1)]

    def extra_repr(self) -> str:
        sizes = f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, head_dim={self.head_dim}"
        grouped = "" if self.num_kv_heads == self.num_heads else f", num_kv_heads={self.num_kv_heads}"
        kind = f", feature_dim={self.feature_dim}" if self.window is None else f", window={self.window}"
        return sizes + grouped + kind
