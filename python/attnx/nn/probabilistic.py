"""Probabilistic FlashAttention as a module."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from attnx.nn.projections import ProjectedAttention, Rotary
from attnx.probabilistic import Keep, Mode, probabilistic_attention

__all__ = ["ProbabilisticAttention"]


class ProbabilisticAttention(ProjectedAttention):
    """Multi-head attention over sampled blocks: projections around :func:`attnx.probabilistic_attention`.

    In training every call draws a round of its own from torch's generator, so that ``torch.manual_seed`` repeats them
    and activation checkpointing recomputes the same. In evaluation the attention is dense.

    Args:
        embed_dim: features of a token.
        num_heads: query heads.
        num_kv_heads: key and value heads, a divisor of num_heads; num_heads by default.
        head_dim: features of a head; embed_dim / num_heads by default.
        linear_bias: give the four projections a bias.
        keep, density, mode, importance, score, scale, block_size, is_causal: as in
            :func:`attnx.probabilistic_attention`; a tensor ``keep`` becomes a buffer.
        bias: with ``score="sigmoid"``, what is added to every logit: None, ``"row"`` or a float.
        eval_seed: in evaluation, attend over the blocks of this seed's round 0 instead of all.
        qk_norm: normalise every head's query and key over head_dim, ahead of ``rotary``.
        output_norm: normalise every head's output over head_dim, ahead of the output projection.
        norm_layer: what ``qk_norm`` and ``output_norm`` build, ``torch.nn.LayerNorm`` or ``torch.nn.RMSNorm``.
        rotary: (query, key) -> (query, key), both (batch, heads, length, head_dim), called ahead of the attention;
            a module becomes a submodule.
        device: of the parameters.
        dtype: of the parameters.

    Shapes:
        x: (batch, length, embed_dim).
        context: (batch, context_length, embed_dim); x where not given.
        output: (batch, length, embed_dim).

    Raises:
        ValueError: an argument does not fit; the message names it, what was expected and what came.

    Source: Fulu Li, arXiv 2410.18441.
    """

    keep_table: Tensor | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        linear_bias: bool = False,
        keep: Keep = "harmonic",
        density: float | None = None,
        mode: Mode = "bernoulli",
        importance: bool = False,
        score: Literal["softmax", "sigmoid"] = "softmax",
        bias: float | Literal["row"] | None = None,
        scale: float | None = None,
        block_size: tuple[int, int] = (64, 64),
        is_causal: bool = False,
        eval_seed: int | None = None,
        qk_norm: bool = False,
        output_norm: bool = False,
        norm_layer: type[nn.Module] = nn.LayerNorm,
        rotary: Rotary | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            embed_dim,
            num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            linear_bias=linear_bias,
            qk_norm=qk_norm,
            output_norm=output_norm,
            norm_layer=norm_layer,
            rotary=rotary,
            device=device,
            dtype=dtype,
        )
        self.keep = None if isinstance(keep, Tensor) else keep
        self.register_buffer("keep_table", keep if isinstance(keep, Tensor) else None)
        self.density = density
        self.mode = mode
        self.importance = importance
        self.score = score
        self.bias = bias
        self.scale = scale
        self.block_size = block_size
        self.is_causal = is_causal
        self.eval_seed = eval_seed

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
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
            is_causal=self.is_causal,
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
