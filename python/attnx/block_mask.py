"""Which blocks of keys each block of queries visits, as lists."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from attnx import _arguments, _flex_elements, _row_bounds
from attnx._structures import Lengths, register, same

if TYPE_CHECKING:  # importing it takes longer than all of attnx
    from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

__all__ = ["BlockMask"]

_MaskMod: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class BlockMask:
    """Lists of blocks, in the format of ``torch.nn.attention.flex_attention.BlockMask``, and what they hide within.

    It is a pytree: ``torch.export`` takes it as an argument. Two are equal where their lists name the same blocks in
    the same order, and sizes, lengths, bounds, elements and devices agree. ``a & b`` shows what both show.

    :meth:`causal`, :meth:`window`, :meth:`prefix`, :meth:`documents` and :meth:`padding` make the masks that give each
    row one interval of keys, and look at no pair of a query and a key for it.

    Attributes:
        kv_num_blocks: int32 (batch or 1, heads or 1, query_blocks): how many blocks of keys a block of queries visits.
        kv_indices: int32 (batch or 1, heads or 1, query_blocks, width): which ones, in any order, none twice. Of each
            row the first ``kv_num_blocks`` are in use; the rest may hold anything.
        block_size: queries and keys of a block, 64 or 128 each. The last block may be ragged.
        lengths: of queries and of keys, which the mask is for, and calls with others are refused; None: any lengths
            of so many blocks.
        row_bounds: int32 (batch or 1, heads or 1, length_q or 1, 2): the keys from the first up to but not with the
            second number are those that a row sees of its blocks, as in :func:`attnx.softmax_attention`; None: all.
        attn_mask: bool (batch or 1, heads or 1, length_q, length_k): the elements that a row sees of its blocks,
            besides, where no interval says so; None: all.
    """

    kv_num_blocks: Tensor
    kv_indices: Tensor
    block_size: tuple[int, int] = (64, 64)
    lengths: Lengths | None = None
    row_bounds: Tensor | None = None
    attn_mask: Tensor | None = None

    @classmethod
    def from_bounds(cls, row_bounds: Tensor, lengths: Lengths, block_size: tuple[int, int] = (64, 64)) -> BlockMask:
        """The blocks in which some row sees a key, and the bounds.

        Args:
            row_bounds: int32 (batch or 1, heads or 1, length_q or 1, 2), the start and the end of each row's keys.
            lengths: of queries and of keys.
            block_size: as of the mask.
        """
        if row_bounds.dtype != torch.int32 or row_bounds.dim() != 4 or row_bounds.shape[3] != 2:
            raise RuntimeError(
                "row_bounds: expected an int32 tensor (batch or 1, heads or 1, length_q or 1, 2), "
                f"got {row_bounds.dtype} of shape {tuple(row_bounds.shape)}"
            )
        if row_bounds.shape[2] not in (1, lengths[0]):
            raise RuntimeError(f"row_bounds: expected {lengths[0]} rows or 1, got {row_bounds.shape[2]}")
        block_size = _arguments.block_size(block_size)
        counts, indices = _lists(_row_bounds.visited(row_bounds, lengths, block_size))
        return cls(counts, indices, block_size, lengths, row_bounds)

    @classmethod
    def causal(
        cls,
        length_q: int,
        length_k: int | None = None,
        *,
        block_size: tuple[int, int] = (64, 64),
        device: torch.device | str | None = None,
    ) -> BlockMask:
        """Hides later keys, aligned bottom-right: the last query sees the last of ``length_k`` keys (``length_q``)."""
        return cls.window(length_q, length_k, (None, 0), block_size=block_size, device=device)

    @classmethod
    def window(
        cls,
        length_q: int,
        length_k: int | None = None,
        window: tuple[int | None, int | None] = (None, None),
        *,
        block_size: tuple[int, int] = (64, 64),
        device: torch.device | str | None = None,
    ) -> BlockMask:
        """Shows (left, right) keys before and after where a query stands, None or -1 for no bound on a side.

        Alignment is bottom-right, as in :func:`attnx.softmax_attention`, whose argument has the same name.
        """
        lengths = length_q, length_q if length_k is None else length_k
        return cls.from_bounds(_row_bounds.band(lengths, _arguments.window(window), device), lengths, block_size)

    @classmethod
    def prefix(
        cls,
        prefix_length: int | Tensor,
        length_q: int,
        length_k: int | None = None,
        *,
        block_size: tuple[int, int] = (64, 64),
        device: torch.device | str | None = None,
    ) -> BlockMask:
        """Shows the first ``prefix_length`` keys, a number or an integer tensor (batch,), and those before a query.

        This is the mask of a prefix language model: Raffel et al., "Exploring the Limits of Transfer Learning with a
        Unified Text-to-Text Transformer", arXiv 1910.10683, figure 4.
        """
        lengths = length_q, length_q if length_k is None else length_k
        if isinstance(prefix_length, Tensor):
            prefix_length = _whole_numbers("prefix_length", prefix_length, 1)
            device = prefix_length.device if device is None else device
        return cls.from_bounds(_row_bounds.prefix(prefix_length, lengths, device), lengths, block_size)

    @classmethod
    def documents(
        cls,
        document_id: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        length: int | None = None,
        block_size: tuple[int, int] = (64, 64),
    ) -> BlockMask:
        """Shows the keys of a query's own document.

        Args:
            document_id: integer (length,) or (batch, length): tokens of one number are a document, and stand together.
            cu_seqlens: int32 or int64 (documents + 1,), in its place: where documents start, and the last one ends.
            length: tokens, with ``cu_seqlens``, by default up to its end. Those in no document see nothing.
            block_size: as of the mask.

        Raises:
            RuntimeError: both or neither are given, tokens of a document do not stand together, or offsets fall.
        """
        if (document_id is None) == (cu_seqlens is None):
            raise RuntimeError("document_id, cu_seqlens: expected one of them, got both or neither")
        if document_id is not None:
            if length is not None:
                _arguments.refuse("length", "None beside document_id", length)
            ids = _whole_numbers("document_id", document_id, 1, 2)
            ids = ids[None] if ids.dim() == 1 else ids
            runs = (ids[:, 1:] != ids[:, :-1]).sum(-1)
            if not torch.equal(runs, (ids.sort(-1).values.diff() != 0).sum(-1)):
                raise RuntimeError("document_id: expected equal numbers to stand together, got one with others between")
            bounds = _row_bounds.documents(ids)
        else:
            assert cu_seqlens is not None
            offsets = _whole_numbers("cu_seqlens", cu_seqlens, 1).long()
            rises = len(offsets) > 0 and int(offsets[0]) >= 0 and bool((offsets.diff() >= 0).all())
            if not rises:
                raise RuntimeError("cu_seqlens: expected rising offsets from 0 on, got others")
            end = int(offsets[-1])
            length = end if length is None else length
            if length < end:
                _arguments.refuse("length", f"at least the end of the last document, {end}", length)
            bounds = _row_bounds.of_offsets(offsets, length)
        return cls.from_bounds(bounds, (bounds.shape[2], bounds.shape[2]), block_size)

    @classmethod
    def padding(
        cls,
        seqused_k: Tensor,
        length_q: int,
        length_k: int | None = None,
        *,
        leftpad_k: Tensor | None = None,
        block_size: tuple[int, int] = (64, 64),
    ) -> BlockMask:
        """Shows the keys ``leftpad_k[b]``, by default 0, up to ``seqused_k[b]``, integer (batch,), of sequence b.

        Other masks that are joined to it with ``&`` count from the first of all keys.
        """
        lengths = length_q, length_q if length_k is None else length_k
        end = _whole_numbers("seqused_k", seqused_k, 1)[:, None, None]
        start = 0 if leftpad_k is None else _whole_numbers("leftpad_k", leftpad_k, 1)[:, None, None]
        return cls.from_bounds(_row_bounds.stack(start, end, lengths[1], end), lengths, block_size)

    def __and__(self, other: BlockMask) -> BlockMask:
        """What both show; both have the same lengths, or none, and block size, and sizes of batch and heads that are
        equal or 1."""
        if not isinstance(other, BlockMask):
            return NotImplemented
        if (self.block_size, self.lengths) != (other.block_size, other.lengths):
            raise RuntimeError(
                f"&: expected masks of the same blocks and lengths, got {self.block_size} and {self.lengths} beside "
                f"{other.block_size} and {other.lengths}"
            )
        width = max(self.kv_indices.shape[-1], other.kv_indices.shape[-1])  # without lengths, that of full lists
        key_blocks = width if self.lengths is None else None
        visited = self.to_dense(key_blocks) & other.to_dense(key_blocks)
        bounds = _row_bounds.both(self.row_bounds, other.row_bounds)
        if bounds is not None and self.lengths is not None:
            visited = visited & _row_bounds.visited(bounds, self.lengths, self.block_size)
        return BlockMask(*_lists(visited), self.block_size, self.lengths, bounds, self.with_elements(other.attn_mask))

    def with_elements(self, attn_mask: Tensor | None) -> Tensor | None:
        """A mask of pairs, bool or added to logits, that also hides what ``attn_mask`` of this mask does."""
        if attn_mask is None or self.attn_mask is None:
            return self.attn_mask if attn_mask is None else attn_mask
        if attn_mask.dtype == torch.bool:
            return attn_mask & self.attn_mask
        return attn_mask.masked_fill(~self.attn_mask, -torch.inf)

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
        """This mask where its tensors are there, or else a copy there."""
        own = {name: x for name in _TENSORS if (x := getattr(self, name)) is not None}
        moved = {name: x.to(device) for name, x in own.items()}
        return self if all(moved[name] is own[name] for name in own) else replace(self, **moved)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BlockMask):
            return NotImplemented
        sizes = (self.block_size, self.lengths) == (other.block_size, other.lengths)
        if not sizes or not same(self.kv_num_blocks, other.kv_num_blocks):
            return False
        for a, b in ((self.row_bounds, other.row_bounds), (self.attn_mask, other.attn_mask)):
            if (a is None) != (b is None) or (a is not None and b is not None and not same(a, b)):
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

        Its ``mask_mod`` is called for the pairs of its partial blocks: convert once, not at every call. Where the rows
        see all of their blocks, or all but later keys (aligned bottom-right), the lists are all of the mask. Where each
        row sees an interval of them, which sliding windows, prefixes, documents, padding and what they have in common
        do, the mask gets ``row_bounds``. Otherwise it gets ``attn_mask``, which is as large as the matrix of logits.

        Raises:
            RuntimeError: the blocks have other sizes than 64 and 128.
        """
        block_q, block_k = mask.BLOCK_SIZE
        if not {block_q, block_k} <= {64, 128}:
            raise RuntimeError(f"block_mask: expected blocks of 64 or 128 on each side, got {mask.BLOCK_SIZE}")
        length_q, length_k = lengths = tuple(mask.seq_lengths)
        key_blocks = -(-length_k // block_k)
        partial = to_dense(mask.kv_num_blocks, mask.kv_indices, key_blocks)
        full = torch.zeros_like(partial)
        if mask.full_kv_num_blocks is not None:
            full = to_dense(mask.full_kv_num_blocks, mask.full_kv_indices, key_blocks)
        rows = _flex_elements.Rows.of(mask, partial, full)
        kind = rows.kind(partial | full, lengths, block_k)
        ours = cls.from_dense(partial | full, (block_q, block_k), lengths)
        if kind == "interval":
            ours = replace(ours, row_bounds=rows.bounds(length_q))
        elif kind == "others":
            ours = replace(ours, attn_mask=_flex_elements.all_elements(mask, partial, full))
        return ours, kind == "causal"

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

        shows: _MaskMod = listed_and_causal if is_causal else listed
        partial = torch.zeros_like(visited)
        if is_causal:
            i, j = (torch.arange(n, device=visited.device) for n in visited.shape[2:])
            first, last = i * block_q + offset, ((i + 1) * block_q).clamp(max=length_q) - 1 + offset
            end = ((j + 1) * block_k).clamp(max=length_k) - 1
            visited = visited & (j * block_k <= last[:, None])
            partial = visited & (end > first[:, None])
        if self.row_bounds is not None:
            shows = _and_within(shows, self.row_bounds.expand(-1, -1, length_q, -1))
            partial = partial | visited & ~_row_bounds.whole(self.row_bounds, (length_q, length_k), self.block_size)
        if self.attn_mask is not None:
            shows = _and_elements(shows, self.attn_mask)
            partial = visited
        return FlexBlockMask.from_kv_blocks(
            *_lists(partial),
            *_lists(visited & ~partial),
            BLOCK_SIZE=self.block_size,
            mask_mod=shows,
            seq_lengths=(length_q, length_k),
        )


def _length(name: str, given: int | None, own: int | None) -> int:
    length = given if own is None else own
    if length is None or given not in (None, length):
        expected = "a number where the mask has no lengths" if length is None else f"{length} as of the mask"
        raise RuntimeError(f"{name}: expected {expected}, got {given}")
    return length


_TENSORS = ("kv_num_blocks", "kv_indices", "row_bounds", "attn_mask")

register(BlockMask, leaves=(*_TENSORS, "lengths"), constants=("block_size",))


def _and_within(shows: _MaskMod, bounds: Tensor) -> _MaskMod:
    every_batch, every_head = (n > 1 for n in bounds.shape[:2])

    def within(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        start, end = (bounds[batch * every_batch, head * every_head, query, side] for side in (0, 1))
        return shows(batch, head, query, key) & (key >= start) & (key < end)

    return within


def _and_elements(shows: _MaskMod, elements: Tensor) -> _MaskMod:
    every_batch, every_head = (n > 1 for n in elements.shape[:2])

    def shown(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return shows(batch, head, query, key) & elements[batch * every_batch, head * every_head, query, key]

    return shown


def _whole_numbers(name: str, x: Tensor, *dimensions: int) -> Tensor:
    if x.dim() not in dimensions or x.dtype not in (torch.int32, torch.int64):
        raise RuntimeError(
            f"{name}: expected an int32 or int64 tensor of {' or '.join(map(str, dimensions))} dimensions, "
            f"got {x.dtype} of shape {tuple(x.shape)}"
        )
    return x


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
