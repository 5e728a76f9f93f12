"""Length-scaled softplus attention as a module."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from attnx.nn.arguments import ProjectionArguments, shows_projection_arguments
from attnx.nn.projections import ProjectedAttention
from attnx.softplus import softplus_attention

__all__ = ["SoftplusAttention"]


@shows_projection_arguments
class SoftplusAttention(ProjectedAttention):
    """Multi-head softplus attention: projections around :func:`attnx.softplus_attention`, LSSA and LSSAR.

    Queries, keys and values stay in (batch, length, heads, head_dim) storage; queries and keys are normalised after
    ``rotary``, in copies.

    Made from a softmax attention (``from_softmax``) its weights are others, which takes fine-tuning.

    Args:
        embed_dim: features of a token.
        num_heads: query heads.
        sharpen: the power of LSSAR, a whole number from 1 to 64; None: LSSA, without one. It has no parameters, so that
            a model may be evaluated with another one than it was trained with.
        scale: what stands in the place of ln(head_dim).
        is_causal: hide later keys; aligned bottom-right, so that the last query sees the last key.
        window: (left, right): how many keys before and after its own position a query sees; -1 for no bound.
        {projection_arguments}

    Shapes:
        x: (batch, length, embed_dim).
        context: (batch, context_length, context_dim); x where not given.
        output: (batch, length, embed_dim).

    Raises:
        ValueError: an argument does not fit; the message names it, what was expected and what came.

    Source: arXiv 2501.13428.
    """

    instead_of_masks = "attnx.nn.SigmoidAttention or attnx.softmax_attention"

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        sharpen: int | None = None,
        scale: float | None = None,
        is_causal: bool = False,
        window: tuple[int, int] = (-1, -1),
        **projection: Unpack[ProjectionArguments],
    ) -> None:
        super().__init__(embed_dim, num_heads, **projection)
        if sharpen is not None and (
            isinstance(sharpen, bool) or not isinstance(sharpen, int) or not 1 <= sharpen <= 64
        ):
            raise ValueError(f"sharpen: expected None or a whole number from 1 to 64, got {sharpen!r}")
        self.sharpen = sharpen
        self.scale = scale
        self.is_causal = is_causal
        self.window = window

    def attend(self, query: Tensor, key: Tensor, value: Tensor, is_causal: bool, **hides: Any) -> Tensor:
        output = softplus_attention(
            query, key, value, sharpen=self.sharpen, scale=self.scale, is_causal=is_causal, window=self.window
        )
        assert isinstance(output, Tensor)
        return output

    def options(self) -> dict[str, Any]:
        return super().options() | {
            "sharpen": self.sharpen,
            "scale": self.scale,
            "is_causal": self.is_causal or None,
            "window": None if self.window == (-1, -1) else self.window,
        }
