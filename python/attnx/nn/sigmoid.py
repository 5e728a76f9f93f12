"""Sigmoid attention as a module."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from attnx.functional import sigmoid_attention
from attnx.nn.arguments import ProjectionArguments, shows_projection_arguments
from attnx.nn.projections import ProjectedAttention, positive

__all__ = ["SigmoidAttention"]


@shows_projection_arguments
class SigmoidAttention(ProjectedAttention):
    """Multi-head sigmoid attention: projections around :func:`attnx.sigmoid_attention`.

    Queries, keys and values stay in (batch, length, heads, head_dim) storage; the operator reads them transposed,
    without a copy. The source recommends ``output_norm`` (a hybrid norm) for long sequences: the weights of a row sum
    to what they will, and the norm takes that out. What is added to logits is float32 under any ``dtype`` but float64.

    Made from a softmax attention (``from_softmax``) its weights no longer sum to 1, which takes fine-tuning.

    Args:
        embed_dim: features of a token.
        num_heads: query heads.
        bias: what is added to every logit, as in :func:`attnx.sigmoid_attention`: None, ``"row"`` or a float; or
            ``"trainable"``, a float32 parameter ``bias`` of shape (num_heads,) that starts at -log(bias_length).
        bias_length: with ``bias="trainable"`` alone, and required there: the number of keys a row usually sees,
            so that the weights of a row start near a sum of 1.
        scale: factor on query . key, 1/sqrt(head_dim) by default.
        is_causal: hide later keys; aligned bottom-right, so that the last query sees the last key.
        window: (left, right): how many keys before and after its own position a query sees; -1 for no bound.
        alibi: subtract slope times distance from the logits. True: fixed slopes, 2^(-8 h / num_heads) for head
            h = 1, 2, ..., num_heads. ``"trainable"``: a float32 parameter ``alibi_slopes`` that starts there.
        {projection_arguments}

    Shapes:
        x: (batch, length, embed_dim).
        context: (batch, context_length, context_dim); x where not given.
        output: (batch, length, embed_dim).

    Raises:
        ValueError: an argument does not fit; the message names it, what was expected and what came.

    Source: Ramapuram et al., "Theory, Analysis, and Best Practices for Sigmoid Self-Attention", arXiv 2409.04431;
    the slopes: Press et al., "Train Short, Test Long", arXiv 2108.12409.
    """

    bias: nn.Parameter | float | Literal["row"] | None
    alibi_slopes: Tensor | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        bias: float | Literal["row", "trainable"] | None = None,
        bias_length: int | None = None,
        scale: float | None = None,
        is_causal: bool = False,
        window: tuple[int, int] = (-1, -1),
        alibi: bool | Literal["trainable"] = False,
        **projection: Unpack[ProjectionArguments],
    ) -> None:
        super().__init__(embed_dim, num_heads, **projection)
        device, dtype = projection.get("device"), projection.get("dtype")
        if bias not in (None, "row", "trainable") and (isinstance(bias, bool) or not isinstance(bias, (int, float))):
            raise ValueError(f'bias: expected None, "row", "trainable" or a float, got {bias!r}')
        if (bias == "trainable") != (bias_length is not None):
            raise ValueError(
                'bias_length: expected a length with bias="trainable" and None without, '
                f"got bias={bias!r} and bias_length={bias_length!r}"
            )
        if alibi not in (False, True, "trainable"):
            raise ValueError(f'alibi: expected False, True or "trainable", got {alibi!r}')
        self.bias_length = None if bias_length is None else positive("bias_length", bias_length)
        self.scale = scale
        self.is_causal = is_causal
        self.window = window

        # What is added to a logit is kept in the precision of the logits, whatever the projections have.
        sum_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        per_head = torch.empty(num_heads, device=device, dtype=sum_dtype)
        self.bias = nn.Parameter(per_head.clone()) if bias == "trainable" else bias
        if alibi == "trainable":
            self.alibi_slopes = nn.Parameter(per_head.clone())
        else:
            self.register_buffer("alibi_slopes", per_head if alibi else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gives ``bias`` and ``alibi_slopes`` their start; the submodules have a reset_parameters of their own."""
        with torch.no_grad():
            if self.bias_length is not None and isinstance(self.bias, Tensor):
                self.bias.fill_(-math.log(self.bias_length))
            if self.alibi_slopes is not None:
                head = torch.arange(1, self.num_heads + 1, device=self.alibi_slopes.device)
                self.alibi_slopes.copy_(torch.exp2(-8.0 * head / self.num_heads))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, is_causal: bool, **hides: Any) -> Tensor:
        return sigmoid_attention(
            query,
            key,
            value,
            bias=_sum_precision(self.bias, query) if isinstance(self.bias, Tensor) else self.bias,
            scale=self.scale,
            is_causal=is_causal,
            window=self.window,
            alibi_slopes=None if self.alibi_slopes is None else _sum_precision(self.alibi_slopes, query),
            **hides,
        )

    def options(self) -> dict[str, Any]:
        alibi = None if self.alibi_slopes is None else "trainable" if self.alibi_slopes.requires_grad else True
        return super().options() | {
            "bias": "trainable" if isinstance(self.bias, Tensor) else self.bias,
            "bias_length": self.bias_length,
            "scale": self.scale,
            "is_causal": self.is_causal or None,
            "window": None if self.window == (-1, -1) else self.window,
            "alibi": alibi,
        }


def _sum_precision(per_head: Tensor, query: Tensor) -> Tensor:
    """Undoes what ``module.to(dtype)`` did to a tensor that the operator adds to the logits."""
    return per_head.to(torch.float64 if query.dtype == torch.float64 else torch.float32)
