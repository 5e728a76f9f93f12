"""What an attention's weights and logits say of its keys and rows, without its values."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from attnx import _arguments, _shards
from attnx._scores import ScoreArguments, ScoreName, SigmoidBias, resolve_score
from attnx.functional import Window, softmax_attention

_ops = torch.ops.attnx


class _Call(NamedTuple):
    """Some rows of an attention, as a call of their own: these queries are aligned to the end of these keys."""

    query: Tensor
    key: Tensor
    rows: slice
    scale: float | None
    is_causal: bool
    window: tuple[int, int]


def attention_key_weights(
    query: Tensor,
    key: Tensor,
    *,
    logsumexp: Tensor | None = None,
    row_weights: Tensor | None = None,
    rows: range | None = None,
    score: ScoreName = "softmax",
    bias: SigmoidBias = None,
    scale: float | Tensor | None = None,
    is_causal: bool = False,
    window: Window = None,
) -> Tensor:
    r"""The weight that each key gets from all rows, or from some, of each head.

    .. math:: c_j = \sum_{i \in \text{rows}} w_i P_{ij}

    It takes half of a forward's products, as it has no values, and sums float32 weights. The order of its sums is
    fixed.

    Args:
        query: (batch, heads, length_q, head_dim).
        key: (batch, kv_heads, length_k, head_dim); heads is a multiple of kv_heads.
        logsumexp: (batch, heads, length_q) of all rows, as ``softmax_attention(..., return_logsumexp=True)`` of the
            same queries and keys gives it, float32 (float64 for float64). Without it another pass computes it, which
            takes about as long as a forward. The gradients of query and key are complete, and it gets none. The
            sigmoid has none.
        row_weights: (batch or 1, heads or 1, rows), the dtype of logsumexp: what each row of ``rows`` counts; 1 by
            default. It may require a gradient.
        rows: the rows that count, a range of step 1; all by default.
        score: "softmax", or "sigmoid" with ``bias`` as in :func:`attnx.sigmoid_attention`, but not a tensor.
        scale, is_causal, window: as in :func:`attnx.sigmoid_attention`.

    Returns:
        (batch, heads, length_k) float32 (float64 for float64). A key that no row sees gets 0.

    Raises:
        RuntimeError: an argument does not fit; the message names it, what was expected and what came.
        NotImplementedError: no kernel for these arguments on this device; the message names what is missing.

    Sources: Zhang et al., "H2O: Heavy-Hitter Oracle", arXiv 2306.14048, and Sung et al., "RSQ: Learning from Important
    Tokens Leads to Better Quantized LLMs", arXiv 2503.01820, sum weights so.
    """
    _shards.expect_whole("attention_key_weights")
    _arguments.tensors(query=query, key=key)
    _arguments.optional_tensors(logsumexp=logsumexp, row_weights=row_weights)
    call = _of_rows(query, key, rows, scale, is_causal, window)
    s = _score(score, bias, call, key)
    logsumexp = _logsumexp(call, s, logsumexp, query)
    weights = _ops.attention_key_weights(
        call.query, call.key, logsumexp, row_weights, *s[:1], *s[2:], call.scale, call.is_causal, *call.window, 0
    )
    return torch.nn.functional.pad(weights, (0, key.shape[2] - call.key.shape[2]))


def attention_row_weights(
    query: Tensor,
    key: Tensor,
    *,
    rows: range | None = None,
    logsumexp: Tensor | None = None,
    score: ScoreName = "softmax",
    bias: SigmoidBias = None,
    scale: float | Tensor | None = None,
    is_causal: bool = False,
    window: Window = None,
) -> Tensor:
    r"""The weights of some rows, such as the last ones or that of a class token.

    Args:
        query, key, score, bias, scale, is_causal, window: as in :func:`attention_key_weights`.
        rows: which rows, a range of step 1; all by default. The result is as large as their number.
        logsumexp: (batch, heads, length_q) of all rows, as in :func:`attention_key_weights`.

    Returns:
        (batch, heads, rows, length_k) float32 (float64 for float64), 0 where a row does not see a key. It has gradients
        in query and key.

    Raises:
        RuntimeError: an argument does not fit; the message names it, what was expected and what came.
        NotImplementedError: no kernel for these arguments on this device; the message names what is missing.

    Sources: Li et al., "SnapKV: LLM Knows What You are Looking for Before Generation", arXiv 2404.14469, and Oren et
    al., "Transformers are Multi-State RNNs" (TOVA), arXiv 2401.06104, choose keys by them.
    """
    _shards.expect_whole("attention_row_weights")
    _arguments.tensors(query=query, key=key)
    _arguments.optional_tensors(logsumexp=logsumexp)
    call = _of_rows(query, key, rows, scale, is_causal, window)
    s = _score(score, bias, call, key)
    logsumexp = _logsumexp(call, s, logsumexp, query)
    weights = _ops.attention_row_weights(
        call.query, call.key, logsumexp, *s[:1], *s[2:], call.scale, call.is_causal, *call.window, 0
    )
    return torch.nn.functional.pad(weights, (0, key.shape[2] - call.key.shape[2]))


def attention_max_logits(
    query: Tensor,
    key: Tensor,
    *,
    rows: range | None = None,
    scale: float | Tensor | None = None,
    is_causal: bool = False,
    window: Window = None,
) -> Tensor:
    """The largest logit of each row, scale included; ``.amax((0, 2))`` of it is that of each head, by which QK-clip
    rescales the projections of query and key.

    Args:
        query, key, scale, is_causal, window: as in :func:`attention_key_weights`.
        rows: which rows, a range of step 1; all by default.

    Returns:
        (batch, heads, rows) float32 (float64 for float64), -inf where a row sees no key. It has no gradient.

    Raises:
        RuntimeError: an argument does not fit; the message names it, what was expected and what came.
        NotImplementedError: no kernel for these arguments on this device; the message names what is missing.

    Source: Kimi Team, "Kimi K2: Open Agentic Intelligence" (QK-clip), arXiv 2507.20534.
    """
    _shards.expect_whole("attention_max_logits")
    _arguments.tensors(query=query, key=key)
    call = _of_rows(query, key, rows, scale, is_causal, window)
    return _ops.attention_max_logits(call.query, call.key, call.scale, call.is_causal, *call.window, 0)


def _of_rows(
    query: Tensor,
    key: Tensor,
    rows: range | None,
    scale: float | Tensor | None,
    is_causal: bool,
    window: Window,
) -> _Call:
    """These rows as a call that sees the same keys, without those that lie after all that they see.

    The call aligns the last row to the last of its keys, so that rows move to the end of what they see, and the window
    moves back by as much.
    """
    query, scale = _arguments.with_scale(query, scale)
    is_causal, (left, right) = _arguments.flag("is_causal", is_causal), _arguments.window(window)
    if rows is None or query.dim() != 4 or key.dim() != 4:  # the operator says what is wrong with the shapes
        return _Call(query, key, slice(None), scale, is_causal, (left, right))
    length_q, length_k = query.shape[2], key.shape[2]
    if not isinstance(rows, range) or rows.step != 1 or not 0 <= rows.start <= rows.stop <= length_q:
        _arguments.refuse("rows", f"None or a range of step 1 within {length_q} rows", rows)
    right = 0 if is_causal else right
    after = length_q - rows.stop  # so many keys lie after the last row's place
    shift = after if right < 0 else min(after, right)
    seen = max(length_k - after + shift, 0)
    moved = left + shift if left >= 0 else left, right - shift if right >= 0 else right
    here = slice(rows.start, rows.stop)
    return _Call(query[:, :, here], key[:, :, :seen], here, scale, False, moved)


def _score(score: ScoreName, bias: SigmoidBias, call: _Call, key: Tensor) -> ScoreArguments:
    """The rule of lengths means all keys, whichever the rows see."""
    s = resolve_score(score, bias)
    if s.bias_rule == "length" and call.key.shape != key.shape:
        s = s._replace(bias_rule="none", bias_value=-math.log(max(key.shape[2], 1)))
    return s


def _logsumexp(call: _Call, s: ScoreArguments, given: Tensor | None, query: Tensor) -> Tensor | None:
    if s.score != "softmax":
        return given
    if given is not None:
        if given.shape != query.shape[:3]:
            raise RuntimeError(
                f"logsumexp: expected shape {tuple(query.shape[:3])}, one number per row, got {tuple(given.shape)}"
            )
        return given.detach()[:, :, call.rows]
    with torch.no_grad():
        few = call.key[..., :8]  # values, as few as fill 16 bytes
        _, logsumexp = softmax_attention(
            call.query,
            call.key,
            few,
            scale=call.scale,
            is_causal=call.is_causal,
            window=call.window,
            return_logsumexp=True,
        )
    return logsumexp
