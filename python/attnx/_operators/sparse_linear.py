"""What is special to the operators that sort blocks into critical, marginal and negligible ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnx import _capability
from attnx._capability import expect
from attnx._operators.schema import Arguments
from attnx._operators.symbols import unguarded


def refusal(name: str, arguments: Arguments) -> str:
    """The map needs of a backend what the attention needs."""
    query, key = arguments["query"], arguments["key"]
    return _capability.refusal("sparse_linear_attention", {"query": query, "key": key, "value": key})


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
    rounding: str,
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
    count = _share_of(critical, some)
    count = count.floor() if rounding == "floor" else count.ceil()
    count = count.clamp(min=1).maximum(forced.sum(-1, keepdim=True)).minimum(some)
    least = some - _share_of(negligible, some).floor()
    by_rank = (j < count).to(torch.int8) - ((j >= least) & (j >= count)).to(torch.int8)
    labels = torch.empty(products.shape, dtype=torch.int8, device=device)
    return labels.scatter_(-1, order, by_rank.expand(products.shape))


def longest(cu_seqlens: Tensor) -> int:
    """Reads on the host how long the longest of packed sequences is."""
    return int(cu_seqlens.diff().max()) if cu_seqlens.numel() > 1 else 0


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
    expect({block_q, block_k} <= {64, 128}, "block_size", "64 or 128 on each side", (block_q, block_k))
    blocks = unguarded(-(-length_q // block_q)), unguarded(-(-length_k // block_k))
    return query.new_empty(batch, query.shape[1], *blocks, dtype=torch.int8)
