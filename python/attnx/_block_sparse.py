"""What torch must know of the block-sparse operator: shapes, gradients, autocast, refusals."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnx import _capability, _operators
from attnx.block_mask import transpose

NAME = "block_sparse_attention"


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, block_bias = inputs[:6]
    ctx.save_for_backward(*tensors, *output, *([] if block_bias is None else [block_bias]))
    ctx.options = inputs[6:]


def _gradient(ctx: Any, grad: Tensor, grad_logsumexp: Tensor) -> tuple[Any, ...]:
    query, key, value, counts, indices, output, logsumexp, *bias = ctx.saved_tensors
    block_q, block_k, *options = ctx.options
    if grad.stride(-1) != 1:
        grad = grad.contiguous()
    block_bias = bias[0] if bias else None
    transposed: tuple[Tensor | None, ...] = (None, None, None)
    if _capability.backend_of(query.device) == "cuda":
        transposed = transpose(counts, indices, block_bias, -(-key.shape[2] // block_k))
    lists = (counts, indices, block_bias, *transposed)
    deterministic = torch.are_deterministic_algorithms_enabled()
    gradients = torch.ops.attnx.block_sparse_attention_backward(
        grad, grad_logsumexp, query, key, value, output, logsumexp, *lists, block_q, block_k, *options, deterministic
    )
    return *gradients, *(None,) * (3 + len(ctx.options))


def register() -> None:
    for name in (NAME, f"{NAME}_backward"):
        _operators.register_refusal(name)
        _operators.register_fake(name)
    torch.library.register_autograd(f"attnx::{NAME}", _gradient, setup_context=_setup_context)
    _operators.refuse_double_backward(f"{NAME}_backward")
    for device_type in ("cpu", "cuda"):
        _operators.register_autocast(NAME, device_type)
