"""Which process computes which pairs of queries and keys around a ring."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnx.distributed._parts import Band, Shard, parts
from attnx.distributed.sequence import Layout, chunks_of

BANDS = {
    "all": Band(-1, -1, 0, False),
    "causal": Band(-1, 0, 0, False),
    "alibi": Band(-1, 0, 0, True),
    "window": Band(5, 3, 0, False),
    "far_window": Band(20, -1, -3, False),
    "ahead": Band(-1, 0, 7, False),
    "behind": Band(4, 0, -9, False),
}


def seen(places: Tensor, keys: Tensor, band: Band) -> Tensor:
    before = places[:, None] - keys
    visible = torch.ones_like(before, dtype=torch.bool)
    if band.left >= 0:
        visible &= before <= band.left
    if band.right >= 0:
        visible &= before >= -band.right
    return visible


def pairs(layout: Layout, size: int, rank: int, length_q: int, length_k: int, band: Band) -> Tensor:
    """How often each pair is computed, (queries of the rank, keys of all), as operators see the pairs of a part."""
    of_queries = chunks_of(layout, rank, size)
    computed = []
    for other in range(size):
        of_keys = chunks_of(layout, other, size)
        chunks = len(of_queries)
        counts = torch.zeros(length_q, length_k, dtype=torch.int64)
        calls = parts(Shard(of_queries, length_q // chunks), Shard(of_keys, length_k // chunks), band)
        for part in calls:
            queries, keys = (range(*x.indices(n)) for x, n in ((part.queries, length_q), (part.keys, length_k)))
            places = torch.arange(len(queries)) + len(keys) - len(queries) + part.position_offset
            cut = Band(band.left, band.right, 0, False) if part.is_cut else BANDS["all"]
            counts[part.queries, part.keys] += seen(places, torch.arange(len(keys)), cut).long()
        computed.append(counts)
    return torch.cat(computed, 1)


@pytest.mark.parametrize("name", BANDS)
@pytest.mark.parametrize("lengths", [(12, 12), (8, 12), (12, 8)], ids=str)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_every_pair_is_computed_once(layout: Layout, size: int, lengths: tuple[int, int], name: str) -> None:
    band, (length_q, length_k) = BANDS[name], lengths

    def places(length: int, rank: int) -> Tensor:
        chunks = chunks_of(layout, rank, size)
        each = length // len(chunks)
        return torch.cat([torch.arange(chunk * each, (chunk + 1) * each) for chunk in chunks])

    keys = torch.cat([places(length_k, rank) for rank in range(size)])
    for rank in range(size):
        expected = seen(places(length_q, rank) + band.shift, keys, band)
        assert torch.equal(pairs(layout, size, rank, length_q, length_k, band), expected.long())


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_zigzag_shares_causal_work_alike(size: int) -> None:
    causal = BANDS["causal"]
    work = [int(pairs("zigzag", size, rank, 12, 12, causal).sum()) for rank in range(size)]
    assert len(set(work)) == 1
    contiguous = [int(pairs("contiguous", size, rank, 12, 12, causal).sum()) for rank in range(size)]
    assert max(contiguous) > max(work)
