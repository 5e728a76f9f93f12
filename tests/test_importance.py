"""Scores of keys against their definitions on the matrix of weights in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import attnx
from attnx import importance
from attnx.reference import attention_row_weights
from cases import Shape, random_inputs

SHAPE = Shape(length_q=90, length_k=90, head_dim=64, batch=2, heads=4, kv_heads=2)


def operands(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    inputs, _ = random_inputs(shape, dtype, device)
    return inputs["query"], inputs["key"]


def of_group(x: Tensor, key: Tensor) -> Tensor:
    return torch.stack([heads.mean(1) for heads in x.chunk(key.shape[1], 1)], 1)


def rsq(query: Tensor, key: Tensor, r_min: float) -> Tensor:
    scores = attention_row_weights(query, key, is_causal=True).sum((1, 2))
    rows = []
    for s in scores:
        r = r_min + (1 - r_min) * (s - s.min()) / (s.max() - s.min())
        rows.append(r / r.mean())
    return torch.stack(rows)


def snapkv(query: Tensor, key: Tensor, window: int, kernel_size: int) -> Tensor:
    weights = attention_row_weights(query, key, is_causal=True)[:, :, -window:, :-window].mean(2)
    half = kernel_size // 2
    padded = torch.nn.functional.pad(weights, (half, half))
    pooled = torch.stack([padded[..., i : i + weights.shape[-1]] for i in range(kernel_size)]).mean(0)
    return of_group(pooled, key)


def h2o(query: Tensor, key: Tensor) -> Tensor:
    weights = attention_row_weights(query, key, is_causal=True)
    return of_group(weights.sum(2) / (weights > 0).sum(2).clamp(min=1), key)


def tova(query: Tensor, key: Tensor) -> Tensor:
    return attention_row_weights(query, key)[:, :, -1].mean(1)


def cls(query: Tensor, key: Tensor, row: int) -> Tensor:
    return attention_row_weights(query, key)[:, :, row].mean(1)


CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], dict[str, Any]]] = {
    "rsq": (importance.rsq, rsq, {"r_min": 0.1}),
    "snapkv": (importance.snapkv, snapkv, {"window": 20, "kernel_size": 5}),
    "snapkv-unpooled": (importance.snapkv, snapkv, {"window": 64, "kernel_size": 1}),
    "h2o": (importance.h2o, h2o, {}),
    "tova": (importance.tova, tova, {}),
    "cls": (importance.cls, cls, {"row": 3}),
}


@pytest.mark.parametrize("length_k", [90, 120])
@pytest.mark.parametrize("case", CASES)
def test_definition(case: str, length_k: int, dtype: torch.dtype, device: torch.device) -> None:
    function, definition, options = CASES[case]
    shape = Shape(length_q=90, length_k=length_k, head_dim=64, batch=2, heads=4, kv_heads=2)
    query, key = operands(shape, dtype, device)
    expected = definition(query, key, **options)
    actual = function(query, key, **options)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected.float(), rtol=1e-4, atol=1e-6)
    causal = case not in ("tova", "cls")
    _, logsumexp = attnx.softmax_attention(query, key, key, is_causal=causal, return_logsumexp=True)
    torch.testing.assert_close(function(query, key, logsumexp=logsumexp, **options), actual, rtol=1e-5, atol=1e-7)


def test_rsq_of_equal_tokens_is_one(dtype: torch.dtype, device: torch.device) -> None:
    """All keys alike, and no mask: nothing is left to divide by."""
    query, key = operands(SHAPE, dtype, device)
    weights = importance.rsq(query, torch.zeros_like(key), is_causal=False)
    assert torch.equal(weights, torch.ones_like(weights))


def test_rsq_has_mean_one_and_the_least_weight_is_bounded(dtype: torch.dtype, device: torch.device) -> None:
    weights = importance.rsq(*operands(SHAPE, dtype, device), r_min=0.2)
    torch.testing.assert_close(weights.mean(-1), torch.ones_like(weights[:, 0]))
    torch.testing.assert_close(weights.amin(-1) / weights.amax(-1), torch.full_like(weights[:, 0], 0.2))


def test_the_whole_prompt_is_the_window(dtype: torch.dtype, device: torch.device) -> None:
    query, key = operands(SHAPE, dtype, device)
    assert importance.snapkv(query, key, window=90).shape == (2, 2, 0)


BAD: list[tuple[Callable[..., Tensor], dict[str, Any], str]] = [
    (importance.rsq, {"r_min": 2.0}, "r_min: expected a number from 0 to 1, got 2.0"),
    (importance.snapkv, {"window": 91}, "window: expected an int from 1 to 90, got 91"),
    (importance.snapkv, {"window": 10, "kernel_size": 4}, "kernel_size: expected an odd number, got 4"),
    (importance.cls, {"row": 90}, "row: expected an int from 0 to 89, got 90"),
]


@pytest.mark.parametrize(("function", "options", "message"), BAD, ids=lambda x: getattr(x, "__name__", None))
def test_bad_input(
    function: Callable[..., Tensor], options: dict[str, Any], message: str, dtype: torch.dtype, device: torch.device
) -> None:
    with pytest.raises(RuntimeError, match=f"^{message}"):
        function(*operands(SHAPE, dtype, device), **options)
