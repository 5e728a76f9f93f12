"""Disentangled attention: what stands at a distance has keys and queries of its own."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from attnx import _arguments, _shards
from attnx._layouts import takes_layouts
from attnx._terms import TermOptions, resolve_terms
from attnx.functional import Window
from attnx.relative import check_index, distances

__all__ = ["disentangled_attention", "log_distance_buckets"]

_ops = torch.ops.attnx


def log_distance_buckets(
    length_q: int, length_k: int, *, span: int, max_distance: int | None = None, device: Any = None
) -> Tensor:
    """The row of a table of 2 * span relative positions for each distance between queries and keys, as DeBERTa has it.

    Distances up to span / 2 on either side have rows of their own; those beyond share rows by their logarithm.

    Args:
        length_q, length_k: how many queries and keys there are.
        span: half of the rows: a distance of 0 has row ``span``. It is ``position_buckets`` of DeBERTa's configuration.
        max_distance: ``max_relative_positions`` of the configuration, in tokens; None: every distance has a row of its
            own, and those from ``span`` on share the last.
        device: of the result.

    Returns:
        (length_q + length_k - 1,) int64, for :func:`attnx.disentangled_attention`.

    Raises:
        RuntimeError: an argument does not fit; the message names it, what was expected and what came.

    Source: He et al., "DeBERTa: Decoding-enhanced BERT with Disentangled Attention", arXiv 2006.03654; buckets:
    "DeBERTaV3", arXiv 2111.09543.
    """
    _arguments.integer("span", span, 2 if max_distance is not None else 1)
    distance = distances(length_q, length_k, device=device)
    if max_distance is not None:
        exact = span // 2
        _arguments.integer("max_distance", max_distance, exact + 2)
        # float32, as models that are trained round here: ceil depends on it.
        size = distance.abs().clamp(min=exact)
        grown = (size / exact).log() / torch.tensor((max_distance - 1) / exact, device=device).log() * (exact - 1)
        shared = distance.sign() * (grown.ceil().long() + exact)
        distance = distance.where(distance.abs() <= exact, shared)
    return (distance + span).clamp(0, 2 * span - 1)


@takes_layouts
def disentangled_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    *,
    pos_key: Tensor | None = None,
    pos_query: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    window: Window = None,
    enable_gqa: bool = False,
    return_logsumexp: bool = False,
    **terms: Unpack[TermOptions],
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Softmax attention in which contents also meet relative positions.

    .. math:: L_{ij} = s\, (q_i \cdot k_j + q_i \cdot k^r_{\delta(i, j)} + q^r_{\delta(i, j)} \cdot k_j)

    The row :math:`\delta(i, j)` of the relative positions is ``index[i - j + length_k - 1]``. The products with
    relative positions are made once for each row, (batch, heads, length, positions) in float32, for those positions
    that the lengths reach; nothing of the size of the matrix of logits is made.

    Args:
        query: (batch, heads, length_q, head_dim).
        key: (batch, kv_heads, length_k, head_dim).
        value: (batch, kv_heads, length_k, value_dim).
        index: (length_q + length_k - 1,) int64 or int32, such as :func:`log_distance_buckets`. Numbers of a device's
            memory are not looked at: those out of range then stand for the last position.
        pos_key: (heads, positions, head_dim): keys of relative positions, which queries meet ("c2p").
        pos_query: (heads, positions, head_dim): queries of relative positions, which keys meet ("p2c"). At least one of
            the two is there.
        scale: 1/sqrt(head_dim * (1 + how many of the two there are)) by default.
        is_causal, window: as of :func:`attnx.softmax_attention`.
        return_logsumexp: also return (batch, heads, length_q) float32 (float64 for float64).
        terms: softcap, key_bias, key_mask, dropout_p, generator, seed, offset of :func:`attnx.softmax_attention`. The
            softcap caps the product of query and key alone.

    ``enable_gqa`` and other layouts of query, key and value are taken as by :func:`attnx.sigmoid_attention`.

    Returns:
        (batch, heads, length_q, value_dim) in the dtype of query, differentiable with respect to all tensors but
        index. A row that sees no key gives 0. Gradients are the same bits every time.

    Raises:
        RuntimeError: an argument does not fit; the message names it, what was expected and what came.
        NotImplementedError: no kernel for these arguments on this device.

    Source: He et al., arXiv 2006.03654.
    """
    _shards.expect_whole("disentangled_attention")
    _arguments.flag("enable_gqa", enable_gqa)
    _arguments.tensors(query=query, key=key, value=value, index=index)
    _arguments.optional_tensors(pos_key=pos_key, pos_query=pos_query)
    given = {name: x for name, x in (("pos_key", pos_key), ("pos_query", pos_query)) if x is not None}
    if not given:
        _arguments.refuse("pos_key", "a tensor where pos_query is None", None)
    heads, head_dim = query.shape[1], query.shape[3]
    positions = next(iter(given.values())).shape[-2]
    for name, x in given.items():
        if x.shape != (heads, positions, head_dim) or x.dtype != query.dtype:
            raise RuntimeError(
                f"{name}: expected {query.dtype} of shape ({heads}, {positions}, {head_dim}) like query, got {x.dtype} "
                f"of shape {tuple(x.shape)}"
            )
    check_index(index, query.shape[2] + key.shape[2] - 1, "relative positions", positions)
    scale = 1 / math.sqrt(head_dim * (1 + len(given))) if scale is None else _arguments.number("scale", scale)
    band = _arguments.flag("is_causal", is_causal), *_arguments.window(window), 0
    _, options = resolve_terms("disentangled_attention", query, key, value, **terms)
    first, last = _reached(index, positions)
    tables = _products(query, pos_key, scale, first, last), _products(key, pos_query, scale, first, last)
    index = (index - first).int()
    output, logsumexp = _ops.disentangled_attention(query, key, value, *tables, index, *options, scale, *band)
    return (output, logsumexp) if return_logsumexp else output


def _reached(index: Tensor, positions: int) -> tuple[int, int]:
    """The first and the last position that the index has, where its values are at hand."""
    if not _arguments.has_values(index):
        return 0, positions - 1
    first, last = index.aminmax()
    return int(first), int(last)


def _products(rows: Tensor, of_positions: Tensor | None, scale: float, first: int, last: int) -> Tensor | None:
    """scale * row . position for each row of each query head, in the type of sums."""
    if of_positions is None:
        return None
    dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    groups = len(of_positions) // rows.shape[1]
    rows = (rows if groups == 1 else rows.repeat_interleave(groups, 1)).to(dtype)
    return (rows @ (of_positions[:, first : last + 1].to(dtype) * scale).mT).to(dtype)
