"""Means of rows over blocks and ranges, by which sparse attentions choose."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["range_means"]


def range_means(x: Tensor, ranges: Tensor) -> Tensor:
    sums = torch.nn.functional.pad(x.double().cumsum(2), (0, 0, 1, 0))
    ranges = ranges.long().expand(len(x), -1, -1)

    def at(place: Tensor) -> Tensor:
        return sums.gather(2, place[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))

    size = (ranges[..., 1] - ranges[..., 0]).clamp(min=1)[:, None, :, None]
    return ((at(ranges[..., 1]) - at(ranges[..., 0])) / size).to(
        torch.float64 if x.dtype == torch.float64 else torch.float32
    )
