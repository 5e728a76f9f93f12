"""The gated delta rule: linear attention whose state decays, and forgets for a key what it holds for it."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from attnx import _arguments, _capability, _shards

__all__ = ["gated_delta_rule"]

_ops = torch.ops.attnx


@overload
def gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    scale: float | Tensor | None = ...,
    initial_state: Tensor | None = ...,
    carry: Tensor | None = ...,
    normalize_qk: bool = ...,
    return_state: Literal[False] = ...,
) -> Tensor: ...


@overload
def gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    scale: float | Tensor | None = ...,
    initial_state: Tensor | None = ...,
    carry: Tensor | None = ...,
    normalize_qk: bool = ...,
    return_state: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@overload
def gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    scale: float | Tensor | None = ...,
    initial_state: Tensor | None = ...,
    carry: Tensor | None = ...,
    normalize_qk: bool = ...,
    return_state: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...


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
    r"""The gated delta rule, as Gated DeltaNet, Qwen3-Next and Qwen3.5 have it.

    Each head has a state :math:`S`, (key_dim, value_dim), which token after token decays, takes a share of what its
    value differs by from what the state holds for its key, and is read by its query:

    .. math::
        S_t = e^{g_t} S_{t-1} + \beta_t k_t (v_t - e^{g_t} S_{t-1}^T k_t)^T \qquad o_t = \text{scale} \, S_t^T q_t

    Time and memory are linear in the length. A sequence may come in pieces, each of which begins with the state that
    the one before it returned; pieces of up to 8 tokens, as in decoding, update the state token by token, longer ones
    chunk by chunk. Keys should have a norm of 1 at most, and beta be between 0 and 1, so that the state does not grow;
    models normalise query and key. The order of all sums is fixed.

    Args:
        query: (batch, heads, length, key_dim).
        key: the same shape.
        value: (batch, value_heads, length, value_dim); value_heads is a multiple of heads, and consecutive heads of
            values share a head of queries and keys.
        log_decay: (batch, value_heads, length), g: 0 keeps the state, -inf forgets it. float32 (float64 for float64).
        beta: the same shape and dtype.
        scale: of the query, key_dim ** -0.5 by default; a number, or a tensor of shape () or (heads,) with a gradient.
        initial_state: (batch, value_heads, key_dim, value_dim), the dtype of beta; zeros by default.
        carry: (batch, value_heads, chunks), the dtype of beta: how much of what each chunk of 64 tokens adds to the
            state goes on behind it, where the last chunk may be shorter; 1 by default. Within a chunk a token meets
            those before it all the same. With 0 a chunk leaves the state decayed and otherwise as it was, as NAtS-L
            (arXiv 2602.03681) has it for chunks whose keys and values are kept.
        normalize_qk: whether queries and keys are brought to norm 1, in the type of sums: x / sqrt(sum(x^2) + 1e-6).
            On CUDA they are rounded to the dtype of query then.
        return_state: whether to return the state after the last token, too.

    Returns:
        (batch, value_heads, length, value_dim) in the dtype of value, and with ``return_state`` the state, shaped like
        ``initial_state``. All tensor arguments have gradients, through both.

    Raises:
        RuntimeError: an argument does not fit; the message names it, what was expected and what came.
        NotImplementedError: no kernel for these arguments on this device; the message names what is missing.

    Source: Yang et al., "Gated Delta Networks: Improving Mamba2 with Delta Rule", arXiv 2412.06464.
    """
    _shards.expect_whole("gated_delta_rule")
    _arguments.tensors(query=query, key=key, value=value, log_decay=log_decay, beta=beta)
    _arguments.optional_tensors(initial_state=initial_state, carry=carry)
    wants_state = _arguments.flag("return_state", return_state)
    factor: Tensor | None = None
    number: float | None = 1.0
    if _arguments.flag("normalize_qk", normalize_qk) and _capability.backend_of(query.device) == "cuda":
        query, key, normalize_qk = _unit(query), _unit(key), False
    if normalize_qk and isinstance(scale, Tensor):
        # A norm of 1 would undo a factor of the query.
        group = value.shape[1] // query.shape[1] if query.dim() == value.dim() == 4 and query.shape[1] else 1
        _arguments.with_scale(query[:0], scale)  # refuses what is no scale
        factor = scale if scale.dim() == 0 else scale.repeat_interleave(group)[:, None, None]
    else:
        query, number = _arguments.with_scale(query, scale)
    output, state = _ops.gated_delta_rule(
        query, key, value, log_decay, beta, initial_state, carry, number, normalize_qk
    )
    if factor is not None:
        output = (output * factor).to(output.dtype)
    return (output, state) if wants_state else output


def _unit(x: Tensor) -> Tensor:
    return (x * (x.float().square().sum(-1, keepdim=True) + 1e-6).rsqrt()).to(x.dtype)
