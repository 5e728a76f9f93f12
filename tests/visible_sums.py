"""Forward and backward written out as sums over the visible pairs alone: what may depend on what.

Plain PyTorch multiplies hidden pairs by 0, and 0 x NaN is NaN. Here a hidden pair is left out of every sum, so the
positions of NaN and Inf in the results are those that the definition gives. For tiny shapes: each pair is held for
each feature.
"""

from __future__ import annotations

import math

from torch import Tensor


def attention_sums(
    softmax: bool, query: Tensor, key: Tensor, value: Tensor, grad_output: Tensor, visible: Tensor, bias: float = 0.0
) -> dict[str, Tensor]:
    """Output and gradients, by name, of one head in float64: query (length_q, head_dim), key, value alike."""
    q, k, v, do = (x.double() for x in (query, key, value, grad_output))
    scale = 1 / math.sqrt(q.shape[-1])
    logits = scale * (q[:, None] * k).sum(-1)
    if softmax:
        logits = logits.where(visible, -math.inf)
        sees_some = ~logits.isneginf().all(-1, keepdim=True)
        weights = logits.softmax(-1).where(visible & sees_some, 0.0)
    else:
        weights = (logits + bias).sigmoid().where(visible, 0.0)

    grad_weights = (do[:, None] * v).sum(-1).where(visible, 0.0)
    if softmax:
        delta = (weights * grad_weights).sum(-1, keepdim=True)
        grad_logits = weights * (grad_weights - delta)
    else:
        grad_logits = weights * (1 - weights) * grad_weights

    pair = visible[..., None]
    return {
        "output": (weights[..., None] * v).where(pair, 0.0).sum(1),
        "grad_query": scale * (grad_logits[..., None] * k).where(pair, 0.0).sum(1),
        "grad_key": scale * (grad_logits[..., None] * q[:, None]).where(pair, 0.0).sum(0),
        "grad_value": (weights[..., None] * do[:, None]).where(pair, 0.0).sum(0),
    }
