"""The one comparison that all numeric tests share: forward and backward against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import attnx
from attnx import reference
from attnx.testing import (
    assert_close,
    eager_attention,
    eager_sigmoid_attention,
    eager_softmax_attention,
    parameter_at_logits,
)

Attention = Callable[..., Tensor]


def forward_backward(
    attention: Attention, inputs: dict[str, Tensor], grad_output: Tensor, **options: Any
) -> dict[str, Tensor]:
    """The output of ``attention(**inputs, **options)`` and the gradient of each of ``inputs``, by name."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    output = attention(**leaves, **options)
    gradients = torch.autograd.grad(output, list(leaves.values()), grad_output)
    return {"output": output.detach()} | {f"grad_{name}": g for name, g in zip(leaves, gradients, strict=True)}


def each_sequence(attention: Attention) -> Attention:
    """Makes the varlen form of ``attention``: one call a sequence."""

    def varlen(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        has_padding: bool = False,
        **options: Any,
    ) -> Tensor:
        # The last part is padding, which gives 0.
        lengths_q = [*cu_seqlens_q.diff().tolist(), len(query) - int(cu_seqlens_q[-1])]
        lengths_k = [*cu_seqlens_k.diff().tolist(), len(key) - int(cu_seqlens_k[-1])]
        per_row = {name: x for name, x in options.items() if isinstance(x, Tensor) and x.dim() == 2}
        outputs = []
        parts = list(zip(query.split(lengths_q), key.split(lengths_k), value.split(lengths_k), strict=True))
        for i, (q, k, v) in enumerate(parts):
            own = {name: x.split(lengths_q, dim=1)[i] for name, x in per_row.items()}
            if i == len(parts) - 1:
                outputs.append(q.sum(-1, keepdim=True).expand(-1, -1, v.shape[-1]) * 0)
                break
            output = attention(*(x.transpose(0, 1)[None] for x in (q, k, v)), **options | own)
            outputs.append(output[0].transpose(0, 1))
        return torch.cat(outputs)

    return varlen


def used_keys(attention: Attention) -> Attention:
    """Makes the form of ``attention`` that takes lengths and starts of keys: one call a sequence, on its keys alone."""

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        seqused_k: Tensor | None = None,
        leftpad_k: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        if seqused_k is None and leftpad_k is None:
            return attention(query, key, value, **options)
        ends = [key.shape[2]] * len(key) if seqused_k is None else seqused_k.tolist()
        starts = [0] * len(key) if leftpad_k is None else leftpad_k.tolist()
        ranges = [slice(*x) for x in zip(starts, ends, strict=True)]
        return torch.cat(
            [
                attention(query[b : b + 1], key[b : b + 1, :, r], value[b : b + 1, :, r], **options)
                for b, r in enumerate(ranges)
            ]
        )

    return attend


EAGER: dict[str, Attention] = {
    "sigmoid_attention": used_keys(eager_sigmoid_attention),
    "softmax_attention": used_keys(eager_softmax_attention),
    "sigmoid_attention_varlen": each_sequence(eager_sigmoid_attention),
    "softmax_attention_varlen": each_sequence(eager_softmax_attention),
}


def check(
    operator: str,
    inputs: dict[str, Tensor],
    grad_output: Tensor,
    *,
    attention: Attention | None = None,
    gradient_floor: float | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Holds the output and the gradient of every input of an operator against float64; returns them.

    Args:
        operator: its name in ``attnx``.
        inputs: its floating-point tensors by name; each is differentiated.
        grad_output: the gradient to start from.
        attention: what is to compute the same as the operator, where this is not it.
        gradient_floor: units of rounding allowed to the gradients on top, where the usual ones do not do.
        options: its other arguments.
    """
    results = forward_backward(attention or getattr(attnx, operator), inputs, grad_output, **options)
    exact = {name: x.double() for name, x in inputs.items()}, grad_output.double()
    expected = forward_backward(getattr(reference, operator), *exact, **options)
    baseline = forward_backward(EAGER[operator], inputs, grad_output, **options)
    terms = _gradient_terms(operator, *exact, **options)
    for name, actual in results.items():
        like = inputs.get(name.removeprefix("grad_"), grad_output)
        assert (actual.dtype, actual.shape) == (like.dtype, like.shape), name
        assert_close(
            actual,
            expected[name],
            baseline[name],
            name=name,
            terms=terms[name],
            dtype=grad_output.dtype,
            floor=gradient_floor if name.startswith("grad_") else None,
        )
    return results


def _gradient_terms(operator: str, inputs: dict[str, Tensor], grad_output: Tensor, **options: Any) -> dict[str, Tensor]:
    """How large the terms are whose sums and differences the gradients are, by name.

    For softmax the gradient of a logit is P (dP - delta), which cancels where one key takes the whole weight: these
    are the gradients of P dP alone. The gradient of a bias or slope is one number a head, a sum with both signs over
    all rows, which plain PyTorch may hit by luck: this is the root of the sum of squares over the rows, twice, as a
    single number strays further than the average of many.
    """
    heads = inputs["query"].shape[1]
    rows = inputs["query"].shape[0 if operator.endswith("varlen") else 2]
    parameters = {name: x for name, x in inputs.items() if name in ("bias", "alibi_slopes", "sink")}
    by_row = {name: x[..., None].expand(heads, rows) for name, x in parameters.items()}
    attention = EAGER[operator]
    if "softmax" in operator:
        attention = _softmax_with_constant_sums
        attention = each_sequence(attention) if operator.endswith("varlen") else used_keys(attention)
    terms = forward_backward(attention, inputs | by_row, grad_output, **options)
    for name, x in parameters.items():
        terms[f"grad_{name}"] = spread_of_sum(terms[f"grad_{name}"], per_head=x.dim() > 0)
    return terms


def spread_of_sum(by_row: Tensor, *, per_head: bool) -> Tensor:
    """How far a sum over rows strays, of a gradient for each head and row; see :func:`_gradient_terms`."""
    return by_row.square().sum(-1 if per_head else None).sqrt() * 2


def _softmax_with_constant_sums(
    query: Tensor, key: Tensor, value: Tensor, *, sink: Tensor | None = None, **options: Any
) -> Tensor:
    def weigh(logits: Tensor, visible: Tensor) -> Tensor:
        logits = logits.masked_fill(~visible, torch.finfo(logits.dtype).min)
        logsumexp = logits.logsumexp(-1, keepdim=True).detach()
        if sink is not None:
            logsumexp = logsumexp.logaddexp(parameter_at_logits(sink, query))
        return (logits - logsumexp).exp()

    return eager_attention(weigh, query, key, value, **options)
