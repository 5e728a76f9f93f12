"""How important each key, or token, is by the weights that attention gives it.

These are the scores by which methods for pruning of caches and tokens, and for quantisation, choose. Each is a few
lines over :func:`attnx.attention_key_weights` and :func:`attnx.attention_row_weights`, which need no values and keep no
matrix of weights. ``logsumexp`` is what the layer's own ``softmax_attention(..., return_logsumexp=True)`` gave; without
it, it is computed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnx import _arguments
from attnx.weights import attention_key_weights, attention_row_weights

__all__ = ["cls", "h2o", "rsq", "snapkv", "tova"]


def rsq(
    query: Tensor,
    key: Tensor,
    *,
    r_min: float = 0.01,
    logsumexp: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = True,
) -> Tensor:
    """RSQ's weight of each token in the sum of x x^T by which a layer's weights are quantised.

    A token's score is the sum of what it gets from all rows of all heads. Scores are scaled to [r_min, 1] in each
    sequence, and divided by their mean. Where all scores are equal the weights are 1.

    Args:
        query: (batch, heads, length, head_dim).
        key: (batch, kv_heads, length_k, head_dim).
        r_min: the least weight before the division, in [0, 1]; 0.01 is the paper's with rotation, 0.1 without.
        logsumexp: (batch, heads, length).
        scale, is_causal: as in :func:`attnx.softmax_attention`.

    Returns:
        (batch, length_k) float32 (float64 for float64), of mean 1.

    Raises:
        RuntimeError: an argument does not fit; the message names it, what was expected and what came.

    Source: Sung et al., "RSQ: Learning from Important Tokens Leads to Better Quantized LLMs", arXiv 2503.01820.
    """
    r_min = _arguments.share("r_min", r_min, "a number from 0 to 1")
    score = attention_key_weights(query, key, logsumexp=logsumexp, scale=scale, is_causal=is_causal).sum(1)
    if score.shape[-1] == 0:
        return score
    low, high = score.amin(-1, keepdim=True), score.amax(-1, keepdim=True)
    r = r_min + (1 - r_min) * (score - low) / (high - low).where(high > low, 1)
    return (r / r.mean(-1, keepdim=True)).where(high > low, 1)


def snapkv(
    query: Tensor,
    key: Tensor,
    *,
    window: int = 64,
    kernel_size: int = 5,
    logsumexp: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """SnapKV's score of the keys before an observation window, which itself stays in the cache.

    It is the mean weight that the last ``window`` rows give a key, averaged over its neighbours and over the query
    heads of a key head.

    Args:
        query: (batch, heads, length, head_dim), of the prompt.
        key: (batch, kv_heads, length_k, head_dim).
        window: rows of the observation window, from 1 to length.
        kernel_size: keys that are averaged, an odd number; at the ends fewer count, as zeros pad them.
        logsumexp: (batch, heads, length).
        scale: as in :func:`attnx.softmax_attention`. Attention is causal.

    Returns:
        (batch, kv_heads, length_k - window) float32 (float64 for float64).

    Raises:
        RuntimeError: an argument does not fit; the message names it, what was expected and what came.

    Source: Li et al., "SnapKV: LLM Knows What You are Looking for Before Generation", arXiv 2404.14469.
    """
    length, length_k = query.shape[2], key.shape[2]
    _arguments.integer("window", window, 1, min(length, length_k))
    if _arguments.integer("kernel_size", kernel_size, 1) % 2 == 0:
        _arguments.refuse("kernel_size", "an odd number", kernel_size)
    rows = range(length - window, length)
    total = attention_key_weights(query, key, rows=rows, logsumexp=logsumexp, scale=scale, is_causal=True)
    mean = total[..., : length_k - window] / window
    if mean.shape[-1] == 0:
        return _mean_of_group(mean, key)
    pooled = torch.nn.functional.avg_pool1d(mean, kernel_size, stride=1, padding=kernel_size // 2)
    return _mean_of_group(pooled, key)


def h2o(
    query: Tensor,
    key: Tensor,
    *,
    logsumexp: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """H2O's score: the weight that a key gets from all rows, over the number of rows that see it.

    The division, without which the first keys win by being seen most, is kvpress's.

    Args:
        query: (batch, heads, length, head_dim), of the prompt.
        key: (batch, kv_heads, length_k, head_dim).
        logsumexp: (batch, heads, length).
        scale: as in :func:`attnx.softmax_attention`. Attention is causal.

    Returns:
        (batch, kv_heads, length_k) float32 (float64 for float64): the mean over the query heads of a key head. A key
        that no row sees gets 0.

    Raises:
        RuntimeError: an argument does not fit; the message names it, what was expected and what came.

    Source: Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models", arXiv
    2306.14048.
    """
    total = attention_key_weights(query, key, logsumexp=logsumexp, scale=scale, is_causal=True)
    length, length_k = query.shape[2], key.shape[2]
    # Key j is seen by the rows from j + length - length_k on.
    rows = (length_k - torch.arange(length_k, device=key.device)).clamp(max=length)
    return _mean_of_group(total / rows.clamp(min=1), key)


def tova(query: Tensor, key: Tensor, *, logsumexp: Tensor | None = None, scale: float | None = None) -> Tensor:
    """TOVA's score: the weight that the last row gives a key, the mean over all heads.

    Args:
        query: (batch, heads, length, head_dim), of one row or more.
        key: (batch, kv_heads, length_k, head_dim).
        logsumexp: (batch, heads, length).
        scale: as in :func:`attnx.softmax_attention`.

    Returns:
        (batch, length_k) float32 (float64 for float64).

    Raises:
        RuntimeError: an argument does not fit; the message names it, what was expected and what came.

    Source: Oren et al., "Transformers are Multi-State RNNs", arXiv 2401.06104.
    """
    last = _arguments.integer("query", query.shape[2], 1, expected="one row or more")
    return _row(query, key, last - 1, logsumexp, scale)


def cls(
    query: Tensor, key: Tensor, *, row: int = 0, logsumexp: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """The weight that the row of a class token gives a key, the mean over all heads.

    VTC-CLS sums it over layers; DAMRO takes the ten largest for outliers.

    Args:
        query: (batch, heads, length, head_dim) of an encoder, whose rows see all keys.
        key: (batch, kv_heads, length_k, head_dim).
        row: that of the class token.
        logsumexp: (batch, heads, length).
        scale: as in :func:`attnx.softmax_attention`.

    Returns:
        (batch, length_k) float32 (float64 for float64), the class token's own included.

    Raises:
        RuntimeError: an argument does not fit; the message names it, what was expected and what came.

    Sources: Wang et al., "[CLS] Token Tells Everything Needed for Training-free Efficient MLLMs" (VTC-CLS), arXiv
    2412.05819; Gong et al., "DAMRO", arXiv 2410.04514.
    """
    return _row(query, key, _arguments.integer("row", row, 0, query.shape[2] - 1), logsumexp, scale)


def _row(query: Tensor, key: Tensor, row: int, logsumexp: Tensor | None, scale: float | None) -> Tensor:
    weights = attention_row_weights(query, key, rows=range(row, row + 1), logsumexp=logsumexp, scale=scale)
    return weights[:, :, 0].mean(1)


def _mean_of_group(x: Tensor, key: Tensor) -> Tensor:
    """The mean over the query heads that share a key head."""
    return x.unflatten(1, (key.shape[1], -1)).mean(2)
