"""The products of normalised rows and centroids, by which routing ranks on the GPU: as accurate as float32."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm

import attnx
from attnx._capability import dtype_name
from attnx.testing import assert_close

pytestmark = pytest.mark.backends("cuda", "emulated")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Shape(NamedTuple):
    batch: int
    heads: int  # of rows
    group: int  # heads of centroids on a head of rows
    length: int
    clusters: int
    head_dim: int


SHAPES = [
    Shape(1, 1, 1, 1, 1, 2),
    Shape(2, 2, 2, 67, 5, 3),
    Shape(1, 2, 1, 64, 128, 64),
    Shape(1, 1, 1, 201, 130, 64),
    Shape(2, 3, 1, 130, 257, 41),
    Shape(1, 1, 3, 62, 33, 256),
    Shape(1, 2, 1, 63, 1, 129),
]


def padded(n: int) -> int:
    return (n + 3) // 4 * 4


def matrix(x: Tensor) -> tuple[int, int, int]:
    return x.data_ptr(), x.stride(0), x.stride(1)


def guarded(*shape: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A tensor full of NaN and all the memory around it, which holds NaN as well, wider than a tile."""
    n, margin = math.prod(shape), 1024
    storage = torch.full((n + 2 * margin,), math.nan, device=device)
    return storage[margin : margin + n].view(shape), storage


def assert_untouched(x: Tensor, storage: Tensor) -> None:
    margin = (storage.numel() - x.numel()) // 2
    assert storage[:margin].isnan().all()
    assert storage[-margin:].isnan().all()


def random_rows(shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(batch, heads, length, head_dim), a slice of a tensor that lies in memory by rows and is NaN elsewhere."""
    whole = torch.full((shape.batch, shape.length + 1, shape.heads + 1, shape.head_dim + 3), math.nan, dtype=dtype)
    rows = whole[:, 1:, 1:, 1:-2]
    generator = torch.Generator().manual_seed(1)
    rows.copy_(3 * torch.randn(rows.shape, generator=generator) + 0.5)
    return whole.to(device)[:, 1:, 1:, 1:-2].transpose(1, 2)


def random_centroids(shape: Shape, device: torch.device) -> Tensor:
    size = (shape.heads * shape.group, shape.clusters, shape.head_dim)
    return torch.randn(size, generator=torch.Generator().manual_seed(2)).to(device)


def scores(rows: Tensor, centroids: Tensor) -> Tensor:
    """(batch, heads of centroids, clusters, length), as the kernels compute it."""
    batch, heads, length, head_dim = rows.shape
    all_heads, clusters, _ = centroids.shape
    features = padded(head_dim)
    normalised, normalised_storage = guarded(batch, heads, length, features, device=rows.device)
    attnx._C.cuda_normalise_rows(
        (rows.data_ptr(), *rows.stride()[:3]),
        dtype_name(rows.dtype),
        batch,
        heads,
        length,
        head_dim,
        normalised.data_ptr(),
    )
    matrices, matrices_storage = guarded(heads, all_heads // heads * clusters, features, device=rows.device)
    attnx._C.cuda_pad_centroids(centroids.data_ptr(), all_heads, clusters, head_dim, matrices.data_ptr())
    products, products_storage = guarded(batch, *matrices.shape[:2], padded(length), device=rows.device)
    for i in range(batch):
        attnx._C.cuda_routing_scores(
            heads, length, matrices.size(1), features, matrix(normalised[i]), matrix(matrices), matrix(products[i])
        )
    if rows.is_cuda:
        torch.cuda.synchronize()
    assert_untouched(normalised, normalised_storage)
    assert_untouched(matrices, matrices_storage)
    assert_untouched(products, products_storage)
    return products.view(batch, all_heads, clusters, -1)[..., :length]


def eager_scores(rows: Tensor, centroids: Tensor) -> Tensor:
    normalised = layer_norm(rows, rows.shape[-1:]).repeat_interleave(centroids.size(0) // rows.size(1), 1)
    return centroids @ normalised.mT


def check(rows: Tensor, centroids: Tensor) -> None:
    expected = eager_scores(rows.double(), centroids.double())
    assert_close(scores(rows, centroids), expected, eager_scores(rows.float(), centroids), name="scores")


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
@pytest.mark.parametrize("rows_dtype", DTYPES, ids=str)
def test_definition(shape: Shape, rows_dtype: torch.dtype, device: torch.device) -> None:
    check(random_rows(shape, rows_dtype, device), random_centroids(shape, device))


def test_tf32_would_not_do(device: torch.device) -> None:
    """The bound can fail: operands with 10 bits of mantissa, as a single product of TF32 has them, exceed it."""
    shape = SHAPES[2]
    rows, centroids = random_rows(shape, torch.float32, device), random_centroids(shape, device)
    rounded = (centroids.view(torch.int32) & ~0x1FFF).view(torch.float32)
    expected, baseline = eager_scores(rows.double(), centroids.double()), eager_scores(rows, centroids)
    with pytest.raises(AssertionError, match="scores"):
        assert_close(scores(rows, rounded), expected, baseline, name="scores")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nonfinite_row_is_nan_and_no_other(value: float, device: torch.device) -> None:
    shape = SHAPES[3]
    rows = random_rows(shape, torch.float32, device)
    rows[0, 0, 77, 5] = value
    check(rows, random_centroids(shape, device))


def test_constant_row_is_zero(device: torch.device) -> None:
    rows = torch.full((1, 1, 5, 64), 7.0, device=device)
    assert (scores(rows, random_centroids(Shape(1, 1, 1, 5, 9, 64), device)) == 0).all()


def test_repeats_bitwise_and_by_parts(device: torch.device) -> None:
    """A few centroids at a time have the same scores as all of them at once."""
    shape = SHAPES[3]
    rows, centroids = random_rows(shape, torch.bfloat16, device), random_centroids(shape, device)
    whole = scores(rows, centroids)
    assert torch.equal(scores(rows, centroids), whole)
    parts = [scores(rows, part.contiguous()) for part in centroids.split(48, dim=1)]
    assert torch.equal(torch.cat(parts, dim=2), whole)


@pytest.mark.backends("emulated")
def test_offsets_beyond_32_bits(device: torch.device, tmp_path: Path) -> None:
    """Rows, centroids and scores far apart, in files of which only the pages that are touched exist."""
    problem_stride, row_stride = 2**31, 2**31 - 4
    rows, centroids, products = (
        torch.from_file(str(tmp_path / name), shared=True, size=problem_stride + row_stride + 8).as_strided(
            (2, 2, 8), (problem_stride, row_stride, 1)
        )
        for name in ("rows", "centroids", "products")
    )
    rows.copy_(torch.randn(2, 2, 8))
    centroids.copy_(torch.randn(2, 2, 8))
    attnx._C.cuda_routing_scores(2, 2, 2, 8, matrix(rows), matrix(centroids), matrix(products))
    assert_close(products[..., :2], centroids.double() @ rows.double().mT, centroids @ rows.mT)


GOOD = {
    "problems": 1,
    "rows": 4,
    "centroids": 4,
    "features": 8,
    "row_matrix": (0, 32, 8),
    "centroid_matrix": (0, 32, 8),
    "score_matrix": (0, 16, 4),
}
BAD = {
    "features": ({"features": 6}, "features: expected a multiple of 4, got 6"),
    "address": ({"row_matrix": (4, 32, 8)}, "row_matrix: expected an address"),
    "row stride": ({"centroid_matrix": (0, 32, 10)}, "centroid_matrix: .* got row stride 10"),
    "short rows": ({"score_matrix": (0, 16, 0)}, "score_matrix: .* rows of 4 numbers, got row stride 0"),
    "problem stride": ({"score_matrix": (0, 18, 4)}, "score_matrix: .* problem stride 18"),
    "wide stride": ({"row_matrix": (0, 0, 2**31)}, "row_matrix: expected at most 2147483647, got 2147483648"),
    "problems": ({"problems": 2**16}, "problems: expected at most 65535, got 65536"),
    "rows": ({"rows": 2**22, "score_matrix": (0, 0, 2**22)}, "rows: expected at most 4194240, got 4194304"),
    "centroids": ({"centroids": 2**31}, "centroids: expected at most"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_bad_input(changes: dict[str, object], message: str, device: torch.device) -> None:
    with pytest.raises(RuntimeError, match=message):
        attnx._C.cuda_routing_scores(**GOOD | changes)


def test_head_dim_beyond_the_largest(device: torch.device) -> None:
    with pytest.raises(RuntimeError, match="head_dim: expected at most 256, got 257"):
        attnx._C.cuda_normalise_rows((0, 0, 0, 0), "float32", 1, 1, 1, 257, 0)
