"""What is special to the operators that sort blocks into critical, marginal and negligible ones."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def labels(products: Tensor, **others: object) -> Tensor:
    return torch.empty_like(products, dtype=torch.int8, memory_format=torch.contiguous_format)


def _share_of(share: float, count: Tensor) -> Tensor:
    """The product share * count, without the last bits in which a product that should be whole is not."""
    return (share * count.double() * 2**30).round() / 2**30


def labels_by_sorting(
    products: Tensor,
    length_q: int,
    length_k: int,
    block_q: int,
    block_k: int,
    critical: float,
    negligible: float,
    is_causal: bool,
    protect: int,
) -> Tensor:
    """The labels where no kernel selects them: csrc/cpu/labels.cpp does the same by selection."""
    rows, blocks = products.shape[2:]
    device = products.device
    i, j = torch.arange(rows, device=device)[:, None], torch.arange(blocks, device=device)
    # These count the blocks that some queries of a row see, and those that every one sees.
    if is_causal:
        first, last = i * block_q, ((i + 1) * block_q).clamp(max=length_q) - 1
        seen_first, seen_last = ((x + length_k - length_q + 1).clamp(0, length_k) for x in (first, last))
        some = (seen_last + block_k - 1) // block_k
        every = torch.where(seen_first == length_k, blocks, seen_first // block_k).minimum(some - 1)
    else:
        some = every = torch.full((rows, 1), blocks, device=device)
    candidate = j < some
    forced = candidate & ((j >= every) | (j < -(-protect // block_k)))
    largest = torch.finfo(products.dtype).max
    order = products.nan_to_num(nan=largest).masked_fill(forced, math.inf).masked_fill(~candidate, -math.inf)
    order = order.argsort(dim=-1, descending=True, stable=True)
    count = _share_of(critical, some).ceil().clamp(min=1).maximum(forced.sum(-1, keepdim=True)).minimum(some)
    least = some - _share_of(negligible, some).floor()
    by_rank = (j < count).to(torch.int8) - ((j >= least) & (j >= count)).to(torch.int8)
    labels = torch.empty(products.shape, dtype=torch.int8, device=device)
    return labels.scatter_(-1, order, by_rank.expand(products.shape))


# So many tokens are pooled at once: torch converts what it sums in another dtype, and a copy of all would leave caches.
_POOLED_TOGETHER = 2048


def _pool(x: Tensor, block: int) -> Tensor:
    """(batch, heads, blocks, head_dim): the mean of each block, of the ragged last one too."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    whole = x.shape[2] // block * block
    converts = x.dtype != dtype and x.device.type == "cpu"
    parts = x[:, :, :whole].split(_POOLED_TOGETHER if converts else max(whole, 1), dim=2)
    means = [part.unflatten(2, (-1, block)).mean(3, dtype=dtype) for part in parts]
    if whole < x.shape[2]:
        means.append(x[:, :, whole:].mean(2, keepdim=True, dtype=dtype))
    return torch.cat(means, dim=2)


def block_map(*args: Any) -> Tensor:
    """The labels where no kernel makes them from queries and keys."""
    return _block_map_varlen(*args) if args[0].dim() == 3 else _block_map(*args)


def _block_map(
    query: Tensor,
    key: Tensor,
    block_q: int,
    block_k: int,
    critical: float,
    negligible: float,
    smooth_k: bool,
    protect: int,
    scale: float | None,
    is_causal: bool,
) -> Tensor:
    length_q, length_k = query.shape[2], key.shape[2]
    labels = map_labels(query, key, block_q, block_k)
    if labels.numel() == 0:
        return labels
    pooled = _pool(key, block_k)
    if smooth_k:
        pooled = pooled - key.mean(2, keepdim=True, dtype=pooled.dtype)
    pooled = pooled.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    products = _pool(query, block_q) @ pooled.mT * (1.0 if scale is None else math.copysign(1.0, scale))
    return torch.ops.attnx.sparse_linear_labels(
        products, length_q, length_k, block_q, block_k, critical, negligible, is_causal, protect
    )


def longest(cu_seqlens: Tensor) -> int:
    """The longest of packed sequences, which is read on the host."""
    return int(cu_seqlens.diff().max()) if cu_seqlens.numel() > 1 else 0


def _block_map_varlen(
    query: Tensor,
    key: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *options: Any,
) -> Tensor:
    block_q, block_k = options[:2]
    labels = map_labels(query, key, block_q, block_k, cu_seqlens_q, max_seqlen_q, max_seqlen_k).fill_(-1)
    for name, cu_seqlens, most in (("q", cu_seqlens_q, max_seqlen_q), ("k", cu_seqlens_k, max_seqlen_k)):
        if most < (needed := longest(cu_seqlens)):
            raise RuntimeError(f"max_seqlen_{name}: expected at least the longest sequence, {needed}, got {most}")
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b, (q0, q1, k0, k1) in enumerate(zip(ends_q, ends_q[1:], ends_k, ends_k[1:], strict=False)):
        q, k = (x.transpose(0, 1)[None] for x in (query[q0:q1], key[k0:k1]))
        x = _block_map(q, k, *options)
        labels[b, :, : x.shape[2], : x.shape[3]] = x[0]
    return labels


def map_labels(
    query: Tensor,
    key: Tensor,
    block_q: int,
    block_k: int,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    **others: object,
) -> Tensor:
    """Labels without values; of packed sequences as many as the longest need, or all rows do."""
    if cu_seqlens_q is None:
        batch, length_q, length_k = query.shape[0], query.shape[2], key.shape[2]
    else:
        batch = cu_seqlens_q.shape[0] - 1
        length_q, length_k = min(max_seqlen_q, query.shape[0]), min(max_seqlen_k, key.shape[0])
    blocks = -(-length_q // block_q), -(-length_k // block_k)
    return query.new_empty(batch, query.shape[1], *blocks, dtype=torch.int8)
