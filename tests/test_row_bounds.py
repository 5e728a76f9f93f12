"""Intervals of keys that rows see: beside other bounds, at the ends of the numbers, and against masks of pairs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import attnx
from attnx import _row_bounds, reference
from attnx.testing import assert_close
from backends import Backend
from cases import MASKS, OPERATORS, Shape, random_inputs, random_parameter
from compare import forward_backward
from logit_terms import check, draw_term, eager, needs

SHAPE = Shape(length_q=70, length_k=130, batch=2, heads=4, kv_heads=2)


@pytest.fixture(autouse=True)
def _needed(backend: Backend) -> None:
    needs(backend, ("row_bounds",))


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("mask", [mask for mask in MASKS if mask != "window_diagonal"])
def test_beside_other_bounds(mask: str, operator: str, dtype: torch.dtype, backend: Backend) -> None:
    inputs, grad_output = random_inputs(SHAPE, dtype, backend.device)
    slopes = {"alibi_slopes": random_parameter((4,), dtype, backend.device)}
    bounds = draw_term("row_bounds", SHAPE, dtype, backend.device)
    check(operator, inputs | slopes, grad_output, row_bounds=bounds, **MASKS[mask])


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("served", ["sequences", "heads", "all", "rows"])
def test_one_pair_for_several(served: str, operator: str, dtype: torch.dtype, backend: Backend) -> None:
    inputs, grad_output = random_inputs(SHAPE, dtype, backend.device)
    check(operator, inputs, grad_output, row_bounds=draw_term("row_bounds", SHAPE, dtype, backend.device, served))


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("mask", ["causal", "window_both"])
def test_bounds_of_a_window(
    mask: str, operator: str, dtype: torch.dtype, backend: Backend, deterministic: None
) -> None:
    """On the CPU, where both lead to the same loop, they are the same bits; on CUDA they are to rounding."""
    inputs, grad_output = random_inputs(SHAPE, dtype, backend.device)
    left, right = MASKS[mask].get("window", (-1, 0))
    bounds = _row_bounds.band((SHAPE.length_q, SHAPE.length_k), (left, right), backend.device)
    function, options = getattr(attnx, operator), {"bias": -4.0} if operator.startswith("sigmoid") else {}
    expected = forward_backward(function, inputs, grad_output, **MASKS[mask], **options)
    actual = forward_backward(function, inputs, grad_output, row_bounds=bounds, **options)
    for name, x in actual.items():
        if backend.kernels == "cpu":
            assert torch.equal(x, expected[name]), name
        else:
            rounding = 4 * torch.finfo(dtype).eps
            atol = rounding * float(expected[name].abs().max())
            torch.testing.assert_close(x, expected[name], rtol=rounding, atol=atol, msg=name)


LEAST, MOST = torch.iinfo(torch.int32).min, torch.iinfo(torch.int32).max


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(
    ("pair", "keys"),
    [
        ((LEAST, MOST), (0, 130)),
        ((LEAST, 3), (0, 3)),
        ((127, MOST), (127, 130)),
        ((MOST, LEAST), (0, 0)),
        ((130, 140), (0, 0)),
        ((-5, 0), (0, 0)),
        ((64, 64), (0, 0)),
        ((9, 8), (0, 0)),
        ((LEAST, LEAST), (0, 0)),
        ((MOST, MOST), (0, 0)),
    ],
    ids=str,
)
def test_bounds_beyond_the_keys(
    pair: tuple[int, int],
    keys: tuple[int, int],
    operator: str,
    dtype: torch.dtype,
    backend: Backend,
    deterministic: None,
) -> None:
    inputs, grad_output = random_inputs(SHAPE, dtype, backend.device)
    given, inside = (torch.tensor(x, dtype=torch.int32, device=backend.device)[None, None, None] for x in (pair, keys))
    function = getattr(attnx, operator)
    results = forward_backward(function, inputs, grad_output, row_bounds=given)
    expected = forward_backward(function, inputs, grad_output, row_bounds=inside)
    for name, x in results.items():
        assert torch.equal(x, expected[name]), name
        assert keys != (0, 0) or not x.any()


@pytest.mark.parametrize("shape", [SHAPE, Shape(length_q=1, length_k=300, heads=3)], ids=str)
def test_rows_that_see_nothing(shape: Shape, dtype: torch.dtype, backend: Backend, poisoned_allocations: None) -> None:
    """Their output is 0, their logsumexp -inf or the sink, and they give no gradient."""
    inputs, grad_output = random_inputs(shape, dtype, backend.device)
    bounds = draw_term("row_bounds", shape, dtype, backend.device).clamp(0, shape.length_k)
    bounds[:, :1] = 0
    hidden = (bounds[..., 0] == bounds[..., 1]).expand(shape.batch, -1, -1)
    for sinks in (None, random_parameter((shape.heads,), dtype, backend.device) * 0 + 1):
        results = forward_backward(attnx.softmax_attention, inputs, grad_output, sink=sinks, row_bounds=bounds)
        assert all(bool(x.isfinite().all()) for x in results.values())
        assert not results["output"][hidden].any()
        assert not results["grad_query"][hidden].any()
        _, logsumexp = attnx.softmax_attention(**inputs, sink=sinks, row_bounds=bounds, return_logsumexp=True)
        assert (logsumexp[hidden] == (-math.inf if sinks is None else 1)).all()
        assert logsumexp[~hidden].isfinite().all()


@pytest.mark.needs("hidden_nonfinite")
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("worst", [math.nan, math.inf])
def test_what_is_hidden_does_not_leak(worst: float, operator: str, dtype: torch.dtype, backend: Backend) -> None:
    inputs, grad_output = random_inputs(SHAPE, dtype, backend.device)
    bounds = draw_term("row_bounds", SHAPE, dtype, backend.device).clamp(min=30)
    clean = forward_backward(getattr(attnx, operator), inputs, grad_output, row_bounds=bounds)
    for name in ("key", "value"):
        inputs[name][:, :, :30] = worst
    spoilt = forward_backward(getattr(attnx, operator), inputs, grad_output, row_bounds=bounds)
    for name, x in spoilt.items():
        torch.testing.assert_close(x, clean[name], msg=name)


@pytest.mark.parametrize("operator", OPERATORS)
def test_bounds_count_from_the_first_used_key(operator: str, dtype: torch.dtype, backend: Backend) -> None:
    inputs, _ = random_inputs(SHAPE, dtype, backend.device)
    bounds = draw_term("row_bounds", SHAPE, dtype, backend.device)
    starts, ends = (torch.tensor(x, dtype=torch.int32, device=backend.device) for x in ([7, 0], [70, 130]))
    function = getattr(attnx, operator)
    options: dict[str, Any] = {"row_bounds": bounds, "is_causal": True}
    actual = function(**inputs, leftpad_k=starts, seqused_k=ends, **options)
    baseline = []
    for b, (start, end) in enumerate(((7, 70), (0, 130))):
        used = {name: x[b : b + 1, :, start:end] if name != "query" else x[b : b + 1] for name, x in inputs.items()}
        own = options | {"row_bounds": bounds[b : b + 1]}
        torch.testing.assert_close(actual[b : b + 1], function(**used, **own))
        baseline.append(eager(**used, score=operator.split("_")[0], **own))
    exact = {name: x.double() for name, x in inputs.items()}
    expected = getattr(reference, operator)(**exact, leftpad_k=starts, seqused_k=ends, **options)
    assert_close(actual, expected, torch.cat(baseline))


@given(data=st.data())
def test_any_bounds(data: st.DataObject, backend: Backend) -> None:
    shape = Shape(
        length_q=data.draw(st.integers(1, 200)), length_k=data.draw(st.integers(1, 200)), batch=2, heads=2, kv_heads=1
    )
    dtype = backend.dtypes()[0]
    seed, served = data.draw(st.integers(0, 99)), data.draw(st.sampled_from(["each", "sequences", "heads", "rows"]))
    inputs, grad_output = random_inputs(shape, dtype, backend.device, seed)
    bounds = draw_term("row_bounds", shape, dtype, backend.device, served, seed)
    is_causal, operator = data.draw(st.booleans()), data.draw(st.sampled_from(OPERATORS))
    check(operator, inputs, grad_output, is_causal=is_causal, row_bounds=bounds)


@pytest.mark.parametrize("length_q", [1, 300])
def test_threads_share_the_work(length_q: int, threads: int, device: torch.device, backend: Backend) -> None:
    shape = Shape(length_q=length_q, length_k=3000 if length_q == 1 else 200, heads=2)
    dtype = backend.dtypes()[0]
    inputs, grad_output = random_inputs(shape, dtype, device)
    check("softmax_attention", inputs, grad_output, row_bounds=draw_term("row_bounds", shape, dtype, device))


@pytest.mark.parametrize("operator", OPERATORS)
def test_vmap(operator: str, dtype: torch.dtype, backend: Backend) -> None:
    inputs, _ = random_inputs(SHAPE, dtype, backend.device)
    several = {name: torch.stack([x, x.flip(0)]) for name, x in inputs.items()}
    bounds = draw_term("row_bounds", SHAPE, dtype, backend.device)[:, :1]
    bounds = torch.stack([bounds, bounds.flip(2)])

    def attend(query: Tensor, key: Tensor, value: Tensor, row_bounds: Tensor) -> Tensor:
        return getattr(attnx, operator)(query, key, value, row_bounds=row_bounds)

    arguments = (*several.values(), bounds)
    expected = torch.stack([attend(*(x[n] for x in arguments)) for n in range(2)])
    torch.testing.assert_close(torch.vmap(attend)(*arguments), expected)


@pytest.mark.parametrize("operator", OPERATORS)
def test_bad_bounds_are_refused(operator: str, dtype: torch.dtype, backend: Backend) -> None:
    inputs, _ = random_inputs(SHAPE, dtype, backend.device)
    bounds = draw_term("row_bounds", SHAPE, dtype, backend.device)
    for bad, message in (
        (bounds.long(), "row_bounds: expected int32, got int64"),
        (bounds[:, :3], r"row_bounds: expected shape \(2 or 1, 4 or 1, 70 or 1, 2\)"),
        (bounds[..., :1], r"row_bounds: expected shape .*, got \(2, 4, 70, 1\)"),
        (bounds[0], r"row_bounds: expected shape .*, got \(4, 70, 2\)"),
        (bounds.mT.contiguous().mT, "row_bounds: expected a contiguous last dimension"),
        (3, "row_bounds: expected a tensor, got 3"),
    ):
        with pytest.raises(RuntimeError, match=message):
            getattr(attnx, operator)(**inputs, row_bounds=bad)
