"""Sums over millions of equal terms, each of which would be rounded in the same direction."""

from __future__ import annotations

import pytest
import torch

import attnx
from cases import OPERATORS


@pytest.mark.parametrize("length_q", [1, 32], ids=["keys on lanes", "queries on lanes"])
@pytest.mark.parametrize("term", [0.3, 0.7, 0.9])
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.backends("cpu")
def test_equal_weights(operator: str, term: float, length_q: int, device: torch.device) -> None:
    """The errors are at most 1.1e-5 here, and were from 1.1e-4 to 1.4e-3 when the keys were not cut into parts."""
    length_k = 1 << 22
    query, key, value = (torch.full((1, 1, n, 1), x) for n, x in ((length_q, 1.0), (length_k, -term), (length_k, term)))
    key[0, 0, 0] = 0  # the maximum of softmax, so that other weights are no power of two
    options = {"bias": 0.0} if operator == "sigmoid_attention" else {}
    output = getattr(attnx, operator)(query, key, value, scale=1.0, **options)
    weight = key.double().sigmoid().sum() if operator == "sigmoid_attention" else 1.0
    expected = (weight * value[0, 0, 0].double()).expand(output.shape)
    torch.testing.assert_close(output.double(), expected, rtol=5e-5, atol=0)
