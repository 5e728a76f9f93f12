"""Which elements a mask of ``torch.nn.attention.flex_attention`` shows within the blocks that it lists as partial."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

_MOST_PAIRS = 1 << 20  # that mask_mod is called for at once


def shown(mask: FlexBlockMask, partial: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the places (n, 4) of some partial blocks at a time, and what each shows, (n, block_q, block_k)."""
    (block_q, block_k), (length_q, length_k) = mask.BLOCK_SIZE, mask.seq_lengths
    of_keys = torch.vmap(mask.mask_mod, in_dims=(None, None, None, 0))
    of_pairs: Callable[..., Tensor] = torch.vmap(torch.vmap(of_keys, in_dims=(None, None, 0, None)))
    row, column = (torch.arange(n, device=partial.device) for n in mask.BLOCK_SIZE)
    for places in partial.nonzero().split(max(_MOST_PAIRS // (block_q * block_k), 1)):
        if len(places) == 0:  # a mask_mod may not look at anything then
            return
        batch, head, i, j = places.unbind(1)
        query, key = i[:, None] * block_q + row, j[:, None] * block_k + column
        pairs = of_pairs(batch, head, query.clamp(max=length_q - 1), key.clamp(max=length_k - 1))
        yield places, pairs & (query < length_q)[:, :, None] & (key < length_k)[:, None]


class Rows(NamedTuple):
    """These say what each row sees of the listed blocks, in tensors (batch, heads, query_blocks, block_q)."""

    start: Tensor
    end: Tensor  # one past the last key; 0 where the row sees none
    count: Tensor

    @classmethod
    def of(cls, mask: FlexBlockMask, partial: Tensor, full: Tensor) -> Rows:
        (block_q, block_k), length_k = mask.BLOCK_SIZE, mask.seq_lengths[1]
        first = torch.arange(0, length_k, block_k, device=full.device)
        last = (first + block_k).clamp(max=length_k)
        of_full = (
            first.where(full, length_k).amin(-1),
            last.where(full, 0).amax(-1),
            (last - first).where(full, 0).sum(-1),
        )
        start, end, count = (x.flatten()[:, None].repeat(1, block_q) for x in of_full)
        for places, pairs in shown(mask, partial):
            batch, head, i, j = places.unbind(1)
            row = ((batch * full.shape[1] + head) * full.shape[2] + i)[:, None].expand(-1, block_q)
            some = pairs.any(-1)
            begins = j[:, None] * block_k + pairs.byte().argmax(-1)
            ends = (j[:, None] + 1) * block_k - pairs.byte().flip(-1).argmax(-1)
            start.scatter_reduce_(0, row, begins.where(some, length_k), "amin")
            end.scatter_reduce_(0, row, ends.where(some, 0), "amax")
            count.scatter_add_(0, row, pairs.sum(-1))
        return cls(*(x.view(*full.shape[:3], block_q) for x in (start, end, count)))

    def kind(self, listed: Tensor, lengths: tuple[int, int], block_k: int) -> str:
        """Tells whether rows see all keys of their blocks, those that are causal, an interval of them, or others."""
        length_q, length_k = lengths
        block_q = self.start.shape[3]
        sizes = torch.full(listed.shape[3:], block_k, device=listed.device)
        sizes[-1:] = length_k - (len(sizes) - 1) * block_k
        before = torch.nn.functional.pad((sizes * listed).cumsum(-1), (1, 0))
        listed = torch.nn.functional.pad(listed, (0, 1))

        def keys_before(x: Tensor) -> Tensor:
            """How many listed keys come before the key."""
            block = x // block_k
            return before.gather(-1, block) + (x - block * block_k) * listed.gather(-1, block)

        query = torch.arange(listed.shape[2] * block_q, device=listed.device).view(-1, block_q)
        real = query < length_q
        later = (query + length_k - length_q + 1).clamp(0, length_k).expand(self.end.shape)
        if bool(((self.count == before[..., -1:]) | ~real).all()):
            return "all"
        if bool((((self.end <= later) & (self.count == keys_before(later))) | ~real).all()):
            return "causal"
        between = keys_before(self.end) - keys_before(self.start)
        return "interval" if bool(((self.count == between) | (self.end == 0) | ~real).all()) else "others"

    def bounds(self, length_q: int) -> Tensor:
        start = self.start.where(self.end > 0, 0)
        return torch.stack([start, self.end], -1).flatten(2, 3)[:, :, :length_q].to(torch.int32).contiguous()


def all_elements(mask: FlexBlockMask, partial: Tensor, full: Tensor) -> Tensor:
    """Returns which pairs the mask shows, bool (batch, heads, length_q, length_k)."""
    (block_q, block_k), (length_q, length_k) = mask.BLOCK_SIZE, mask.seq_lengths
    blocks = full[:, :, :, None, :, None].repeat(1, 1, 1, block_q, 1, block_k)
    for places, pairs in shown(mask, partial):
        batch, head, i, j = places.unbind(1)
        blocks[batch, head, i, :, j] = pairs
    return blocks.flatten(4, 5).flatten(2, 3)[:, :, :length_q, :length_k]
