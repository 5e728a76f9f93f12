"""The mask that transformers makes says which tokens of a batch are sequences of their own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """The sequences of a batch lie end to end here, without its padding.

    Attributes:
        index_q: int64 (total_q,): the places of queries, counted over the batch.
        index_k: int64 (total_k,): the places of keys, likewise.
        cu_seqlens_q, cu_seqlens_k: int32 (sequences + 1,): where sequences start and end.
        lengths_q, lengths_k: of the sequences, on the host.
        is_causal: whether later keys of a sequence are hidden.
        shape: batch and queries before packing.
    """

    index_q: Tensor
    index_k: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    lengths_q: list[int]
    lengths_k: list[int]
    is_causal: bool
    shape: tuple[int, int]

    @classmethod
    def of(cls, seen: Tensor, is_cross: bool) -> Packing | None:
        """Takes bool (batch, queries, keys), and returns None where a row sees what no sequence has, as with a window.

        A query is padding where it sees no key, or, among as many keys as queries and unless ``is_cross``, not itself.
        """
        batch, queries, keys = seen.shape
        place = torch.arange(keys, device=seen.device)
        start = seen.int().argmax(-1)
        end = start + seen.sum(-1)
        real = end > start
        if not torch.equal(seen, (place >= start[..., None]) & (place < end[..., None])):
            return None
        if queries == keys and not is_cross:
            real &= (start <= place) & (place < end)
        sequel = torch.zeros_like(real)  # it continues the sequence of the query before
        sequel[:, 1:] = real[:, 1:] & real[:, :-1] & (start[:, 1:] == start[:, :-1])
        is_causal = bool((sequel[:, 1:] & (end[:, 1:] != end[:, :-1])).any())

        at, query = real.nonzero(as_tuple=True)
        start, end = start[at, query], end[at, query]
        new = torch.ones_like(start, dtype=torch.bool)
        new[1:] = (at[1:] != at[:-1]) | (start[1:] != start[:-1])
        sequence = new.cumsum(0) - 1
        first = new.nonzero()[:, 0]
        lengths_q = sequence.bincount(minlength=len(first))
        last = first + lengths_q - 1
        sequence_start, sequence_end = start[last], end[last]
        overlaps = (at[first][1:] == at[first][:-1]) & (sequence_start[1:] < sequence_end[:-1])
        expected = sequence_end[sequence]
        if is_causal:
            expected = expected - (last[sequence] - torch.arange(len(at), device=at.device))
        if bool(overlaps.any()) or not torch.equal(end, expected):
            return None
        lengths_k = sequence_end - sequence_start
        cu_q, cu_k = (torch.nn.functional.pad(x.cumsum(0), (1, 0)).to(torch.int32) for x in (lengths_q, lengths_k))
        shift = (at[first] * keys + sequence_start - cu_k[:-1]).repeat_interleave(lengths_k)
        return cls(
            at * queries + query,
            shift + torch.arange(len(shift), device=shift.device),
            cu_q,
            cu_k,
            lengths_q.tolist(),
            lengths_k.tolist(),
            is_causal,
            (batch, queries),
        )

    @property
    def varlen(self) -> tuple[Tensor, Tensor, int, int]:
        """Returns what the operators for packed sequences take."""
        return self.cu_seqlens_q, self.cu_seqlens_k, max(self.lengths_q, default=0), max(self.lengths_k, default=0)

    def pack(self, query: Tensor, *keys: Tensor) -> tuple[Tensor, ...]:
        """Packs (batch, heads, length, head_dim) to (tokens, heads, head_dim): the query, then keys and values."""
        index = (self.index_q, *[self.index_k] * len(keys))
        return tuple(x.transpose(1, 2).flatten(0, 1)[i] for x, i in zip((query, *keys), index, strict=True))

    def unpack(self, output: Tensor) -> Tensor:
        """Returns (tokens, heads, value_dim) as (batch, heads, length, value_dim), which is 0 for padding."""
        batch, queries = self.shape
        rows = output.new_zeros(batch * queries, *output.shape[1:]).index_copy(0, self.index_q, output)
        return rows.unflatten(0, (batch, queries)).transpose(1, 2)
