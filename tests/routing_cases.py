"""What the tests of routing attention share: centroids, memory, and the operator in plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import attnx
from attnx import reference
from attnx.testing import assert_close
from compare import forward_backward


def random_centroids(heads: int, clusters: int, head_dim: int, seed: int = 7) -> Tensor:
    return torch.randn(heads, clusters, head_dim, generator=torch.Generator().manual_seed(seed))


def random_memory(kv_heads: int, count: int, head_dim: int, value_dim: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(8)
    keys, values = (torch.randn(kv_heads, count, d, generator=generator).to(dtype) for d in (head_dim, value_dim))
    return {"memory_key": keys, "memory_value": values}


def with_memory(function: Any) -> Any:
    """Takes the two tensors of the memory by name, so that each is differentiated."""

    def attention(*, memory_key: Tensor | None = None, memory_value: Tensor | None = None, **arguments: Any) -> Tensor:
        memory_kv = None if memory_key is None else (memory_key, memory_value)
        return function(memory_kv=memory_kv, **arguments)

    return attention


def eager_routing_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: attnx.Routes,
    *,
    is_causal: bool = False,
    normalize_qk: bool = False,
    score: str = "softmax",
    bias: Any = None,
    memory_kv: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    constant_sums: bool = False,
) -> Tensor:
    """A gather, attention in plain PyTorch and an addition for each cluster, rounded to the dtype at each step.

    With ``constant_sums`` the softmax's sums are not differentiated.
    """
    if normalize_qk:
        query, key = (F.layer_norm(x, x.shape[-1:]) for x in (query, key))
    batch, heads, length_q, _ = query.shape
    group = heads // key.shape[1]
    leads = torch.tensor([[key.shape[2] - length_q]] * batch) if routes.lead is None else routes.lead
    heads_out = []
    for b in range(batch):
        for h in range(heads):
            total = query.new_zeros(length_q, value.shape[3])
            count = torch.zeros(length_q)
            for c in range(routes.clusters):
                q, k = (
                    indices[b, h, offsets[b, h, c] : offsets[b, h, c + 1]].long()
                    for indices, offsets in (routes[:2], routes[2:4])
                )
                keys, values = key[b, h // group, k], value[b, h // group, k]
                memory = 0
                if memory_kv is not None:
                    memory = memory_kv[0].shape[1]
                    keys = torch.cat((memory_kv[0][h // group], keys))
                    values = torch.cat((memory_kv[1][h // group], values))
                lead = leads[b, c * leads.shape[1] // routes.clusters]
                seen = k <= q[:, None] + lead if is_causal else torch.ones(len(q), len(k), dtype=torch.bool)
                seen = F.pad(seen, (memory, 0), value=True)
                rule = "row" if bias is None and is_causal else bias
                output = _dense(query[b, h, q], keys, values, seen, score, rule, scale, constant_sums)
                total = total.index_add(0, q, output)
                count[q] += 1
            heads_out.append(total / count.clamp(min=1)[:, None].to(total.dtype))
    return torch.stack(heads_out).unflatten(0, (batch, heads))


def _dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    score: str,
    bias: Any,
    scale: float | None,
    constant_sums: bool,
) -> Tensor:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    # From the last term to the first, as attnx.testing.eager_attention does.
    logits = q.flip(-1) @ (k * scale).flip(0, -1).mT
    seen = seen.flip(-1)
    if score == "softmax":
        logits = logits.masked_fill(~seen, torch.finfo(logits.dtype).min)
        weights = (logits - logits.logsumexp(-1, True).detach()).exp() if constant_sums else logits.softmax(-1)
    else:
        keys = seen.sum(-1, keepdim=True) if bias == "row" else torch.tensor(seen.shape[-1])
        added = -keys.clamp(min=1).to(q.dtype).log() if bias in (None, "row") else bias
        weights = (logits + added).sigmoid()
    return weights.masked_fill(~seen, 0.0) @ v.flip(0)


def check(
    inputs: dict[str, Tensor],
    grad_output: Tensor,
    routes: attnx.Routes,
    *,
    reference: Any = reference.routing_attention,
    **options: Any,
) -> dict[str, Tensor]:
    """Output and gradients against float64, with the error of plain PyTorch as the measure."""
    options["routes"] = routes
    results = forward_backward(with_memory(attnx.routing_attention), inputs, grad_output, **options)
    exact = {name: x.double() for name, x in inputs.items()}
    expected = forward_backward(with_memory(reference), exact, grad_output.double(), **options)
    baseline = forward_backward(with_memory(eager_routing_attention), inputs, grad_output, **options)
    # The gradient of a logit is P (dP - delta), which may cancel: rounding is of the size of P dP.
    terms = forward_backward(
        with_memory(eager_routing_attention), exact, grad_output.double(), constant_sums=True, **options
    )
    for name, actual in results.items():
        assert actual.dtype == grad_output.dtype
        assert_close(actual, expected[name], baseline[name], name=name, terms=terms[name])
    return results
