"""Routing attention with clusters of the root of the length, its routing included, beside dense attention and the
routing-transformer package, as far as that is installed: ``pip install 'attnx[bench]'``."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import attnx
import attnx.reference
from suite import Attention, Case, Contender, Formula, Inputs, Prepare, Suite
from suites import dense, peers

HEADS = 4


def _case(length: int, **options: Any) -> Case:
    return Case(str(length) + ("-causal" if options.get("is_causal") else ""), HEADS, length, length, 64, **options)


CASES = (
    _case(2048, quick=True),
    _case(2048, is_causal=True, quick=True),
    _case(4096),
    _case(8192),
    _case(16384),
    _case(16384, is_causal=True),
)
# The time should grow like the length to the power of 1.5.
LENGTHS = tuple(_case(n, is_causal=c) for n in (2048, 4096, 8192, 16384, 32768, 65536) for c in (False, True))


Clusters = Callable[[int], int]  # by the length
RoutesOf = Callable[[Case, Inputs], attnx.Routes]


def root(length: int) -> int:
    """128 at 16384."""
    return round(math.sqrt(length))


def cluster_size(length: int, clusters: Clusters = root) -> int:
    return -(-length // clusters(length))


def centroids(case: Case, device: torch.device, clusters: Clusters = root) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(case.heads, clusters(case.length_k), case.head_dim, generator=generator).to(device)


def _options(routing: Any, case: Case, clusters: Clusters) -> dict[str, Any]:
    options = {"routing": routing, "is_causal": case.is_causal, "shared_qk": case.is_causal}
    return options | ({"cluster_size": cluster_size(case.length_k, clusters)} if routing == "topk" else {})


def ours(routing: Any, clusters: Clusters = root) -> Prepare:
    def prepare(case: Case, inputs: Inputs) -> Attention:
        around, options = centroids(case, inputs.query.device, clusters), _options(routing, case, clusters)
        return lambda q, k, v: attnx.routing_attention(q, k, v, around, **options)

    return prepare


def routes_of(routing: Any, clusters: Clusters = root) -> RoutesOf:
    """In a dtype that holds the inputs and their float64 copies alike, so that both have the same."""

    def routes(case: Case, inputs: Inputs) -> attnx.Routes:
        device = inputs.query.device
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32  # CUDA routes no float32
        query, key = inputs.query.to(dtype), inputs.key.to(dtype)
        return attnx.route(query, key, centroids(case, device, clusters), **_options(routing, case, clusters))

    return routes


def given(routes_of: RoutesOf) -> Prepare:
    def prepare(case: Case, inputs: Inputs) -> Attention:
        routes = routes_of(case, inputs)
        return lambda q, k, v: attnx.routing_attention(q, k, v, routes, is_causal=case.is_causal)

    return prepare


def formula(routes_of: RoutesOf) -> Formula:
    def reference(case: Case, exact: Inputs) -> Attention:
        routes = routes_of(case, exact)
        return lambda q, k, v: attnx.reference.routing_attention(q, k, v, routes, is_causal=case.is_causal)

    def eager(case: Case, inputs: Inputs) -> Attention:
        routes = routes_of(case, inputs)

        def head(query: Tensor, key: Tensor, value: Tensor, b: int, h: int) -> Tensor:
            total, count = torch.zeros_like(query), torch.zeros_like(query[:, :1])
            for c in range(routes.clusters):
                q, k = (
                    indices[b, h, offsets[b, h, c] : offsets[b, h, c + 1]].long()
                    for indices, offsets in (routes[:2], routes[2:4])
                )
                logits = query[q] @ key[k].mT * case.head_dim**-0.5
                if case.is_causal:
                    logits = logits.masked_fill(k > q[:, None], -math.inf)
                total = total.index_add(0, q, logits.softmax(-1) @ value[k])
                count = count.index_add(0, q, torch.ones_like(query[q, :1]))
            return total / count.clamp(min=1)

        def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            places = list(itertools.product(range(case.batch), range(case.heads)))
            heads = [head(query[b, h], key[b, h], value[b, h], b, h) for b, h in places]
            return torch.stack(heads).unflatten(0, (case.batch, case.heads))

        return attention

    return Formula(reference, eager)


BALANCED, NEAREST = formula(routes_of("topk")), formula(routes_of("argmax"))


def _package(case: Case, inputs: Inputs) -> Attention:
    """KmeansAttention as in evaluation, without the update of its centroids, which ours leaves out here as well."""
    module = importlib.import_module("routing_transformer.routing_transformer")
    sizes = root(case.length_k), cluster_size(case.length_k), case.heads, case.head_dim
    attention = module.KmeansAttention(*sizes, causal=case.is_causal, shared_qk=case.is_causal)
    attention.kmeans.means.copy_(F.normalize(centroids(case, inputs.query.device), dim=-1))
    attention.kmeans.initted.fill_(True)
    attention = attention.to(inputs.query.dtype).requires_grad_(False).eval()
    call: Callable[..., tuple[Tensor, Tensor]] = attention
    return lambda *x: call(*x)[0]


def _package_formula(case: Case, inputs: Inputs) -> Attention:
    """The package itself in the precision at hand: it adds 1e-5 to counts, masks a token's own key and normalises keys
    where they are shared, so that its results are its own."""
    return _package(case, inputs)


_SDPA = Contender("sdpa", dense.SOFTMAX, dense.sdpa)
_OURS = (
    Contender("attnx-routing", BALANCED, ours("topk")),
    Contender("attnx-routing-argmax", NEAREST, ours("argmax")),
    Contender("attnx-routing-routes-given", BALANCED, given(routes_of("topk"))),
)
_PACKAGE = (
    (Contender("routing-transformer", Formula(_package_formula, _package_formula), _package),)
    if peers.is_installed("routing_transformer.routing_transformer")
    else ()
)

SUITE = Suite(
    name="routing",
    cases=CASES,
    contenders=(*_OURS, *_PACKAGE, _SDPA),
    baseline="sdpa",
    memory_case=Case("memory", 8, 16384, 16384, 64),
)

LENGTHS_SUITE = Suite(
    name="routing-lengths",
    cases=LENGTHS,
    contenders=(*_OURS, *_PACKAGE),
    baseline="routing-transformer" if _PACKAGE else "attnx-routing",
    memory_case=Case("memory", 8, 65536, 65536, 64),
)
