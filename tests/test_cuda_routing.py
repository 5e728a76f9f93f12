"""Routing on the GPU: which tokens are in which cluster, and the centroids that follow them."""

from __future__ import annotations

import itertools
import math
import os
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm

import attnx
from attnx import reference
from backends import Backend
from routing_cases import check, eager_routing_attention, random_centroids, random_memory

pytestmark = pytest.mark.backends("cuda", "emulated")


class Case(NamedTuple):
    batch: int
    heads: int
    kv_heads: int
    length_q: int
    length_k: int
    head_dim: int
    clusters: int
    cluster_size: int
    dtype: torch.dtype
    with_nan: bool = False


CASES = [
    Case(1, 2, 1, 96, 70, 16, 6, 16, torch.bfloat16),
    Case(2, 4, 2, 96, 96, 16, 5, 1000, torch.bfloat16, with_nan=True),
    Case(1, 1, 1, 3000, 100, 24, 20, 40, torch.float16, with_nan=True),
    Case(1, 1, 1, 5, 7, 3, 131, 2, torch.bfloat16),
    Case(1, 1, 1, 700, 640, 16, 600, 3, torch.bfloat16, with_nan=True),
]


def tokens_of(case: Case, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(case.batch, case.heads, case.length_q, case.head_dim, generator=generator)
    key = torch.randn(case.batch, case.kv_heads, case.length_k, case.head_dim, generator=generator)
    if case.with_nan:
        query[:, :, [0, case.length_q // 2, -1], 0] = math.nan
    centroids = random_centroids(case.heads, case.clusters, case.head_dim)
    return query.to(device, case.dtype), key.to(device, case.dtype), centroids.to(device)


def products(rows: Tensor, centroids: Tensor) -> Tensor:
    """(batch, heads, clusters, length) in float64; -inf for tokens that are in no cluster."""
    normalised = layer_norm(rows.double(), rows.shape[-1:])
    all_heads = normalised.repeat_interleave(centroids.shape[0] // rows.shape[1], 1)
    return (centroids.double() @ all_heads.mT).nan_to_num(nan=-math.inf).cpu()


def members(indices: Tensor, offsets: Tensor) -> list[list[int]]:
    """The tokens of each cluster of each head, one after the other; slots behind the last cluster hold 0."""
    lists = []
    for x, ends in zip(indices.flatten(0, 1).cpu(), offsets.flatten(0, 1).tolist(), strict=True):
        lists += [x[a:b].tolist() for a, b in itertools.pairwise(ends)]
        assert not x[ends[-1] :].any()
    return lists


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_balanced(case: Case, device: torch.device) -> None:
    query, key, centroids = tokens_of(case, device)
    routes = attnx.route(query, key, centroids, cluster_size=case.cluster_size)
    for rows, indices, offsets in ((query, *routes[:2]), (key, *routes[2:4])):
        scores = products(rows, centroids).flatten(0, 2)
        for tokens, x in zip(members(indices, offsets), scores, strict=True):
            count = min(case.cluster_size, int((x > -math.inf).sum()))
            assert len(tokens) == count
            assert tokens == sorted(set(tokens))
            assert count == 0 or x[tokens].min() > x.sort().values[-count] - 1e-4


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_argmax(case: Case, device: torch.device) -> None:
    query, key, centroids = tokens_of(case, device)
    routes = attnx.route(query, key, centroids, routing="argmax")
    for rows, indices, offsets in ((query, *routes[:2]), (key, *routes[2:4])):
        nearest, scores = attnx.nearest_centroids(rows, centroids).cpu().long(), products(rows, centroids)
        assert torch.equal(nearest < 0, scores[:, :, 0] == -math.inf)
        best = scores.gather(2, nearest.clamp(min=0)[:, :, None])[:, :, 0]
        assert ((nearest < 0) | (best > scores.amax(2) - 1e-4)).all()
        expected = [(x == c).nonzero()[:, 0].tolist() for x in nearest.flatten(0, 1) for c in range(case.clusters)]
        assert members(indices, offsets) == expected


def test_ties_go_to_the_lower_index(device: torch.device) -> None:
    rows = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    query = rows.repeat(40, 1)[None, None].to(device)  # row i again at i + 5, i + 10, ...
    centroids = layer_norm(rows.float(), (8,))[None].to(device)
    routes = attnx.route(query, query, centroids, cluster_size=7)
    assert members(*routes[:2]) == [[i + 5 * n for n in range(7)] for i in range(5)]
    same = centroids[:, :1].expand(1, 4, -1).contiguous()
    routes = attnx.route(query, query, same, routing="argmax")
    assert members(*routes[:2]) == [list(range(200)), [], [], []]


def test_update_is_the_reference_s(device: torch.device) -> None:
    query, key, _ = tokens_of(CASES[1], device)
    centroids, counts = random_centroids(4, 20, 16).to(device), torch.ones(4, 20, device=device)
    centroids[:, 3] *= 1e-3  # nobody's nearest
    for decay in (0.9, 0.999):
        expected = reference.update_centroids(centroids, counts, query, key, decay=decay)
        unused = centroids[:, 3].clone()
        attnx.update_centroids_(centroids, counts, query, key, decay=decay)
        torch.testing.assert_close((centroids, counts), tuple(x.float() for x in expected))
        assert torch.equal(centroids[:, 3], unused)
    counts.zero_()
    before = centroids.clone()
    attnx.update_centroids_(centroids, counts, query, key, decay=1.0)
    assert torch.equal(centroids, before)
    assert not counts.any()


@pytest.mark.parametrize("count", [-1.0, math.nan])
def test_counts_below_0_are_refused(count: float, device: torch.device, backend: Backend) -> None:
    if backend.name == "cuda" and os.environ.get("ATTNX_DEBUG") != "1":
        pytest.skip("values on the GPU are looked at under ATTNX_DEBUG=1 only")
    query, key, centroids = tokens_of(CASES[0], device)
    counts, before = torch.full(centroids.shape[:2], count, device=device), centroids.clone()
    with pytest.raises(RuntimeError, match=r"^counts: expected finite numbers of 0 or more, got"):
        attnx.update_centroids_(centroids, counts, query, key, decay=0.5)
    assert torch.equal(centroids, before)


@pytest.mark.parametrize("options", [{"cluster_size": 9}, {"routing": "argmax"}], ids=["topk", "argmax"])
def test_centroids_with_nan_route_nothing(options: dict[str, Any], device: torch.device) -> None:
    query, key, centroids = tokens_of(CASES[0], device)
    centroids[:, 1, 3] = math.nan
    routes = attnx.route(query, key, centroids, **options)
    for indices, offsets in (routes[:2], routes[2:4]):
        sizes = [len(x) for x in members(indices, offsets)]
        assert sizes[1] == sizes[1 + centroids.shape[1]] == 0
        assert sizes[0] > 0
    # Slots that no cluster uses count for no token.
    output = attnx.routing_attention(query, key, key, routes).cpu().double()
    on_host = [x.cpu() if isinstance(x, Tensor) else x for x in routes]
    rows = [x.cpu().double() for x in (query, key, key)]
    expected = eager_routing_attention(*rows, attnx.Routes(*on_host))
    torch.testing.assert_close(output, expected, rtol=0.02, atol=0.02)


def check_lengths(heads: int, length: int, clusters: int, memory: int = 0, **options: Any) -> None:
    """One key head; 64 features, under a causal mask."""
    generator = torch.Generator().manual_seed(0)
    query, key, value, grad_output = (
        torch.randn(1, n, length, 64, generator=generator).bfloat16() for n in (heads, 1, 1, heads)
    )
    inputs = {"query": query, "key": key, "value": value}
    inputs |= random_memory(1, memory, 64, 64, torch.bfloat16) if memory else {}
    routes = attnx.route(query, key, random_centroids(heads, clusters, 64), **options)
    check(inputs, grad_output, routes, reference=eager_routing_attention, is_causal=True)


# The references of these are on the CPU.
@pytest.mark.backends("emulated")
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("memory", [0, 2])
def test_more_clusters_than_a_block_has_threads(memory: int) -> None:
    """Most are empty or short."""
    check_lengths(2, 600, 520, memory, routing="argmax")


@pytest.mark.backends("emulated")
@pytest.mark.usefixtures("backend")
def test_clusters_of_several_tiles() -> None:
    check_lengths(1, 600, 2, cluster_size=310)
