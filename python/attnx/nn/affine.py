"""Affine-scaled attention as a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self, Unpack

from attnx import _arguments
from attnx.affine import affine_attention, visible_sums
from attnx.nn.arguments import ProjectionArguments, shows_projection_arguments
from attnx.nn.projections import ProjectedAttention

__all__ = ["AffineScaledAttention"]


@shows_projection_arguments
class AffineScaledAttention(ProjectedAttention):
    r"""Multi-head attention whose rows are gated, and get back in plain sums what the gate takes.

    The gate of a token and head is :math:`\alpha = \text{clamp}(0.1\, w_h \cdot x + 0.5, 0, 1)`, and
    :func:`attnx.affine_attention` adds :math:`\beta = (\bar\alpha_h - \alpha) / n` times the sum of the n values that
    the token sees, with the moving average :math:`\bar\alpha_h` of the head's gates. So the weights of a row sum to
    :math:`\bar\alpha_h`.

    The average is a buffer ``gate_average``, which starts at 0.5 and is float32, whatever the module is converted to.
    In training every backward moves it by ``1 - decay`` of the way to the mean of the gates, once it has their
    gradient: it is the same throughout a forward, its backward and a forward that activation checkpointing repeats.

    Made from a softmax attention (``from_softmax``) it gives the same until it is trained: the gates start at 0.5,
    and the projection of values is doubled, as the weights of a row sum to 0.5.

    Args:
        embed_dim: features of a token.
        num_heads: query heads.
        scale: factor on query . key, 1/sqrt(head_dim) by default.
        is_causal: hide later keys; aligned bottom-right, so that the last query sees the last key.
        window: (left, right): how many keys before and after its own position a query sees; -1 for no bound.
        decay: of the moving average, from 0 to 1.
        {projection_arguments}

    Shapes:
        x: (batch, length, embed_dim).
        context: (batch, context_length, context_dim); x where not given.
        output: (batch, length, embed_dim).

    Raises:
        ValueError: an argument does not fit; the message names it, what was expected and what came.

    Source: "Affine-Scaled Attention", arXiv 2602.23057. That hidden keys get nothing, and that a row counts the keys it
    sees, is a choice of ours.
    """

    keeps_dtype = ("gate_average",)
    instead_of_masks = "attnx.nn.SigmoidAttention or attnx.softmax_attention"

    gate_average: Tensor

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        scale: float | None = None,
        is_causal: bool = False,
        window: tuple[int, int] = (-1, -1),
        decay: float = 0.9,
        **projection: Unpack[ProjectionArguments],
    ) -> None:
        super().__init__(embed_dim, num_heads, **projection)
        if not 0 <= decay <= 1:
            raise ValueError(f"decay: expected from 0 to 1, got {decay!r}")
        device, dtype = projection.get("device"), projection.get("dtype")
        self.scale = scale
        self.is_causal = is_causal
        self.window = window
        self.decay = decay
        self.gate_proj = nn.Linear(embed_dim, num_heads, bias=False, device=device, dtype=dtype)
        self.register_buffer("gate_average", torch.empty(num_heads, dtype=torch.float32, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gives ``gate_average`` its start; the submodules have a reset_parameters of their own."""
        nn.init.constant_(self.gate_average, 0.5)

    @classmethod
    def from_softmax(cls, attention: nn.MultiheadAttention | ProjectedAttention, **options: Any) -> Self:
        module = super().from_softmax(attention, **options)
        with torch.no_grad():
            module.gate_proj.weight.zero_()
            for parameter in module.v_proj.parameters():
                parameter.mul_(2)
        return module

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        query, key, value = self.project(x, context)
        self.hides(query, key, attn_mask, key_padding_mask)
        sums = torch.float64 if query.dtype == torch.float64 else torch.float32
        gate = (0.1 * self.gate_proj(x).to(sums) + 0.5).clamp(0, 1).transpose(1, 2)
        average = self.gate_average.to(sums)[:, None]
        if self.training and torch.is_grad_enabled():
            target = gate.detach().mean((0, 2))
            gate = torch.ops.attnx.move_average_in_backward(gate, self.gate_average, target, self.decay)
        band: dict[str, Any] = {"is_causal": self.causal(is_causal), "window": _arguments.window(self.window)}
        ones = torch.ones(key.shape[2], 1, dtype=sums, device=key.device)
        count = visible_sums(ones, query.shape[2], **band, dtype=sums)[:, 0].clamp(min=1)
        addend = (average - gate) / count
        return self.merge(affine_attention(query, key, value, gate, addend, scale=self.scale, **band))

    def options(self) -> dict[str, Any]:
        return super().options() | {
            "scale": self.scale,
            "is_causal": self.is_causal or None,
            "window": None if self.window == (-1, -1) else self.window,
            "decay": self.decay,
        }
