"""Disentangled self-attention as a module."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from attnx.disentangled import disentangled_attention, log_distance_buckets
from attnx.nn import masks
from attnx.nn.projections import multihead_projections, positive

__all__ = ["DisentangledSelfAttention"]


class DisentangledSelfAttention(nn.Module):
    """The self-attention of DeBERTa: multi-head attention in which tokens also meet embeddings of relative positions.

    Its parameters have the names of transformers' module of this name for ``DebertaV2``, whose state it loads. As there
    no projection of the output belongs to it.

    Args:
        embed_dim: features of a token, and of an embedding of a relative position.
        num_heads: heads.
        span: half of the relative positions, which are 2 * span; DeBERTa's ``position_buckets``.
        max_distance: as of :func:`attnx.log_distance_buckets`; DeBERTa's ``max_relative_positions``.
        c2p: whether queries meet keys of relative positions.
        p2c: whether keys meet queries of relative positions.
        share_projections: whether tokens and relative positions share their projections; DeBERTa's ``share_att_key``.
        dropout: of the weights, in training.
        position_dropout: of the embeddings of relative positions, in training.
        device, dtype: of the parameters.

    Shapes:
        x: (batch, length, embed_dim).
        positions: (2 * span or more, embed_dim), the embeddings of relative positions; the first 2 * span are used.
        key_mask: (batch, length) bool, True where a token may be attended to; or None.
        output: (batch, length, embed_dim).

    Raises:
        ValueError: an argument does not fit; the message names it, what was expected and what came.

    Source: He et al., "DeBERTa: Decoding-enhanced BERT with Disentangled Attention", arXiv 2006.03654.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        span: int = 256,
        max_distance: int | None = 512,
        c2p: bool = True,
        p2c: bool = True,
        share_projections: bool = False,
        dropout: float = 0.0,
        position_dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.embed_dim, self.num_heads = positive("embed_dim", embed_dim), positive("num_heads", num_heads)
        self.span = positive("span", span)
        if embed_dim % num_heads:
            raise ValueError(f"num_heads: expected a divisor of embed_dim = {embed_dim}, got {num_heads}")
        if not (c2p or p2c):
            raise ValueError("c2p: expected True where p2c is False, got False")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: expected from 0 to below 1, got {dropout!r}")
        self.max_distance, self.c2p, self.p2c, self.dropout = max_distance, c2p, p2c, dropout
        self.share_projections = share_projections

        def linear() -> nn.Linear:
            return nn.Linear(embed_dim, embed_dim, device=device, dtype=dtype)

        self.query_proj, self.key_proj, self.value_proj = linear(), linear(), linear()
        if not share_projections:
            if c2p:
                self.pos_key_proj = linear()
            if p2c:
                self.pos_query_proj = linear()
        self.pos_dropout = nn.Dropout(position_dropout)

    @classmethod
    def from_softmax(cls, attention: nn.MultiheadAttention, **options: Any) -> DisentangledSelfAttention:
        """A module with the projections of a softmax attention, copied.

        Until it is trained, and without ``share_projections``, it gives the heads' outputs of that attention, to which
        the caller applies ``attention.out_proj``: its projections of relative positions are 0, and that of queries is
        multiplied by sqrt(1 + how many of ``c2p`` and ``p2c`` there are), as the scale is divided by it. It takes
        (batch, length, embed_dim), whatever ``batch_first`` says. Dropout of weights is taken over.

        Args:
            attention: a ``torch.nn.MultiheadAttention`` without ``add_bias_kv`` and ``add_zero_attn``, whose kdim and
                vdim are embed_dim.
            options: of the new module.

        Raises:
            ValueError: the attention has what this module does not.
        """
        weights, biases = multihead_projections(attention)
        if not attention.kdim == attention.vdim == attention.embed_dim:
            raise ValueError(f"attention: expected kdim and vdim equal to embed_dim, got {attention}")
        given = {"dropout": attention.dropout, "device": weights[0].device, "dtype": weights[0].dtype} | options
        module = cls(attention.embed_dim, attention.num_heads, **given)
        with torch.no_grad():
            for i, projection in enumerate((module.query_proj, module.key_proj, module.value_proj)):
                projection.weight.copy_(weights[i])
                projection.bias.copy_(biases[i]) if biases is not None else projection.bias.zero_()
            for parameter in module.query_proj.parameters():
                parameter.mul_(math.sqrt(1 + module.c2p + module.p2c))
            for name, parameter in module.named_parameters():
                if name.startswith("pos_"):
                    parameter.zero_()
        return module.train(attention.training)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        key_mask: Tensor | None = None,
        *,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Attends from the tokens of ``x`` to themselves.

        ``key_padding_mask`` and ``is_causal`` are those of :class:`torch.nn.MultiheadAttention`, where True hides:
        the former is (batch, length), bool or added to the logits, in the place of ``key_mask``.

        Raises:
            ValueError: an argument does not fit, or ``attn_mask`` is given, which this attention does not have.
        """
        masks.refuse(
            type(self).__name__, "key_padding_mask, is_causal, or attnx.softmax_attention", attn_mask=attn_mask
        )
        if not isinstance(is_causal, bool):
            raise ValueError(f"is_causal: expected True or False, got {is_causal!r}")
        if key_mask is not None and key_padding_mask is not None:
            raise ValueError("key_mask: expected None beside key_padding_mask, got a tensor")
        return self.attend(x, x, positions, key_mask, key_padding_mask=key_padding_mask, is_causal=is_causal)

    def attend(
        self,
        queries: Tensor,
        x: Tensor,
        positions: Tensor,
        key_mask: Tensor | None,
        *,
        key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """The attention of ``queries`` to ``x``, which stand at the same positions: (batch, length, embed_dim) each."""
        for name, tokens in (("x", x), ("queries", queries)):
            if tokens.dim() != 3 or tokens.shape[2] != self.embed_dim:
                raise ValueError(
                    f"{name}: expected (batch, length, {self.embed_dim}), got a tensor of shape {tuple(tokens.shape)}"
                )
        if positions.dim() != 2 or len(positions) < 2 * self.span or positions.shape[1] != self.embed_dim:
            raise ValueError(
                f"positions: expected ({2 * self.span} or more, {self.embed_dim}), got a tensor of shape "
                f"{tuple(positions.shape)}"
            )
        if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != x.shape[:2]):
            raise ValueError(
                f"key_mask: expected bool of shape {tuple(x.shape[:2])}, got {key_mask.dtype} of shape "
                f"{tuple(key_mask.shape)}"
            )
        positions = self.pos_dropout(positions[: 2 * self.span])
        pos_key_proj = self.key_proj if self.share_projections else getattr(self, "pos_key_proj", None)
        pos_query_proj = self.query_proj if self.share_projections else getattr(self, "pos_query_proj", None)
        query, key = self._heads(self.query_proj(queries)), self._heads(self.key_proj(x))
        output = disentangled_attention(
            query,
            key,
            self._heads(self.value_proj(x)),
            log_distance_buckets(
                queries.shape[1], x.shape[1], span=self.span, max_distance=self.max_distance, device=x.device
            ),
            pos_key=self._heads(pos_key_proj(positions)) if self.c2p and pos_key_proj is not None else None,
            pos_query=self._heads(pos_query_proj(positions)) if self.p2c and pos_query_proj is not None else None,
            key_mask=None if key_mask is None else key_mask[:, None],
            is_causal=is_causal,
            **masks.of_call(query, key, None, key_padding_mask),
            dropout_p=self.dropout if self.training else 0.0,
        )
        assert isinstance(output, Tensor)
        return output.transpose(1, 2).flatten(2)

    def _heads(self, x: Tensor) -> Tensor:
        """(..., length, embed_dim) as (..., heads, length, head_dim)."""
        # The projections say how many heads there are: under tensor parallelism each process has a share of them.
        return x.unflatten(-1, (-1, self.embed_dim // self.num_heads)).transpose(-3, -2)

    def extra_repr(self) -> str:
        shown: dict[str, Any] = {"span": self.span, "max_distance": self.max_distance}
        shown |= {name: False for name in ("c2p", "p2c") if not getattr(self, name)}
        shown |= {"share_projections": True} if self.share_projections else {}
        return ", ".join([f"{self.embed_dim}, {self.num_heads}", *(f"{name}={x}" for name, x in shown.items())])
