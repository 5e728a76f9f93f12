"""The comparison rule can fail: each thing it promises to catch, it catches."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attnx import reference
from attnx.testing import assert_close, eager_sigmoid_attention, eager_softmax_attention
from cases import MASKS, Shape, random_inputs

TRUTH = torch.linspace(-2, 2, 1001, dtype=torch.float64).view(7, 11, 13)
BASELINE = TRUTH + 1e-3 * TRUTH.sign()


def with_value(x: Tensor, value: float, index: tuple[int, ...] = (3, 4, 5)) -> Tensor:
    x = x.clone()
    x[index] = value
    return x


def test_accepts_what_plain_pytorch_loses() -> None:
    assert_close(BASELINE.float(), TRUTH, BASELINE)
    assert_close(TRUTH - 1.9e-3, TRUTH, BASELINE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_accepts_one_rounding_where_plain_pytorch_is_exact(dtype: torch.dtype) -> None:
    assert_close(TRUTH.to(dtype), TRUTH, TRUTH)


def test_rejects_three_times_the_error() -> None:
    with pytest.raises(AssertionError, match=r"largest error 0.003, allowed 0.002 .* at \(3, 4, 5\): got"):
        assert_close(with_value(TRUTH, TRUTH[3, 4, 5] + 3e-3), TRUTH, BASELINE)


def test_rejects_errors_that_are_small_but_everywhere() -> None:
    baseline = with_value(TRUTH, TRUTH[3, 4, 5] + 1e-3)
    with pytest.raises(AssertionError, match="root-mean-square error"):
        assert_close(TRUTH + 1e-3, TRUTH, baseline)


def test_rejects_a_swap_of_two_equal_sized_values() -> None:
    with pytest.raises(AssertionError, match="largest error"):
        assert_close(TRUTH.flip(0), TRUTH, BASELINE)


def test_terms_count_where_the_result_cancels() -> None:
    noise = torch.full((4,), 1e-7)
    zero = torch.zeros(4, dtype=torch.float64)
    assert_close(noise, zero, zero, terms=torch.ones(4))
    with pytest.raises(AssertionError):
        assert_close(noise, zero, zero)


@pytest.mark.parametrize("kind", [math.nan, math.inf, -math.inf], ids=str)
def test_rejects_moved_missing_and_surplus(kind: float) -> None:
    truth = with_value(TRUTH, kind)
    assert_close(truth, truth, truth)
    for wrong in (TRUTH, with_value(TRUTH, kind, (3, 4, 6)), with_value(truth, kind, (0, 0, 0))):
        with pytest.raises(AssertionError, match=r"(NaN|inf) at \d+ places, expected at"):
            assert_close(wrong, truth, truth)


def test_rejects_infinity_of_the_other_sign_and_nan_for_infinity() -> None:
    truth = with_value(TRUTH, math.inf)
    for wrong in (-math.inf, math.nan):
        with pytest.raises(AssertionError, match="places, expected at"):
            assert_close(with_value(TRUTH, wrong), truth, truth)


def test_finite_values_beside_nan_still_count() -> None:
    truth = with_value(TRUTH, math.nan)
    with pytest.raises(AssertionError, match="largest error"):
        assert_close(with_value(truth, 9.0, (0, 0, 0)), truth, truth)


def test_overflow_of_the_baseline_allows_nothing() -> None:
    with pytest.raises(AssertionError, match="largest error"):
        assert_close(TRUTH + 1.0, TRUTH, with_value(TRUTH, math.inf))


def test_rejects_another_shape() -> None:
    with pytest.raises(AssertionError, match=r"output: shape .* but expected has"):
        assert_close(TRUTH[:1], TRUTH, BASELINE)


def test_accepts_empty() -> None:
    assert_close(TRUTH[:0], TRUTH[:0], TRUTH[:0])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("operator", ["sigmoid", "softmax"])
def test_eager_formulas_are_the_definition(operator: str, mask: str) -> None:
    """Two independent statements of one operator; in float64 they agree to its precision."""
    inputs, _ = random_inputs(Shape(length_k=21, heads=4, kv_heads=2), torch.float64, torch.device("cpu"))
    slopes = torch.linspace(0.1, 0.4, 4, dtype=torch.float64)
    eager = {"sigmoid": eager_sigmoid_attention, "softmax": eager_softmax_attention}[operator]
    truth = getattr(reference, f"{operator}_attention")(**inputs, alibi_slopes=slopes, **MASKS[mask])
    torch.testing.assert_close(eager(**inputs, alibi_slopes=slopes, **MASKS[mask]), truth, rtol=1e-12, atol=1e-14)
