"""The operators' definitions: a few lines of float64 PyTorch each, differentiable, without any attention kernel.

Every test compares with these. They take the arguments of the functions of the same name, compute in float64
whatever the inputs are, and hold the whole score matrix.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from attnx._scores import ScoreName
from attnx.block_mask import BlockMask
from attnx.functional import SigmoidBias, Window
from attnx.probabilistic import Keep, Mode
from attnx.routing import Routes, Routing
from attnx.sparse_linear import FeatureMap, LinearScope, Rounding, SparseLinearMap

__all__ = [
    "affine_attention",
    "attention_key_weights",
    "attention_max_logits",
    "attention_row_weights",
    "block_sparse_attention",
    "block_sparse_attention_varlen",
    "dropout_factors",
    "gated_delta_rule",
    "gumbel_noise",
    "hierarchical_attention",
    "hierarchical_tokens",
    "linear_attention",
    "philox",
    "pointer_argmax",
    "pointer_log_prob",
    "pointer_sample",
    "probabilistic_attention",
    "probabilistic_attention_varlen",
    "probabilistic_block_mask",
    "rectified_attention",
    "rectified_blocks",
    "route",
    "route_varlen",
    "routing_attention",
    "routing_attention_varlen",
    "sigmoid_attention",
    "sigmoid_attention_jvp",
    "sigmoid_attention_varlen",
    "softmax_attention",
    "softmax_attention_jvp",
    "softmax_attention_varlen",
    "softplus_attention",
    "softplus_attention_varlen",
    "sparse_linear_attention",
    "sparse_linear_attention_varlen",
    "sparse_linear_block_map",
    "staircase_attention",
    "staircase_dequantize",
    "update_centroids",
    "visible_keys",
]


def _distance(length_q: int, length_k: int, device: torch.device) -> Tensor:
    """(length_q, length_k): how far key j lies before query i, aligned so that the last query meets the last key."""
    i = torch.arange(length_q, device=device)[:, None]
    j = torch.arange(length_k, device=device)
    return i + length_k - length_q - j


def _visible(distance: Tensor, is_causal: bool, window: Window) -> Tensor:
    left, right = (-1 if bound is None else bound for bound in window or (-1, -1))
    if is_causal:
        right = 0
    visible = torch.ones_like(distance, dtype=torch.bool)
    if left >= 0:
        visible &= distance <= left
    if right >= 0:
        visible &= -distance <= right
    return visible


def _band(
    query: Tensor,
    key: Tensor,
    is_causal: bool,
    window: Window,
    position_offset: int,
    seqused_k: Tensor | None,
    leftpad_k: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The distance of each key from where each query stands, which of them are visible, and how many keys are used.

    The first two are (batch or 1, 1, length_q, length_k), the last is (batch or 1, 1, 1, 1).
    """
    batch, length_q, length_k = key.shape[0], query.shape[2], key.shape[2]
    ends = torch.full((batch,), length_k, device=key.device) if seqused_k is None else seqused_k.long()
    starts = torch.zeros_like(ends) if leftpad_k is None else leftpad_k.long()
    ends, starts = ends[:, None, None, None], starts[:, None, None, None]
    # Keys count from the start, and the last query stands at the last one that is used.
    distance = _distance(length_q, length_k, query.device) - length_k + ends + position_offset
    j = torch.arange(length_k, device=key.device)
    visible = _visible(distance, is_causal, window) & (j >= starts) & (j < ends)
    return distance, visible, ends - starts


def _used_keys(key: Tensor, seqused_k: Tensor | None, leftpad_k: Tensor | None) -> list[slice]:
    """The rows of the keys of each sequence."""
    ends = [key.shape[2]] * len(key) if seqused_k is None else seqused_k.tolist()
    starts = [0] * len(key) if leftpad_k is None else leftpad_k.tolist()
    return [slice(*x) for x in zip(starts, ends, strict=True)]


def _per_head(x: Tensor, heads: int) -> Tensor:
    return x.double().expand(heads)[:, None, None]


class _Terms(NamedTuple):
    """What is done to a logit and its weight besides biases, slopes and bounds; the arguments of that name."""

    softcap: float | None = None
    attn_mask: Tensor | None = None
    distance_bias: Tensor | None = None
    row_bounds: Tensor | None = None
    key_bias: Tensor | None = None
    key_mask: Tensor | None = None
    dropout_p: float = 0.0
    seed: int = 0
    offset: int = 0
    sequence: int = 0  # the first of the call, by which dropout counts its draws

    @classmethod
    def of(cls, options: dict[str, Any], leftpad_k: Tensor | None) -> _Terms:
        """Bounds of rows count from the first key that is used, and those of the terms from the first of all."""
        terms = cls(**options)
        if terms.row_bounds is None or leftpad_k is None:
            return terms
        return terms._replace(row_bounds=terms.row_bounds.long() + leftpad_k[:, None, None, None])

    def cap(self, logits: Tensor) -> Tensor:
        if self.softcap is None or math.isinf(self.softcap):
            return logits
        return self.softcap * (logits / self.softcap).tanh()

    def add(self, logits: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
        """The logits with what is added to them, and which of them are not hidden by it."""
        if self.row_bounds is not None:
            j = torch.arange(logits.shape[-1], device=logits.device)
            visible = visible & (j >= self.row_bounds[..., :1]) & (j < self.row_bounds[..., 1:])
        of_keys = None if self.key_bias is None else self.key_bias[:, :, None]
        for x in (self.attn_mask, self.of_distances(*logits.shape[-2:]), of_keys):
            if x is not None and x.dtype == torch.bool:
                visible = visible & x
            elif x is not None:
                logits, visible = logits + x.double(), visible & (x != -math.inf)
        return logits, visible.expand(logits.shape)

    def of_distances(self, length_q: int, length_k: int) -> Tensor | None:
        if self.distance_bias is None:
            return None
        i, j = torch.arange(length_q)[:, None], torch.arange(length_k)
        return self.distance_bias[..., i - j + length_k - 1]

    def share(self) -> Tensor | None:
        return None if self.key_mask is None else self.key_mask.double()[:, :, None]

    def drop(self, weights: Tensor) -> Tensor:
        if self.dropout_p == 0:
            return weights
        return weights * dropout_factors(weights.shape, self.dropout_p, self.seed, self.offset, self.sequence)


_NO_TERMS = _Terms()


def dropout_factors(shape: Sequence[int], p: float, seed: int, offset: int, sequence: int = 0) -> Tensor:
    """What dropout multiplies weights (batch, heads, length_q, length_k) by: 0, or 1 / (1 - p), p in steps of 1/256.

    A byte decides about each weight. One call of Philox draws those of 16 keys of a row, two neighbours in each of
    eight groups of eight keys.

    Args:
        shape: of the weights.
        p: the probability of 0.
        seed, offset: as in :func:`attnx.softmax_attention`.
        sequence: the number of the first in its batch.
    """
    batch, heads, length_q, length_k = shape
    j = torch.arange(length_k)
    head = (torch.arange(batch)[:, None] + sequence) * heads + torch.arange(heads)
    place = j // 64 * 4 + j % 8 // 2, torch.arange(length_q)[:, None], head[..., None, None], torch.tensor(offset)
    words = torch.stack(philox(torch.broadcast_tensors(*place), seed), -1)
    n = j // 8 % 8 * 2 + j % 2
    byte = words.gather(-1, (n // 4).expand(words.shape[:-1])[..., None])[..., 0] >> n % 4 * 8 & 255
    kept = max(int(256 * (1 - p) + 0.5), 1)
    return (byte < kept).double() * (256 / kept)


def _logits(
    query: Tensor,
    key: Tensor,
    scale: float | Tensor | None,
    alibi_slopes: Tensor | None,
    distance: Tensor,
    terms: _Terms = _NO_TERMS,
) -> Tensor:
    """(batch, heads, length_q, length_k)."""
    heads, head_dim = query.shape[1], query.shape[3]
    key = key.double().repeat_interleave(heads // key.shape[1], dim=1)
    if isinstance(scale, Tensor):
        query, scale = query.double() * _per_head(scale, heads), 1.0
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    logits = terms.cap(scale * query.double() @ key.transpose(-1, -2))
    if alibi_slopes is not None:
        logits = logits - _per_head(alibi_slopes, heads) * distance.abs()
    return logits


def _weighted(weights: Tensor, visible: Tensor, value: Tensor) -> Tensor:
    """sum_j weights[i, j] value[j] over the visible keys alone, so that what a hidden key holds has no effect."""
    heads = weights.shape[1]
    value = value.double().repeat_interleave(heads // value.shape[1], dim=1)
    if bool(value.isfinite().all()):
        return weights @ value
    terms = weights[..., None] * value[:, :, None]
    return terms.where(visible[..., None], 0.0).sum(-2)


def _sigmoid_bias(bias: SigmoidBias, keys: int | Tensor, visible: Tensor) -> Tensor | float:
    """What a bias that is no tensor adds to the logits."""
    if bias is None:
        return -torch.as_tensor(keys, device=visible.device).clamp(min=1).double().log()
    if bias == "row":
        return -visible.sum(-1, keepdim=True).clamp(min=1).double().log()
    return bias


def _softmax(
    logits: Tensor, visible: Tensor, value: Tensor, sink: Tensor | None = None, terms: _Terms = _NO_TERMS
) -> tuple[Tensor, Tensor]:
    """The output and logsumexp of logits that are -inf where a key is not visible.

    A sink is one more logit of every row of its head, which has no value. A key whose logit is -inf is not visible.
    """
    visible = visible & (logits != -math.inf)
    logits = logits.where(visible, -math.inf)
    if (share := terms.share()) is not None:
        return _softmax_of_shares(logits, share, visible, value, sink, terms)
    logsumexp = logits.logsumexp(-1)
    if sink is not None:
        logsumexp = logsumexp.logaddexp(_per_head(sink, logits.shape[1])[..., 0])
    # A row without keys has no weight to give; a logsumexp of +inf makes every weight 0, gradients included.
    weights = (logits - logsumexp.where(visible.any(-1), math.inf)[..., None]).exp()
    return _weighted(terms.drop(weights.where(visible, 0.0)), visible, value), logsumexp


def _softmax_of_shares(
    logits: Tensor, share: Tensor, visible: Tensor, value: Tensor, sink: Tensor | None, terms: _Terms
) -> tuple[Tensor, Tensor]:
    """Softmax of weights share * exp(logit), with a gradient of the share also where it is 0."""
    counts = visible & (share != 0)
    most = logits.where(counts, -math.inf).logsumexp(-1, keepdim=True).detach()
    if sink is not None:
        sink = _per_head(sink, logits.shape[1])
        most = most.logaddexp(sink.detach())
    some = most > -math.inf  # a row in which nothing counts gives no gradient either
    weights = share * (logits.where(visible & some, -math.inf) - most.where(some, 0.0)).exp()
    total = weights.sum(-1, keepdim=True).where(some, 1.0)
    if sink is not None:
        total = total + (sink - most).exp()
    return _weighted(terms.drop(weights / total), counts, value), (total.log() + most)[..., 0]


def _sigmoid(logits: Tensor, visible: Tensor, value: Tensor, terms: _Terms = _NO_TERMS) -> Tensor:
    logits, visible = terms.add(logits, visible)
    weights = logits.sigmoid().where(visible, 0.0)
    if (share := terms.share()) is not None:
        weights, visible = weights * share, visible & (share != 0)
    return _weighted(terms.drop(weights), visible, value)


def sigmoid_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bias: SigmoidBias = None,
    scale: float | Tensor | None = None,
    is_causal: bool = False,
    window: Window = None,
    position_offset: int = 0,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    head_mask: Tensor | None = None,
    **options: Any,
) -> Tensor:
    terms = _Terms.of(options, leftpad_k)
    heads = query.shape[1]
    distance, visible, keys = _band(query, key, is_causal, window, position_offset, seqused_k, leftpad_k)
    logits = _logits(query, key, scale, alibi_slopes, distance, terms)
    added = _per_head(bias, heads) if isinstance(bias, Tensor) else _sigmoid_bias(bias, keys, visible)
    return _times(head_mask, _sigmoid(logits + added, visible, value, terms))


def softmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | Tensor | None = None,
    is_causal: bool = False,
    window: Window = None,
    position_offset: int = 0,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
    head_mask: Tensor | None = None,
    return_logsumexp: bool = False,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    terms = _Terms.of(options, leftpad_k)
    distance, visible, _ = _band(query, key, is_causal, window, position_offset, seqused_k, leftpad_k)
    logits, visible = terms.add(_logits(query, key, scale, alibi_slopes, distance, terms), visible)
    output, logsumexp = _softmax(logits.where(visible, -math.inf), visible, value, sink, terms)
    if head_mask is not None:
        logsumexp = logsumexp.where(head_mask[..., None] != 0, -math.inf)
    output = _times(head_mask, output)
    return (output, logsumexp) if return_logsumexp else output


def softmax_attention_jvp(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tangent_query: Tensor | None = None,
    tangent_key: Tensor | None = None,
    tangent_value: Tensor | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    window: Window = None,
    position_offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output and the logsumexp, and the derivatives of both along these tangents, of which None is zero."""
    distance, visible, _ = _band(query, key, is_causal, window, position_offset, None, None)
    logits = _logits(query, key, scale, None, distance).where(visible, -math.inf)
    output, logsumexp = _softmax(logits, visible, value)
    weights = (logits - logsumexp.where(visible.any(-1), math.inf)[..., None]).exp()
    change = _change_of_logits(query, key, tangent_query, tangent_key, scale, visible)
    tangent_logsumexp = (weights * change).sum(-1)
    change_of_weights = weights * (change - tangent_logsumexp[..., None])
    tangent_output = _change_of_output(weights, change_of_weights, visible, value, tangent_value)
    return output, logsumexp, tangent_output, tangent_logsumexp


def sigmoid_attention_jvp(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tangent_query: Tensor | None = None,
    tangent_key: Tensor | None = None,
    tangent_value: Tensor | None = None,
    *,
    bias: float | Literal["row"] | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    window: Window = None,
    position_offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """The output, and its derivative along these tangents, of which None is zero."""
    distance, visible, keys = _band(query, key, is_causal, window, position_offset, None, None)
    logits = _logits(query, key, scale, None, distance) + _sigmoid_bias(bias, keys, visible)
    weights = logits.sigmoid().where(visible, 0.0)
    change = weights * (-logits).sigmoid() * _change_of_logits(query, key, tangent_query, tangent_key, scale, visible)
    change = change.where(visible, 0.0)
    return _weighted(weights, visible, value), _change_of_output(weights, change, visible, value, tangent_value)


def _change_of_logits(
    query: Tensor,
    key: Tensor,
    tangent_query: Tensor | None,
    tangent_key: Tensor | None,
    scale: float | None,
    visible: Tensor,
) -> Tensor:
    """(batch, heads, length_q, length_k), 0 where a key is not visible."""
    change = query.new_zeros(*query.shape[:3], key.shape[2], dtype=torch.float64)
    for q, k in ((tangent_query, key), (query, tangent_key)):
        if q is not None and k is not None:
            change = change + _logits(q, k, scale, None, change)
    return change.where(visible, 0.0)


def _change_of_output(
    weights: Tensor, change: Tensor, visible: Tensor, value: Tensor, tangent_value: Tensor | None
) -> Tensor:
    of_values = 0.0 if tangent_value is None else _weighted(weights, visible, tangent_value)
    return _weighted(change, visible, value) + of_values


def _times(head_mask: Tensor | None, output: Tensor) -> Tensor:
    return output if head_mask is None else output * head_mask.double()[..., None, None]


def softplus_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    sharpen: int | None = None,
    scale: float | Tensor | None = None,
    is_causal: bool = False,
    window: Window = None,
    position_offset: int = 0,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    return_logsumexp: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    distance, visible, _ = _band(query, key, is_causal, window, position_offset, seqused_k, leftpad_k)
    keys = visible.sum(-1, keepdim=True).double()
    scale = math.log(query.shape[3]) if scale is None else scale
    logits = _logits(_unit(query) * keys.clamp(min=1).log(), _unit(key), scale, None, distance)
    visible = visible.expand(logits.shape)
    a = logits.where(visible, 0.0).logaddexp(torch.zeros((), dtype=logits.dtype)).where(visible, 0.0)
    total = a.sum(-1, keepdim=True)
    weights = a / total.where(keys > 0, 1.0)
    if sharpen is not None:
        above = keys * weights - (keys > 3).double()
        above = above.where(visible & (above > 1e-12), 0.0)  # where all weigh the same, what is left is rounding
        most = above.amax(-1, keepdim=True).detach() if above.shape[-1] else total
        powers = (above / most.where(most > 0, 1.0)) ** sharpen
        weights = powers / powers.sum(-1, keepdim=True).where(most > 0, 1.0)
    output = _weighted(weights, visible, value)
    return (output, total.log()[..., 0]) if return_logsumexp else output


def _unit(x: Tensor) -> Tensor:
    return x.double() / x.double().norm(dim=-1, keepdim=True).clamp(min=1e-12)


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
    return_logsumexp: bool = False,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    terms = _Terms.of(options, None)
    length_q, length_k, head_dim = query.shape[2], key.shape[2], query.shape[3]
    distance, visible, _ = _band(query, key, is_causal, window, 0, None, None)
    if scale is None:
        scale = 1 / math.sqrt(head_dim * (1 + sum(x is not None for x in (pos_key, pos_query))))
    logits = _logits(query, key, scale, None, distance, terms)
    at = index.long()[torch.arange(length_q)[:, None] - torch.arange(length_k) + length_k - 1].expand(logits.shape)
    if pos_key is not None:
        logits = logits + (scale * query.double() @ pos_key.double().mT).gather(3, at)
    if pos_query is not None:
        keys = key.double().repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        logits = logits + (scale * keys @ pos_query.double().mT).gather(3, at.mT).mT
    logits, visible = terms.add(logits, visible)
    output, logsumexp = _softmax(logits.where(visible, -math.inf), visible, value, None, terms)
    return (output, logsumexp) if return_logsumexp else output


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask,
    *,
    score: ScoreName = "softmax",
    bias: SigmoidBias = None,
    block_bias: Tensor | None = None,
    sink: Tensor | None = None,
    scale: float | Tensor | None = None,
    is_causal: bool = False,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    return_logsumexp: bool = False,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    options["row_bounds"] = block_mask.row_bounds
    options["attn_mask"] = block_mask.with_elements(options.get("attn_mask"))
    terms = _Terms.of(options, leftpad_k)
    length_q, length_k = query.shape[2], key.shape[2]
    block_q, block_k = block_mask.block_size
    key_blocks = -(-length_k // block_k)

    def each_element(blocks: Tensor) -> Tensor:
        elements = blocks.repeat_interleave(block_q, -2).repeat_interleave(block_k, -1)[..., :length_q, :length_k]
        if leftpad_k is None:
            return elements
        # Blocks of keys count from the first that is used.
        place = (torch.arange(length_k, device=query.device) - leftpad_k[:, None, None, None]).clamp(min=0)
        elements = elements.expand(len(query), *elements.shape[1:])
        return elements.gather(-1, place.expand(*elements.shape[:-1], -1))

    distance, in_band, keys = _band(query, key, is_causal, None, 0, seqused_k, leftpad_k)
    # (..., query_blocks, width, key_blocks): which block an entry of a list in use names.
    width = torch.arange(block_mask.kv_indices.shape[-1], device=query.device)
    used = (width < block_mask.kv_num_blocks[..., None])[..., None]
    names = used & (block_mask.kv_indices[..., None] == torch.arange(key_blocks, device=query.device))
    visible = (each_element(names.any(-2)) & in_band).expand(*query.shape[:2], -1, -1)
    logits = _logits(query, key, scale, None, distance, terms)
    if block_bias is not None:
        logits = logits + each_element(block_bias.double()[..., None].where(names, 0.0).sum(-2))
    if score == "sigmoid":
        return _sigmoid(logits + _sigmoid_bias(bias, keys, in_band), visible, value, terms)
    logits, visible = terms.add(logits, visible)
    output, logsumexp = _softmax(logits.where(visible, -math.inf), visible, value, sink, terms)
    return (output, logsumexp) if return_logsumexp else output


def attention_key_weights(
    query: Tensor,
    key: Tensor,
    *,
    row_weights: Tensor | None = None,
    rows: range | None = None,
    **options: Any,
) -> Tensor:
    weights = attention_row_weights(query, key, rows=rows, **options)
    return (weights if row_weights is None else weights * row_weights.double()[..., None]).sum(2)


def attention_row_weights(
    query: Tensor,
    key: Tensor,
    *,
    rows: range | None = None,
    score: ScoreName = "softmax",
    bias: SigmoidBias = None,
    scale: float | Tensor | None = None,
    is_causal: bool = False,
    window: tuple[int, int] = (-1, -1),
) -> Tensor:
    distance = _distance(query.shape[2], key.shape[2], query.device)
    visible = _visible(distance, is_causal, window)
    logits = _logits(query, key, scale, None, distance)
    if score == "sigmoid":
        weights = (logits + _sigmoid_bias(bias, key.shape[2], visible)).sigmoid()
    else:
        logsumexp = logits.where(visible, -math.inf).logsumexp(-1, keepdim=True)
        weights = (logits - logsumexp.where(visible.any(-1, keepdim=True), math.inf)).exp()
    weights = weights.where(visible, 0.0)
    return weights if rows is None else weights[:, :, rows.start : rows.stop]


def attention_max_logits(
    query: Tensor,
    key: Tensor,
    *,
    rows: range | None = None,
    scale: float | Tensor | None = None,
    is_causal: bool = False,
    window: tuple[int, int] = (-1, -1),
) -> Tensor:
    distance = _distance(query.shape[2], key.shape[2], query.device)
    logits = _logits(query, key, scale, None, distance).where(_visible(distance, is_causal, window), -math.inf)
    largest = logits.amax(-1) if key.shape[2] else logits.new_full(logits.shape[:3], -math.inf)
    return largest if rows is None else largest[:, :, rows.start : rows.stop]


def gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    scale: float | Tensor | None = None,
    initial_state: Tensor | None = None,
    carry: Tensor | None = None,
    normalize_qk: bool = False,
    return_state: bool = False,
) -> Any:
    group = value.shape[1] // query.shape[1]
    query, key, value, log_decay, beta = (x.double() for x in (query, key, value, log_decay, beta))
    if normalize_qk:
        query, key = (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (query, key))
    if isinstance(scale, Tensor):
        scale = scale.double() if scale.dim() == 0 else scale.double()[:, None, None]
    query = query * (query.shape[3] ** -0.5 if scale is None else scale)
    query, key = (x.repeat_interleave(group, dim=1) for x in (query, key))
    if initial_state is None:
        state = query.new_zeros(*value.shape[:2], query.shape[3], value.shape[3])
    else:
        state = initial_state.double()
    outputs, kept = [], state
    for t in range(query.shape[2]):
        q, k, v = (x[:, :, t, :, None] for x in (query, key, value))
        kept, state = (x * log_decay[:, :, t, None, None].exp() for x in (kept, state))
        state = state + k @ (beta[:, :, t, None, None] * (v - state.mT @ k)).mT
        outputs.append((state.mT @ q).mT)
        if carry is not None and (t % 64 == 63 or t == query.shape[2] - 1):
            kept = state = kept + carry.double()[:, :, t // 64, None, None] * (state - kept)
    output = torch.cat(outputs, 2) if outputs else value
    return (output, state) if return_state else output


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    feature_map: str = "taylor",
    scale: float | Tensor | None = None,
    is_causal: bool = True,
    initial_state: Tensor | None = None,
    return_state: bool = False,
) -> Any:
    group = query.shape[1] // key.shape[1]
    query, key, value = query.double(), key.double(), value.double()
    if feature_map == "taylor":
        if isinstance(scale, Tensor):
            scale = scale.double() if scale.dim() == 0 else scale.double()[:, None, None]
        query = query * (query.shape[3] ** -0.5 if scale is None else scale)
        of_query, of_key = _taylor_features(query), _taylor_features(key)
    else:
        of_query, of_key = (_FEATURE_MAPS[feature_map](x) for x in (query, key))
    numbers = torch.cat((value, torch.ones_like(value[..., :1])), -1)
    state = of_key.mT @ numbers
    before = torch.zeros_like(state) if initial_state is None else initial_state.double()
    weights = of_query @ of_key.mT.repeat_interleave(group, 1)
    if is_causal:
        weights = weights.tril()
    sums = weights @ numbers.repeat_interleave(group, 1) + of_query @ before.repeat_interleave(group, 1)
    total = sums[..., -1:]
    output = (sums[..., :-1] / total.where(total != 0, 1.0)).where(total != 0, 0.0)
    return (output, before + state) if return_state else output


def _taylor_features(x: Tensor) -> Tensor:
    """Returns 1, the numbers, and their products: the product of two is 1 + t + t^2 / 2, where t is that of rows."""
    first, second = torch.triu_indices(x.shape[-1], x.shape[-1], device=x.device)
    pairs = x[..., first] * x[..., second] * x.new_ones(len(first)).masked_fill(first == second, 0.5**0.5)
    return torch.cat((torch.ones_like(x[..., :1]), x, pairs), -1)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 on words held in int64: four random words for each counter, under a key of 64 bits.

    Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
    """
    word = 0xFFFFFFFF
    c0, c1, c2, c3 = counter
    low, high = key & word, (key >> 32) & word
    for _ in range(10):
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # all 64 bits are right, though the sign may be wrong
        c0, c1, c2, c3 = (
            (product1 >> 32) & word ^ c1 ^ low,
            product1 & word,
            (product0 >> 32) & word ^ c3 ^ high,
            product0 & word,
        )
        low, high = (low + 0x9E3779B9) & word, (high + 0xBB67AE85) & word
    return c0, c1, c2, c3


def _negative_log2(word: Tensor) -> Tensor:
    """-log2((word + 1/2) 2^-32) in units of 2^-24, rounded as on every backend: the bits of log2 one by one."""
    odd = 2 * word + 1
    exponent = odd.double().frexp().exponent.long() - 1
    mantissa, log = (odd << (32 - exponent)) >> 1, exponent
    for _ in range(24):
        mantissa = (mantissa * mantissa >> 31) & (2**33 - 1)  # unsigned
        two_or_more = mantissa >> 32
        mantissa, log = mantissa >> two_or_more, 2 * log + two_or_more
    return (33 << 24) - log


class _Draw(NamedTuple):
    """What is drawn with, of each block of queries and block of keys."""

    distance: Tensor  # in blocks, to the nearest that holds the position of one of the queries
    candidate: Tensor  # whether it may take part
    p: Tensor  # its probability, float32 as the operators have it
    blocks_per_row: int | None  # with mode="topm"


_PARAMETERS = {"harmonic": 1.0, "geometric": 0.9, "power": 0.5, "gaussian": 8.0}


def _probability(keep: str, distance: Tensor, parameter: float) -> Tensor:
    d = distance.double()
    p = {
        "harmonic": lambda: parameter / (1 + d),
        "geometric": lambda: (parameter**d).clamp(min=0.01),
        "power": lambda: (1 + d) ** -parameter,
        "gaussian": lambda: (-((d / parameter) ** 2) / 2).exp(),
    }[keep]()
    return p.clamp(max=1.0).where(distance > 0, 1.0)


def _draw(
    keep: Keep,
    density: float | None,
    mode: Mode,
    lengths: tuple[int, int],
    block_size: tuple[int, int],
    is_causal: bool,
) -> _Draw:
    p, blocks_per_row = _solve(keep, density, mode, lengths, block_size, is_causal)
    distance, candidate = _distances(lengths, block_size, is_causal)
    return _Draw(distance, candidate, p[distance], blocks_per_row)


def _distances(lengths: tuple[int, int], block_size: tuple[int, int], is_causal: bool) -> tuple[Tensor, Tensor]:
    """The first two of :class:`_Draw`."""
    (length_q, length_k), (block_q, block_k) = lengths, block_size
    position = torch.arange(length_q) + length_k - length_q
    blocks_k = -(-length_k // block_k)
    lasts = _lasts(position, block_q)
    first, last = (x.clamp(0, max(length_k - 1, 0)) // block_k for x in (position[::block_q], lasts))
    j = torch.arange(blocks_k)
    distance = (first[:, None] - j).maximum(j - last[:, None]).clamp(min=0)
    candidate = torch.ones_like(distance, dtype=torch.bool)
    if is_causal:
        candidate = (j <= last[:, None]) & (lasts >= 0)[:, None]
    return distance, candidate


def _solve(
    keep: Keep,
    density: float | None,
    mode: Mode,
    lengths: tuple[int, int],
    block_size: tuple[int, int],
    is_causal: bool,
) -> tuple[Tensor, int | None]:
    """The probability of a block by its distance, float32, and how many blocks a row has with mode="topm"."""
    distance, candidate = _distances(lengths, block_size, is_causal)
    blocks_k = distance.shape[1]
    if not candidate.any():
        return torch.ones(blocks_k), 1 if mode == "topm" else None

    def share(parameter: float) -> float:
        """The mean share of the candidates that take part."""
        assert isinstance(keep, str)
        return float(_probability(keep, distance[candidate], parameter).mean())

    if isinstance(keep, Tensor):
        p = keep.cpu()
    else:
        parameter = _PARAMETERS[keep]
        if density is not None:
            # The bounds keep next to no block but the diagonal's, and all of them; the share grows between them.
            sparse, parameter = {
                "harmonic": (0.0, float(blocks_k)),
                "geometric": (0.0, 1.0),
                "power": (64.0, 0.0),
                "gaussian": (1e-3, 1e9 * blocks_k),
            }[keep]
            for _ in range(100):
                middle = (sparse + parameter) / 2
                sparse, parameter = (middle, parameter) if share(middle) < density else (sparse, middle)
        elif mode == "topm":
            density = share(parameter)
        p = _probability(keep, torch.arange(blocks_k), parameter).float()
    if mode == "bernoulli":
        return p, None
    assert density is not None
    diagonal, candidates = ((x & candidate).sum(1) for x in (distance == 0, candidate))
    kept = [int(candidates.clamp(max=m).maximum(diagonal).sum()) for m in range(1, blocks_k + 1)]
    # The first of equals, where rounding does not tell them apart.
    nearest = min(range(blocks_k), key=lambda m: round(abs(kept[m] / int(candidates.sum()) - density), 12))
    return p, nearest + 1


def _lasts(x: Tensor, block: int) -> Tensor:
    """The last element of each block, of a ragged one too."""
    return torch.stack([part[-1] for part in x.split(block)]) if len(x) else x


def _sampled(batch: int, heads: int, draw: _Draw, seed: int, offset: int, sequence: int = 0) -> Tensor:
    """bool (batch, heads, query_blocks, key_blocks): which blocks take part, from that sequence of the call on."""
    distance, candidate, p, blocks_per_row = draw
    i, j = (torch.arange(n) for n in distance.shape)
    head = (torch.arange(batch * heads) + sequence * heads).view(batch, heads, 1, 1)
    word = philox(torch.broadcast_tensors(j, i[:, None], head, torch.tensor(offset)), seed)[0]
    if blocks_per_row is None:
        return ((word + 0.5) * 2.0**-32 < p.double()) & candidate
    # A race, won by the diagonal; stable, so that of equals the lower index comes first.
    arrival = (_negative_log2(word) / p.double()).where(distance > 0, 0.0).where(candidate, math.inf)
    place = arrival.argsort(dim=-1, stable=True).argsort(-1)
    return ((place < blocks_per_row) | (distance == 0)) & arrival.isfinite()


def probabilistic_block_mask(
    batch: int,
    heads: int,
    length_q: int,
    length_k: int,
    *,
    keep: Keep = "harmonic",
    density: float | None = None,
    mode: Mode = "bernoulli",
    block_size: tuple[int, int] = (64, 64),
    is_causal: bool = False,
    seed: int,
    offset: int,
) -> BlockMask:
    draw = _draw(keep, density, mode, (length_q, length_k), block_size, is_causal)
    visited = _sampled(batch, heads, draw, seed, offset)
    return BlockMask.from_dense(visited, block_size, (length_q, length_k))


def _probabilistic_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    solved: tuple[Tensor, int | None],
    *,
    sequence: int = 0,
    importance: bool = False,
    score: ScoreName = "softmax",
    bias: SigmoidBias = None,
    scale: float | Tensor | None = None,
    block_size: tuple[int, int] = (64, 64),
    is_causal: bool = False,
    seed: int,
    offset: int,
) -> tuple[Tensor, Tensor]:
    """The output and the logsumexp, with what :func:`_solve` found for the longest sequence of the call."""
    length_q, length_k = query.shape[2], key.shape[2]
    distance, candidate = _distances((length_q, length_k), block_size, is_causal)
    draw = _Draw(distance, candidate, solved[0][distance], solved[1])

    def each_element(blocks: Tensor) -> Tensor:
        elements = blocks.repeat_interleave(block_size[0], -2).repeat_interleave(block_size[1], -1)
        return elements[..., :length_q, :length_k].to(query.device)

    in_band = _visible(_distance(length_q, length_k, query.device), is_causal, (-1, -1))
    visible = each_element(_sampled(query.shape[0], query.shape[1], draw, seed, offset, sequence)) & in_band
    logits = _logits(query, key, scale, None, in_band)
    p = torch.ones_like(logits[0, 0])
    if importance:
        p = each_element(draw.p.double()).where(visible, 1.0)
    if score == "sigmoid":
        weights = (logits + _sigmoid_bias(bias, length_k, in_band)).sigmoid() / p
        return _weighted(weights.where(visible, 0.0), visible, value), weights.new_zeros(weights.shape[:3])
    return _softmax((logits - p.log()).where(visible, -math.inf), visible, value)


def probabilistic_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    keep: Keep = "harmonic",
    density: float | None = None,
    mode: Mode = "bernoulli",
    block_size: tuple[int, int] = (64, 64),
    is_causal: bool = False,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    return_logsumexp: bool = False,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    solved = _solve(keep, density, mode, (query.shape[2], key.shape[2]), block_size, is_causal)
    options |= {"block_size": block_size, "is_causal": is_causal}
    if seqused_k is None and leftpad_k is None:
        both = _probabilistic_attention(query, key, value, solved, **options)
    else:
        sequences = []
        for b, used in enumerate(_used_keys(key, seqused_k, leftpad_k)):
            own = query[b : b + 1], key[b : b + 1, :, used], value[b : b + 1, :, used]
            sequences.append(_probabilistic_attention(*own, solved, sequence=b, **options))
        output, logsumexp = (torch.cat(x) for x in zip(*sequences, strict=True))
        both = output, logsumexp
    return both if return_logsumexp else both[0]


def sparse_linear_block_map(
    query: Tensor,
    key: Tensor,
    *,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    **options: Any,
) -> SparseLinearMap:
    if seqused_k is None and leftpad_k is None:
        return _sparse_linear_block_map(query, key, **options)
    block_q, block_k = options.get("block_size", (64, 64))
    sizes = (*query.shape[:2], -(-query.shape[2] // block_q), -(-key.shape[2] // block_k))
    labels = torch.full(sizes, -1, dtype=torch.int8, device=query.device)
    for b, used in enumerate(_used_keys(key, seqused_k, leftpad_k)):
        own = _sparse_linear_block_map(query[b : b + 1], key[b : b + 1, :, used], **options).labels
        labels[b, :, :, : own.shape[3]] = own[0]
    return SparseLinearMap(labels, (block_q, block_k), (query.shape[2], key.shape[2]))


def _sparse_linear_block_map(
    query: Tensor,
    key: Tensor,
    *,
    critical: float = 0.05,
    negligible: float = 0.10,
    block_size: tuple[int, int] = (64, 64),
    is_causal: bool = False,
    smooth_k: bool = False,
    scale: float | Tensor | None = None,
    protect: int = 0,
    rounding: Rounding = "ceil",
) -> SparseLinearMap:
    heads, length_q, length_k = query.shape[1], query.shape[2], key.shape[2]
    block_q, block_k = block_size
    whole = math.floor if rounding == "floor" else math.ceil
    key = key.double().repeat_interleave(heads // key.shape[1], dim=1)
    if smooth_k:
        key = key - key.mean(2, keepdim=True)
    mean_keys = [part.mean(2) for part in key.split(block_k, dim=2)]
    visible = _visible(_distance(length_q, length_k, query.device), is_causal, (-1, -1))
    rows = []
    for part, sees in zip(query.double().split(block_q, dim=2), visible.split(block_q), strict=True):
        scores = [_logits(part.mean(2, True), mean[:, :, None], scale, None, sees)[..., 0, 0] for mean in mean_keys]
        some = [bool(block.any()) for block in sees.split(block_k, dim=1)]
        partial = [bool(block.any() and not block.all()) for block in sees.split(block_k, dim=1)]
        count = sum(some)
        forced = [
            j < count and (partial[j] or j * block_k < protect or (is_causal and j == count - 1))
            for j in range(len(some))
        ]
        # Exactly: shares such as 0.07 of 100 blocks are 7.
        most = max(1, whole(round(critical * count, 9)), sum(forced))
        least = count - math.floor(round(negligible * count, 9))
        labels = torch.full((*query.shape[:2], len(some)), -1, dtype=torch.int8)
        for b, h in itertools.product(range(query.shape[0]), range(heads)):
            order = [(not forced[j], -float(scores[j][b, h]), j) for j in range(count)]
            for rank, (_, _, j) in enumerate(sorted(order)):
                labels[b, h, j] = 1 if rank < most else -1 if rank >= least else 0
        rows.append(labels)
    labels = torch.stack(rows, dim=2).to(query.device)
    return SparseLinearMap(labels, block_size, (query.shape[2], key.shape[2]))


_FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: x.softmax(-1),
    "elu": lambda x: torch.nn.functional.elu(x) + 1,
    "relu": torch.relu,
}
_SCOPES = {"marginal": (0,), "noncritical": (-1, 0), "all": (-1, 0, 1)}


def sparse_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    block_map: SparseLinearMap | None = None,
    feature_map: FeatureMap = "softmax",
    linear_scope: LinearScope = "marginal",
    is_causal: bool = False,
    scale: float | Tensor | None = None,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    **map_options: Any,
) -> tuple[Tensor, Tensor]:
    if block_map is None:
        map_options |= {"seqused_k": seqused_k, "leftpad_k": leftpad_k}
        block_map = sparse_linear_block_map(query, key, is_causal=is_causal, scale=scale, **map_options)
    options: dict[str, Any] = {"feature_map": feature_map, "linear_scope": linear_scope}
    options |= {"is_causal": is_causal, "scale": scale}
    if seqused_k is None and leftpad_k is None:
        return _sparse_linear_attention(query, key, value, block_map, **options)
    sequences = []
    for b, used in enumerate(_used_keys(key, seqused_k, leftpad_k)):
        labels = block_map.labels if len(block_map.labels) == 1 else block_map.labels[b : b + 1]
        own = query[b : b + 1], key[b : b + 1, :, used], value[b : b + 1, :, used]
        sequences.append(_sparse_linear_attention(*own, SparseLinearMap(labels, block_map.block_size), **options))
    sparse, linear = (torch.cat(x) for x in zip(*sequences, strict=True))
    return sparse, linear


def _sparse_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_map: SparseLinearMap,
    *,
    feature_map: FeatureMap,
    linear_scope: LinearScope,
    is_causal: bool,
    scale: float | Tensor | None,
) -> tuple[Tensor, Tensor]:
    heads, length_q, length_k = query.shape[1], query.shape[2], key.shape[2]
    block_q, block_k = block_map.block_size
    labels = block_map.labels.repeat_interleave(block_q, 2).repeat_interleave(block_k, 3)[:, :, :length_q, :length_k]
    distance = _distance(length_q, length_k, query.device)
    seen = _visible(distance, is_causal, (-1, -1))

    critical = ((labels == 1) & seen).expand(*query.shape[:2], -1, -1)
    logits = _logits(query, key, scale, None, distance).where(critical, -math.inf)
    sparse, _ = _softmax(logits, critical, value)

    in_scope = torch.stack([labels == label for label in _SCOPES[linear_scope]]).any(0) & seen
    phi = _FEATURE_MAPS[feature_map]
    keys = phi(key.double()).repeat_interleave(heads // key.shape[1], dim=1)
    weights = (phi(query.double()) @ keys.mT).where(in_scope, 0.0)
    total = weights.sum(-1, keepdim=True)
    weights = weights / total.where(total != 0, math.inf)
    return sparse, weights @ value.double().repeat_interleave(heads // value.shape[1], dim=1)


def _float16(x: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
    """x rounded, by floor or ceil, to the grid of float16."""
    unit = torch.ldexp(torch.ones_like(x), x.frexp().exponent.clamp(min=-13) - 11)
    return rounding(x / unit) * unit


def _quantised(x: Tensor, bits: int, group: int) -> Tensor:
    """x through codes of some bits, groups of the last dimension sharing a range."""
    x = x.unflatten(-1, (-1, group))
    minimum = _float16(x.amin(-1, True), torch.floor)
    step = _float16((x.amax(-1, True) - minimum) / 256, torch.ceil)
    code = ((x - minimum) / step.where(step > 0, math.inf)).floor().clamp(0, 255)
    cell = 2 ** (8 - bits)
    return (minimum + ((code / cell).floor() + 0.5) * cell * step).flatten(-2)


def staircase_dequantize(
    key: Tensor,
    value: Tensor,
    *,
    levels: Sequence[int] = (16, 8, 4, 2),
    window: int = 128,
    group: int = 32,
    residual: int = 0,
) -> tuple[Tensor, Tensor]:
    """What :class:`attnx.StaircaseCache` reads once these tokens were appended: (batch, heads, length, head_dim)."""
    key, value = key.double().clone(), value.double().clone()
    full = max(key.shape[2] - residual, 0) // window
    for w in range(full):
        tokens, bits = slice(w * window, (w + 1) * window), levels[min(full - w, len(levels) - 1)]
        key[:, :, tokens] = _quantised(key[:, :, tokens].mT, bits, group).mT
        value[:, :, tokens] = _quantised(value[:, :, tokens], bits, group)
    return key, value


def staircase_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    score: ScoreName = "softmax",
    is_causal: bool = True,
    scale: float | Tensor | None = None,
    bias: SigmoidBias = None,
    **layout: Any,
) -> Tensor:
    """Attention over a cache to which key and value were appended."""
    key, value = staircase_dequantize(key, value, **layout)
    if score == "sigmoid":
        return sigmoid_attention(query, key, value, is_causal=is_causal, scale=scale, bias=bias)
    output = softmax_attention(query, key, value, is_causal=is_causal, scale=scale)
    assert isinstance(output, Tensor)
    return output


def _own_terms(options: dict[str, Any], sequence: int, first: int, end: int) -> dict[str, Any]:
    """The terms of one packed sequence, whose keys are those from ``first`` on."""
    keys = {
        name: options[name][None, :, first:end] for name in ("key_bias", "key_mask") if options.get(name) is not None
    }
    if (head_mask := options.get("head_mask")) is not None and head_mask.dim() == 2:
        keys["head_mask"] = head_mask[sequence : sequence + 1]
    return options | keys | {"sequence": sequence}


def _each_sequence(
    attention: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    options: dict[str, Any] | None = None,
) -> Tensor:
    """Rows after the last sequence give 0."""
    outputs = []
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    if len(ends_q) == 1:  # no sequence: the same as one without tokens
        ends_q, ends_k = ends_q * 2, ends_k * 2
    for b, (q0, q1, k0, k1) in enumerate(zip(ends_q, ends_q[1:], ends_k, ends_k[1:], strict=False)):
        q, k, v = (x.transpose(0, 1)[None] for x in (query[q0:q1], key[k0:k1], value[k0:k1]))
        own = {} if options is None else _own_terms(options, b, k0, k1)
        outputs.append(attention(q, k, v, **own)[0].transpose(0, 1))
    output = torch.cat(outputs)
    return torch.cat([output, output.new_zeros(len(query) - len(output), *output.shape[1:])])


def _each_sequence_with_logsumexp(
    attention: Callable[..., tuple[Tensor, Tensor]],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    # The logsumexp rides along as one more feature.
    def in_one(q: Tensor, k: Tensor, v: Tensor, **own: Any) -> Tensor:
        output, logsumexp = attention(q, k, v, **own)
        return torch.cat([output, logsumexp[..., None]], -1)

    both = _each_sequence(in_one, query, key, value, cu_seqlens_q, cu_seqlens_k, options)
    output, logsumexp = both[..., :-1], both[..., -1].transpose(0, 1).clone()
    logsumexp[:, cu_seqlens_q[-1] :] = -math.inf
    return output, logsumexp


def sigmoid_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    has_padding: bool = False,
    **options: Any,
) -> Tensor:
    return _each_sequence(sigmoid_attention, query, key, value, cu_seqlens_q, cu_seqlens_k, options)


def visible_keys(
    length_q: int, length_k: int, device: torch.device, *, is_causal: bool = False, window: tuple[int, int] = (-1, -1)
) -> Tensor:
    """(length_q, length_k), bool: the keys that each query sees under a band."""
    return _visible(_distance(length_q, length_k, device), is_causal, window)


def affine_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    addend: Tensor | None = None,
    *,
    is_causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    **options: Any,
) -> Tensor:
    output = softmax_attention(query, key, value, is_causal=is_causal, window=window, **options)
    rows = gate.double()[..., None] * output
    if addend is None:
        return rows
    visible = visible_keys(query.shape[2], key.shape[2], query.device, is_causal=is_causal, window=window).double()
    sums = visible @ value.double().repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    return rows + addend.double()[..., None] * sums


def rectified_blocks(
    query: Tensor,
    key: Tensor,
    *,
    text_length: int = 0,
    top_p: float = 0.3,
    drop: float = 0.8,
    neighbours: Tensor | None = None,
    seqused_k: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The shares A of blocks and, last, of the text; which blocks are critical; and for which their mean is a gain."""
    _, heads, length, head_dim = query.shape
    query, key = query.double(), key.double().repeat_interleave(heads // key.shape[1], 1)
    video = length - text_length
    of_block = [slice(first, min(first + 128, video)) for first in range(0, video, 128)]
    mean_q, mean_k = (torch.stack([x[:, :, rows].mean(2) for rows in of_block], 2) for x in (query, key))
    off_q, off_k = (
        torch.stack([(x[:, :, rows] - x[:, :, rows].mean(2, keepdim=True)).abs().mean(2) for rows in of_block], 2)
        for x in (query, key)
    )
    products = mean_q @ mean_k.mT
    gains = products.abs() > (off_q @ mean_k.mT).abs() + (mean_q @ off_k.mT).abs()
    of_text = mean_q @ key[:, :, video:].mT
    if seqused_k is not None:
        padding = torch.arange(video, length, device=key.device) >= seqused_k[:, None]
        of_text = of_text.masked_fill(padding[:, None, None], -math.inf)
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    weights = (torch.cat((products, of_text), -1) * scale).softmax(-1)
    sizes = torch.tensor([rows.stop - rows.start for rows in of_block], device=key.device)
    blocks = len(of_block)
    shares = torch.cat((weights[..., :blocks] * sizes, weights[..., blocks:].sum(-1, keepdim=True)), -1)
    shares = shares / shares.sum(-1, keepdim=True)
    critical = torch.zeros_like(gains)
    least = math.floor((1 - drop) * blocks + 1e-6)
    for row, chosen in zip(shares.detach().flatten(0, -2), critical.flatten(0, -2), strict=True):
        total, ranked = 0.0, row.argsort(descending=True, stable=True).tolist()
        for j in ranked:
            chosen[[j] if j < blocks else []] = True
            total += float(row[j])
            if total > top_p:
                break
        chosen[[j for j in ranked if j < blocks][:least]] = True
    if neighbours is not None:
        critical |= neighbours
    if text_length and video % 128:
        critical[..., -1] = True
    return shares, critical, gains


def rectified_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    text_length: int = 0,
    seqused_k: Tensor | None = None,
    scale: float | None = None,
    blocks: tuple[Tensor, Tensor] | None = None,
    **options: Any,
) -> Tensor:
    """``blocks`` are which are critical, and for which their mean is a gain, where the inputs do not decide."""
    heads, video = query.shape[1], query.shape[2] - text_length
    common: dict[str, Any] = {"seqused_k": seqused_k, "scale": scale}
    shares, critical, gains = rectified_blocks(query, key, text_length=text_length, **common, **options)
    critical, gains = (critical, gains) if blocks is None else blocks
    hidden = ~critical.repeat_interleave(128, 2)[:, :, :video].repeat_interleave(128, 3)[..., :video]
    visible = torch.cat((~hidden, torch.ones(*hidden.shape[:3], text_length, dtype=torch.bool)), -1)
    output = softmax_attention(query[:, :, :video], key, value, attn_mask=visible, **common)
    of_text = softmax_attention(query[:, :, video:], key, value, **common)
    value = value.double().repeat_interleave(heads // value.shape[1], 1)
    means = [x.mean(2) for x in value[:, :, :video].split(128, 2)]
    moved = shares[..., : len(means)] * (gains & ~critical)
    gate, addend = 1 - moved.sum(-1, keepdim=True), moved @ torch.stack(means, 2)
    gate, addend = (x.repeat_interleave(128, 2)[:, :, :video] for x in (gate, addend))
    return torch.cat((gate * output + addend, of_text), 2)


def hierarchical_tokens(
    query: Tensor,
    key: Tensor,
    chunk_starts: Tensor,
    *,
    budget: int = 2048,
    block_size: int = 256,
    recent: int = 64,
    share_heads: bool = False,
) -> Tensor:
    """bool (batch, heads, length_q, length_k): the tokens that each query's block chooses, later ones among them."""
    batch, heads, length_q, _ = query.shape
    length_k = key.shape[2]
    query, key = query.double(), key.double().repeat_interleave(heads // key.shape[1], 1)
    if share_heads:
        query, key = (x.mean(1, keepdim=True).expand_as(x) for x in (query, key))
    chosen = torch.zeros(batch, heads, length_q, length_k, dtype=torch.bool, device=query.device)
    for b, h, first in itertools.product(range(batch), range(heads), range(0, length_q, block_size)):
        last = min(first + block_size, length_q)
        ahead = length_k - length_q
        newest, end = max(first + ahead + 1 - recent, 0), last + ahead
        tokens, left = list(range(newest, end)), budget - (end - newest)
        of_block = query[b, h, first:last].mean(0) * math.sqrt(last - first)
        starts = chunk_starts[b if len(chunk_starts) > 1 else 0].tolist()
        ranked = []
        for start, stop in itertools.pairwise(starts):
            rows = key[b, h, start : min(stop, end)]
            if start < min(stop, newest):
                score = float(of_block @ rows.mean(0)) * math.sqrt(len(rows))
                ranked.append((-score, start, min(stop, newest)))
        for _, start, stop in sorted(ranked):
            tokens += list(range(start, stop))[:left]
            left = max(left - (stop - start), 0)
        chosen[b, h, first:last, tokens] = True
    return chosen


def hierarchical_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    chunk_starts: Tensor | None = None,
    *,
    scale: float | None = None,
    tokens: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """``tokens`` are those of :func:`hierarchical_tokens`, where the inputs do not decide."""
    if tokens is None:
        assert chunk_starts is not None
        tokens = hierarchical_tokens(query, key, chunk_starts, **options)
    return softmax_attention(query, key, value, attn_mask=tokens, is_causal=True, scale=scale)


def pointer_log_prob(
    query: Tensor,
    key: Tensor,
    target: Tensor,
    *,
    scale: float | Tensor | None = None,
    is_causal: bool = False,
    window: Window = None,
    sink: Tensor | None = None,
    **options: Any,
) -> Tensor:
    terms = _Terms.of(options, None)
    logits, visible = _pointer_logits(query, key, scale, is_causal, window, terms)
    value = key.new_zeros(*key.shape[:3], 1)
    _, logsumexp = _softmax(logits, visible, value, sink, terms)
    index = target.long()[..., None]
    logit, visible = logits.gather(-1, index)[..., 0], visible.gather(-1, index)[..., 0]
    if (share := terms.share()) is not None:
        share = share.expand(logits.shape).gather(-1, index)[..., 0]
        logit, visible = logit + share.where(share > 0, 1.0).log(), visible & (share > 0)
    return (logit - logsumexp.where(visible, 0.0)).where(visible, -math.inf)


def pointer_argmax(query: Tensor, key: Tensor, **options: Any) -> Tensor:
    return pointer_sample(query, key, temperature=0.0, **options)


def pointer_sample(
    query: Tensor,
    key: Tensor,
    *,
    temperature: float = 1.0,
    seed: int = 0,
    offset: int = 0,
    scale: float | Tensor | None = None,
    is_causal: bool = False,
    window: Window = None,
    **options: Any,
) -> Tensor:
    terms = _Terms.of(options, None)
    logits, _ = _pointer_logits(query, key, scale, is_causal, window, terms)
    if (share := terms.share()) is not None:
        logits = logits + share.log()
    if temperature > 0:
        logits = logits + temperature * gumbel_noise(logits.shape, seed, offset)
    if key.shape[2] == 0:
        return torch.full(logits.shape[:3], -1, device=query.device)
    largest, index = logits.max(-1)
    return index.where(largest > -math.inf, -1)


def gumbel_noise(shape: Sequence[int], seed: int, offset: int) -> Tensor:
    """What :func:`attnx.pointer_sample` adds to logits (batch, heads, length_q, length_k) at temperature 1.

    One call of Philox draws the words of 4 keys of a row, two neighbours in each of two groups of eight keys; float32
    holds the uniform numbers they make.

    Args:
        shape: of the logits.
        seed, offset: as in :func:`attnx.pointer_sample`.
    """
    batch, heads, length_q, length_k = shape
    j, head = torch.arange(length_k), torch.arange(batch * heads).view(batch, heads, 1, 1)
    place = j // 16 * 4 + j % 8 // 2, torch.arange(length_q)[:, None], head, torch.tensor(offset)
    words = torch.stack(philox(torch.broadcast_tensors(*place), seed), -1)
    word = words.gather(-1, (j // 8 % 2 * 2 + j % 2).expand(words.shape[:-1])[..., None])[..., 0]
    uniform = (((word >> 1).float() + 0.5) * 2**-31).clamp(max=1 - 2**-24)
    return -(-(-uniform.double()).log1p()).log()


def _pointer_logits(
    query: Tensor, key: Tensor, scale: float | Tensor | None, is_causal: bool, window: Window, terms: _Terms
) -> tuple[Tensor, Tensor]:
    """Returns the logits, -inf where a key is hidden, and which are not."""
    distance, visible, _ = _band(query, key, is_causal, window, 0, None, None)
    logits, visible = terms.add(_logits(query, key, scale, None, distance, terms), visible)
    return logits.where(visible, -math.inf), visible


def softmax_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    has_padding: bool = False,
    return_logsumexp: bool = False,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    def attention(q: Tensor, k: Tensor, v: Tensor, **own: Any) -> tuple[Tensor, Tensor]:
        output, logsumexp = softmax_attention(q, k, v, return_logsumexp=True, **own)
        return output, logsumexp

    both = _each_sequence_with_logsumexp(attention, query, key, value, cu_seqlens_q, cu_seqlens_k, options)
    return both if return_logsumexp else both[0]


def softplus_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    has_padding: bool = False,
    return_logsumexp: bool = False,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    def attention(q: Tensor, k: Tensor, v: Tensor, sequence: int, **own: Any) -> tuple[Tensor, Tensor]:
        if own.get("sharpen") is not None:
            output = softplus_attention(q, k, v, **own)
            assert isinstance(output, Tensor)
            return output, output[..., 0]
        output, logsumexp = softplus_attention(q, k, v, return_logsumexp=True, **own)
        return output, logsumexp

    both = _each_sequence_with_logsumexp(attention, query, key, value, cu_seqlens_q, cu_seqlens_k, options)
    return both if return_logsumexp else both[0]


def block_sparse_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    block_mask: BlockMask,
    *,
    block_bias: Tensor | None = None,
    has_padding: bool = False,
    return_logsumexp: bool = False,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    def attention(q: Tensor, k: Tensor, v: Tensor, **own: Any) -> tuple[Tensor, Tensor]:
        rows, sequence = -(-q.shape[2] // block_mask.block_size[0]), own["sequence"]

        def part(x: Tensor) -> Tensor:
            return (x if len(x) == 1 else x[sequence : sequence + 1])[:, :, :rows]

        mask = BlockMask(part(block_mask.kv_num_blocks), part(block_mask.kv_indices), block_mask.block_size)
        bias = None if block_bias is None else part(block_bias)
        if own.get("score") == "sigmoid":
            output = block_sparse_attention(q, k, v, mask, block_bias=bias, **own)
            assert isinstance(output, Tensor)
            return output, output.new_zeros(output.shape[:3])
        output, logsumexp = block_sparse_attention(q, k, v, mask, block_bias=bias, return_logsumexp=True, **own)
        return output, logsumexp

    both = _each_sequence_with_logsumexp(attention, query, key, value, cu_seqlens_q, cu_seqlens_k, options)
    return both if return_logsumexp else both[0]


def probabilistic_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    keep: Keep = "harmonic",
    density: float | None = None,
    mode: Mode = "bernoulli",
    block_size: tuple[int, int] = (64, 64),
    is_causal: bool = False,
    has_padding: bool = False,
    return_logsumexp: bool = False,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    solved = _solve(keep, density, mode, (max_seqlen_q, max_seqlen_k), block_size, is_causal)

    def attention(q: Tensor, k: Tensor, v: Tensor, **own: Any) -> tuple[Tensor, Tensor]:
        return _probabilistic_attention(q, k, v, solved, block_size=block_size, is_causal=is_causal, **own)

    both = _each_sequence_with_logsumexp(attention, query, key, value, cu_seqlens_q, cu_seqlens_k, options)
    return both if return_logsumexp else both[0]


def sparse_linear_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    block_map: SparseLinearMap,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    sequences = iter(block_map.labels.expand(max(len(cu_seqlens_q) - 1, 1), -1, -1, -1))

    # The linear part rides along as more features.
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        labels = next(sequences)[None]
        own = SparseLinearMap(labels, block_map.block_size)
        return torch.cat(sparse_linear_attention(q, k, v, block_map=own, **options), -1)

    both = _each_sequence(attention, query, key, value, cu_seqlens_q, cu_seqlens_k)
    return both[..., : value.shape[-1]], both[..., value.shape[-1] :]


def _normalised(x: Tensor) -> Tensor:
    return torch.nn.functional.layer_norm(x.double(), x.shape[-1:])


def _routing_products(rows: Tensor, centroids: Tensor) -> Tensor:
    """(batch, heads, clusters, length), NaN where a row or a centroid is not finite."""
    x = _normalised(rows).repeat_interleave(centroids.shape[0] // rows.shape[1], dim=1)
    return centroids.double() @ x.mT


def _members(products: Tensor, routing: Routing, size: int) -> Tensor:
    """bool (batch, heads, clusters, length)."""
    order = products.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    if routing == "topk":
        place = order.argsort(dim=-1, descending=True, stable=True).argsort(-1)
        return (place < size) & ~products.isnan()
    place = order.argsort(dim=-2, descending=True, stable=True).argsort(-2)
    return (place == 0) & ~products.isnan()


def _as_lists(member: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    batch, heads = member.shape[:2]
    indices = torch.zeros(batch, heads, slots, dtype=torch.int32)
    for b, h in itertools.product(range(batch), range(heads)):
        used = member[b, h].nonzero()[:, 1]
        indices[b, h, : len(used)] = used
    counts = member.sum(-1).cumsum(-1)
    return indices, torch.cat((torch.zeros(batch, heads, 1), counts), -1).int()


def route(
    query: Tensor,
    key: Tensor,
    centroids: Tensor,
    *,
    cluster_size: int | None = None,
    routing: Routing = "topk",
    shared_qk: bool | None = None,
    is_causal: bool = False,
    seqused_q: Tensor | None = None,
    leftpad_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
) -> Routes:
    """Takes centroids in float64, too."""
    clusters = centroids.shape[1]
    if seqused_q is None and leftpad_q is None and query.shape[2] == key.shape[2]:
        seqused_q, leftpad_q = seqused_k, leftpad_k

    def lists(rows: Tensor, seqused: Tensor | None, leftpad: Tensor | None) -> tuple[Tensor, Tensor]:
        length = rows.shape[2]
        size = min(length, max(length // clusters, 1) if cluster_size is None else cluster_size)
        is_token = _is_token(rows, seqused, leftpad)[:, None, None]
        member = _members(_routing_products(rows, centroids).where(is_token, math.nan), routing, size)
        return _as_lists(member, clusters * size if routing == "topk" else length)

    of_queries = lists(query, seqused_q, leftpad_q)
    if shared_qk is None:
        shared_qk = is_causal and query.shape[2] == key.shape[2]
    if shared_qk:
        return Routes(*of_queries, *of_queries, query.shape[2], key.shape[2])
    ends = [
        torch.full((len(x),), x.shape[2]) if used is None else used
        for x, used in ((query, seqused_q), (key, seqused_k))
    ]
    lead = (ends[1] - ends[0]).int()[:, None]
    return Routes(*of_queries, *lists(key, seqused_k, leftpad_k), query.shape[2], key.shape[2], lead)


def _is_token(rows: Tensor, seqused: Tensor | None, leftpad: Tensor | None) -> Tensor:
    """bool (batch, length)."""
    used = torch.zeros(rows.shape[0], rows.shape[2], dtype=torch.bool, device=rows.device)
    for b, range_of_rows in enumerate(_used_keys(rows, seqused, leftpad)):
        used[b, range_of_rows] = True
    return used


def route_varlen(
    query: Tensor,
    key: Tensor,
    centroids: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    cluster_size: int | None = None,
    routing: Routing = "topk",
    shared_qk: bool = False,
    is_causal: bool = False,
    has_padding: bool = False,
) -> Routes:
    heads, clusters, _ = centroids.shape
    sequences = len(cu_seqlens_q) - 1

    def lists(rows: Tensor, offsets: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        length, starts = rows.shape[0], offsets.tolist()
        size = length if cluster_size is None else min(cluster_size, longest)
        products = _routing_products(rows.transpose(0, 1)[None], centroids)
        member = torch.zeros(1, heads, sequences * clusters, length, dtype=torch.bool)
        for s, (start, end) in enumerate(itertools.pairwise(starts)):
            own = _members(products[..., start:end], routing, size)
            member[:, :, s * clusters : (s + 1) * clusters, start:end] = own
        return _as_lists(member, clusters * min(sequences * size, length) if routing == "topk" else length)

    of_queries = lists(query, cu_seqlens_q, max_seqlen_q)
    of_keys = of_queries if shared_qk else lists(key, cu_seqlens_k, max_seqlen_k)
    lead = (cu_seqlens_k[1:] - cu_seqlens_q[1:])[None]
    return Routes(*of_queries, *of_keys, query.shape[0], key.shape[0], lead)


def _membership(indices: Tensor, offsets: Tensor, length: int) -> Tensor:
    """bool (batch, heads, clusters, length)."""
    starts, ends = offsets[..., :-1, None], offsets[..., 1:, None]
    slot = torch.arange(indices.shape[2], device=indices.device)
    inside = (slot >= starts) & (slot < ends)
    at = torch.zeros(*offsets.shape[:2], offsets.shape[2] - 1, length, dtype=torch.int64, device=indices.device)
    return at.scatter_add(3, indices.long()[:, :, None].expand_as(inside), inside.long()) > 0


def routing_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Tensor | Routes,
    *,
    cluster_size: int | None = None,
    routing: Routing | None = None,
    is_causal: bool = False,
    shared_qk: bool | None = None,
    normalize_qk: bool = False,
    score: ScoreName = "softmax",
    bias: SigmoidBias = None,
    memory_kv: tuple[Tensor, Tensor] | None = None,
    scale: float | Tensor | None = None,
    **lengths: Tensor | None,
) -> Tensor:
    if isinstance(routes, Tensor):
        options: dict[str, Any] = {"cluster_size": cluster_size, "routing": routing or "topk", "shared_qk": shared_qk}
        options |= lengths
        routes = route(query, key, routes, is_causal=is_causal, **options)
    if normalize_qk:
        query, key = _normalised(query), _normalised(key)
    length_q, length_k, memory = query.shape[2], key.shape[2], 0
    if memory_kv is not None:
        memory = memory_kv[0].shape[1]
        key, value = (
            torch.cat((m.double().expand(x.shape[0], -1, -1, -1), x.double()), dim=2)
            for m, x in zip(memory_kv, (key, value), strict=True)
        )
    lead = torch.tensor([[length_k - length_q]], device=query.device) if routes.lead is None else routes.lead
    i, j = torch.arange(length_q, device=query.device)[:, None], torch.arange(length_k, device=query.device)
    of_queries = _membership(routes.query_indices, routes.query_offsets, length_q)
    of_keys = _membership(routes.key_indices, routes.key_offsets, length_k)
    logits = _logits(query, key, scale, None, torch.empty(0))
    total = torch.zeros(*query.shape[:3], value.shape[3], dtype=torch.float64)
    for c in range(routes.clusters):
        sequence = c * lead.shape[1] // routes.clusters
        visible = j <= i + lead[:, sequence, None, None, None] if is_causal else torch.ones_like(j, dtype=torch.bool)
        seen = of_keys[:, :, c, None] & visible
        seen = torch.cat((seen.new_ones(*seen.shape[:3], memory), seen), dim=-1) & of_queries[:, :, c, :, None]
        if score == "softmax":
            output, _ = _softmax(logits.where(seen, -math.inf), seen, value)
        else:
            by_row = bias == "row" or is_causal
            keys = seen.sum(-1, True) if by_row else (memory + of_keys[:, :, c].sum(-1))[..., None, None]
            added = -keys.clamp(min=1).double().log() if bias is None or bias == "row" else bias
            output = _weighted((logits + added).sigmoid().where(seen, 0.0), seen, value)
        total = total + output
    return total / of_queries.sum(2).clamp(min=1)[..., None]


def routing_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    routes: Tensor | Routes,
    *,
    has_padding: bool = False,
    **options: Any,
) -> Tensor:
    if isinstance(routes, Routes):
        q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
        return routing_attention(q, k, v, routes, **options)[0].transpose(0, 1)
    centroids = routes

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return routing_attention(q, k, v, centroids, **options)

    return _each_sequence(attention, query, key, value, cu_seqlens_q, cu_seqlens_k)


def update_centroids(
    centroids: Tensor,
    counts: Tensor,
    query: Tensor,
    key: Tensor,
    *,
    decay: float = 0.999,
    seqused_q: Tensor | None = None,
    leftpad_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Centroids and counts after :func:`attnx.update_centroids_`."""
    members = torch.zeros_like(counts, dtype=torch.float64)
    sums = torch.zeros_like(centroids, dtype=torch.float64)
    if seqused_q is None and leftpad_q is None and query.shape[2] == key.shape[2]:
        seqused_q, leftpad_q = seqused_k, leftpad_k
    for rows, *used in ((query, seqused_q, leftpad_q), (key, seqused_k, leftpad_k)):
        x = _normalised(rows).repeat_interleave(centroids.shape[0] // rows.shape[1], dim=1)
        is_token = _is_token(rows, *used)[:, None, None]
        of_centroid = _members(_routing_products(rows, centroids).where(is_token, math.nan), "argmax", 0)
        members += 0.5 * of_centroid.sum((0, 3))
        x = x.where(x.isfinite().all(-1, keepdim=True), 0.0)
        sums += 0.5 * (of_centroid.double() @ x).sum(0)
    counts = decay * counts.double() + (1 - decay) * members
    total = counts.sum(-1, keepdim=True)
    smoothed = (counts + 1e-5) * total / (total + counts.shape[-1] * 1e-5)
    moved = (1 - decay) * (sums - members[..., None] * centroids.double()) / smoothed[..., None]
    return centroids.double() + moved.where(members[..., None] > 0, 0.0), counts
