"""Log-probabilities of keys, against the whole matrix of them."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import attnx
from attnx import reference
from attnx.testing import assert_close
from cases import DTYPES, Shape, parameter_dtype, random_inputs
from compare import forward_backward

SHAPE = Shape(33, 40, 16, batch=2, heads=4, kv_heads=2)


def _inputs(dtype: torch.dtype, device: torch.device) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    inputs, _ = random_inputs(SHAPE, dtype, device)
    del inputs["value"]
    torch.manual_seed(2)
    target = torch.randint(0, 8, (2, 4, 33)).to(device)  # keys that every query sees
    return inputs, target, torch.randn(2, 4, 33, dtype=parameter_dtype(dtype)).to(device)


def _eager(query: Tensor, key: Tensor, target: Tensor, **options: Any) -> Tensor:
    """The plain computation: the matrix in the dtype of query, its logarithms in float32."""
    logits = query * query.shape[-1] ** -0.5 @ key.repeat_interleave(query.shape[1] // key.shape[1], dim=1).mT
    visible = reference.visible_keys(query.shape[2], key.shape[2], query.device, **options)
    log_prob = logits.to(parameter_dtype(query.dtype)).masked_fill(~visible, -torch.inf).log_softmax(-1)
    return log_prob.gather(-1, target[..., None])[..., 0]


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window": (40, 3)}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masks(options: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
    inputs, target, grad_output = _inputs(dtype, device)
    got = forward_backward(attnx.pointer_log_prob, inputs, grad_output, target=target, **options)
    exact = {name: x.double() for name, x in inputs.items()}
    want = forward_backward(reference.pointer_log_prob, exact, grad_output.double(), target=target, **options)
    plain = forward_backward(_eager, inputs, grad_output, target=target, **options)
    for name, x in got.items():
        assert_close(x, want[name], plain[name], name=name, dtype=dtype)


def test_hidden_targets(dtype: torch.dtype, device: torch.device) -> None:
    """Their logarithm is -inf; a loss that leaves them out has finite gradients."""
    inputs, _, _ = _inputs(dtype, device)
    target = torch.full((2, 4, 33), 30, device=device)
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    log_prob = attnx.pointer_log_prob(**leaves, target=target, is_causal=True)
    hidden = torch.arange(33, device=device) + 7 < 30
    assert torch.equal(log_prob == -torch.inf, hidden.expand_as(log_prob))
    gradients = torch.autograd.grad(log_prob.where(~hidden, 0.0).sum(), list(leaves.values()))
    assert all(x.isfinite().all() for x in gradients)
    assert not gradients[0][:, :, hidden].any()


def test_sink(dtype: torch.dtype, device: torch.device) -> None:
    inputs, target, _ = _inputs(dtype, device)
    sink = torch.linspace(-1, 2, 4, dtype=parameter_dtype(dtype)).to(device)
    got = attnx.pointer_log_prob(**inputs, target=target, sink=sink)
    exact = {name: x.double() for name, x in inputs.items()}
    want = reference.pointer_log_prob(**exact, target=target, sink=sink)
    assert_close(got, want, want.to(dtype), dtype=dtype)


@pytest.mark.backends("cpu")
def test_gradients(backend: object) -> None:
    inputs, target, _ = _inputs(torch.float64, torch.device("cpu"))
    leaves = [x[:1].clone().requires_grad_() for x in inputs.values()]

    def log_prob(query: Tensor, key: Tensor) -> Tensor:
        return attnx.pointer_log_prob(query, key, target[:1], is_causal=True)

    assert torch.autograd.gradcheck(log_prob, leaves)


@pytest.mark.backends("cpu")
def test_compiled(backend: object) -> None:
    inputs, target, _ = _inputs(torch.float32, torch.device("cpu"))
    compiled = torch.compile(attnx.pointer_log_prob, fullgraph=True, backend="aot_eager", dynamic=True)
    assert torch.equal(compiled(**inputs, target=target), attnx.pointer_log_prob(**inputs, target=target))


@pytest.mark.backends("cpu")
@pytest.mark.parametrize(
    ("target", "message"),
    [
        (None, "target: expected a tensor, got None"),
        (torch.zeros(2, 4, 33), "target: expected int64 or int32 of shape (2, 4, 33), got torch.float32"),
        (torch.zeros(2, 4, 3, dtype=torch.int64), "target: expected int64 or int32 of shape (2, 4, 33)"),
        (torch.full((2, 4, 33), 40), "target: expected keys from 0 to 39, got some from 40 to 40"),
        (torch.full((2, 4, 33), -1), "target: expected keys from 0 to 39, got some from -1 to -1"),
    ],
)
def test_bad_input(target: Any, message: str, backend: object) -> None:
    inputs, _, _ = _inputs(torch.float32, torch.device("cpu"))
    with pytest.raises(RuntimeError, match=re.escape(message)):
        attnx.pointer_log_prob(**inputs, target=target)
