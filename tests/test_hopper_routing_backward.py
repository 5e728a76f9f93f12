"""The backward mainloop for Hopper, sm_90a, over gathered rows: routing attention's gradients against float64.

On a GPU of compute capability 9.0, or on the emulator under CUDAEMU_CC=90.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import attnx
from cases import DTYPES, Shape, random_inputs
from compare import forward_backward
from routing_cases import random_centroids, random_memory, with_memory
from test_routing import check, routes_of

pytestmark = [pytest.mark.backends("cuda", "emulated"), pytest.mark.needs("sm90"), pytest.mark.usefixtures("backend")]

# Those that have tiles of their own, some that are padded, and some whose values are narrower.
HEAD_DIMS = [(64, 64), (128, 128), (256, 256), (40, 24), (96, 128), (192, 160)]
SCORES = ["softmax", "sigmoid"]

attend = with_memory(attnx.routing_attention)


@pytest.fixture
def sm90() -> Iterator[None]:
    """Calls that another mainloop would serve are errors."""
    with attnx.cuda_mainloop("sm90"):
        yield


def inputs_of(
    length: int, head_dim: int, value_dim: int, dtype: torch.dtype, device: torch.device, memory: int = 0
) -> tuple[dict[str, Tensor], Tensor]:
    """Two heads that share their keys."""
    shape = Shape(length, length, head_dim, value_dim, heads=2, kv_heads=1)
    inputs, grad_output = random_inputs(shape, dtype, device)
    if memory:
        inputs |= {k: x.to(device) for k, x in random_memory(1, memory, head_dim, value_dim, dtype).items()}
    return inputs, grad_output


@pytest.mark.usefixtures("sm90")
@pytest.mark.parametrize("options", [{}, {"is_causal": True, "memory": 3}], ids=["full", "causal_memory"])
@pytest.mark.parametrize(("head_dim", "value_dim"), HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("score", SCORES)
def test_clusters_that_overlap(
    score: str, dtype: torch.dtype, head_dim: int, value_dim: int, options: dict[str, Any], device: torch.device
) -> None:
    """Several tiles of rows and of keys, the last ones ragged; queries and keys that are clustered apart."""
    options = dict(options)
    inputs, grad_output = inputs_of(240, head_dim, value_dim, dtype, device, options.pop("memory", 0))
    routes = routes_of(inputs, 2, cluster_size=150, shared_qk=False)
    check(inputs, grad_output, routes, score=score, **options)


@pytest.mark.usefixtures("sm90")
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("score", SCORES)
def test_ragged_clusters(score: str, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    """Clusters of any length, one of them of the memory alone; rows in none are not read."""
    inputs, grad_output = inputs_of(330, head_dim, head_dim, dtype, device, memory=2)
    centroids = random_centroids(2, 4, head_dim)
    centroids[:, 3] = math.nan
    for name in ("query", "key"):
        inputs[name][:, :, [5, 77, 329]] = math.nan
    routes = attnx.route(inputs["query"], inputs["key"], centroids.to(device), routing="argmax", is_causal=True)
    options: dict[str, Any] = {"routes": routes, "score": score, "is_causal": True}
    clean = {name: x.nan_to_num() for name, x in inputs.items()}
    expected = check(clean, grad_output, **options)
    inputs["value"][:, :, [5, 77, 329]] = math.nan
    with attnx.cuda_mainloop("sm90"):
        results = forward_backward(attend, inputs, grad_output, **options)
    for name, x in results.items():
        tolerance = 4 * torch.finfo(dtype).eps * expected[name].abs().max().item()  # atomics in another order
        torch.testing.assert_close(x, expected[name], rtol=0, atol=tolerance, msg=name)


@pytest.mark.usefixtures("sm90", "deterministic")
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("score", SCORES)
def test_repeats_bitwise(score: str, head_dim: int, is_causal: bool, dtype: torch.dtype, device: torch.device) -> None:
    """Three tiles of keys and more add to the gradients of the queries."""
    inputs, grad_output = inputs_of(330, head_dim, head_dim, dtype, device, memory=3)
    routes = routes_of(inputs, 2, cluster_size=300)
    options: dict[str, Any] = {"routes": routes, "score": score, "is_causal": is_causal}
    first = forward_backward(attend, inputs, grad_output, **options)
    for _ in range(3):
        again = forward_backward(attend, inputs, grad_output, **options)
        assert all(torch.equal(again[name], x) for name, x in first.items())


@pytest.mark.usefixtures("sm90", "deterministic")
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("score", SCORES)
def test_sums_of_many_tiles_repeat_bitwise(score: str, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    """A tile or two of queries, to whose sums many tiles of keys add at about the same time."""
    inputs, grad_output = random_inputs(Shape(80, 64 * 20, head_dim, heads=4), dtype, device)
    routes = routes_of(inputs, 1, cluster_size=64 * 20, shared_qk=False)
    first = forward_backward(attend, inputs, grad_output, routes=routes, score=score)
    for _ in range(4):
        again = forward_backward(attend, inputs, grad_output, routes=routes, score=score)
        assert all(torch.equal(again[name], x) for name, x in first.items())


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize(("head_dim", "value_dim"), HEAD_DIMS)
@pytest.mark.parametrize("score", SCORES)
def test_short_clusters(score: str, head_dim: int, value_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    """Narrow tiles: one of rows and, with the memory, three of keys to a cluster."""
    inputs, grad_output = inputs_of(150, head_dim, value_dim, dtype, device, memory=70)
    options: dict[str, Any] = {"routes": routes_of(inputs, 2, cluster_size=60), "score": score, "is_causal": True}
    first = check(inputs, grad_output, **options)
    again = forward_backward(attend, inputs, grad_output, **options)
    assert all(torch.equal(again[name], x) for name, x in first.items())
    padded = next(d for d in (64, 128, 256) if d >= max(head_dim, value_dim))
    kernel = f"attnx_backward_sm90, 64 rows x 64 keys, head_dim padded to {padded}"
    assert kernel in explanation_of(inputs, **options)


def test_rows_that_do_not_start_on_16_bytes(dtype: torch.dtype, device: torch.device) -> None:
    """An error where sm90 is asked for, and served by sm80 where nothing is, with the reason."""
    inputs, grad_output = inputs_of(150, 60, 60, dtype, device)
    routes = routes_of(inputs, 2, cluster_size=100)
    with attnx.cuda_mainloop("sm90"), pytest.raises(RuntimeError, match="rows do not start on 16 bytes"):
        forward_backward(attend, inputs, grad_output, routes=routes)
    check(inputs, grad_output, routes)
    reason = "the backward is not sm90's: rows do not start on 16 bytes, or are not multiples of them"
    assert reason in explanation_of(inputs, routes=routes)


def explanation_of(inputs: dict[str, Tensor], **options: Any) -> str:
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    memory = tuple(leaves.pop(f"memory_{x}") for x in ("key", "value")) if "memory_key" in leaves else None
    return str(attnx.explain(attnx.routing_attention, **leaves, memory_kv=memory, **options))
