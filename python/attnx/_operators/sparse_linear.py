"""What is special to the operators that sort blocks into critical, marginal and negligible ones."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from attnx import _capability
from attnx._capability import expect


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


# So many tokens are pooled at once: what is made on the way would leave caches otherwise.
_POOLED_TOGETHER = 2048


def _mean_of_halves(x: Tensor) -> Tensor:
    """The mean over the last dimension but one, a power of two: one half is added to the other until one row is left.

    The mean of equal tokens is that token then, however many they are, as no sum of them is rounded.
    """
    count = x.shape[-2]
    while x.shape[-2] > 1:
        half = x.shape[-2] // 2
        x = x[..., :half, :] + x[..., half:, :]
    return x.squeeze(-2) / count


def _pool(x: Tensor, block: int) -> Tensor:
    """(batch, heads, blocks, head_dim): the mean of each block, of the ragged last one too."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    whole = x.shape[2] // block * block
    parts = x[:, :, :whole].split(_POOLED_TOGETHER if x.device.type == "cpu" else max(whole, 1), dim=2)
    means = [_mean_of_halves(part.to(dtype).unflatten(2, (-1, block))) for part in parts]
    if whole < x.shape[2]:  # float64 does not round sums of so few tokens
        means.append(x[:, :, whole:].mean(2, keepdim=True, dtype=torch.float64).to(dtype))
    return torch.cat(means, dim=2)


def _check_block_size(block_q: int, block_k: int) -> None:
    expect({block_q, block_k} <= {64, 128}, "block_size", "64 or 128 on each side", (block_q, block_k))


def _check_rows(query: Tensor, key: Tensor, rank: int) -> None:
    served = ("sparse_linear_attention", "cpu")
    row = next(row for row in _capability.table() if (row.operator, row.backend) == served)
    layout = "(batch, heads, length, head_dim)" if rank == 4 else "(rows, heads, head_dim)"
    for name, x in (("query", query), ("key", key)):
        expect(x.dim() == rank, name, f"{rank} dimensions, {layout}", f"shape {tuple(x.shape)}")
    dtype, (low, high) = _capability.dtype_name(query.dtype), row.head_dim
    expect(dtype in row.dtypes, "query", f"one of {', '.join(row.dtypes)}", dtype)
    expect(key.dtype == query.dtype, "key", f"{dtype} like query", _capability.dtype_name(key.dtype))
    expect(low <= query.shape[-1] <= high, "query", f"head_dim from {low} to {high}", query.shape[-1])
    heads, kv_heads = query.shape[1], key.shape[1]
    multiple = heads >= 1 and kv_heads >= 1 and heads % kv_heads == 0
    expect(multiple, "query", f"heads to be a multiple of the {kv_heads} heads of key", heads)
    shape = list(key.shape)
    shape[-1] = query.shape[-1]
    shape[0] = query.shape[0] if rank == 4 else shape[0]
    expect(list(key.shape) == shape, "key", f"shape {tuple(shape)}", tuple(key.shape))


def _check_options(
    dtype: torch.dtype,
    block_q: int,
    block_k: int,
    critical: float,
    negligible: float,
    smooth_k: bool,
    protect: int,
    scale: float | None,
    is_causal: bool,
) -> None:
    _check_block_size(block_q, block_k)
    for name, share in (("critical", critical), ("negligible", negligible)):
        expect(0 <= share <= 1, name, "a share of the blocks from 0 to 1", share)
    together = "shares of at most 1 together"
    expect(critical + negligible <= 1, "critical, negligible", together, f"{critical} + {negligible}")
    expect(protect >= 0, "protect", "a number of keys, 0 or more", protect)
    expect(scale is None or math.isfinite(scale), "scale", "a finite number", scale)
    in_range = scale is None or dtype == torch.float64 or abs(scale) <= torch.finfo(torch.float32).max
    expect(in_range, "scale", "a number in the range of float32", scale)


def _read_offsets(name: str, x: Tensor, rows: int, max_seqlen: int) -> list[int]:
    expect(x.dtype == torch.int32, name, "int32", _capability.dtype_name(x.dtype))
    expect(x.dim() == 1 and x.shape[0] >= 1, name, "shape (batch + 1,)", tuple(x.shape))
    ends: list[int] = x.tolist()
    expect(ends[0] == 0, name, "to start at 0", ends[0])
    expect(ends == sorted(ends), name, "rising offsets", ends)
    expect(ends[-1] == rows, name, f"to end at the number of rows, {rows}", ends[-1])
    longest = max((end - start for start, end in itertools.pairwise(ends)), default=0)
    most = name.replace("cu", "max", 1).replace("seqlens", "seqlen")
    expect(max_seqlen >= longest, most, f"at least the longest sequence, {longest}", max_seqlen)
    return ends


def block_map(query: Tensor, key: Tensor, *others: Any) -> Tensor:
    """The labels where no kernel makes them from queries and keys. It checks what the kernels' operator checks."""
    packed, options = others[:-8], others[-8:]
    _check_rows(query, key, 3 if packed else 4)
    _check_options(query.dtype, *options)
    return _block_map_varlen(query, key, *packed, *options) if packed else _block_map(query, key, *options)


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
    sign = 1.0 if scale is None else float((scale > 0) - (scale < 0))
    products = _pool(query, block_q) @ pooled.mT * sign
    return torch.ops.attnx.sparse_linear_labels(
        products, length_q, length_k, block_q, block_k, critical, negligible, is_causal, protect
    )


def longest(cu_seqlens: Tensor) -> int:
    """Reads on the host how long the longest of packed sequences is."""
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
    ends_q = _read_offsets("cu_seqlens_q", cu_seqlens_q, query.shape[0], max_seqlen_q)
    ends_k = _read_offsets("cu_seqlens_k", cu_seqlens_k, key.shape[0], max_seqlen_k)
    expect(len(ends_k) == len(ends_q), "cu_seqlens_k", f"shape {(len(ends_q),)}", (len(ends_k),))
    labels = map_labels(query, key, block_q, block_k, cu_seqlens_q, max_seqlen_q, max_seqlen_k).fill_(-1)
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
    _check_block_size(block_q, block_k)
    blocks = -(-length_q // block_q), -(-length_k // block_k)
    return query.new_empty(batch, query.shape[1], *blocks, dtype=torch.int8)
