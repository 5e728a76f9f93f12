"""Linear attention over all earlier tokens, by a state that sums them up."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, overload

import torch
from torch import Tensor

from attnx import _arguments, _shards

__all__ = ["linear_attention"]

_ops = torch.ops.attnx

StateFeatures: TypeAlias = Literal["taylor", "elu", "relu", "softmax"]


@overload
def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    feature_map: StateFeatures = ...,
    scale: float | Tensor | None = ...,
    is_causal: bool = ...,
    initial_state: Tensor | None = ...,
    return_state: Literal[False] = ...,
) -> Tensor: ...


@overload
def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    feature_map: StateFeatures = ...,
    scale: float | Tensor | None = ...,
    is_causal: bool = ...,
    initial_state: Tensor | None = ...,
    return_state: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@overload
def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    feature_map: StateFeatures = ...,
    scale: float | Tensor | None = ...,
    is_causal: bool = ...,
    initial_state: Tensor | None = ...,
    return_state: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    feature_map: StateFeatures = "taylor",
    scale: float | Tensor | None = None,
    is_causal: bool = True,
    initial_state: Tensor | None = None,
    return_state: bool = False,
) -> Any:
    r"""Linear attention: weights are products of features, so that a sum over tokens takes the place of the tokens.

    .. math:: o_i = \frac{\sum_j w_{ij} v_j}{\sum_j w_{ij}} \qquad w_{ij} = \phi(q_i) \cdot \phi(k_j)

    With "taylor", BASED's, a weight is the Taylor polynomial of softmax's, :math:`1 + t + t^2/2` of
    :math:`t = \text{scale} \, q_i \cdot k_j`; its 1 + d + d (d + 1) / 2 features, 153 for a head_dim of 16, are made
    where they are used. Time and memory are linear in the length; where it is short, and no state is given or wanted,
    the weights of all pairs are made instead, which takes less time. A sequence may come in pieces, each of which
    begins with the state that the one before it returned. The order of all sums is fixed.

    Args:
        query: (batch, heads, length_q, head_dim); head_dim is 64 at most with "taylor".
        key: (batch, kv_heads, length_k, head_dim); heads is a multiple of kv_heads.
        value: (batch, kv_heads, length_k, value_dim).
        feature_map: "taylor"; "elu", elu(x) + 1; "relu"; or "softmax" over the features of a token.
        scale: of the products of "taylor", head_dim ** -0.5 by default; a number, or a tensor of shape () or (heads,)
            with a gradient. The other maps have none.
        is_causal: whether a query sees the keys up to its own place alone; both lengths are the same then. Otherwise it
            sees all.
        initial_state: (batch, kv_heads, features, value_dim + 1), float32 (float64 for float64): the sum of
            phi(k) [v, 1] over tokens that all queries see before the keys given. Zeros by default.
        return_state: whether to return the state after the last key, too. It does not depend on the scale.

    Returns:
        (batch, heads, length_q, value_dim) in the dtype of query, 0 where the weights of a row sum to 0; and with
        ``return_state`` the state. All tensor arguments have gradients, through both.

    Raises:
        RuntimeError: an argument does not fit; the message names it, what was expected and what came.
        NotImplementedError: no kernel for these arguments on this device; the message names what is missing.

    Sources: Katharopoulos et al., "Transformers are RNNs", arXiv 2006.16236; taylor: Arora et al., "Simple linear
    attention language models balance the recall-throughput tradeoff" (BASED), arXiv 2402.18668.
    """
    _shards.expect_whole("linear_attention")
    _arguments.tensors(query=query, key=key, value=value)
    _arguments.optional_tensors(initial_state=initial_state)
    query, number = _arguments.with_scale(query, scale)
    wants_state = _arguments.flag("return_state", return_state)
    output, state = _ops.linear_attention(
        query,
        key,
        value,
        initial_state,
        _arguments.text("feature_map", feature_map),
        number,
        _arguments.flag("is_causal", is_causal),
        wants_state,
    )
    return (output, state) if wants_state else output
