"""Rectified sparse attention: softmax over critical blocks, corrected by what pooled blocks say of the others."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from attnx import _arguments, _shards
from attnx._layouts import takes_layouts
from attnx.block_mask import BlockMask
from attnx.functional import block_sparse_attention, softmax_attention
from attnx.pooling import block_means, block_statistics, pair_products

__all__ = ["rectified_attention"]

BLOCK = 128

_ONE = 2**40  # a share of 1, as a whole number


class Pooled(NamedTuple):
    """What the pooled queries and keys say, for each block of queries of the video.

    Attributes:
        shares: (batch, heads, blocks, blocks) or, with a text, one more column: the weight that each block of keys has
            of a row, and all of the text last.
        critical: bool (batch, heads, blocks, blocks), which blocks are attended to.
        gains: bool likewise, for which of the others the mean of their values is better than nothing.
    """

    shares: Tensor
    critical: Tensor
    gains: Tensor


@takes_layouts
def rectified_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    text_length: int = 0,
    top_p: float = 0.3,
    drop: float = 0.8,
    neighbours: Tensor | None = None,
    seqused_k: Tensor | None = None,
    scale: float | Tensor | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    r"""Attention of a video over its critical blocks and a text, weighted as attention over everything would be.

    Softmax over a few blocks gives each of them too much weight. Blocks of 128 tokens are pooled to their means, and
    the softmax of a mean query over the mean keys and each single key of the text,

    .. math:: A_{IJ} = \frac{n_J \hat P_{IJ}}{\sum_J n_J \hat P_{IJ} + \tau}, \qquad A_{I,t} = \frac{\tau}{\ldots},
        \qquad \tau = \sum_{j \in t} \hat P_{Ij}

    with the n_J tokens of block J, says what share of a row it would have. Critical, C_I, are the largest shares, until
    their sum exceeds ``top_p``, and at least (1 - ``drop``) of the blocks. The text is one of the shares, and is
    attended to whatever its rank. The mean value of another block stands for it where this gains more than pooling
    errs,

    .. math:: G_{IJ}: |\bar q_I \cdot \bar k_J| > \bigl|\overline{|q - \bar q_I|} \cdot \bar k_J\bigr| +
        \bigl|\bar q_I \cdot \overline{|k - \bar k_J|}\bigr|

    so that, of O, the attention over C_I and the text,

    .. math:: O'_i = \Bigl(1 - \sum_{J \notin C_I, G_{IJ}} A_{IJ}\Bigr) O_i +
        \sum_{J \notin C_I, G_{IJ}} A_{IJ} \bar v_J

    Queries of the text see everything. With ``drop=0`` all blocks are critical, and it is softmax attention.

    Args:
        query: (batch, heads, length, head_dim): the tokens of a video, best ordered such that those of a block are
            alike, and then those of a text.
        key: (batch, kv_heads, length, head_dim); heads is a multiple of kv_heads.
        value: (batch, kv_heads, length, value_dim).
        text_length: how many of the tokens are the text's; 0 for none. Where the video's do not fill blocks, their last
            block, which then holds some of the text, is critical for all.
        top_p: a share of the weights of a row, from 0 to 1.
        drop: the share of the video's blocks, from 0 to 1, that need not be critical.
        neighbours: bool, (blocks, blocks), or (batch, heads, blocks, blocks), where the first two may be 1: blocks of
            keys that are critical besides, such as those beside the block of queries in space.
        seqused_k: (batch,) int32, as in :func:`attnx.softmax_attention`: text beyond the first so many tokens is
            padding. All of the video is in use.
        scale: of the logits; 1/sqrt(head_dim) by default; or a tensor as in :func:`attnx.sigmoid_attention`, positive.

    ``enable_gqa`` and other layouts of query, key and value are taken as by :func:`attnx.sigmoid_attention`. Pooled
    sums and shares are float32 (float64 for float64): a number for each pair of blocks and, of the text, of a block and
    a token.

    Returns:
        (batch, heads, length, value_dim) in the dtype of query. Gradients flow through O, the shares and the mean
        values; none through the choice of blocks.

    Raises:
        RuntimeError: an argument does not fit; the message names it, what was expected and what came.
        NotImplementedError: no kernel for these arguments on this device; the message names what is missing.

    Source: "Rectified SpaAttn", arXiv 2511.19835.
    """
    _shards.expect_whole("rectified_attention")
    _arguments.flag("enable_gqa", enable_gqa)
    _arguments.tensors(query=query, key=key, value=value)
    _arguments.optional_tensors(neighbours=neighbours, seqused_k=seqused_k)
    top_p = _arguments.share("top_p", top_p, "a share of the weights from 0 to 1")
    drop = _arguments.share("drop", drop)
    _check_rows(query, key)
    length = query.shape[2]
    text_length = _arguments.integer("text_length", text_length, 0, length)
    video = length - text_length
    _check_used(seqused_k, query, video)
    query, scale = _arguments.with_scale(query, scale)
    if video == 0:
        return softmax_attention(query, key, value, seqused_k=seqused_k, scale=scale)
    pooled = pool(query, key, video, top_p, drop, neighbours, seqused_k, scale)
    output = block_sparse_attention(
        query[:, :, :video],
        key,
        value,
        _lists(pooled.critical, (video, length)),
        seqused_k=seqused_k,
        scale=scale,
    )
    rows = _rectified(output, value[:, :, :video], pooled)
    if text_length:
        of_text = softmax_attention(query[:, :, video:], key, value, seqused_k=seqused_k, scale=scale)
        rows = [*rows, of_text]
    return torch.cat(rows, 2) if len(rows) > 1 else rows[0]


def pool(
    query: Tensor,
    key: Tensor,
    video: int,
    top_p: float,
    drop: float,
    neighbours: Tensor | None,
    seqused_k: Tensor | None,
    scale: float | None,
) -> Pooled:
    of_queries, off_queries = block_statistics(query[:, :, :video], BLOCK)
    of_keys, off_keys = block_statistics(key[:, :, :video], BLOCK)
    products = pair_products(of_queries, of_keys)
    with torch.no_grad():
        errors = pair_products(off_queries, of_keys).abs_() + pair_products(of_queries, off_keys).abs_()
        gains = products.abs() > errors
        del errors
    logits, blocks = products, products.shape[-1]
    if video < key.shape[2]:
        logits = torch.cat((products, _of_text(of_queries, key[:, :, video:], video, seqused_k)), -1)
    weights = (logits * (1 / math.sqrt(query.shape[3]) if scale is None else scale)).softmax(-1)
    shares = weights[..., :blocks] * _sizes(video, weights)
    if video < key.shape[2]:
        shares = torch.cat((shares, weights[..., blocks:].sum(-1, keepdim=True)), -1)
    shares = shares / shares.sum(-1, keepdim=True)
    return Pooled(shares, _critical(shares.detach(), video, key.shape[2], top_p, drop, neighbours), gains)


def _of_text(of_queries: Tensor, text: Tensor, video: int, seqused_k: Tensor | None) -> Tensor:
    """Products of mean queries and single tokens of the text, -inf for padding."""
    text = text.to(of_queries.dtype)
    if seqused_k is None:
        return pair_products(of_queries, text)
    unused = torch.arange(text.shape[2], device=text.device) >= (seqused_k - video)[:, None]
    text = text.masked_fill(unused[:, None, :, None], 0.0)  # what it holds has no effect, on gradients neither
    return pair_products(of_queries, text).masked_fill(unused[:, None, None], -torch.inf)


def _critical(shares: Tensor, video: int, length: int, top_p: float, drop: float, neighbours: Tensor | None) -> Tensor:
    blocks = -(-video // BLOCK)
    # A product that should be whole may lie a little below.
    least = (round((1 - drop) * 2**30) * blocks + 2**10) // 2**30
    largest, order = shares.sort(dim=-1, descending=True, stable=True)
    place = torch.arange(shares.shape[-1], device=shares.device)
    among_blocks = place - (order == blocks).cumsum(-1)  # the text has a share, and is no block
    # Whole numbers have one sum, whatever its order.
    sums = largest.double().mul(_ONE).round().long().cumsum(-1)
    taken = (place <= (sums <= top_p * _ONE).sum(-1, keepdim=True)) | (among_blocks < least)
    critical = torch.empty_like(taken).scatter_(-1, order, taken)[..., :blocks]
    if neighbours is not None:
        critical = critical | _checked_neighbours(neighbours, critical)
    if video < length:
        critical = critical | (_sizes(video, shares) < BLOCK)
    return critical


def _lists(critical: Tensor, lengths: tuple[int, int]) -> BlockMask:
    """The blocks of keys that the rows of the video visit: the critical ones, and all of the text."""
    of_text = -(-lengths[1] // BLOCK) - critical.shape[-1]
    return BlockMask.from_dense(torch.nn.functional.pad(critical, (0, of_text), value=True), (BLOCK, BLOCK), lengths)


def _rectified(output: Tensor, value: Tensor, pooled: Pooled) -> list[Tensor]:
    """The rows of the video, of blocks that are full and of one that may not be."""
    shares, critical, gains = pooled
    stands_in = gains & ~critical
    moved = shares[..., : critical.shape[-1]].masked_fill(~stands_in, 0.0)
    gate = 1 - moved.sum(-1, keepdim=True)
    means = block_means(value, BLOCK)
    addend = pair_products(moved, means.mT)
    full = output.shape[2] // BLOCK
    cut = full * BLOCK
    in_blocks = output[:, :, :cut].unflatten(2, (full, BLOCK))
    rows = torch.addcmul(addend[:, :, :full, None], gate[:, :, :full, None], in_blocks).flatten(2, 3)
    ragged = torch.addcmul(addend[:, :, full:], gate[:, :, full:], output[:, :, cut:])
    return [x.to(output.dtype) for x in (rows, ragged) if x.shape[2]]


def _sizes(length: int, like: Tensor) -> Tensor:
    """How many tokens each block has."""
    blocks = -(-length // BLOCK)
    return (length - BLOCK * torch.arange(blocks, device=like.device)).clamp(max=BLOCK).to(like.dtype)


def _check_rows(query: Tensor, key: Tensor) -> None:
    for name, x in (("query", query), ("key", key)):
        if x.dim() != 4:
            _arguments.refuse(name, "(batch, heads, length, head_dim)", x)
    if key.shape[2] != query.shape[2]:
        _arguments.refuse("key", f"the {query.shape[2]} tokens of query", key)
    if key.shape[1] == 0 or query.shape[1] % key.shape[1] or query.shape[3] != key.shape[3]:
        _arguments.refuse("key", f"the head_dim and a divisor of the heads of query {tuple(query.shape)}", key)


def _check_used(seqused_k: Tensor | None, query: Tensor, video: int) -> None:
    if seqused_k is None:
        return
    if seqused_k.dtype != torch.int32 or seqused_k.shape != query.shape[:1]:
        raise RuntimeError(
            f"seqused_k: expected int32 of shape ({query.shape[0]},), got {seqused_k.dtype} of shape "
            f"{tuple(seqused_k.shape)}"
        )
    if _arguments.has_values(seqused_k) and int(seqused_k.min()) < video:
        raise RuntimeError(f"seqused_k: expected at least the {video} tokens of the video, got {int(seqused_k.min())}")


def _checked_neighbours(neighbours: Tensor, critical: Tensor) -> Tensor:
    shape = critical.shape
    fits = neighbours.dim() in (2, 4) and neighbours.shape[-2:] == shape[-2:]
    fits = fits and all(n in (1, m) for n, m in zip(neighbours.shape[:-2], shape[:-2], strict=False))
    if neighbours.dtype != torch.bool or not fits:
        raise RuntimeError(
            f"neighbours: expected bool of shape {tuple(shape[-2:])} or {tuple(shape)}, got {neighbours.dtype} of "
            f"shape {tuple(neighbours.shape)}"
        )
    if neighbours.device != critical.device:
        raise RuntimeError(f"neighbours: expected a tensor on {critical.device}, got one on {neighbours.device}")
    return neighbours
