"""Hierarchical sparse attention as a module, and what finds the chunks of its keys."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from attnx.hierarchical import hierarchical_attention
from attnx.nn.arguments import ProjectionArguments, shows_projection_arguments
from attnx.nn.projections import ProjectedAttention, positive

__all__ = ["BoundaryPredictor", "HierarchicalSparseAttention"]


class BoundaryPredictor(nn.Module):
    r"""Tells where chunks of tokens start, from the keys on the left and on the right of a place.

    Both windows, of ``window`` keys each, go through one encoder, a convolution over the window for each feature and a
    projection, with rectifiers. A network of two layers takes their codes l and r as
    :math:`[l, r, |l - r|, l \odot r, \cos(l, r)]` and gives the logit of a boundary. It is trained, apart from the
    attention, on boundaries that are known.

    The logit of a place looks at ``window`` keys after it, of which one belongs to the place itself. Keys beyond the
    ends are 0.

    Args:
        key_dim: features of a token's keys, of all heads together.
        window: keys on each side.
        hidden: features of the codes and of the network's first layer.
        device: the device of the parameters.
        dtype: the dtype of the parameters.

    Shapes:
        key: (batch, kv_heads, length, head_dim), of which kv_heads times head_dim is key_dim.
        output: (batch, length): the logit of a chunk that starts with the token.

    Raises:
        ValueError: an argument does not fit; the message names it, what was expected and what came.

    Source: arXiv 2510.24606, section 3; the encoder is that of the authors' code.
    """

    def __init__(
        self,
        key_dim: int,
        *,
        window: int = 4,
        hidden: int = 256,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.key_dim, self.window = positive("key_dim", key_dim), positive("window", window)
        positive("hidden", hidden)
        self.over_window = nn.Conv1d(key_dim, key_dim, window, groups=key_dim, **factory)
        self.code = nn.Linear(key_dim, hidden, **factory)
        self.compare = nn.Linear(4 * hidden + 1, hidden, **factory)
        self.logit = nn.Linear(hidden, 1, **factory)

    def forward(self, key: Tensor) -> Tensor:
        """Returns the logit of a boundary ahead of each token."""
        if key.dim() != 4 or key.shape[1] * key.shape[3] != self.key_dim:
            raise ValueError(
                f"key: expected (batch, kv_heads, length, head_dim) of {self.key_dim} features a token, got a tensor "
                f"of shape {tuple(key.shape)}"
            )
        features = key.transpose(2, 3).flatten(1, 2)
        # A window is coded once, and is to the left of one place and to the right of another.
        codes = F.relu(self.over_window(F.pad(features, (self.window, self.window - 1)))).mT
        codes = F.relu(self.code(codes))
        left, right = codes[:, : -self.window], codes[:, self.window :]
        cosine = F.cosine_similarity(left, right, dim=-1, eps=1e-6)[..., None]
        both = torch.cat((left, right, (left - right).abs(), left * right, cosine), -1)
        return self.logit(F.relu(self.compare(both)))[..., 0]

    @torch.no_grad()
    def chunk_starts(self, key: Tensor, chunks: int) -> Tensor:
        """The likeliest ``chunks`` - 1 boundaries, as :func:`attnx.hierarchical_attention` takes them.

        Returns:
            (batch, chunks + 1) int32, from 0 to length. Of more chunks than tokens the last have none.
        """
        if not isinstance(chunks, torch.SymInt):
            positive("chunks", chunks)
        inside = self(key)[:, 1:]
        # Of equal logits the earlier place counts, on every device.
        order = inside.argsort(dim=1, descending=True, stable=True)[:, : chunks - 1]
        starts = F.pad(order.sort(dim=1).values + 1, (1, 0))
        return F.pad(starts, (0, chunks + 1 - starts.shape[1]), value=key.shape[2]).to(torch.int32)


@shows_projection_arguments
class HierarchicalSparseAttention(ProjectedAttention):
    """Causal multi-head attention to the tokens of a few chunks: projections around
    :func:`attnx.hierarchical_attention`.

    Chunks end where ``boundaries`` says, a :class:`BoundaryPredictor` for the keys as they are attended to, or after
    every ``chunk_length`` tokens without one. With a ``budget`` for all tokens it is causal softmax attention, and a
    module made from one (``from_softmax``) gives the same.

    Args:
        embed_dim: features of a token.
        num_heads: query heads.
        chunk_length: tokens of a chunk, or of one on average with ``boundaries``.
        budget, block_size, recent, share_heads, scale: as in :func:`attnx.hierarchical_attention`.
        boundaries: the predictor, which becomes a submodule; its parameters get no gradient here. None: chunks are
            equally long.
        {projection_arguments}

    Shapes:
        x: (batch, length, embed_dim).
        context: (batch, context_length, context_dim), of which the tokens of x are the last; x where not given.
        output: (batch, length, embed_dim).

    Raises:
        ValueError: an argument does not fit; the message names it, what was expected and what came.

    Source: arXiv 2510.24606.
    """

    instead_of_masks = "attnx.nn.SigmoidAttention or attnx.softmax_attention"

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        chunk_length: int = 64,
        budget: int = 2048,
        block_size: int = 256,
        recent: int = 64,
        share_heads: bool = False,
        scale: float | None = None,
        boundaries: BoundaryPredictor | None = None,
        **projection: Unpack[ProjectionArguments],
    ) -> None:
        super().__init__(embed_dim, num_heads, **projection)
        self.chunk_length = positive("chunk_length", chunk_length)
        self.block_size, self.recent = positive("block_size", block_size), positive("recent", recent)
        self.budget = positive("budget", budget)
        if budget < block_size + recent - 1:
            raise ValueError(
                f"budget: expected at least block_size + recent - 1 = {block_size + recent - 1}, got {budget}"
            )
        key_dim = self.num_kv_heads * self.head_dim
        if boundaries is not None and (not isinstance(boundaries, BoundaryPredictor) or boundaries.key_dim != key_dim):
            raise ValueError(
                f"boundaries: expected None or a BoundaryPredictor of {key_dim} features, got {boundaries}"
            )
        self.share_heads = share_heads
        self.scale = scale
        self.boundaries = boundaries
        self.is_causal = True

    def attend(self, query: Tensor, key: Tensor, value: Tensor, is_causal: bool, **hides: Any) -> Tensor:
        length = key.shape[2]
        chunks = max(-(-length // self.chunk_length), 1)
        if self.boundaries is not None:
            starts = self.boundaries.chunk_starts(key, chunks)
        else:
            starts = torch.arange(chunks + 1, dtype=torch.int32, device=key.device)[None] * self.chunk_length
            starts = starts.clamp(max=length)
        return hierarchical_attention(
            query,
            key,
            value,
            starts,
            budget=self.budget,
            block_size=self.block_size,
            recent=self.recent,
            share_heads=self.share_heads,
            scale=self.scale,
        )

    def options(self) -> dict[str, Any]:
        return super().options() | {
            "chunk_length": self.chunk_length,
            "budget": self.budget,
            "block_size": self.block_size,
            "recent": self.recent,
            "share_heads": self.share_heads or None,
            "scale": self.scale,
        }
