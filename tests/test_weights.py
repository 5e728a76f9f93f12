"""Weights by key and by row, and largest logits, against their definitions in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import attnx
from attnx import reference
from attnx.testing import assert_close
from cases import DTYPES, Shape, random_inputs

FULL_DTYPES = [*DTYPES, torch.float64]
SCORES: dict[str, dict[str, Any]] = {
    "softmax": {},
    "sigmoid": {"score": "sigmoid"},
    "sigmoid-row": {"score": "sigmoid", "bias": "row"},
    "sigmoid-number": {"score": "sigmoid", "bias": -1.5},
}
MASKS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"is_causal": True},
    "window": {"window": (40, 25)},
    "left": {"window": (30, -1)},
    "right": {"window": (-1, 9)},
}
SHAPES = [
    Shape(length_q=150, length_k=200, head_dim=64, batch=2, heads=4, kv_heads=2),
    Shape(length_q=130, length_k=70, head_dim=40, heads=2),
    Shape(length_q=70, length_k=130, head_dim=35, heads=2, kv_heads=1),
    Shape(length_q=1, length_k=90, head_dim=64, heads=2),
]
ROWS = {"all": slice(None), "some": slice(20, 45), "last": slice(-3, None), "first": slice(0, 1), "none": slice(0, 0)}


def operands(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    inputs, _ = random_inputs(shape, dtype, device)
    return inputs["query"], inputs["key"]


def rows_of(shape: Shape, which: str) -> range | None:
    return None if which == "all" else range(shape.length_q)[ROWS[which]]


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def check(function: str, query: Tensor, key: Tensor, floor: float = 8, **options: Any) -> Tensor:
    """Weights are sums of float32 products of what the inputs are, whatever their dtype."""
    actual = getattr(attnx, function)(query, key, **options)
    expected = getattr(reference, function)(query, key, **options)
    dtype = sum_dtype(query.dtype)
    assert actual.dtype == dtype
    # The baseline is float32's own rounding: a logit of size x moves a weight by x units.
    logits = reference.attention_max_logits(query.abs(), key.abs(), scale=options.get("scale"))
    units = floor + (float(logits.amax()) if logits.numel() else 0) * (4 if query.dtype == torch.float64 else 1)
    assert_close(actual, expected, expected.to(dtype), name=function, dtype=dtype, floor=units)
    return actual


@pytest.mark.parametrize("which", ROWS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("score", SCORES)
def test_rows_and_masks(score: str, mask: str, which: str, dtype: torch.dtype, device: torch.device) -> None:
    for shape in SHAPES[:2]:
        query, key = operands(shape, dtype, device)
        rows = rows_of(shape, which)
        count = shape.length_q if rows is None else len(rows)
        generator = torch.Generator().manual_seed(1)
        row_weights = torch.randn(1, shape.heads, count, generator=generator, dtype=sum_dtype(dtype)).to(device)
        options = SCORES[score] | MASKS[mask] | {"rows": rows}
        check("attention_key_weights", query, key, row_weights=row_weights, **options)
        check("attention_row_weights", query, key, **options)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", FULL_DTYPES, ids=str)
def test_shapes_and_dtypes(dtype: torch.dtype, shape: Shape, score: str, device: torch.device) -> None:
    query, key = operands(shape, dtype, device)
    options: dict[str, Any] = {"score": score, "is_causal": shape.length_q > 1}
    check("attention_key_weights", query, key, **options)
    check("attention_row_weights", query, key, **options)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_head_dims(score: str, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    query, key = operands(Shape(length_q=150, length_k=140, head_dim=head_dim, heads=2), dtype, device)
    check("attention_key_weights", query, key, score=score, is_causal=True)
    check("attention_row_weights", query, key, score=score, rows=range(100, 150))
    check("attention_max_logits", query, key)


@pytest.mark.parametrize("which", ROWS)
@pytest.mark.parametrize("mask", MASKS)
def test_largest_logits(mask: str, which: str, dtype: torch.dtype, device: torch.device) -> None:
    for shape in SHAPES:
        query, key = operands(shape, dtype, device)
        check("attention_max_logits", query, key, **MASKS[mask], rows=rows_of(shape, which))
        check("attention_max_logits", -query, key, **MASKS[mask], rows=rows_of(shape, which))  # none above 0


def test_a_given_logsumexp_is_used(dtype: torch.dtype, device: torch.device) -> None:
    """Sinks take weight by it, for instance: weights of a row need not sum to 1."""
    query, key = operands(SHAPES[0], dtype, device)
    _, logsumexp = attnx.softmax_attention(query, key, key, is_causal=True, return_logsumexp=True)
    plain = check("attention_key_weights", query, key, is_causal=True)
    given = attnx.attention_key_weights(query, key, logsumexp=logsumexp, is_causal=True)
    torch.testing.assert_close(given, plain, rtol=1e-5, atol=1e-5)
    halved = attnx.attention_key_weights(query, key, logsumexp=logsumexp + math.log(2), is_causal=True)
    torch.testing.assert_close(halved, plain / 2, rtol=1e-5, atol=1e-5)
    last = range(SHAPES[0].length_q - 5, SHAPES[0].length_q)
    row = attnx.attention_row_weights(query, key, logsumexp=logsumexp + math.log(2), rows=last, is_causal=True)
    torch.testing.assert_close(row.sum(-1), torch.full_like(row[..., 0], 0.5), rtol=1e-4, atol=0)


def test_weights_of_a_row_sum_to_one(dtype: torch.dtype, device: torch.device) -> None:
    query, key = operands(SHAPES[0], dtype, device)
    total = attnx.attention_key_weights(query, key, is_causal=True).sum(-1)
    torch.testing.assert_close(total, torch.full_like(total, SHAPES[0].length_q), rtol=1e-4, atol=0)


def test_rows_that_see_nothing_and_keys_that_no_row_sees(dtype: torch.dtype, device: torch.device) -> None:
    """Without a key the result is 0, and -inf for logits; NaN in keys that are hidden does not come through."""
    query, key = operands(Shape(length_q=130, length_k=70, head_dim=64, heads=2), dtype, device)
    first = range(20)  # they stand before all keys
    assert not attnx.attention_key_weights(query, key, rows=first, is_causal=True).any()
    assert not attnx.attention_row_weights(query, key, rows=first, is_causal=True).any()
    assert (attnx.attention_max_logits(query, key, rows=first, is_causal=True) == -math.inf).all()
    none = attnx.attention_key_weights(query, key[:, :, :0])
    assert none.shape == (1, 2, 0)
    assert not attnx.attention_key_weights(query[:, :, :0], key).any()
    key[:, :, 60:] = math.nan
    seen = attnx.attention_key_weights(query, key, rows=range(100, 115), is_causal=True)
    assert seen.isfinite().all()
    assert not seen[..., 60:].any()


@pytest.mark.parametrize("dtype", [torch.float64], ids=str)
@pytest.mark.parametrize("mask", ["full", "causal", "window"])
@pytest.mark.parametrize("score", SCORES)
def test_gradcheck(score: str, mask: str, dtype: torch.dtype, device: torch.device) -> None:
    shape = Shape(length_q=7, length_k=9, head_dim=5, heads=4, kv_heads=2)
    query, key = (x.requires_grad_() for x in operands(shape, dtype, device))
    weights = torch.rand(1, 4, 4, dtype=dtype, device=device).requires_grad_()
    options = SCORES[score] | MASKS[mask] | {"rows": range(2, 6)}

    def by_key(query: Tensor, key: Tensor, row_weights: Tensor) -> Tensor:
        return attnx.attention_key_weights(query, key, row_weights=row_weights, **options)

    def by_row(query: Tensor, key: Tensor) -> Tensor:
        return attnx.attention_row_weights(query, key, **options)

    torch.autograd.gradcheck(by_key, (query, key, weights))
    torch.autograd.gradcheck(by_row, (query, key))


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_gradients_in_16_bits(score: str, dtype: torch.dtype, device: torch.device) -> None:
    shape = Shape(length_q=70, length_k=100, head_dim=64, heads=4, kv_heads=2)
    query, key = operands(shape, dtype, device)
    weights = torch.rand(1, 4, 70, device=device)
    grad = torch.randn(1, 4, 100, device=device)

    def gradients(function: Any, *leaves: Tensor) -> list[Tensor]:
        leaves = tuple(x.detach().requires_grad_() for x in leaves)
        c = function(*leaves[:2], row_weights=leaves[2], score=score, is_causal=True)
        return list(torch.autograd.grad(c, leaves, grad.to(c.dtype)))

    actual = gradients(attnx.attention_key_weights, query, key, weights)
    expected = gradients(reference.attention_key_weights, query.double(), key.double(), weights.double())
    for name, x, y in zip(("query", "key", "row_weights"), actual, expected, strict=True):
        error = (x.double() - y).square().mean().sqrt() / y.square().mean().sqrt()
        assert error < 4 * torch.finfo(dtype).eps, name


def test_gradients_flow_once_through_a_logsumexp_of_the_same_graph(device: torch.device) -> None:
    if attnx._C.cuda_on_host:
        pytest.skip("float64")
    query, key = (x.requires_grad_() for x in operands(SHAPES[1], torch.float64, device))
    _, logsumexp = attnx.softmax_attention(query, key, key, return_logsumexp=True)
    grad = torch.randn(1, 2, 70, dtype=torch.float64)
    given = attnx.attention_key_weights(query, key, logsumexp=logsumexp)
    plain = attnx.attention_key_weights(query, key)
    for x, y in zip(*(torch.autograd.grad(c, (query, key), grad) for c in (given, plain)), strict=True):
        torch.testing.assert_close(x, y)


def test_same_bits_again(dtype: torch.dtype, device: torch.device) -> None:
    query, key = operands(SHAPES[0], dtype, device)
    first, second = (attnx.attention_key_weights(query, key, is_causal=True) for _ in range(2))
    assert torch.equal(first, second)


def test_any_number_of_threads(threads: int, device: torch.device) -> None:
    query, key = operands(Shape(length_q=300, length_k=900, head_dim=16, heads=2), torch.bfloat16, device)
    several = attnx.attention_key_weights(query, key, is_causal=True)
    torch.set_num_threads(1)
    assert torch.equal(several, attnx.attention_key_weights(query, key, is_causal=True))


def test_every_instruction_set(instruction_set: str, device: torch.device) -> None:
    query, key = operands(Shape(length_q=130, length_k=500, head_dim=64, heads=2), torch.bfloat16, device)
    check("attention_key_weights", query, key, window=(100, 7))
    check("attention_row_weights", query, key, rows=range(60, 130))
    check("attention_max_logits", query, key, is_causal=True)


def test_strides(dtype: torch.dtype, device: torch.device) -> None:
    shape = SHAPES[0]
    query, key = operands(shape, dtype, device)
    moved = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key)]
    assert torch.equal(attnx.attention_key_weights(*moved), attnx.attention_key_weights(query, key))
    assert torch.equal(attnx.attention_row_weights(*moved), attnx.attention_row_weights(query, key))
    weights = torch.rand(1, 1, shape.length_q, device=device)
    every = weights.expand(shape.batch, shape.heads, -1)
    one, all_of_them = (attnx.attention_key_weights(query, key, row_weights=w) for w in (weights, every))
    assert torch.equal(one, all_of_them)
    assert torch.equal(one, attnx.attention_key_weights(query, key, row_weights=every.contiguous()))


def test_vmap(dtype: torch.dtype, device: torch.device) -> None:
    query, key = operands(SHAPES[0], dtype, device)
    queries, keys = torch.stack([query, -query]), torch.stack([key, key * 0.5])
    together = torch.vmap(lambda q, k: attnx.attention_key_weights(q, k, is_causal=True))(queries, keys)
    alone = [attnx.attention_key_weights(q, k, is_causal=True) for q, k in zip(queries, keys, strict=True)]
    assert torch.equal(together, torch.stack(alone))


def test_autocast(device: torch.device) -> None:
    query, key = operands(SHAPES[0], torch.float32, device)
    with torch.autocast(device.type, torch.bfloat16):
        cast = attnx.attention_key_weights(query, key)
    assert torch.equal(cast, attnx.attention_key_weights(query.bfloat16(), key.bfloat16()))


def test_opcheck(dtype: torch.dtype, device: torch.device) -> None:
    query, key = operands(Shape(length_q=20, length_k=30, head_dim=64, heads=4, kv_heads=2), dtype, device)
    _, logsumexp = attnx.softmax_attention(query, key, key, return_logsumexp=True)
    query, key = query.requires_grad_(), key.requires_grad_()
    weights = torch.rand(1, 4, 20, device=device).requires_grad_()
    score, mask = ("softmax", "none", 0.0), (None, True, -1, -1, 0)
    ops = torch.ops.attnx
    torch.library.opcheck(ops.attention_key_weights.default, (query, key, logsumexp, weights, *score, *mask))
    torch.library.opcheck(ops.attention_row_weights.default, (query, key, logsumexp, *score, *mask))
    torch.library.opcheck(ops.attention_max_logits.default, (query.detach(), key.detach(), *mask))


def test_flops(dtype: torch.dtype, device: torch.device) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    query, key = operands(SHAPES[0], dtype, device)
    _, logsumexp = attnx.softmax_attention(query, key, key, return_logsumexp=True)
    with FlopCounterMode(display=False) as counter:
        attnx.attention_key_weights(query, key, logsumexp=logsumexp)
    assert counter.get_total_flops() == 2 * 2 * 4 * 150 * 200 * 64


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "rows": ({"rows": range(0, 200)}, r"rows: expected None or a range of step 1 within 150 rows, got range"),
    "step": ({"rows": range(0, 10, 2)}, "rows: expected None or a range of step 1"),
    "rows_type": ({"rows": [1, 2]}, "rows: expected None or a range of step 1"),
    "row_weights": ({"row_weights": torch.ones(1, 4, 149)}, r"row_weights: expected shape .* got \(1, 4, 149\)"),
    "row_weights_dtype": ({"row_weights": torch.ones(1, 4, 150).double()}, "row_weights: expected float32"),
    "logsumexp": ({"logsumexp": torch.ones(2, 4, 3)}, r"logsumexp: expected shape \(2, 4, 150\)"),
    "logsumexp_of_sigmoid": ({"logsumexp": torch.ones(2, 4, 150), "score": "sigmoid"}, "logsumexp: expected None with"),
    "score": ({"score": "relu"}, "score: expected"),
    "bias": ({"bias": 1.0}, "bias: expected None"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, dtype: torch.dtype, device: torch.device) -> None:
    options, message = BAD[case]
    options = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}
    query, key = operands(SHAPES[0], dtype, device)
    with pytest.raises(RuntimeError, match=message):
        attnx.attention_key_weights(query, key, **options)


@pytest.mark.parametrize("function", ["attention_key_weights", "attention_row_weights", "attention_max_logits"])
def test_explain(function: str, dtype: torch.dtype, device: torch.device) -> None:
    query, key = operands(SHAPES[0], dtype, device)
    explained = attnx.explain(getattr(attnx, function), query, key)
    assert explained.supported
    assert not attnx.explain(getattr(attnx, function), query.int(), key.int()).supported
