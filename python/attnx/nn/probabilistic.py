"""Probabilistic FlashAttention as a module."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor
from typing_extensions import Unpack

from attnx._scores import ScoreName
from attnx.nn.arguments import ProjectionArguments, shows_projection_arguments
from attnx.nn.projections import ProjectedAttention
from attnx.probabilistic import Keep, Mode, probabilistic_attention

__all__ = ["ProbabilisticAttention"]


@shows_projection_arguments
class ProbabilisticAttention(ProjectedAttention):
    """Multi-head attention over sampled blocks: projections around :func:`attnx.probabilistic_attention`.

    In training every call draws a round of its own from torch's generator, so that ``torch.manual_seed`` repeats them
    and activation checkpointing recomputes the same. In evaluation the attention is dense.

    Made from a softmax attention (``from_softmax``) it gives the same in evaluation without ``eval_seed``; in
    training each softmax is over the blocks of its round.

    Args:
        embed_dim: features of a token.
        num_heads: query heads.
        keep, density, mode, importance, score, scale, block_size, is_causal: as in
            :func:`attnx.probabilistic_attention`; a tensor ``keep`` becomes a buffer.
        bias: with ``score="sigmoid"``, what is added to every logit: None, ``"row"`` or a float.
        eval_seed: in evaluation, attend over the blocks of this seed's round 0 instead of all.
        {projection_arguments}

    Shapes:
        x: (batch, length, embed_dim).
        context: (batch, context_length, context_dim); x where not given.
        output: (batch, length, embed_dim).

    Raises:
        ValueError: an argument does not fit; the message names it, what was expected and what came.

    Source: Fulu Li, arXiv 2410.18441.
    """

    instead_of_masks = "attnx.block_sparse_attention with the blocks of attnx.probabilistic_block_mask"

    keep_table: Tensor | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        keep: Keep = "harmonic",
        density: float | None = None,
        mode: Mode = "bernoulli",
        importance: bool = False,
        score: ScoreName = "softmax",
        bias: float | Literal["row"] | None = None,
        scale: float | None = None,
        block_size: tuple[int, int] = (64, 64),
        is_causal: bool = False,
        eval_seed: int | None = None,
        **projection: Unpack[ProjectionArguments],
    ) -> None:
        super().__init__(embed_dim, num_heads, **projection)
        self.keep = None if isinstance(keep, Tensor) else keep
        self.register_buffer("keep_table", keep.to(projection.get("device")) if isinstance(keep, Tensor) else None)
        self.density = density
        self.mode = mode
        self.importance = importance
        self.score = score
        self.bias = bias
        self.scale = scale
        self.block_size = block_size
        self.is_causal = is_causal
        self.eval_seed = eval_seed

    def attend(self, query: Tensor, key: Tensor, value: Tensor, is_causal: bool, **hides: Any) -> Tensor:
        fixed = not self.training and self.eval_seed is not None
        return probabilistic_attention(
            query,
            key,
            value,
            # module.to(dtype) may have rounded the table: float() restores the type that the operator wants.
            keep=self.keep if self.keep_table is None else self.keep_table.float(),
            density=self.density,
            mode=self.mode,
            importance=self.importance,
            score=self.score,
            bias=self.bias,
            scale=self.scale,
            block_size=self.block_size,
            is_causal=is_causal,
            seed=self.eval_seed if fixed else None,
            offset=0 if fixed else None,
            training=self.training,
        )

    def options(self) -> dict[str, Any]:
        return super().options() | {
            "keep": self.keep,
            "density": self.density,
            "mode": self.mode,
            "importance": self.importance or None,
            "score": self.score,
            "bias": self.bias,
            "scale": self.scale,
            "block_size": self.block_size,
            "is_causal": self.is_causal or None,
            "eval_seed": self.eval_seed,
        }
