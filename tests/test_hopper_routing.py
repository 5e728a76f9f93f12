"""The loop over clusters for Hopper, sm_90a: its producers gather rows. Every path of it against float64.

On a GPU of compute capability 9.0, or on the emulator under CUDAEMU_CC=90.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import attnx
from attnx import reference
from attnx.testing import assert_close
from cases import DTYPES, Shape, random_inputs
from routing_cases import eager_routing_attention, random_centroids, random_memory, with_memory

pytestmark = [pytest.mark.backends("cuda", "emulated"), pytest.mark.needs("sm90"), pytest.mark.usefixtures("backend")]

# Those that have tiles of their own, one that is padded, and one whose values are narrower.
HEAD_DIMS = [(64, 64), (128, 128), (256, 256), (96, 96), (128, 40)]
SCORES = ["sigmoid", "softmax"]


@pytest.fixture(autouse=True)
def sm90(backend: Any) -> Iterator[None]:
    """Calls that another mainloop would serve are errors."""
    with attnx.cuda_mainloop("sm90"):
        yield


def check_forward(inputs: dict[str, Tensor], routes: attnx.Routes, **options: Any) -> Tensor:
    """Holds the output against float64; returns it."""
    options["routes"] = routes
    output = with_memory(attnx.routing_attention)(**inputs, **options)
    exact = {name: x.double() for name, x in inputs.items()}
    expected = with_memory(reference.routing_attention)(**exact, **options)
    assert_close(output, expected, with_memory(eager_routing_attention)(**inputs, **options))
    return output


def routes_of(inputs: dict[str, Tensor], clusters: int, **options: Any) -> attnx.Routes:
    query = inputs["query"]
    centroids = random_centroids(query.shape[1], clusters, query.shape[3]).to(query.device)
    return attnx.route(query, inputs["key"], centroids, **options)


@pytest.mark.parametrize(("head_dim", "value_dim"), HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("score", SCORES)
def test_balanced(score: Any, dtype: torch.dtype, head_dim: int, value_dim: int, device: torch.device) -> None:
    """Clusters of two ragged tiles of rows and three or more of keys, a memory, a mask, heads that share keys."""
    shape = Shape(200, 330, head_dim, value_dim, batch=2, heads=2, kv_heads=1)
    inputs, _ = random_inputs(shape, dtype, device)
    routes = routes_of(inputs, 2, cluster_size=150, shared_qk=False)
    assert routes.key_indices.shape[2] == 2 * 150
    inputs |= {name: x.to(device) for name, x in random_memory(1, 131, head_dim, value_dim, dtype).items()}
    check_forward(inputs, routes, score=score, is_causal=True)
    check_forward(inputs, routes, score=score)


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("score", SCORES)
def test_argmax(score: Any, is_causal: bool, dtype: torch.dtype, device: torch.device) -> None:
    """Ragged clusters, one of them of no token, and rows that lie apart in memory."""
    inputs, _ = random_inputs(Shape(500, 400, 64, heads=4, kv_heads=2), dtype, device)
    inputs = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in inputs.items()}
    centroids = random_centroids(4, 4, 64).to(device)
    centroids[:, 2] = math.nan
    routes = attnx.route(inputs["query"], inputs["key"], centroids, routing="argmax", shared_qk=False)
    check_forward(inputs, routes, score=score, is_causal=is_causal)


@pytest.mark.parametrize("keys", [0, 1])
@pytest.mark.parametrize("score", SCORES)
def test_clusters_of_few_keys(score: Any, keys: int, dtype: torch.dtype, device: torch.device) -> None:
    """All queries are nearest to the first centroid, and all keys but so many to the second."""
    inputs, _ = random_inputs(Shape(140, 140, 64, heads=2), dtype, device)
    token = inputs["query"][:, :, :1]
    inputs["query"] = token.expand(inputs["query"].shape).contiguous()
    inputs["key"] = -inputs["query"]
    inputs["key"][:, :, :keys] = token
    centroid = reference._normalised(token.float())[0].float()
    centroids = torch.cat((centroid, -centroid), 1)
    routes = attnx.route(inputs["query"], inputs["key"], centroids, routing="argmax", shared_qk=False)
    output = check_forward(inputs, routes, score=score)
    assert output.any() == (keys > 0)


@pytest.mark.parametrize("shared_qk", [False, True], ids=["apart", "shared"])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("mainloop", ["sm80", "sm90"])
def test_argmax_is_causal(mainloop: Any, score: Any, shared_qk: bool, dtype: torch.dtype, device: torch.device) -> None:
    """Later tokens change no earlier output, not by a bit, though they may share a tile."""
    inputs, _ = random_inputs(Shape(600, 600, 64, heads=2), dtype, device)
    changed = {name: torch.cat((x[:, :, :300], -x[:, :, 300:].flip(2)), 2) for name, x in inputs.items()}
    options = {"routes": random_centroids(2, 3, 64).to(device), "shared_qk": shared_qk, "score": score}
    with attnx.cuda_mainloop(mainloop):
        before, after = (
            attnx.routing_attention(**x, routing="argmax", is_causal=True, **options) for x in (inputs, changed)
        )
    assert torch.equal(before[:, :, :300], after[:, :, :300])
    assert not torch.equal(before[:, :, 300:], after[:, :, 300:])


def test_values_of_no_key(dtype: torch.dtype, device: torch.device) -> None:
    """No tile has rows of other clusters, whose values may be no numbers, nor the first row behind the last key."""
    inputs, _ = random_inputs(Shape(150, 300, 64), dtype, device)
    inputs["key"][:, :, 0] = math.nan
    routes = routes_of(inputs, 1, cluster_size=140, shared_qk=False)
    expected = check_forward(inputs, routes)
    for h in range(2):
        others = set(range(300)) - set(routes.key_indices[0, h].tolist())
        inputs["value"][0, h, list(others)] = math.nan
    assert torch.equal(attnx.routing_attention(**inputs, routes=routes), expected)


def test_more_tiles_than_blocks(dtype: torch.dtype, device: torch.device) -> None:
    inputs, _ = random_inputs(Shape(130, 130, 64, heads=100), dtype, device)
    check_forward(inputs, routes_of(inputs, 2, cluster_size=70))


def _explain(inputs: dict[str, Tensor], **options: Any) -> Any:
    with attnx.cuda_mainloop("auto"):
        return attnx.explain(attnx.routing_attention, **inputs, **options)


def test_the_kernel_is_named(dtype: torch.dtype, device: torch.device) -> None:
    inputs, _ = random_inputs(Shape(200, 200, 96), dtype, device)
    explanation = _explain(inputs, routes=routes_of(inputs, 2, cluster_size=150))
    assert any("attnx_forward_sm90, 128 rows x 128 keys, head_dim padded to 128" in r for r in explanation.reasons)


def _odd_strides(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return inputs | {"key": torch.nn.functional.pad(inputs["key"], (0, 3))[..., :64]}


@pytest.mark.parametrize(
    ("change", "clusters", "reason"),
    [
        (_odd_strides, 2, "rows do not start on 16 bytes, or are not multiples of them"),
        (dict, 4, "clusters have at most 64 queries in the mean"),
    ],
)
def test_what_sm80_serves(
    change: Callable[[Any], Any], clusters: int, reason: str, dtype: torch.dtype, device: torch.device
) -> None:
    """And says so; to ask for sm90 is an error there."""
    inputs = change(random_inputs(Shape(200, 200, 64), dtype, device)[0])
    routes = routes_of(inputs, clusters, cluster_size=200 // clusters)
    assert f"the forward is not sm90's: {reason}" in _explain(inputs, routes=routes).reasons
    with pytest.raises(RuntimeError, match=reason):
        attnx.routing_attention(**inputs, routes=routes)
    with attnx.cuda_mainloop("auto"):
        check_forward(inputs, routes)
