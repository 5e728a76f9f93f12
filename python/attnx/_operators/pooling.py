"""What is special to the operators that pool rows: shapes, and the gradient of means over blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnx import _capability
from attnx._operators.schema import Arguments, sum_dtype


def refusal(name: str, arguments: Arguments) -> str:
    """They serve block-sparse attention, and need of a backend what it needs."""
    rows = arguments["rows"]
    return _capability.refusal("block_sparse_attention", {"query": rows, "key": rows, "value": rows})


def of_ranges(rows: Tensor, ranges: Tensor) -> Tensor:
    return rows.new_empty((*rows.shape[:2], ranges.shape[1], rows.shape[3]), dtype=sum_dtype(rows))


def of_blocks(rows: Tensor, block: int) -> Tensor:
    if block < 1:
        raise RuntimeError(f"block: expected 1 or more, got {block}")
    blocks = -(-rows.shape[2] // block)
    return rows.new_empty((*rows.shape[:2], blocks, rows.shape[3]), dtype=sum_dtype(rows))


def two_of_blocks(rows: Tensor, block: int) -> tuple[Tensor, Tensor]:
    return of_blocks(rows, block), of_blocks(rows, block)


def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor | tuple[Tensor, Tensor]) -> None:
    rows, ctx.block = inputs
    ctx.length, ctx.dtype = rows.shape[2], rows.dtype
    ctx.set_materialize_grads(False)
    if isinstance(output, tuple):
        ctx.mark_non_differentiable(output[1])


def gradient(ctx: Any, grad_means: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, None]:
    """Each row of a block has an equal share of the gradient of its mean."""
    if grad_means is None:
        return None, None
    first = torch.arange(0, ctx.length, ctx.block, device=grad_means.device)
    size = (ctx.length - first).clamp(max=ctx.block).to(grad_means.dtype)
    share = (grad_means / size[:, None]).to(ctx.dtype)
    return share.repeat_interleave(ctx.block, 2)[:, :, : ctx.length], None
