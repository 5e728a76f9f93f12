"""Which blocks of keys each block of queries visits, as lists."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnx._structures import Lengths, register, same

if TYPE_CHECKING:  # importing it takes longer than all of attnx
    from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

__all__ = ["BlockMask"]


@dataclass(frozen=True, eq=False)
class BlockMask:
    """Lists of blocks, in the format of ``torch.nn.attention.flex_attention.BlockMask``.

    It is a pytree: ``torch.export`` takes it as an argument. Two are equal where their lists name the same blocks in
    the same order, and sizes, lengths and devices agree.

    Attributes:
        kv_num_blocks: int32 (batch or 1, heads or 1, query_blocks): how many blocks of keys a block of queries visits.
        kv_indices: int32 (batch or 1, heads or 1, query_blocks, width): which ones, in any order, none twice. Of each
            row the first ``kv_num_blocks`` are in use; the rest may hold anything.
        block_size: queries and keys of a block, 64 or 128 each. The last block may be ragged.
        lengths: of queries and of keys, which the mask is for, and calls with others are refused; None: any lengths
            of so many blocks.
    """

    kv_num_blocks: Tensor
    kv_indices: Tensor
    block_size: tuple[int, int] = (64, 64)
    lengths: Lengths | None = None

    @classmethod
    def from_dense(
        cls, visited: Tensor, block_size: tuple[int, int] = (64, 64), lengths: Lengths | None = None
    ) -> BlockMask:
        """From a bool tensor (batch or 1, heads or 1, query_blocks, key_blocks); the lists ascend."""
        if visited.dtype != torch.bool or visited.dim() != 4:
            raise RuntimeError(
                "visited: expected a bool tensor (batch, heads, query_blocks, key_blocks), "
                f"got {visited.dtype} of shape {tuple(visited.shape)}"
            )
        if lengths is not None:
            blocks = tuple(-(-length // block) for length, block in zip(lengths, block_size, strict=True))
            if tuple(visited.shape[2:]) != blocks:
                raise RuntimeError(
                    f"lengths: expected those of {visited.shape[2]} blocks of queries and {visited.shape[3]} of keys, "
                    f"got {lengths}, which are {blocks[0]} and {blocks[1]}"
                )
        counts, indices = _lists(visited)
        return cls(counts, indices, block_size, lengths)

    def to(self, device: torch.device | str) -> BlockMask:
        """This mask where its lists are there, or else a copy there."""
        counts, indices = self.kv_num_blocks.to(device), self.kv_indices.to(device)
        if counts is self.kv_num_blocks and indices is self.kv_indices:
            return self
        return BlockMask(counts, indices, self.block_size, self.lengths)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BlockMask):
            return NotImplemented
        sizes = (self.block_size, self.lengths) == (other.block_size, other.lengths)
        if not sizes or not same(self.kv_num_blocks, other.kv_num_blocks):
            return False
        return same(self._used(), other._used())

    def __hash__(self) -> int:
        return hash((self.block_size, self.lengths, self.kv_num_blocks.shape))

    def _used(self) -> Tensor:
        """The indices as wide as the longest list, with 0 where a row does not use them."""
        counts, indices = self.kv_num_blocks, self.kv_indices
        place = torch.arange(int(counts.max()) if counts.numel() else 0, device=indices.device)
        return indices[..., : len(place)].where(place < counts[..., None], 0)

    def to_dense(self, key_blocks: int | None = None) -> Tensor:
        """The bool tensor (batch or 1, heads or 1, query_blocks, key_blocks); a mask with lengths knows key_blocks."""
        return to_dense(self.kv_num_blocks, self.kv_indices, self._key_blocks(key_blocks))

    def transposed(self, key_blocks: int | None = None) -> tuple[Tensor, Tensor]:
        """The lists of the other side: counts and indices of the blocks of queries that visit each block of keys."""
        counts, indices, _ = transpose(self.kv_num_blocks, self.kv_indices, None, self._key_blocks(key_blocks))
        return counts, indices

    def _key_blocks(self, given: int | None) -> int:
        if self.lengths is None and given is None:
            raise RuntimeError("key_blocks: expected a number where the mask has no lengths, got None")
        own = given if self.lengths is None else -(-self.lengths[1] // self.block_size[1])
        if given is not None and given != own:
            raise RuntimeError(f"key_blocks: expected {own}, as the mask has {self.lengths} tokens, got {given}")
        assert own is not None
        return own

    @classmethod
    def from_flex(cls, mask: FlexBlockMask) -> tuple[BlockMask, bool]:
        """From a mask of ``torch.nn.attention.flex_attention``, and whether it is causal.

        Its ``mask_mod`` is called for every pair of a query and a key, one row of blocks at a time: convert once, not
        at every call.

        Raises:
            RuntimeError: the mask hides other elements of its blocks than later keys (aligned bottom-right), which
                lists of blocks cannot say, or its blocks have other sizes than 64 and 128.
        """
        block_q, block_k = mask.BLOCK_SIZE
        if not {block_q, block_k} <= {64, 128}:
            raise RuntimeError(f"block_mask: expected blocks of 64 or 128 on each side, got {mask.BLOCK_SIZE}")
        key_blocks = -(-mask.seq_lengths[1] // block_k)
        partial = to_dense(mask.kv_num_blocks, mask.kv_indices, key_blocks)
        full = torch.zeros_like(partial)
        if mask.full_kv_num_blocks is not None:
            full = to_dense(mask.full_kv_num_blocks, mask.full_kv_indices, key_blocks)
        all_visible = as_causal = True
        for visible, earlier, listed, whole in _rows(mask, partial, full):
            all_visible = all_visible and bool(visible[listed].all())
            as_causal = as_causal and torch.equal(visible & listed, earlier & listed) and bool(earlier[whole].all())
        if not (all_visible or as_causal):
            raise RuntimeError(
                "block_mask: expected a mask_mod that hides nothing, or later keys (aligned bottom-right), within its "
                f"blocks, got {mask.mask_mod}"
            )
        return cls.from_dense(partial | full, (block_q, block_k), tuple(mask.seq_lengths)), not all_visible

    def to_flex(
        self, length_q: int | None = None, length_k: int | None = None, *, is_causal: bool = False
    ) -> FlexBlockMask:
        """As a mask of ``torch.nn.attention.flex_attention``, on the device of the lists.

        Args:
            length_q: queries; a mask with lengths knows them.
            length_k: keys, likewise.
            is_causal: also hide later keys, aligned bottom-right. Blocks that the diagonal cuts become partial ones,
                those beyond it are left out.
        """
        from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

        own_q, own_k = self.lengths or (None, None)
        length_q, length_k = _length("length_q", length_q, own_q), _length("length_k", length_k, own_k)
        block_q, block_k = self.block_size
        visited = self.to_dense(-(-length_k // block_k))
        offset = length_k - length_q

        every_batch, every_head = (n > 1 for n in visited.shape[:2])  # or one list serves all

        # The lists again, as flex_attention heeds them only when it is compiled.
        def listed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return visited[batch * every_batch, head * every_head, query // block_q, key // block_k]

        def listed_and_causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return listed(batch, head, query, key) & (key <= query + offset)

        partial = torch.zeros_like(visited)
        if is_causal:
            i, j = (torch.arange(n, device=visited.device) for n in visited.shape[2:])
            first, last = i * block_q + offset, ((i + 1) * block_q).clamp(max=length_q) - 1 + offset
            end = ((j + 1) * block_k).clamp(max=length_k) - 1
            visited = visited & (j * block_k <= last[:, None])
            partial = visited & (end > first[:, None])
        return FlexBlockMask.from_kv_blocks(
            *_lists(partial),
            *_lists(visited & ~partial),
            BLOCK_SIZE=self.block_size,
            mask_mod=listed_and_causal if is_causal else listed,
            seq_lengths=(length_q, length_k),
        )


def _length(name: str, given: int | None, own: int | None) -> int:
    length = given if own is None else own
    if length is None or given not in (None, length):
        expected = "a number where the mask has no lengths" if length is None else f"{length} as of the mask"
        raise RuntimeError(f"{name}: expected {expected}, got {given}")
    return length


register(BlockMask, leaves=("kv_num_blocks", "kv_indices", "lengths"), constants=("block_size",))


def _rows(mask: FlexBlockMask, partial: Tensor, full: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Of each row of blocks, as (queries, keys): what mask_mod shows, what a causal mask does, and which elements lie
    in partial and in full blocks."""
    (block_q, block_k), (length_q, length_k) = mask.BLOCK_SIZE, mask.seq_lengths
    device = partial.device
    key = torch.arange(length_k, device=device)
    shows: Callable[..., Tensor] = torch.vmap(
        torch.vmap(mask.mask_mod, in_dims=(None, None, None, 0)), in_dims=(None, None, 0, None)
    )
    for b, h, i in torch.cartesian_prod(*(torch.arange(n, device=device) for n in partial.shape[:3])):
        query = torch.arange(i * block_q, min((i + 1) * block_q, length_q), device=device)
        earlier = key <= query[:, None] + length_k - length_q
        listed, whole = (
            x[b, h, i].repeat_interleave(block_k)[:length_k].expand(len(query), -1) for x in (partial, full)
        )
        yield shows(b, h, query, key), earlier, listed, whole


def _lists(visited: Tensor) -> tuple[Tensor, Tensor]:
    indices = visited.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return visited.sum(-1, dtype=torch.int32).contiguous(), indices.to(torch.int32).contiguous()


def _targets(counts: Tensor, indices: Tensor, blocks: int) -> Tensor:
    """The indices as int64, with those that are not in use one past the last block."""
    used = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    return indices.long().where(used, blocks)


def to_dense(counts: Tensor, indices: Tensor, blocks: int) -> Tensor:
    targets = _targets(counts, indices, blocks)  # either half may serve all heads, or sequences
    dense = torch.zeros(*targets.shape[:-1], blocks + 1, dtype=torch.bool, device=indices.device)
    return dense.scatter(-1, targets, True)[..., :blocks]


def dense_bias(counts: Tensor, indices: Tensor, bias: Tensor, blocks: int) -> Tensor:
    """(batch or 1, heads or 1, rows, blocks): the bias of each listed block, 0 for the others."""
    targets = _targets(counts, indices, blocks)
    shape = torch.broadcast_shapes(bias.shape, targets.shape)
    targets = targets.expand(shape)
    dense = torch.zeros(*shape[:-1], blocks + 1, dtype=bias.dtype, device=bias.device)
    return dense.scatter(-1, targets, bias.expand(shape))[..., :blocks]


def transpose(
    counts: Tensor, indices: Tensor, bias: Tensor | None, blocks: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The lists of the other side, ascending: for each of ``blocks`` listed blocks, the rows that list it."""
    transposed = _lists(to_dense(counts, indices, blocks).mT)
    if bias is None:
        return *transposed, None
    dense = dense_bias(counts, indices, bias, blocks).mT
    return *transposed, dense.gather(-1, transposed[1].long().expand(dense.shape)).contiguous()
