"""Attention whose weights are the answer: keys, and the log-probabilities of keys, without the matrix of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnx import _arguments, _shards
from attnx._random import draw_round
from attnx._terms import resolve_terms
from attnx.functional import Window, softmax_attention

__all__ = ["pointer_argmax", "pointer_log_prob", "pointer_sample"]

_ops = torch.ops.attnx


def pointer_log_prob(
    query: Tensor,
    key: Tensor,
    target: Tensor,
    *,
    scale: float | Tensor | None = None,
    is_causal: bool = False,
    window: Window = None,
    sink: Tensor | None = None,
    softcap: float | None = None,
    attn_mask: Tensor | None = None,
    key_bias: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    r"""The log-probability with which each query points to its target key.

    .. math:: \log P_{i, y_i} = L_{i, y_i} - \log \sum_{j \in V(i)} e^{L_{ij}}, \qquad L_{ij} = s\, q_i \cdot k_j

    with softcap, attn_mask, key_bias and key_mask in the logit of the target as in those of the others. Its negative
    mean is the cross-entropy of a pointer network. Memory is linear in the lengths: the logsumexp comes from attention
    over values of one feature.

    Args:
        query: (batch, heads, length_q, head_dim).
        key: (batch, kv_heads, length_k, head_dim).
        target: (batch, heads, length_q), int64 or int32: the index of a key.
        scale, is_causal, window: as of :func:`attnx.softmax_attention`.
        sink: as of :func:`attnx.softmax_attention`: one more key that a query may point to, so that the probabilities
            of the others sum to less than 1.
        softcap, attn_mask, key_bias, key_mask: as of :func:`attnx.sigmoid_attention`.

    Returns:
        (batch, heads, length_q), float32 (float64 for float64 inputs), differentiable with respect to query, key and
        all of these numbers. A target that is hidden, by a bound, by a mask or by a key_mask of 0, gives -inf, with
        gradient 0.

    Raises:
        RuntimeError: an argument does not fit; the message names it, what was expected and what came. On the GPU,
            where it would wait for the device, and under torch.compile nothing checks the range of targets here.

    Source: Vinyals et al., "Pointer Networks", arXiv 1506.03134, with the dot product as the score.
    """
    _shards.expect_whole("pointer_log_prob")
    _arguments.tensors(query=query, key=key, target=target)
    if target.dtype not in (torch.int32, torch.int64) or target.shape != query.shape[:3]:
        raise RuntimeError(
            f"target: expected int64 or int32 of shape {tuple(query.shape[:3])}, got {target.dtype} of shape "
            f"{tuple(target.shape)}"
        )
    if target.device != query.device:
        raise RuntimeError(f"target: expected a tensor on {query.device} like query, got one on {target.device}")
    length_k = key.shape[2]
    if _arguments.has_values(target):
        low, high = int(target.min()), int(target.max())
        if not 0 <= low <= high < length_k:
            raise RuntimeError(f"target: expected keys from 0 to {length_k - 1}, got some from {low} to {high}")
    values = key.new_zeros(1, 1, 1, 1).expand(*key.shape[:3], 1)
    query, scale = _arguments.with_scale(query, scale)
    _, logsumexp = softmax_attention(
        query,
        key,
        values,
        scale=scale,
        is_causal=is_causal,
        window=window,
        sink=sink,
        softcap=softcap,
        attn_mask=attn_mask,
        key_bias=key_bias,
        key_mask=key_mask,
        return_logsumexp=True,
    )
    sums, target = logsumexp.dtype, target.long()
    logit = _product(query.to(sums), key, target) * (1 / math.sqrt(query.shape[3]) if scale is None else scale)
    if softcap is not None and softcap < math.inf:
        logit = softcap * (logit / softcap).tanh()
    seen = _in_band(target, length_k, is_causal, window)
    if attn_mask is not None and attn_mask.shape[-1] == 1:
        attn_mask = attn_mask.expand(*attn_mask.shape[:-1], length_k)
    for added in (attn_mask, None if key_bias is None else key_bias[:, :, None]):
        if added is None:
            continue
        number = _of_target(added, target)
        if number.dtype == torch.bool:
            seen = seen & number
        else:
            logit, seen = logit + number.to(sums), seen & (number != -torch.inf)
    if key_mask is not None:
        share = _of_target(key_mask[:, :, None], target).to(sums)
        logit, seen = logit + share.where(share > 0, 1.0).log(), seen & (share > 0)
    return (logit - logsumexp.where(seen, 0.0)).where(seen, -torch.inf)


def pointer_argmax(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | Tensor | None = None,
    is_causal: bool = False,
    window: Window = None,
    softcap: float | None = None,
    attn_mask: Tensor | None = None,
    key_bias: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """The key to which each query points with the largest probability.

    Args:
        query: (batch, heads, length_q, head_dim).
        key: (batch, kv_heads, length_k, head_dim); heads is a multiple of kv_heads.
        scale, is_causal, window: as of :func:`attnx.softmax_attention`.
        softcap, attn_mask, key_bias, key_mask: as of :func:`attnx.sigmoid_attention`.

    Returns:
        (batch, heads, length_q) int64: the index of the key with the largest logit, of equals the lowest; -1 where a
        query sees no key. Memory is linear in the lengths. It has no gradient.

    Raises:
        RuntimeError: an argument does not fit; the message names it, what was expected and what came.
        NotImplementedError: no kernel for these arguments on this device; the message names what is missing.

    Source: Vinyals et al., "Pointer Networks", arXiv 1506.03134.
    """
    _shards.expect_whole("pointer_argmax")
    options = (scale, is_causal, window, softcap, attn_mask, key_bias, key_mask)
    return _choose(query, key, 0.0, (None, None), *options)


def pointer_sample(
    query: Tensor,
    key: Tensor,
    *,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
    scale: float | Tensor | None = None,
    is_causal: bool = False,
    window: Window = None,
    softcap: float | None = None,
    attn_mask: Tensor | None = None,
    key_bias: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    r"""A key that each query points to, drawn with the probabilities of :func:`attnx.pointer_log_prob`.

    .. math:: \arg\max_j\, L_{ij} + T g_{ij}, \qquad g_{ij} = -\ln(-\ln(1 - u_{ij}))

    with u uniform in (0, 1) has key j with the probability :math:`e^{L_{ij} / T} / \sum_k e^{L_{ik} / T}`.

    Args:
        query: (batch, heads, length_q, head_dim).
        key: (batch, kv_heads, length_k, head_dim); heads is a multiple of kv_heads.
        temperature: T, from 0, which is :func:`attnx.pointer_argmax`, on.
        generator: draws seed and offset where they are not given; by default torch's own of query's device.
        seed: an int or an int64 tensor of shape (), on query's device: with offset it decides all u, on every backend
            alike, and in :mod:`attnx.reference`.
        offset: the round, from 0 to 2^32 - 1, likewise; a new one at each step draws others.
        scale, is_causal, window: as of :func:`attnx.softmax_attention`.
        softcap, attn_mask, key_bias, key_mask: as of :func:`attnx.sigmoid_attention`.

    Returns:
        (batch, heads, length_q) int64: the index of a key, -1 where a query sees none. Memory is linear in the lengths.
        It has no gradient; that of the log-probability of what was drawn is what REINFORCE takes.

    Raises:
        RuntimeError: an argument does not fit; the message names it, what was expected and what came.
        NotImplementedError: no kernel for these arguments on this device; the message names what is missing.

    Sources: Bello et al., "Neural Combinatorial Optimization with Reinforcement Learning", arXiv 1611.09940, draw
    routes from such probabilities; Maddison et al., "A* Sampling", arXiv 1411.0030, draw by the largest of perturbed
    logits.
    """
    _shards.expect_whole("pointer_sample")
    temperature = _arguments.number("temperature", temperature, "a finite number from 0 on")
    _arguments.tensors(query=query, key=key)
    drawn: tuple[Tensor | None, Tensor | None] = (None, None)
    if temperature != 0:
        drawn = draw_round(generator, seed, offset, query.device)
    options = (scale, is_causal, window, softcap, attn_mask, key_bias, key_mask)
    return _choose(query, key, temperature, drawn, *options)


def _choose(
    query: Tensor,
    key: Tensor,
    temperature: float,
    drawn: tuple[Tensor | None, Tensor | None],
    scale: float | Tensor | None,
    is_causal: bool,
    window: Window,
    softcap: float | None,
    attn_mask: Tensor | None,
    key_bias: Tensor | None,
    key_mask: Tensor | None,
) -> Tensor:
    _arguments.tensors(query=query, key=key)
    query, scale = _arguments.with_scale(query, scale)
    band = _arguments.flag("is_causal", is_causal), *_arguments.window(window)
    (attn_mask, *_), (softcap, key_bias, key_mask, *_) = resolve_terms(
        "pointer_sample",
        query,
        key,
        key,
        softcap=softcap,
        attn_mask=attn_mask,
        key_bias=key_bias,
        key_mask=key_mask,
    )
    return _ops.pointer_sample(query, key, softcap, attn_mask, key_bias, key_mask, temperature, *drawn, scale, *band, 0)


def _product(query: Tensor, key: Tensor, target: Tensor) -> Tensor:
    """Returns the product of each query and its target."""
    group = query.shape[1] // key.shape[1]
    index = target.unflatten(1, (-1, group)).flatten(2)[..., None].expand(-1, -1, -1, key.shape[3])
    pointed = key.gather(2, index).unflatten(2, (group, query.shape[2])).flatten(1, 2)
    return (query * pointed.to(query.dtype)).sum(-1)


def _in_band(target: Tensor, length_k: int, is_causal: bool, window: Window) -> Tensor:
    length_q = target.shape[2]
    position = torch.arange(length_q, device=target.device) + (length_k - length_q)
    left, right = _arguments.window(window)
    right = 0 if is_causal else right
    seen = torch.ones_like(target, dtype=torch.bool)
    if left >= 0:
        seen &= target >= position - left
    if right >= 0:
        seen &= target <= position + right
    return seen


def _of_target(x: Tensor, target: Tensor) -> Tensor:
    """Returns the number that x has for each query and its target, where dimensions that x lacks, or has once, go for
    all. Its gradient is as large as x."""
    x = x[(None,) * (4 - x.dim())]
    of_rows = torch.meshgrid(*(torch.arange(n, device=x.device) for n in target.shape), indexing="ij")
    places = (*(i if n > 1 else 0 for i, n in zip(of_rows, x.shape, strict=False)), target)
    return x[places]
