"""Each row has an interval of keys here: int32 (batch or 1, heads or 1, length_q or 1, 2) of a start and an end.

Such bounds say what causal, window, prefix, document and padding masks say, in memory that grows with the length alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnx._structures import Lengths

Blocks = tuple[int, int]  # queries and keys of a block


def stack(start: Tensor | int, end: Tensor | int, length_k: int, like: Tensor) -> Tensor:
    """Returns the bounds of rows (..., length_q), clipped to the keys."""
    both = [torch.as_tensor(x, device=like.device).expand(like.shape).clamp(0, length_k) for x in (start, end)]
    return torch.stack(both, -1).to(torch.int32)


def positions(lengths: Lengths, device: torch.device | str | None) -> Tensor:
    """Returns at which key each query stands, (1, 1, length_q): the last one at the last key."""
    length_q, length_k = lengths
    return (torch.arange(length_q, device=device) + length_k - length_q)[None, None]


def band(lengths: Lengths, window: tuple[int, int], device: torch.device | str | None) -> Tensor:
    at, (left, right) = positions(lengths, device), window
    return stack(0 if left < 0 else at - left, lengths[1] if right < 0 else at + right + 1, lengths[1], at)


def prefix(prefix_length: int | Tensor, lengths: Lengths, device: torch.device | str | None) -> Tensor:
    at = positions(lengths, device)
    prefix_length = torch.as_tensor(prefix_length, device=at.device).reshape(-1, 1, 1)
    end = (at + 1).maximum(prefix_length)
    return stack(0, end, lengths[1], end)


def documents(document_id: Tensor) -> Tensor:
    """Returns the bounds of documents, each of which is one run of equal numbers in (batch, length)."""
    length = document_id.shape[-1]
    place = torch.arange(length, device=document_id.device).expand(document_id.shape)
    differs = document_id[:, 1:] != document_id[:, :-1]
    edge = differs.new_ones(len(document_id), 1)
    start = place.where(torch.cat([edge, differs], -1), 0).cummax(-1).values
    end = (place + 1).where(torch.cat([differs, edge], -1), length).flip(-1).cummin(-1).values.flip(-1)
    return stack(start[:, None], end[:, None], length, place[:, None])


def of_offsets(cu_seqlens: Tensor, length: int) -> Tensor:
    """Returns the bounds of documents [cu_seqlens[n], cu_seqlens[n + 1]); rows that lie in none see nothing."""
    at = torch.arange(length, device=cu_seqlens.device)[None, None]
    after = torch.searchsorted(cu_seqlens.contiguous(), at, right=True)
    inside = (after > 0) & (after < len(cu_seqlens))
    start, end = (cu_seqlens[n.clamp(0, len(cu_seqlens) - 1)] for n in (after - 1, after))
    return stack(start.where(inside, 0), end.where(inside, 0), length, at)


def visited(bounds: Tensor, lengths: Lengths, block_size: Blocks) -> Tensor:
    """Tells in which blocks some row sees a key, (batch or 1, heads or 1, query_blocks, key_blocks)."""
    length_k, (block_q, block_k) = lengths[1], block_size
    start, end = _of_rows(bounds, lengths, block_q, 0, 0).clamp(0, length_k).unbind(-1)
    some = end > start
    first, last = (start // block_k).where(some, 0), ((end - 1) // block_k + 1).where(some, 0)
    # A row counts one up where its blocks start and one down where they end.
    changes = torch.zeros(*start.shape[:3], -(-length_k // block_k) + 1, dtype=torch.int32, device=bounds.device)
    one = torch.ones_like(first, dtype=torch.int32)
    return changes.scatter_add(-1, first, one).scatter_add(-1, last, -one).cumsum(-1)[..., :-1] > 0


def whole(bounds: Tensor, lengths: Lengths, block_size: Blocks) -> Tensor:
    """Tells likewise of which blocks every row sees every key."""
    length_k, (block_q, block_k) = lengths[1], block_size
    start, end = _of_rows(bounds, lengths, block_q, 0, length_k).unbind(-1)
    first = torch.arange(0, length_k, block_k, device=bounds.device)
    last = (first + block_k).clamp(max=length_k)
    return (start.amax(-1)[..., None] <= first) & (end.amin(-1)[..., None] >= last)


def _of_rows(bounds: Tensor, lengths: Lengths, block_q: int, start: int, end: int) -> Tensor:
    """Returns int64 (batch or 1, heads or 1, query_blocks, block_q, 2), with these bounds past the last row."""
    rows = bounds.long().expand(-1, -1, lengths[0], -1)
    past = torch.tensor([start, end], device=bounds.device).expand(*rows.shape[:2], -lengths[0] % block_q, 2)
    return torch.cat([rows, past], 2).unflatten(2, (-1, block_q))


def both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Returns what both leave."""
    if a is None or b is None:
        return b if a is None else a
    return torch.stack([a[..., 0].maximum(b[..., 0]), a[..., 1].minimum(b[..., 1])], -1)
