"""A factor of the output of each head, 0 of which hides all keys from a head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnx import _arguments, _capability
from attnx._operators.tangents import may_have_tangents


def of_heads(head_mask: Any, query: Tensor) -> Tensor | None:
    """Returns the mask as (batch or 1, heads).

    Raises:
        RuntimeError: it does not fit.
    """
    if head_mask is None:
        return None
    _check(head_mask, query, query.shape[:2])
    return head_mask if head_mask.dim() == 2 else head_mask[None]


def of_rows(head_mask: Any, query: Tensor, cu_seqlens_q: Tensor) -> Tensor | None:
    """Returns the factors of packed rows as (total_q or 1, heads).

    Raises:
        RuntimeError: the mask does not fit.
    """
    if head_mask is None or query.dim() != 3 or cu_seqlens_q.dim() != 1:
        return None  # the operator refuses what does not fit
    sequences = cu_seqlens_q.shape[0] - 1
    _check(head_mask, query, (sequences, query.shape[1]))
    if head_mask.dim() == 1:
        return head_mask[None]
    if sequences == 0:
        return None
    rows = torch.arange(query.shape[0], device=query.device, dtype=cu_seqlens_q.dtype)
    of_row = torch.searchsorted(cu_seqlens_q[1:], rows, right=True)
    return head_mask[of_row.clamp(max=sequences - 1)]  # padding gives 0 whatever its factor is


def _check(head_mask: Any, query: Tensor, sizes: Sequence[int]) -> None:
    _arguments.optional_tensors(head_mask=head_mask)
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    shape, name = tuple(sizes), _capability.dtype_name
    if head_mask.dtype != dtype or tuple(head_mask.shape) not in (shape, shape[1:]):
        raise RuntimeError(
            f"head_mask: expected {name(dtype)} of shape {shape[1:]} or {shape}, heads or sequences and heads, got "
            f"{name(head_mask.dtype)} of shape {tuple(head_mask.shape)}"
        )
    if head_mask.device != query.device:
        raise RuntimeError(f"head_mask: expected a tensor on {query.device} like query, got one on {head_mask.device}")


def bounds(mask: Tensor | None, row_bounds: Tensor | None, key: Tensor) -> Tensor | None:
    """Returns ``row_bounds`` by which heads of factor 0 see no key, so that the loop leaves them out.

    The derivative by a factor needs the output of its head, and tangents do not pass beside row_bounds. On CUDA
    row_bounds belong to a kernel of their own, which calls that need nothing else of it are faster without.
    """
    if mask is None or _wants_derivative(mask) or _capability.backend_of(key.device) != "cpu" or key.dim() != 4:
        return row_bounds
    if row_bounds is None:
        row_bounds = torch.tensor([0, key.shape[2]], dtype=torch.int32, device=key.device)
    elif row_bounds.dtype != torch.int32 or row_bounds.dim() != 4:
        return row_bounds  # the operator refuses it
    return torch.where(mask[:, :, None, None] == 0, 0, row_bounds)


def apply(mask: Tensor | None, output: Tensor) -> Tensor:
    """Multiplies the output, (batch, heads, length, dim) or packed, by the factors."""
    if mask is None:
        return output
    factors = mask[:, :, None, None] if output.dim() == 4 else mask[:, :, None]
    return (output * factors).to(output.dtype)


def hide(mask: Tensor | None, logsumexp: Tensor) -> Tensor:
    """Sets the logsumexp, (batch, heads, length) or packed, to -inf where the factor is 0."""
    if mask is None:
        return logsumexp
    return logsumexp.masked_fill((mask[:, :, None] if logsumexp.dim() == 3 else mask.mT) == 0, -torch.inf)


def _wants_derivative(mask: Tensor) -> bool:
    return (mask.requires_grad and torch.is_grad_enabled()) or may_have_tangents()
