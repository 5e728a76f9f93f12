"""Routing attention on a GPU beside what PyTorch has for it: balanced clusters by gather, scaled_dot_product_attention
and scatter, and ragged ones by flex_attention over sorted tokens, with a mask that keeps clusters apart."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

import attnx
from suite import Attention, Case, Contender, Inputs, Prepare, Suite
from suites import dense, routing
from suites.routing import Clusters, RoutesOf

BLOCK = 128  # of flex_attention's masks

# The longest first: should time run out, these say most.
CASES = tuple(
    Case(f"{n}" + ("-causal" if c else ""), 16, n, n, 64, is_causal=c, quick=n == 4096)
    for n in (262144, 65536, 16384, 4096)
    for c in (False, True)
)
CLUSTERS: dict[str, Clusters] = {"": routing.root, "-c256": lambda length: 256}


def _products(x: Tensor, centroids: Tensor) -> Tensor:
    """(batch, heads, clusters, length)"""
    return centroids.to(x.dtype) @ F.layer_norm(x, x.shape[-1:]).mT


def _members(x: Tensor, centroids: Tensor, size: int) -> Tensor:
    """The tokens of each cluster in the order of time, (batch, heads, clusters * size)."""
    return _products(x, centroids).topk(min(size, x.shape[-2]), dim=-1).indices.sort(-1).values.flatten(-2)


def _gather(x: Tensor, places: Tensor) -> Tensor:
    return x.gather(2, places[..., None].expand(-1, -1, -1, x.shape[-1]))


def _composed(clusters: Clusters) -> Prepare:
    def prepare(case: Case, inputs: Inputs) -> Attention:
        centroids = routing.centroids(case, inputs.query.device, clusters)
        size = routing.cluster_size(case.length_k, clusters)

        def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            with torch.no_grad():
                queries = _members(query, centroids, size)
                keys = queries if case.is_causal else _members(key, centroids, size)
            shape = case.batch * case.heads, centroids.shape[1], -1, case.head_dim
            q, k, v = (_gather(x, places).view(shape) for x, places in ((query, queries), (key, keys), (value, keys)))
            # Queries that share the clusters of keys see a triangle.
            output = F.scaled_dot_product_attention(q, k, v, is_causal=case.is_causal).reshape(*queries.shape, -1)
            index = queries[..., None]
            total = torch.zeros_like(query).scatter_add(2, index.expand_as(output), output)
            count = torch.zeros_like(query[..., :1]).scatter_add(2, index, torch.ones_like(output[..., :1]))
            return total / count.clamp(min=1)

        return attention

    return prepare


def _composed_routes(clusters: Clusters) -> RoutesOf:
    """The clusters that it makes, of the numbers that the inputs and their float64 copies share."""

    def routes(case: Case, inputs: Inputs) -> attnx.Routes:
        device = inputs.query.device
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        centroids = routing.centroids(case, device, clusters)
        size = routing.cluster_size(case.length_k, clusters)
        queries = _members(inputs.query.to(dtype), centroids, size).int()
        keys = queries if case.is_causal else _members(inputs.key.to(dtype), centroids, size).int()
        count = centroids.shape[1]
        offsets = torch.arange(count + 1, dtype=torch.int32, device=device) * (queries.shape[-1] // count)
        offsets = offsets.expand(case.batch, case.heads, -1).contiguous()
        return attnx.Routes(queries, offsets, keys, offsets, case.length_q, case.length_k)

    return routes


def _in_blocks(x: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest of each block of sorted numbers."""
    starts = torch.arange(0, x.shape[-1], BLOCK, device=x.device)
    return x[..., starts], x[..., (starts + BLOCK - 1).clamp(max=x.shape[-1] - 1)]


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries sees, and which."""
    return blocks.sum(-1, dtype=torch.int32), blocks.int().argsort(dim=-1, descending=True, stable=True).int()


def _document_mask(case: Case, clusters: tuple[Tensor, Tensor], times: tuple[Tensor, Tensor]) -> BlockMask:
    """A mask over tokens sorted by cluster: each sees its own, and if causal what is not later."""
    (of_query, of_key), (query_time, key_time) = clusters, times

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        same = of_query[b, h, i] == of_key[b, h, j]
        return same & (key_time[b, h, j] <= query_time[b, h, i]) if case.is_causal else same

    (first_q, last_q), (first_k, last_k) = _in_blocks(of_query), _in_blocks(of_key)
    touch = (first_q[..., None] <= last_k[..., None, :]) & (last_q[..., None] >= first_k[..., None, :])
    full = torch.zeros_like(touch)
    if case.is_causal:  # tokens of one place are query and key, so that no block of later ones is seen
        blocks = torch.arange(touch.shape[-1], device=touch.device)
        touch &= blocks[:, None] >= blocks
    else:
        same = (first_q == last_q)[..., None] & (first_k == last_k)[..., None, :]
        full = touch & same & (first_q[..., None] == first_k[..., None, :])
    parts = *_ordered(touch & ~full), *_ordered(full)
    lengths = case.length_q, case.length_k
    return BlockMask.from_kv_blocks(*parts, BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=lengths)


def _flex(clusters: Clusters) -> Prepare:
    """Clusters and mask are made beforehand; what is timed sorts rows, attends, and puts rows back."""

    def prepare(case: Case, inputs: Inputs) -> Attention:
        routes = routing.routes_of("argmax", clusters)(case, inputs)
        counts = (x.diff(dim=-1).flatten() for x in (routes.query_offsets, routes.key_offsets))
        number = torch.arange(routes.clusters, device=inputs.query.device).repeat(case.batch * case.heads)
        queries, keys = routes.query_indices.long(), routes.key_indices.long()
        documents = tuple(number.repeat_interleave(n).view(queries.shape) for n in counts)
        mask = _document_mask(case, (documents[0], documents[1]), (queries, keys))
        flex = functools.partial(dense.compiled_flex_attention(dynamic=False), block_mask=mask)
        back = queries.argsort(-1)

        def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return _gather(flex(_gather(query, queries), _gather(key, keys), _gather(value, keys)), back)

        return attention

    return prepare


def _contenders(suffix: str, clusters: Clusters) -> tuple[Contender, ...]:
    balanced, nearest = (routing.formula(routing.routes_of(x, clusters)) for x in ("topk", "argmax"))
    given = routing.given(routing.routes_of("argmax", clusters))
    return (
        Contender(f"attnx-routing{suffix}", balanced, routing.ours("topk", clusters)),
        Contender(f"attnx-routing-argmax{suffix}", nearest, routing.ours("argmax", clusters)),
        Contender(f"attnx-argmax-given{suffix}", nearest, given),
        Contender(f"gather-sdpa{suffix}", routing.formula(_composed_routes(clusters)), _composed(clusters)),
        Contender(f"flex-argmax-given{suffix}", nearest, _flex(clusters)),
    )


SUITE = Suite(
    name="routing-gpu",
    cases=CASES,
    contenders=tuple(c for suffix, clusters in CLUSTERS.items() for c in _contenders(suffix, clusters)),
    baseline="gather-sdpa",
    memory_case=Case("memory", 16, 65536, 65536, 64),
)
