"""Means of rows over blocks and ranges, by which sparse attentions choose."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["block_means", "block_statistics", "pair_products", "range_means"]

_ops = torch.ops.attnx


def block_means(rows: Tensor, block: int) -> Tensor:
    """(batch, heads, blocks, dim), float32 or float64: the mean row of each block of so many, the last maybe fewer."""
    means: Tensor = _ops.block_means(rows, block)
    return means


def block_statistics(rows: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """The means, and how far the rows of each block are from theirs, feature by feature, on average, which have no
    gradient.
    """
    means, deviations = _ops.block_statistics(rows, block)
    return means, deviations


def range_means(rows: Tensor, ranges: Tensor) -> Tensor:
    """(batch, heads, ranges, dim), float32 or float64, without a gradient: the mean row of each range.

    Args:
        rows: (batch, heads, length, dim).
        ranges: integer (batch or 1, ranges, 2): the first row, and one past the last. One without rows gives 0.
    """
    means: Tensor = _ops.range_means(rows.detach(), ranges.to(torch.int32).contiguous())
    return means


def pair_products(of_queries: Tensor, of_keys: Tensor) -> Tensor:
    """(batch, heads, rows, columns) of (batch, heads, rows, dim) and (batch, kv_heads, columns, dim), in their dtype,
    under autocast, too.
    """
    with torch.autocast(of_queries.device.type, enabled=False):
        return (of_queries.unflatten(1, (of_keys.shape[1], -1)) @ of_keys[:, :, None].mT).flatten(1, 2)
