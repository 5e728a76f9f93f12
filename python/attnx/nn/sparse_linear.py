"""Sparse-linear attention as a module."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from attnx.nn.arguments import ProjectionArguments, shows_projection_arguments
from attnx.nn.projections import ProjectedAttention
from attnx.sparse_linear import FeatureMap, LinearScope, Rounding, sparse_linear_attention

__all__ = ["SparseLinearAttention"]

MIX_START = 3.0  # alpha = 0.953


@shows_projection_arguments
class SparseLinearAttention(ProjectedAttention):
    """Multi-head sparse-linear attention: projections around :func:`attnx.sparse_linear_attention`.

    The two parts of the operator are added as ``O^s + O^l W + w_0``, W and w_0 shared by the heads and 0 at the start:
    a new module is attention over the critical blocks alone, and learns what the marginal ones are worth.

    Made from a trained softmax attention (``from_softmax``) it needs fine-tuning, since most blocks are missing
    from the softmax; the paper does so for 2000 steps. With ``critical=1`` and ``negligible=0`` it gives the same.

    Args:
        embed_dim: features of a token.
        num_heads: query heads.
        critical, negligible, block_size, feature_map, linear_scope, is_causal, scale, smooth_k, protect, rounding: as
            in :func:`attnx.sparse_linear_attention`.
        mix: ``"projection"``, as above, or ``"sla2"``: ``alpha O^s + (1 - alpha) O^l`` with one alpha a head, the
            sigmoid of a trainable ``mix_logit`` that starts at 3 (alpha = 0.953).
        {projection_arguments}

    Shapes:
        x: (batch, length, embed_dim).
        context: (batch, context_length, context_dim); x where not given.
        output: (batch, length, embed_dim).

    Raises:
        ValueError: an argument does not fit; the message names it, what was expected and what came.

    Source: Zhang et al., arXiv 2509.24006; the mix: their SLA2.
    """

    instead_of_masks = "attnx.sparse_linear_attention_varlen for padding, and attnx.nn.SigmoidAttention otherwise"

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        critical: float = 0.05,
        negligible: float = 0.10,
        block_size: tuple[int, int] = (64, 64),
        feature_map: FeatureMap = "softmax",
        linear_scope: LinearScope = "marginal",
        mix: Literal["projection", "sla2"] = "projection",
        is_causal: bool = False,
        scale: float | None = None,
        smooth_k: bool = False,
        protect: int = 0,
        rounding: Rounding = "ceil",
        **projection: Unpack[ProjectionArguments],
    ) -> None:
        super().__init__(embed_dim, num_heads, **projection)
        device, dtype = projection.get("device"), projection.get("dtype")
        if mix not in ("projection", "sla2"):
            raise ValueError(f'mix: expected "projection" or "sla2", got {mix!r}')
        self.critical = critical
        self.negligible = negligible
        self.block_size = block_size
        self.feature_map = feature_map
        self.linear_scope = linear_scope
        self.mix = mix
        self.is_causal = is_causal
        self.scale = scale
        self.smooth_k = smooth_k
        self.protect = protect
        self.rounding = rounding
        if mix == "projection":
            self.linear_proj = nn.Linear(self.head_dim, self.head_dim, device=device, dtype=dtype)
        else:
            self.mix_logit = nn.Parameter(torch.empty(num_heads, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gives the mix of the two parts its start; the other submodules have a reset_parameters of their own."""
        if self.mix == "projection":
            nn.init.zeros_(self.linear_proj.weight)
            nn.init.zeros_(self.linear_proj.bias)
        else:
            nn.init.constant_(self.mix_logit, MIX_START)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, is_causal: bool, **hides: Any) -> Tensor:
        sparse, linear = sparse_linear_attention(
            query,
            key,
            value,
            critical=self.critical,
            negligible=self.negligible,
            block_size=self.block_size,
            feature_map=self.feature_map,
            linear_scope=self.linear_scope,
            is_causal=is_causal,
            scale=self.scale,
            smooth_k=self.smooth_k,
            protect=self.protect,
            rounding=self.rounding,
        )
        if self.mix == "projection":
            return sparse + self.linear_proj(linear)
        alpha = self.mix_logit.sigmoid().to(sparse.dtype)[:, None, None]
        return alpha * sparse + (1 - alpha) * linear

    def options(self) -> dict[str, Any]:
        return super().options() | {
            "critical": self.critical,
            "negligible": self.negligible,
            "block_size": self.block_size,
            "feature_map": self.feature_map,
            "linear_scope": self.linear_scope,
            "mix": self.mix,
            "is_causal": self.is_causal or None,
            "scale": self.scale,
            "smooth_k": self.smooth_k or None,
            "protect": self.protect or None,
            "rounding": None if self.rounding == "ceil" else self.rounding,
        }
