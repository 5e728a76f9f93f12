"""Log-probabilities of keys, against the whole matrix of them."""

from __future__ import annotations

import math
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
    softcap, attn_mask, key_bias, key_mask = (
        options.pop(name, None) for name in ("softcap", "attn_mask", "key_bias", "key_mask")
    )
    logits = query * query.shape[-1] ** -0.5 @ key.repeat_interleave(query.shape[1] // key.shape[1], dim=1).mT
    visible = reference.visible_keys(query.shape[2], key.shape[2], query.device, **options)
    logits = logits if softcap is None else softcap * (logits / softcap).tanh()
    logits = logits.to(parameter_dtype(query.dtype))
    if attn_mask is not None:
        logits = logits.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else logits + attn_mask
    logits = logits if key_bias is None else logits + key_bias[:, :, None]
    logits = logits if key_mask is None else logits + key_mask.log()[:, :, None]
    log_prob = logits.masked_fill(~visible, -torch.inf).log_softmax(-1)
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


def _terms(dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Numbers of each kind, none of which hides a target of ``_inputs``."""
    numbers = parameter_dtype(dtype)
    share = torch.rand(2, 1, 40, dtype=numbers) * 0.8 + 0.2
    share[:, :, 8:11] = 0
    pairs = torch.randn(2, 1, 33, 40, dtype=numbers)
    pairs[..., 12] = -torch.inf
    every = {"attn_mask": pairs, "key_bias": torch.randn(1, 4, 40, dtype=numbers), "key_mask": share}
    return {name: x.to(device) for name, x in every.items()}


@pytest.mark.parametrize("given", [["attn_mask"], ["key_bias"], ["key_mask"], ["attn_mask", "key_bias", "key_mask"]])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_terms(given: list[str], softcap: float | None, dtype: torch.dtype, device: torch.device) -> None:
    """The target's logit has them as the others do, and so have their gradients."""
    inputs, target, grad_output = _inputs(dtype, device)
    every = _terms(dtype, device)
    inputs |= {name: every[name] for name in given}
    options = {"target": target, "is_causal": True, "softcap": softcap}
    got = forward_backward(attnx.pointer_log_prob, inputs, grad_output, **options)
    exact = {name: x.double() for name, x in inputs.items()}
    want = forward_backward(reference.pointer_log_prob, exact, grad_output.double(), **options)
    plain = forward_backward(_eager, inputs, grad_output, **options)
    for name, x in got.items():
        # The plain form has no gradient of a share of 0, nor of what it hides.
        baseline = plain[name].where(plain[name].isfinite(), want[name].to(plain[name].dtype))
        assert_close(x, want[name], baseline, name=name, dtype=dtype)


def test_terms_that_change_nothing(dtype: torch.dtype, device: torch.device) -> None:
    inputs, target, _ = _inputs(dtype, device)
    visible = torch.ones(33, 40, dtype=torch.bool, device=device)
    got = attnx.pointer_log_prob(
        **inputs, target=target, softcap=math.inf, attn_mask=visible, key_mask=visible[None, :1]
    )
    assert_close(got, attnx.pointer_log_prob(**inputs, target=target).double(), got, dtype=dtype)


@pytest.mark.parametrize("name", ["attn_mask", "key_bias", "key_mask"])
def test_targets_that_terms_hide(name: str, dtype: torch.dtype, device: torch.device) -> None:
    inputs, target, _ = _inputs(dtype, device)
    hidden = target == 3
    numbers = torch.zeros(2, 1, 40, dtype=parameter_dtype(dtype), device=device)
    numbers[..., 3] = -torch.inf
    given = {"attn_mask": (numbers == 0)[:, :, None], "key_bias": numbers, "key_mask": numbers.exp()}[name]
    leaves = {key: x.requires_grad_() for key, x in inputs.items()}
    if name != "attn_mask":
        leaves[name] = given.requires_grad_()
    log_prob = attnx.pointer_log_prob(target=target, **({name: given} | leaves))
    assert hidden.any()
    assert torch.equal(log_prob == -torch.inf, hidden)
    gradients = torch.autograd.grad(log_prob.where(~hidden, 0.0).sum(), list(leaves.values()))
    assert all(x.isfinite().all() for x in gradients)


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
def test_gradients_of_terms(backend: object) -> None:
    inputs, target, _ = _inputs(torch.float64, torch.device("cpu"))
    leaves = [x[:1, :, :9].clone().requires_grad_() for x in inputs.values()]
    torch.manual_seed(3)
    mask, bias = torch.randn(1, 1, 9, 9).double(), torch.randn(1, 4, 9).double()
    share, scale = torch.rand(1, 1, 9).double() * 0.8 + 0.1, torch.rand(4).double()

    def log_prob(query: Tensor, key: Tensor, *numbers: Tensor) -> Tensor:
        of = dict(zip(("attn_mask", "key_bias", "key_mask", "scale"), numbers, strict=True))
        return attnx.pointer_log_prob(query, key, target[:1, :, :9], softcap=2.0, **of)

    assert torch.autograd.gradcheck(log_prob, [*leaves, *(x.requires_grad_() for x in (mask, bias, share, scale))])


@pytest.mark.backends("cpu")
def test_compiled(backend: object) -> None:
    inputs, target, _ = _inputs(torch.float32, torch.device("cpu"))
    compiled = torch.compile(attnx.pointer_log_prob, fullgraph=True, backend="aot_eager", dynamic=True)
    assert torch.equal(compiled(**inputs, target=target), attnx.pointer_log_prob(**inputs, target=target))
    given = {"target": target, "softcap": 3.0, **_terms(torch.float32, torch.device("cpu"))}
    assert torch.equal(compiled(**inputs, **given), attnx.pointer_log_prob(**inputs, **given))


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
