"""Models of other libraries, which have projections of their own, take sparse-linear attention from here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnx.sparse_linear import (
    FeatureMap,
    LinearScope,
    Rounding,
    sparse_linear_attention,
    sparse_linear_attention_varlen,
)

__all__ = ["SparseLinear"]


class SparseLinear(nn.Module):
    """Adds the two parts of sparse-linear attention as ``O^s + O^l W + w_0``.

    W and w_0, of ``linear_proj``, are shared by the heads and start at 0, as in
    :class:`attnx.nn.SparseLinearAttention`: a new module is attention over the critical blocks alone.

    Args:
        head_dim: features of a head of value.
        critical, negligible, block_size, feature_map, linear_scope, smooth_k, protect, rounding: as in
            :func:`attnx.sparse_linear_attention`.
        device, dtype: of ``linear_proj``.

    Raises:
        RuntimeError: an argument does not fit; the message names it, what was expected and what came.

    Source: Zhang et al., arXiv 2509.24006.
    """

    def __init__(
        self,
        head_dim: int,
        *,
        critical: float = 0.05,
        negligible: float = 0.10,
        block_size: tuple[int, int] = (64, 64),
        feature_map: FeatureMap = "softmax",
        linear_scope: LinearScope = "marginal",
        smooth_k: bool = False,
        protect: int = 0,
        rounding: Rounding = "ceil",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = {
            "critical": critical,
            "negligible": negligible,
            "block_size": tuple(block_size),
            "feature_map": feature_map,
            "linear_scope": linear_scope,
            "smooth_k": smooth_k,
            "protect": protect,
            "rounding": rounding,
        }
        # The operator checks its options here, before a model is trained with them.
        one = torch.zeros(1, 1, 1, 1, device="cpu", dtype=torch.float32)
        sparse_linear_attention(one, one, one, **self.options)
        self.linear_proj = nn.Linear(head_dim, head_dim, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gives the mix of the two parts its start."""
        nn.init.zeros_(self.linear_proj.weight)
        nn.init.zeros_(self.linear_proj.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """Takes (batch, heads, length, head_dim) each, and further options of the operator, such as ``is_causal``."""
        sparse, linear = sparse_linear_attention(query, key, value, **self.options, **options)
        return sparse + self.linear_proj(linear)

    def packed(
        self, query: Tensor, key: Tensor, value: Tensor, lengths: tuple[Tensor, Tensor, int, int], **options: Any
    ) -> Tensor:
        """Takes (tokens, heads, head_dim) each, and where sequences are, as the packed form of the operator does."""
        options = self.options | options
        sparse, linear = sparse_linear_attention_varlen(query, key, value, *lengths, **options)
        return sparse + self.linear_proj(linear)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={x!r}" for name, x in self.options.items())
