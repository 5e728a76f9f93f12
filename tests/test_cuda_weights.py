"""The sigmoid as the CUDA kernels compute it, number by number: the fast formula beside the exact one and the truth."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import attnx
from attnx._capability import dtype_name

pytestmark = pytest.mark.backends("cuda", "emulated")


def weights(logits: Tensor, dtype: torch.dtype, exact: bool) -> Tensor:
    """In float32, ahead of their rounding to ``dtype``."""
    result = torch.empty_like(logits)
    attnx._C.cuda_sigmoid_weights(logits.data_ptr(), result.data_ptr(), logits.numel(), dtype_name(dtype), exact)
    if logits.is_cuda:
        torch.cuda.synchronize()
    return result


@pytest.mark.parametrize(
    ("dtype", "exact", "bound"),
    [
        (torch.bfloat16, False, 2**-7),
        (torch.float16, False, 2**-11),
        (torch.bfloat16, True, 2**-18),
        (torch.float16, True, 2**-18),
    ],
    ids=str,
)
def test_relative_error(dtype: torch.dtype, exact: bool, bound: float, device: torch.device) -> None:
    logits = torch.linspace(-15, 15, 2**17, device=device)
    truth = logits.double().sigmoid()
    assert ((weights(logits, dtype, exact).double() - truth) / truth).abs().max() < bound


@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_ends(dtype: torch.dtype, exact: bool, device: torch.device) -> None:
    """Far out a weight is 0, or next to it, and 1; and what is no number stays none."""
    logits = torch.tensor([-math.inf, -1e4, 1e4, math.inf, math.nan], device=device)
    low, lower, higher, high, nan = weights(logits, dtype, exact).tolist()
    assert 0 <= low <= 2**-126
    assert 0 <= lower <= 2**-126
    assert [higher, high] == pytest.approx([1, 1], rel=2**-7)
    assert math.isnan(nan)
