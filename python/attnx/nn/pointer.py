"""The head of a pointer network as a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnx.nn import masks
from attnx.nn.projections import positive
from attnx.pointer import pointer_argmax, pointer_log_prob, pointer_sample

__all__ = ["PointerHead"]


class PointerHead(nn.Module):
    r"""Points from tokens to places of a context: projections of both around the pointer functions, of one head.

    .. math:: L_{ij} = c \tanh\left(\frac{q_i \cdot k_j}{c \sqrt d}\right), \qquad P_{ij} \propto e^{L_{ij}}

    Masks have the names and meanings that they have in the attention modules: True hides a place. A place that was
    visited stays hidden by ``attn_mask``, which each token has of its own.

    Args:
        embed_dim: features of a token.
        context_dim: features of a place; embed_dim by default.
        head_dim: features of the projections, at most 256; embed_dim by default.
        softcap: c, or None for none.
        linear_bias: whether the two projections have a bias.
        device: the device of the parameters.
        dtype: the dtype of the parameters.

    Shapes:
        x: (batch, length, embed_dim).
        context: (batch, context_length, context_dim).
        target and what :meth:`argmax` and :meth:`sample` return: (batch, length) int64.
        attn_mask: (length, context_length) or (batch, length, context_length), bool, where True hides, or floating
            point, which is added to the logits.
        key_padding_mask: (batch, context_length), likewise.

    Raises:
        ValueError: an argument does not fit; the message names it, what was expected and what came.
        RuntimeError: likewise, from the functions.

    Sources: Vinyals et al., "Pointer Networks", arXiv 1506.03134, with a product in the place of their additive score,
    and Bello et al., "Neural Combinatorial Optimization with Reinforcement Learning", arXiv 1611.09940, for the softcap
    of 10, and for REINFORCE over what :meth:`sample` draws.
    """

    def __init__(
        self,
        embed_dim: int,
        *,
        context_dim: int | None = None,
        head_dim: int | None = None,
        softcap: float | None = 10.0,
        linear_bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.embed_dim = positive("embed_dim", embed_dim)
        self.context_dim = positive("context_dim", embed_dim if context_dim is None else context_dim)
        self.head_dim = positive("head_dim", embed_dim if head_dim is None else head_dim)
        if self.head_dim > 256:
            raise ValueError(f"head_dim: expected at most 256, got {self.head_dim}")
        if softcap is not None and not softcap > 0:
            raise ValueError(f"softcap: expected None or a number above 0, got {softcap!r}")
        self.softcap = softcap
        factory: dict[str, Any] = {"bias": linear_bias, "device": device, "dtype": dtype}
        self.q_proj = nn.Linear(self.embed_dim, self.head_dim, **factory)
        self.k_proj = nn.Linear(self.context_dim, self.head_dim, **factory)

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        target: Tensor,
        *,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Returns the log-probability of each target: (batch, length) float32 (float64 for float64), with gradients;
        it is -inf where the target is hidden. Its negative mean is the loss; other arguments are those of the class.
        """
        if not isinstance(target, Tensor) or target.shape != x.shape[:2]:
            got = tuple(target.shape) if isinstance(target, Tensor) else repr(target)
            raise ValueError(f"target: expected a tensor of shape {tuple(x.shape[:2])}, got {got}")
        query, key, hides = self._project(x, context, attn_mask, key_padding_mask)
        options = {"is_causal": is_causal, "softcap": self.softcap, **hides}
        return pointer_log_prob(query, key, target[:, None], **options)[:, 0]

    log_prob = forward

    def argmax(
        self,
        x: Tensor,
        context: Tensor,
        *,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Returns the likeliest place for each token; -1 where all are hidden. See :func:`attnx.pointer_argmax`."""
        query, key, hides = self._project(x, context, attn_mask, key_padding_mask)
        return pointer_argmax(query, key, is_causal=is_causal, softcap=self.softcap, **hides)[:, 0]

    def sample(
        self,
        x: Tensor,
        context: Tensor,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        seed: int | Tensor | None = None,
        offset: int | Tensor | None = None,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Draws a place for each token; -1 where all are hidden. See :func:`attnx.pointer_sample`, also for
        temperature, generator, seed and offset.
        """
        query, key, hides = self._project(x, context, attn_mask, key_padding_mask)
        return pointer_sample(
            query,
            key,
            temperature=temperature,
            generator=generator,
            seed=seed,
            offset=offset,
            is_causal=is_causal,
            softcap=self.softcap,
            **hides,
        )[:, 0]

    def _project(
        self, x: Tensor, context: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        for name, tokens, features in (("x", x, self.embed_dim), ("context", context, self.context_dim)):
            if tokens.dim() != 3 or tokens.shape[2] != features:
                raise ValueError(
                    f"{name}: expected (batch, length, {features}), got a tensor of shape {tuple(tokens.shape)}"
                )
        query, key = self.q_proj(x)[:, None], self.k_proj(context)[:, None]
        return query, key, masks.of_call(query, key, attn_mask, key_padding_mask)

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, head_dim={self.head_dim}, softcap={self.softcap}"
