"""Which blocks of keys each block of queries visits, as lists."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["BlockMask"]


@dataclass(frozen=True)
class BlockMask:
    """Lists of blocks, in the format of ``torch.nn.attention.flex_attention.BlockMask``.

    Attributes:
        kv_num_blocks: int32 (batch or 1, heads or 1, query_blocks): how many blocks of keys a block of queries visits.
        kv_indices: int32 (batch or 1, heads or 1, query_blocks, width): which ones, in any order, none twice. Of each
            row the first ``kv_num_blocks`` are in use; the rest may hold anything.
        block_size: queries and keys of a block, 64 or 128 each. The last block may be ragged.
    """

    kv_num_blocks: Tensor
    kv_indices: Tensor
    block_size: tuple[int, int] = (64, 64)

    @classmethod
    def from_dense(cls, visited: Tensor, block_size: tuple[int, int] = (64, 64)) -> BlockMask:
        """From a bool tensor (batch or 1, heads or 1, query_blocks, key_blocks); the lists ascend."""
        if visited.dtype != torch.bool or visited.dim() != 4:
            raise RuntimeError(
                "visited: expected a bool tensor (batch, heads, query_blocks, key_blocks), "
                f"got {visited.dtype} of shape {tuple(visited.shape)}"
            )
        counts, indices = _lists(visited)
        return cls(counts, indices, block_size)

    def to_dense(self, key_blocks: int) -> Tensor:
        """The bool tensor (batch or 1, heads or 1, query_blocks, key_blocks)."""
        return to_dense(self.kv_num_blocks, self.kv_indices, key_blocks)


def _lists(visited: Tensor) -> tuple[Tensor, Tensor]:
    indices = visited.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return visited.sum(-1, dtype=torch.int32).contiguous(), indices.to(torch.int32).contiguous()


def _targets(counts: Tensor, indices: Tensor, blocks: int) -> Tensor:
    """The indices as int64, with those that are not in use one past the last block."""
    used = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    return indices.long().where(used, blocks)


def to_dense(counts: Tensor, indices: Tensor, blocks: int) -> Tensor:
    dense = torch.zeros(*indices.shape[:-1], blocks + 1, dtype=torch.bool, device=indices.device)
    return dense.scatter(-1, _targets(counts, indices, blocks), True)[..., :blocks]


def dense_bias(counts: Tensor, indices: Tensor, bias: Tensor, blocks: int) -> Tensor:
    """(batch or 1, heads or 1, rows, blocks): the bias of each listed block, 0 for the others."""
    shape = torch.broadcast_shapes(bias.shape, indices.shape)
    targets = _targets(counts, indices, blocks).expand(shape)
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
