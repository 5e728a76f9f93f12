"""Tensors as kernels meet them in the field: views into larger memory, with NaN wherever they do not reach."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Layout = Callable[[Tensor], Tensor]

_MARGIN = 3  # odd, so that no row starts at an aligned address


def surrounded(values: Tensor, order: Sequence[int] | None = None) -> Tensor:
    """``values`` as a view of a larger buffer that holds NaN before and after it along every dimension.

    Args:
        values: what the view shall hold, of any floating dtype.
        order: the dimensions of ``values`` from the slowest to the fastest in memory; as they are by default.
    """
    order = range(values.dim()) if order is None else order
    buffer = values.new_full([values.shape[d] + 2 * _MARGIN for d in order], torch.nan)
    inner = buffer[tuple(slice(_MARGIN, _MARGIN + values.shape[d]) for d in order)]
    view = inner.permute(torch.tensor(order).argsort().tolist())
    return view.copy_(values)


def contiguous_at_odd_offset(values: Tensor) -> Tensor:
    """``values`` contiguous, with NaN right before the first and right after the last element."""
    buffer = values.new_full((values.numel() + 2 * _MARGIN,), torch.nan)
    return buffer[_MARGIN:-_MARGIN].view(values.shape).copy_(values)


def expanded(values: Tensor) -> Tensor:
    """The first batch and head of ``values`` for all of them, with stride 0."""
    return surrounded(values[:1, :1]).expand(values.shape)


# (batch, heads, length, head_dim) in the storage orders that models use.
LAYOUTS: dict[str, Layout] = {
    "contiguous_at_odd_offset": contiguous_at_odd_offset,
    "sliced": surrounded,
    "batch_length_heads": lambda values: surrounded(values, (0, 2, 1, 3)),
    "length_batch_heads": lambda values: surrounded(values, (2, 0, 1, 3)),
    "expanded": expanded,
}
