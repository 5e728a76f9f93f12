"""Hierarchical sparse attention: blocks of queries choose chunks of earlier tokens, and attend to their tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attnx import _arguments, _shards
from attnx._layouts import takes_layouts
from attnx.pooling import pair_products, range_means
from attnx.routing import Routes, routing_attention

__all__ = ["hierarchical_attention", "hierarchical_routes"]


class _Blocks(NamedTuple):
    """Blocks of queries and the keys that they see, int64 (blocks,) each.

    Attributes:
        first: the first query.
        last: one past the last.
        recent: the first key of those that are there for every block.
        end: one past the last key that some query sees.
    """

    first: Tensor
    last: Tensor
    recent: Tensor
    end: Tensor

    @classmethod
    def of(cls, length_q: int, length_k: int, block_size: int, recent: int, device: torch.device) -> _Blocks:
        first = torch.arange(0, length_q, block_size, device=device)
        last = (first + block_size).clamp(max=length_q)
        ahead = length_k - length_q
        return cls(first, last, (first + (ahead + 1 - recent)).clamp(min=0), last + ahead)


@takes_layouts
def hierarchical_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    chunk_starts: Tensor,
    *,
    budget: int = 2048,
    block_size: int = 256,
    recent: int = 64,
    share_heads: bool = False,
    scale: float | Tensor | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    r"""Causal attention of each block of queries to the tokens of a few chunks, within a budget.

    The keys lie in chunks, such as sentences, of any lengths. A block I of queries compares its mean with that of each
    chunk C, by

    .. math:: \sqrt{|I|}\, \bar q_I \cdot \sqrt{|C|}\, \bar k_C

    and has ``budget`` tokens: first the newest ``recent`` of each of its queries, then the others of whole chunks by
    falling score, of the last one the first so many that fit. Of a chunk that reaches beyond the keys which the block
    sees, those that it sees count alone. A query attends, within the tokens of its block, to itself and what is before
    it. So every query attends to something, and to everything that it sees where that fits the budget.

    The tokens are gathered as the loop loads them: no copy of keys or values is made.

    Args:
        query: (batch, heads, length_q, head_dim), the last of length_k tokens; length_q is at most length_k.
        key: (batch, kv_heads, length_k, head_dim); heads is a multiple of kv_heads.
        value: (batch, kv_heads, length_k, value_dim).
        chunk_starts: int32 (batch or 1, chunks + 1), rising from 0 to length_k: where chunks start, and the last one
            ends. A chunk of no tokens, whose start is that of the next, is never chosen.
            :class:`attnx.nn.BoundaryPredictor` makes them. On the GPU, where it would wait for the device, nothing
            checks what they hold: with wrong ones the kernels read out of bounds. ``ATTNX_DEBUG=1`` in the environment
            has the ranges of keys and the lists that come of them checked there as on the CPU.
        budget: tokens for each block of queries, at least ``block_size`` + ``recent`` - 1, or what there are.
        block_size: queries of a block; the last may be smaller.
        recent: how many of the newest keys, itself among them, every query has for sure; 1 or more.
        share_heads: the scores are those of the mean over heads of queries and of keys, so that heads have the same
            tokens, as in the authors' code; False: each has its own.
        scale: of the logits; 1/sqrt(head_dim) by default; or a tensor as in :func:`attnx.sigmoid_attention`.

    ``enable_gqa`` and other layouts of query, key and value are taken as by :func:`attnx.sigmoid_attention`.

    Returns:
        (batch, heads, length_q, value_dim) in the dtype of query, differentiable with respect to query, key and value.
        The choice has no gradient. It depends on all queries of a block, and on nothing after it.

    Raises:
        RuntimeError: an argument does not fit; the message names it, what was expected and what came.
        NotImplementedError: no kernel for these arguments on this device; the message names what is missing.

    Source: "Long-Context Modeling with Dynamic Hierarchical Sparse Attention", arXiv 2510.24606. That the newest tokens
    are those of every query, and that chunks count as far as a block sees them, is ours.
    """
    _shards.expect_whole("hierarchical_attention")
    _arguments.flag("enable_gqa", enable_gqa)
    _arguments.tensors(query=query, key=key, value=value)
    routes = hierarchical_routes(
        query, key, chunk_starts, budget=budget, block_size=block_size, recent=recent, share_heads=share_heads
    )
    return routing_attention(query, key, value, routes, is_causal=True, scale=scale)


@torch.no_grad()
def hierarchical_routes(
    query: Tensor,
    key: Tensor,
    chunk_starts: Tensor,
    *,
    budget: int = 2048,
    block_size: int = 256,
    recent: int = 64,
    share_heads: bool = False,
) -> Routes:
    """The tokens that :func:`hierarchical_attention` attends to, for each block of queries.

    Args:
        query, key, chunk_starts, budget, block_size, recent, share_heads: as of that function.

    Returns:
        :class:`attnx.Routes`: the blocks of queries are the clusters, and the tokens chosen are their keys, for
        :func:`attnx.routing_attention` with ``is_causal=True``, of other layers, too.

    Raises:
        RuntimeError: an argument does not fit; the message names it, what was expected and what came.

    Source: arXiv 2510.24606.
    """
    _shards.expect_whole("hierarchical_routes")
    _check_rows(query, key)
    batch, heads, length_q, _ = query.shape
    length_k = key.shape[2]
    _check_starts(chunk_starts, batch, length_k, query.device)
    block_size = _arguments.integer("block_size", block_size, 1)
    recent = _arguments.integer("recent", recent, 1)
    _arguments.flag("share_heads", share_heads)
    budget = _arguments.integer("budget", budget, 1)
    forced = torch.sym_min(torch.sym_min(block_size, length_q) + recent - 1, length_k)
    if budget < forced:
        _arguments.refuse("budget", f"at least the {forced} tokens that the queries of a block have for sure", budget)
    blocks = _Blocks.of(length_q, length_k, block_size, recent, query.device)
    chunk_starts = chunk_starts.long()
    scores = _scores(query, key, chunk_starts, blocks, share_heads)
    taken = _taken(scores, chunk_starts, blocks, budget)
    tokens = _lists(taken, chunk_starts, blocks, budget, _slots(length_q, length_k, block_size, budget))
    counts = blocks.end.clamp(max=budget)
    own = torch.arange(length_q, device=query.device)
    return Routes(
        _of_heads(own, batch, heads),
        _of_heads(torch.cat((blocks.first[:1], blocks.last)), batch, heads),
        tokens.expand(batch, heads, -1).contiguous(),
        _of_heads(torch.nn.functional.pad(counts.cumsum(0), (1, 0)), batch, heads),
        length_q,
        length_k,
    )


def _of_heads(x: Tensor, batch: int, heads: int) -> Tensor:
    return x.to(torch.int32).expand(batch, heads, -1).contiguous()


def _scores(query: Tensor, key: Tensor, chunk_starts: Tensor, blocks: _Blocks, share_heads: bool) -> Tensor:
    """(batch, heads or 1, blocks, chunks): how well each chunk, as far as the block sees it, goes with the block."""
    starts, ends = chunk_starts[:, :-1], chunk_starts[:, 1:]
    # One chunk of each block may reach beyond what the block sees.
    seen = blocks.end.expand(len(starts), -1).contiguous()
    cut = torch.searchsorted(starts.contiguous(), seen) - 1
    of_cut = torch.stack((starts.gather(1, cut), seen), -1)
    of_whole = torch.stack((starts, ends), -1)
    of_queries = range_means(query, torch.stack((blocks.first, blocks.last), -1)[None])
    of_keys = range_means(key, torch.cat((of_whole, of_cut), 1))
    if share_heads:
        of_queries, of_keys = of_queries.mean(1, keepdim=True), of_keys.mean(1, keepdim=True)
    of_queries = of_queries * (blocks.last - blocks.first).to(of_queries.dtype).sqrt()[:, None]
    sizes = torch.cat((ends - starts, of_cut[..., 1] - of_cut[..., 0]), 1).to(of_keys.dtype).sqrt()
    whole, last = (of_keys * sizes[:, None, :, None]).split([starts.shape[1], cut.shape[1]], 2)
    scores = pair_products(of_queries, whole)
    last = last.repeat_interleave(of_queries.shape[1] // last.shape[1], 1)
    own = (of_queries * last).sum(-1, keepdim=True)
    return scores.scatter(3, cut[:, None, :, None].expand(own.shape), own)


def _taken(scores: Tensor, chunk_starts: Tensor, blocks: _Blocks, budget: int) -> Tensor:
    """(batch, heads or 1, blocks, chunks): how many tokens of each chunk, its first, are chosen."""
    starts, ends = chunk_starts[:, None, :-1], chunk_starts[:, None, 1:]
    sizes = (torch.minimum(ends, blocks.recent[:, None]) - starts).clamp(min=0)[:, None]
    order = scores.masked_fill(sizes == 0, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    sizes = sizes.expand(order.shape).gather(3, order)
    left = _chosen(blocks, budget)[:, None] - (sizes.cumsum(-1) - sizes)
    return torch.zeros_like(sizes).scatter_(3, order, torch.minimum(sizes, left.clamp(min=0)))


def _chosen(blocks: _Blocks, budget: int) -> Tensor:
    """How many tokens of each block come from chunks."""
    return torch.minimum(budget - (blocks.end - blocks.recent), blocks.recent)


def _slots(length_q: int, length_k: int, block_size: int, budget: int) -> int:
    """How many tokens all blocks have: each as many as it sees, at most the budget."""
    ahead, full = length_k - length_q, length_q // block_size
    small = torch.sym_min(torch.sym_max(budget - ahead, 0) // block_size, full)  # these see less than the budget
    of_ragged = (-(-length_q // block_size) - full) * torch.sym_min(length_k, budget)
    slots: int = small * (small + 1) // 2 * block_size + small * ahead + (full - small) * budget + of_ragged
    return slots


def _lists(taken: Tensor, chunk_starts: Tensor, blocks: _Blocks, budget: int, slots: int) -> Tensor:
    """(batch, heads or 1, slots) int32: the tokens of all blocks, those of each ascending."""
    counts = blocks.end.clamp(max=budget)
    offsets = (counts.cumsum(0) - counts)[:, None]
    # Runs of tokens, of which the newest of a block are the last, start at these places of the lists.
    places = torch.cat((taken.cumsum(-1) - taken, _chosen(blocks, budget)[:, None].expand(*taken.shape[:3], 1)), -1)
    places = (places + offsets).flatten(2)
    starts = chunk_starts[:, None, None, :-1].expand(*taken.shape[:2], len(counts), -1)
    starts = torch.cat((starts, blocks.recent[:, None].expand(*starts.shape[:3], 1)), -1).flatten(2)
    # Within a run, a token is its place and a number; where runs start, these numbers change. Of those that start at
    # one place all but the last are of no token.
    changes = (starts - places).diff(dim=-1, prepend=starts.new_zeros(*starts.shape[:2], 1)).to(torch.int32)
    lists = torch.zeros(*taken.shape[:2], slots + 1, dtype=torch.int32, device=taken.device)
    lists = lists.scatter_add_(2, places, changes)[..., :slots].cumsum(-1, dtype=torch.int32)
    return lists + torch.arange(slots, dtype=torch.int32, device=taken.device)


def _check_rows(query: Tensor, key: Tensor) -> None:
    _arguments.tensors(query=query, key=key)
    for name, x in (("query", query), ("key", key)):
        if x.dim() != 4:
            _arguments.refuse(name, "(batch, heads, length, head_dim)", x)
    if not 1 <= query.shape[2] <= key.shape[2]:
        _arguments.refuse("query", f"from one to the {key.shape[2]} tokens of key", query)
    batch, heads, _, dim = query.shape
    if key.shape[0] != batch or key.shape[1] == 0 or heads % key.shape[1] or key.shape[3] != dim:
        _arguments.refuse(
            "key", f"the batch, the head_dim and a divisor of the heads of query {tuple(query.shape)}", key
        )


def _check_starts(chunk_starts: Tensor, batch: int, length: int, device: torch.device) -> None:
    _arguments.tensors(chunk_starts=chunk_starts)
    shape = chunk_starts.shape
    if chunk_starts.dtype != torch.int32 or len(shape) != 2 or shape[0] not in (1, batch) or shape[1] < 2:
        raise RuntimeError(
            f"chunk_starts: expected int32 of shape ({batch} or 1, chunks + 1), got {chunk_starts.dtype} of shape "
            f"{tuple(shape)}"
        )
    if chunk_starts.device != device:
        raise RuntimeError(f"chunk_starts: expected a tensor on {device} like query, got one on {chunk_starts.device}")
    if not _arguments.has_values(chunk_starts):
        return
    if int(chunk_starts[:, 0].abs().max()) or not bool((chunk_starts[:, -1] == length).all()):
        ends = f"{chunk_starts[:, 0].tolist()} to {chunk_starts[:, -1].tolist()}"
        raise RuntimeError(f"chunk_starts: expected numbers from 0 to the {length} tokens of key, got {ends}")
    if bool((falls := chunk_starts.diff(dim=1) < 0).any()):
        b, i = falls.nonzero()[0].tolist()
        raise RuntimeError(
            f"chunk_starts: expected rising numbers, got {int(chunk_starts[b, i + 1])} after {int(chunk_starts[b, i])}"
        )
