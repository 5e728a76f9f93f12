"""Means of rows over blocks and ranges, and how far rows are from them."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from attnx.testing import assert_close
from cases import DTYPES

_ops = torch.ops.attnx

RANGES = torch.tensor(
    [[[0, 1], [0, 300], [7, 7], [299, 300], [64, 192]], [[3, 90], [3, 91], [100, 300], [0, 0], [5, 6]]],
    dtype=torch.int32,
)


def rows_of(dtype: torch.dtype, device: torch.device, dim: int = 40, length: int = 300) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(2, 3, length, dim, generator=generator) + 2).to(dtype).to(device)


def pooled(rows: Tensor, ranges: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Means and deviations of the same ranges of all sequences."""
    means, deviations = [], []
    for first, last in ranges:
        own = rows[:, :, first:last]
        means.append(own.sum(2) / max(last - first, 1))
        deviations.append((own - means[-1][:, :, None]).abs().sum(2) / max(last - first, 1))
    return torch.stack(means, 2), torch.stack(deviations, 2)


def blocks_of(length: int, block: int) -> list[tuple[int, int]]:
    return [(first, min(first + block, length)) for first in range(0, length, block)]


@pytest.mark.parametrize("dim", [1, 13, 64, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks(dtype: torch.dtype, dim: int, device: torch.device) -> None:
    rows = rows_of(dtype, device, dim)
    for block in (128, 7, 512):
        want = pooled(rows.double(), blocks_of(300, block))
        plain = pooled(rows, blocks_of(300, block))
        got = _ops.block_statistics(rows, block)
        for name, x, exact, eager in zip(("means", "deviations"), got, want, plain, strict=True):
            assert x.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert_close(x, exact, eager, name=name)
        assert torch.equal(_ops.block_means(rows, block), got[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ranges(dtype: torch.dtype, device: torch.device) -> None:
    rows = rows_of(dtype, device)
    got = _ops.range_means(rows, RANGES.to(device))
    for b in range(2):
        own = rows[b : b + 1]
        ranges = [(int(first), int(last)) for first, last in RANGES[b]]
        assert_close(got[b : b + 1], pooled(own.double(), ranges)[0], pooled(own, ranges)[0])
    shared = _ops.range_means(rows, RANGES[:1].contiguous().to(device))
    assert torch.equal(shared[0], got[0])


def test_strides_and_memory_beside(dtype: torch.dtype, device: torch.device) -> None:
    """Rows of any strides, off 16 bytes, with NaN where no row is."""
    rows = rows_of(dtype, device, 24)
    wide = torch.full((2, 300, 3, 41), torch.nan, dtype=dtype, device=device)
    wide[..., 5:29] = rows.transpose(1, 2)
    strided = wide[..., 5:29].transpose(1, 2)
    for got, want in zip(_ops.block_statistics(strided, 64), _ops.block_statistics(rows, 64), strict=True):
        assert torch.equal(got, want)
    got = _ops.range_means(strided, RANGES.to(device))
    assert torch.equal(got, _ops.range_means(rows, RANGES.to(device)))


def test_nothing_to_pool(dtype: torch.dtype, device: torch.device) -> None:
    assert _ops.block_means(rows_of(dtype, device, length=0), 64).shape == (2, 3, 0, 40)
    none = torch.zeros(1, 0, 2, dtype=torch.int32, device=device)
    assert _ops.range_means(rows_of(dtype, device), none).shape == (2, 3, 0, 40)


def test_gradient_of_means(dtype: torch.dtype, device: torch.device) -> None:
    rows = rows_of(dtype, device).requires_grad_()
    means, deviations = _ops.block_statistics(rows, 128)
    assert not deviations.requires_grad
    grad = torch.randn(means.shape, generator=torch.Generator().manual_seed(1)).to(means)
    (got,) = torch.autograd.grad(means, rows, grad)
    sizes = torch.tensor([128, 128, 44], device=device)
    want = (grad / sizes[:, None]).repeat_interleave(sizes, 2).to(dtype)
    assert torch.equal(got, want)


@pytest.mark.backends("cpu")
def test_long_sums(backend: object) -> None:
    """Nothing is lost of what rows that are alike have in common."""
    rows = torch.full((1, 1, 1 << 18, 3), 0.1)
    mean = _ops.range_means(rows, torch.tensor([[[0, 1 << 18]]], dtype=torch.int32))
    torch.testing.assert_close(mean, torch.full((1, 1, 1, 3), 0.1), rtol=1e-6, atol=0)


@pytest.mark.backends("cpu")
def test_gradcheck(backend: object) -> None:
    rows = rows_of(torch.float64, torch.device("cpu"), 3, 11).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: _ops.block_means(x, 4), rows)
    assert torch.autograd.gradcheck(lambda x: _ops.block_statistics(x, 4)[0], rows)


@pytest.mark.backends("cpu")
def test_opcheck(backend: object) -> None:
    rows = rows_of(torch.float32, torch.device("cpu"), 8, 70).requires_grad_()
    torch.library.opcheck(_ops.block_means.default, (rows, 64))
    torch.library.opcheck(_ops.block_statistics.default, (rows, 64))
    torch.library.opcheck(
        _ops.range_means.default, (rows.detach(), torch.tensor([[[0, 3], [2, 70]]], dtype=torch.int32))
    )


@pytest.mark.backends("cpu")
@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("block_means", (torch.ones(2, 3), 4), "rows: expected 4 dimensions, (batch, heads, length, dim), got shape "),
        ("block_means", (torch.ones(1, 1, 2, 257), 4), "rows: expected dim from 1 to 256, got shape (1, 1, 2, 257)"),
        ("block_means", (torch.ones(1, 1, 2, 3).int(), 4), "rows: expected one of float32, bfloat16, float16, float64"),
        ("block_statistics", (torch.ones(1, 1, 2, 3), 0), "block: expected 1 or more, got 0"),
        ("range_means", (torch.ones(1, 1, 9, 3), RANGES[0]), "ranges: expected shape (1 or 1, ranges, 2), got (5, 2)"),
        ("range_means", (torch.ones(1, 1, 9, 3), RANGES[:1].long()), "ranges: expected int32, got int64"),
        (
            "range_means",
            (torch.ones(1, 1, 9, 3), RANGES[:1, 1:]),
            "ranges: expected a first row and one past the last of 9, got 0 and 300",
        ),
    ],
)  # fmt: skip
def test_bad_input(name: str, arguments: tuple[Any, ...], message: str, backend: object) -> None:
    if name == "range_means" and arguments[1].dim() == 3:
        arguments = (arguments[0], arguments[1].contiguous())
    with pytest.raises(RuntimeError, match="^" + re.escape(message)):
        getattr(_ops, name)(*arguments)
