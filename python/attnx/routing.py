"""Routing attention: k-means clusters of queries and keys, attention within each cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from attnx import _arguments, _shards
from attnx._layouts import takes_layouts
from attnx._operators.routing import update
from attnx._scores import ScoreName, SigmoidBias, resolve_score
from attnx._structures import register_named_tuple, same

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "Routes",
    "commitment_loss",
    "nearest_centroids",
    "route",
    "route_varlen",
    "routing_attention",
    "routing_attention_varlen",
    "update_centroids_",
]

Routing: TypeAlias = Literal["topk", "argmax"]

_ops = torch.ops.attnx


class Routes(NamedTuple):
    """Which tokens of each query head are in which cluster; :func:`route` makes them.

    Cluster c of a head holds the queries ``query_indices[..., a:b]`` with a and b from ``query_offsets[..., c]`` and
    ``[..., c + 1]``, ascending, and likewise keys. A token may be in none, one or several clusters.

    Those of packed sequences (:func:`route_varlen`) are one entry of a batch: rows count from the first sequence on,
    and the clusters of a head are those around its centroids for the first sequence, then for the second, and so on.
    """

    query_indices: Tensor  # (batch, heads, slots) int32; what is not in use holds 0
    query_offsets: Tensor  # (batch, heads, clusters + 1) int32, from 0
    key_indices: Tensor
    key_offsets: Tensor
    length_q: int
    length_k: int
    # (batch, sequences) int32, contiguous: under a causal mask query i sees the keys up to i + lead of its sequence;
    # None: one sequence, with the lead length_k - length_q
    lead: Tensor | None = None

    @property
    def clusters(self) -> int:
        return self.query_offsets.shape[-1] - 1

    def to(self, device: torch.device | str) -> Routes:
        """The routes with all lists on the device."""
        query_indices, query_offsets, key_indices, key_offsets = (x.to(device) for x in self[:4])
        lead = None if self.lead is None else self.lead.to(device)
        return Routes(query_indices, query_offsets, key_indices, key_offsets, self.length_q, self.length_k, lead)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Routes):
            return NotImplemented
        if self[4:6] != other[4:6] or (self.lead is None) != (other.lead is None):
            return False
        tensors = [(x, y) for x, y in zip(self, other, strict=True) if isinstance(x, Tensor)]
        return all(same(x, y) for x, y in tensors)

    def __ne__(self, other: object) -> bool:  # a tuple has one of its own
        return not self == other

    def __hash__(self) -> int:
        return hash((self.query_indices.shape, self.query_offsets.shape, self.length_q, self.length_k))


register_named_tuple(Routes, "attnx.Routes")


def _shared(shared_qk: bool | None, is_causal: bool, query: Tensor, key: Tensor) -> bool:
    if shared_qk is None:
        return is_causal and query.shape[-2] == key.shape[-2]
    return shared_qk


def _cluster_size(cluster_size: int | None, name: str, length: int, clusters: int) -> int:
    if cluster_size is None:
        if length % clusters:
            raise RuntimeError(
                f"cluster_size: expected a number where the {length} rows of {name} are not divisible by {clusters} "
                "clusters, got None"
            )
        return max(length // clusters, 1)
    return _arguments.integer("cluster_size", cluster_size, 1)


def _check_centroids(centroids: Tensor) -> None:
    _arguments.tensors(centroids=centroids)
    _arguments.needs_no_gradient("centroids", centroids, "update_centroids_ moves them")


_DENSE = (4, "(batch, heads, length, head_dim)", "(batch, kv_heads, length, head_dim)")
_PACKED = (3, "(total_q, heads, head_dim)", "(total_k, kv_heads, head_dim)")


def _check_rows(query: Tensor, key: Tensor, centroids: Tensor, layout: tuple[int, str, str], routing: Routing) -> None:
    if not isinstance(routing, str) or routing not in ("topk", "argmax"):
        _arguments.refuse("routing", '"topk" or "argmax"', routing)
    _arguments.tensors(query=query, key=key)
    _check_centroids(centroids)
    of_rows, of_query, of_key = layout
    for name, x, rank, shape in (
        ("query", query, of_rows, of_query),
        ("key", key, of_rows, of_key),
        ("centroids", centroids, 3, "(heads, clusters, head_dim)"),
    ):
        if x.dim() != rank:
            raise RuntimeError(f"{name}: expected {rank} dimensions, {shape}, got shape {tuple(x.shape)}")
    if centroids.shape[1] < 1:
        raise RuntimeError(f"centroids: expected one cluster or more, got shape {tuple(centroids.shape)}")


def _used(suffix: str, seqused: Any, leftpad: Any, rows: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Both lengths of rows as operators take them, or neither."""
    _arguments.optional_tensors(**{f"seqused{suffix}": seqused, f"leftpad{suffix}": leftpad})
    return _arguments.key_lengths(seqused, leftpad, rows, rows)


class _Used(NamedTuple):
    """Which rows of each sequence are tokens, as operators take it."""

    seqused_q: Tensor | None
    leftpad_q: Tensor | None
    seqused_k: Tensor | None
    leftpad_k: Tensor | None

    @classmethod
    def of(cls, query: Tensor, key: Tensor, seqused_q: Any, leftpad_q: Any, seqused_k: Any, leftpad_k: Any) -> _Used:
        of_keys = _used("_k", seqused_k, leftpad_k, key)
        own = seqused_q is not None or leftpad_q is not None
        same_tokens = not own and query.dim() == key.dim() == 4 and query.shape[2] == key.shape[2]
        return cls(*(of_keys if same_tokens else _used("_q", seqused_q, leftpad_q, query)), *of_keys)

    def lead(self, length_q: int, length_k: int) -> Tensor | None:
        """What :class:`Routes` says of causal masks."""
        if self.seqused_q is self.seqused_k:
            return None
        ends_q = length_q if self.seqused_q is None else self.seqused_q
        ends_k = length_k if self.seqused_k is None else self.seqused_k
        lead = ends_k - ends_q
        assert isinstance(lead, Tensor)
        return lead[:, None]


def route(
    query: Tensor,
    key: Tensor,
    centroids: Tensor,
    *,
    cluster_size: int | None = None,
    routing: Routing = "topk",
    shared_qk: bool | None = None,
    is_causal: bool = False,
    seqused_q: Tensor | None = None,
    leftpad_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
) -> Routes:
    r"""The clusters of queries and of keys around centroids.

    A token is compared by :math:`x \cdot \mu` with :math:`x` its query, or key, normalised over the features as by
    LayerNorm without scale and bias (eps 1e-5). Nothing is differentiated, and no matrix of tokens by centroids is
    made. A token with a NaN or an infinity is in no cluster, and the cluster of a centroid with a NaN holds no token.

    Args:
        query: (batch, heads, length_q, head_dim).
        key: (batch, kv_heads, length_k, head_dim); heads is a multiple of kv_heads.
        centroids: (heads, clusters, head_dim) float32, contiguous, without a gradient. They belong to query heads:
            those that share a key head each route its keys for themselves.
        cluster_size: with ``"topk"``, how many tokens a cluster has, or all where there are fewer; by default
            length / clusters, which must be whole.
        routing: ``"topk"``: each cluster takes the tokens with the largest product; of equals those that come first.
            Clusters are balanced, and whether an early token is in one depends on later tokens. ``"argmax"``: each
            token is in the cluster of its nearest centroid alone, of equals that with the lower index, whatever other
            tokens there are. Clusters are ragged.
        shared_qk: keys are in the clusters of the queries at their place; by default where ``is_causal`` and there are
            as many keys as queries. Otherwise they are routed for themselves.
        is_causal: whether the attention will be; here it decides the default of ``shared_qk``.
        seqused_k: int32 (batch,): of sequence b the keys are the rows below ``seqused_k[b]``, and what lies beyond is
            padding, which may hold anything: it is in no cluster, and takes no place that a token could have. By
            default all rows are keys.
        leftpad_k: int32 (batch,), from 0 to ``seqused_k``: likewise, the keys start at row ``leftpad_k[b]``.
        seqused_q, leftpad_q: likewise of queries. By default they are the lengths of keys where there are as many
            queries as keys, which are taken to be the same tokens, and all rows are queries otherwise. Among as many
            queries and keys of different tokens ``seqused_q`` says so. With ``shared_qk`` these are the lengths of
            both.

    The last query stands at the last key that is used, as in :func:`attnx.softmax_attention`; where queries have
    lengths this is the last query that is used. A sequence without rows has empty clusters.

    Returns:
        :class:`Routes`.

    Raises:
        RuntimeError: an argument does not fit; the message names it, what was expected and what came.
        NotImplementedError: no kernel for this backend.

    Source: Roy et al., "Efficient Content-Based Sparse Attention with Routing Transformers", arXiv 2003.05997; the
    arg-max form, under which causal attention does not look ahead, is ours.
    """
    _shards.expect_whole("route")
    _check_rows(query, key, centroids, _DENSE, routing)
    length_q, length_k, clusters = query.shape[2], key.shape[2], centroids.shape[1]
    shared = _shared(shared_qk, is_causal, query, key)
    used = _Used.of(query, key, seqused_q, leftpad_q, seqused_k, leftpad_k)
    if shared:
        used = used._replace(seqused_k=used.seqused_q, leftpad_k=used.leftpad_q)
    size_q = size_k = 0
    if routing == "topk":
        size_q = _cluster_size(cluster_size, "query", length_q, clusters)
        size_k = size_q if shared else _cluster_size(cluster_size, "key", length_k, clusters)
    elif cluster_size is not None:
        raise RuntimeError(f'cluster_size: expected None with routing="argmax", got {cluster_size!r}')
    query_indices, query_offsets, key_indices, key_offsets = _ops.route(
        query.detach(), key.detach(), centroids, *used, size_q, size_k, routing, shared
    )
    if shared:
        key_indices, key_offsets = query_indices, query_offsets
    lead = used.lead(length_q, length_k)
    return Routes(query_indices, query_offsets, key_indices, key_offsets, length_q, length_k, lead)


def route_varlen(
    query: Tensor,
    key: Tensor,
    centroids: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    cluster_size: int | None = None,
    routing: Routing = "topk",
    shared_qk: bool | None = None,
    is_causal: bool = False,
    has_padding: bool = False,
) -> Routes:
    """:func:`route` for packed sequences, each on its own, all around the same centroids.

    Args:
        query: (total_q, heads, head_dim).
        key: (total_k, kv_heads, head_dim).
        centroids, routing: as in :func:`route`.
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, has_padding: as in
            :func:`attnx.sigmoid_attention_varlen`; padding is in no cluster.
        cluster_size: as in :func:`route`, and a number with ``"topk"``, as sequences differ in length: a cluster of a
            shorter sequence has all of its tokens.
        shared_qk: as in :func:`route`, where ``cu_seqlens_q`` and ``cu_seqlens_k`` hold the same. It has to be given
            where ``is_causal``, as their values are not looked at on a GPU, and is False by default otherwise.
        is_causal: whether the attention will be.

    Returns:
        :class:`Routes`, of total_q queries and total_k keys.

    Raises:
        RuntimeError: an argument does not fit; the message names it, what was expected and what came.
        NotImplementedError: no kernel for this backend.
    """
    _shards.expect_whole("route_varlen")
    _check_rows(query, key, centroids, _PACKED, routing)
    _arguments.flag("is_causal", is_causal)
    padding = _arguments.flag("has_padding", has_padding)
    of_q, of_k, longest_q, longest_k = _arguments.packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    if of_q.shape == of_k.shape == (1,):  # no sequence is one without rows
        of_q, of_k = (F.pad(x, (0, 1)) for x in (of_q, of_k))
    if shared_qk is None and is_causal:
        _arguments.refuse("shared_qk", "True or False where is_causal", shared_qk)
    size = 0
    if routing == "topk":
        if cluster_size is None:
            _arguments.refuse("cluster_size", 'a number with routing="topk" and packed sequences', cluster_size)
        size = _arguments.integer("cluster_size", cluster_size, 1)
    elif cluster_size is not None:
        raise RuntimeError(f'cluster_size: expected None with routing="argmax", got {cluster_size!r}')
    shared = bool(shared_qk)
    query_indices, query_offsets, key_indices, key_offsets = _ops.route_varlen(
        *(query.detach(), key.detach(), centroids, of_q, of_k, longest_q, longest_k, padding),
        *(size, size, routing, shared),
    )
    if shared:
        key_indices, key_offsets = query_indices, query_offsets
    lead = (of_k[1:] - of_q[1:])[None]  # rows of a sequence count from the first one's on
    return Routes(query_indices, query_offsets, key_indices, key_offsets, query.shape[0], key.shape[0], lead)


@takes_layouts
def routing_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Tensor | Routes,
    *,
    cluster_size: int | None = None,
    routing: Routing | None = None,
    is_causal: bool = False,
    shared_qk: bool | None = None,
    seqused_q: Tensor | None = None,
    leftpad_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    normalize_qk: bool = False,
    score: ScoreName = "softmax",
    bias: SigmoidBias = None,
    memory_kv: tuple[Tensor, Tensor] | None = None,
    scale: float | Tensor | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    r"""Attention within clusters: a query sees the keys of the clusters that hold it.

    .. math:: O_t = \frac{1}{|C_t|} \sum_{c \in C_t} \mathrm{attention}(q_t, K_c, V_c), \qquad C_t = \{c : t \in c\}

    and 0 where no cluster holds token t. The rows of a cluster are gathered as the loop loads them: no copy of query,
    key or value is made. Gradients are added up in the order of the clusters: every call gives the same bits, with any
    number of threads.

    Args:
        query: (batch, heads, length_q, head_dim).
        key: (batch, kv_heads, length_k, head_dim); heads is a multiple of kv_heads, and consecutive query heads share a
            key head.
        value: (batch, kv_heads, length_k, value_dim).
        routes: centroids, (heads, clusters, head_dim) float32, as :func:`route` takes them: one with a NaN routes
            nothing. Or its result for this query and key.
        cluster_size, routing, shared_qk, seqused_q, leftpad_q, seqused_k, leftpad_k: as in :func:`route`; only with
            centroids. ``routing`` is "topk" by default.
        is_causal: within a cluster, hide keys that come later than the query, aligned bottom-right. With ``"topk"``
            routing an output still depends on later tokens, through the membership that they compete for; with
            ``"argmax"`` it does not.
        normalize_qk: the logits, too, are of queries and keys normalised as for the routing, as in the authors' code;
            gradients pass through.
        score: "softmax", or "sigmoid" with ``bias``.
        bias: of the sigmoid: None is -log of the number of keys of the cluster, or, if causal, of those that the row
            sees; "row" is the latter; or a float.
        memory_kv: learned keys (kv_heads, memory, head_dim) and values (kv_heads, memory, value_dim) in the dtype of
            query, which every cluster sees besides its own; they get gradients.
        scale: of the logits; 1/sqrt(head_dim) by default; or a tensor as in :func:`attnx.sigmoid_attention`.

    ``enable_gqa`` and other layouts of query, key and value are taken as by :func:`attnx.sigmoid_attention`.

    Returns:
        (batch, heads, length_q, value_dim) in the dtype of query.

    Raises:
        RuntimeError: an argument does not fit; the message names it, what was expected and what came.
        NotImplementedError: no kernel for these arguments on this device; the message names what is missing.

    Source: Roy et al., arXiv 2003.05997.
    """
    _shards.expect_whole("routing_attention")
    _arguments.flag("enable_gqa", enable_gqa)
    _arguments.tensors(query=query, key=key, value=value)
    _arguments.flag("is_causal", is_causal)
    if isinstance(routes, Tensor):
        routes = route(
            query,
            key,
            routes,
            cluster_size=cluster_size,
            routing="topk" if routing is None else routing,
            shared_qk=shared_qk,
            is_causal=is_causal,
            seqused_q=seqused_q,
            leftpad_q=leftpad_q,
            seqused_k=seqused_k,
            leftpad_k=leftpad_k,
        )
    else:
        of_routes = {"cluster_size": cluster_size, "routing": routing, "shared_qk": shared_qk}
        of_routes |= {"seqused_q": seqused_q, "leftpad_q": leftpad_q, "seqused_k": seqused_k, "leftpad_k": leftpad_k}
        _check_routes(routes, query.shape[-2], key.shape[-2], of_routes)
    return _attend(query, key, value, routes, is_causal, normalize_qk, score, bias, memory_kv, scale)


def routing_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    routes: Tensor | Routes,
    *,
    cluster_size: int | None = None,
    routing: Routing | None = None,
    is_causal: bool = False,
    shared_qk: bool | None = None,
    has_padding: bool | None = None,
    normalize_qk: bool = False,
    score: ScoreName = "softmax",
    bias: SigmoidBias = None,
    memory_kv: tuple[Tensor, Tensor] | None = None,
    scale: float | Tensor | None = None,
) -> Tensor:
    """:func:`routing_attention` over packed sequences, laid out as in :func:`attnx.sigmoid_attention_varlen`.

    Each sequence has clusters of its own around the same centroids: the result is that of a call for each.

    Args:
        query: (total_q, heads, head_dim).
        key: (total_k, kv_heads, head_dim).
        value: (total_k, kv_heads, value_dim).
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k: as in :func:`attnx.sigmoid_attention_varlen`.
        routes: centroids, (heads, clusters, head_dim) float32; or :func:`route_varlen`'s result for these sequences.
        cluster_size, routing, shared_qk, has_padding: as in :func:`route_varlen`; only with centroids. ``routing`` is
            "topk" by default, and ``has_padding`` False.
        is_causal: within a cluster, hide keys that come later than the query, each sequence aligned bottom-right.
        normalize_qk, score, bias, memory_kv, scale: as in :func:`routing_attention`.

    Returns:
        (total_q, heads, value_dim) in the dtype of query; padding gives 0.

    Raises:
        RuntimeError: an argument does not fit; the message names it, what was expected and what came.
        NotImplementedError: no kernel for these arguments on this device; the message names what is missing.
    """
    _shards.expect_whole("routing_attention_varlen")
    _arguments.tensors(query=query, key=key, value=value)
    _arguments.flag("is_causal", is_causal)
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() != 3:
            raise RuntimeError(f"{name}: expected 3 dimensions, (rows, heads, head_dim), got shape {tuple(x.shape)}")
    packing = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    if isinstance(routes, Tensor):
        routes = route_varlen(
            query,
            key,
            routes,
            *packing,
            cluster_size=cluster_size,
            routing="topk" if routing is None else routing,
            shared_qk=shared_qk,
            is_causal=is_causal,
            has_padding=False if has_padding is None else has_padding,
        )
    else:
        of_routes = {"cluster_size": cluster_size, "routing": routing, "shared_qk": shared_qk}
        _check_routes(routes, query.shape[0], key.shape[0], of_routes | {"has_padding": has_padding})
        sequences = max(_arguments.packing(*packing)[0].shape[0] - 1, 1)
        made_for = 1 if routes.lead is None else routes.lead.shape[1]
        if made_for != sequences:
            raise RuntimeError(f"routes: expected those of {sequences} sequences, got those of {made_for}")
    query, scale = _arguments.with_scale(query, scale)
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
    output = _attend(query, key, value, routes, is_causal, normalize_qk, score, bias, memory_kv, scale)
    return output[0].transpose(0, 1)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Routes,
    is_causal: bool,
    normalize_qk: bool,
    score: ScoreName,
    bias: SigmoidBias,
    memory_kv: tuple[Tensor, Tensor] | None,
    scale: float | Tensor | None,
) -> Tensor:
    """The attention of routes that are known; packed sequences are one entry of a batch."""
    # A cluster's length depends on later tokens, so a causal row counts what it sees instead.
    s = resolve_score(score, bias, default_rule="row" if is_causal else "length")
    memory_key, memory_value = _memory(memory_kv)
    if normalize_qk:
        query, key = _normalise(query), _normalise(key)
    query, scale = _arguments.with_scale(query, scale)
    output, _ = _ops.routing_attention(
        *(query, key, value, *routes[:4], routes.lead, memory_key, memory_value),
        *(s.score, s.bias_rule, s.bias_value, scale, is_causal),
    )
    return output


def _check_routes(routes: Routes, length_q: int, length_k: int, of_routes: dict[str, Any]) -> None:
    """Refuses routes of other rows, and what is only for making them."""
    if not isinstance(routes, Routes):
        _arguments.refuse("routes", "centroids, a tensor, or attnx.Routes", routes)
    if (routes.length_q, routes.length_k) != (length_q, length_k):
        raise RuntimeError(
            f"routes: expected those of {length_q} queries and {length_k} keys, got those of {routes.length_q} and "
            f"{routes.length_k}"
        )
    for name, x in of_routes.items():
        if x is not None:
            raise RuntimeError(f"{name}: expected None where routes are given, got {_arguments.describe(x)}")


def _memory(memory_kv: tuple[Tensor, Tensor] | None) -> tuple[Tensor | None, Tensor | None]:
    if memory_kv is None:
        return None, None
    memory_key, memory_value = _arguments.pair("memory_kv", memory_kv, "a pair of tensors, keys and values")
    _arguments.tensors(memory_key=memory_key, memory_value=memory_value)
    return memory_key, memory_value


def _normalise(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


def nearest_centroids(
    rows: Tensor, centroids: Tensor, *, seqused: Tensor | None = None, leftpad: Tensor | None = None
) -> Tensor:
    """The centroid with the largest product for each row, normalised as in :func:`route`.

    Args:
        rows: (batch, heads or a divisor of it, length, head_dim), queries or keys.
        centroids: (heads, clusters, head_dim) float32, contiguous.
        seqused, leftpad: int32 (batch,): of sequence b only the rows ``[leftpad[b], seqused[b])`` are tokens.

    Returns:
        (batch, heads, length) int32; of equals the lower index; -1 where no product is a number, and for padding.
    """
    _arguments.tensors(rows=rows)
    _check_centroids(centroids)
    return _ops.nearest_centroids(rows.detach(), centroids, *_used("", seqused, leftpad, rows))


def commitment_loss(
    query: Tensor,
    key: Tensor | None,
    centroids: Tensor,
    *,
    beta: float = 1e-4,
    seqused_q: Tensor | None = None,
    leftpad_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
) -> Tensor:
    r"""What draws queries and keys to their nearest centroids.

    .. math:: \beta\, \mathrm{mean} |x - \mathrm{sg}(\mu_x)|^2

    x are queries, and keys, normalised as in :func:`route`; the mean is over tokens and features. Centroids get no
    gradient: :func:`update_centroids_` moves them.

    Args:
        query: (batch, heads, length, head_dim).
        key: (batch, kv_heads, length, head_dim), or None: queries alone.
        centroids: (heads, clusters, head_dim) float32.
        beta: the weight of the loss.
        seqused_q, leftpad_q, seqused_k, leftpad_k: as in :func:`route`; padding has no part in the loss.

    Returns:
        A scalar, float32 (float64 for float64). Tokens without a nearest centroid have no part in it.
    """
    _arguments.tensors(query=query)
    used = _Used.of(query, query if key is None else key, seqused_q, leftpad_q, seqused_k, leftpad_k)

    def squares(rows: Tensor, *used: Tensor | None) -> tuple[Tensor, Tensor]:
        nearest = nearest_centroids(rows, centroids, seqused=used[0], leftpad=used[1])
        x = _normalise(rows.double() if rows.dtype == torch.float64 else rows.float())
        heads, _, dim = centroids.shape
        x = x.repeat_interleave(heads // rows.shape[1], dim=1)
        index = nearest.clamp(min=0).long()[..., None].expand(*nearest.shape, dim)
        target = centroids.detach().expand(rows.shape[0], -1, -1, -1).gather(2, index)
        found = (nearest >= 0)[..., None]
        return (x - target.to(x)).where(found, 0.0).square().sum(), found.sum() * dim

    total, count = squares(query, *used[:2])
    if key is not None:
        of_keys = squares(key, *used[2:])
        total, count = total + of_keys[0], count + of_keys[1]
    return beta * total / count.clamp(min=1)


def update_centroids_(
    centroids: Tensor,
    counts: Tensor,
    query: Tensor,
    key: Tensor,
    *,
    decay: float = 0.999,
    group: ProcessGroup | None = None,
    seqused_q: Tensor | None = None,
    leftpad_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
) -> None:
    r"""Moves centroids, in place, towards the mean of the tokens that are nearest to them.

    With n the members of a centroid and s their sum, both half of queries and half of keys, normalised as in
    :func:`route`:

    .. math::
        N \leftarrow \lambda N + (1 - \lambda) n, \qquad
        \mu \leftarrow \mu + (1 - \lambda) \frac{s - n \mu}{\tilde N}

    which is the exponential moving average of the sums over that of the counts; :math:`\tilde N` has Laplace smoothing
    of 1e-5 over the clusters of the head. A centroid without members keeps its place. ``torch.ops.attnx.
    update_centroids_`` does this last step and says in its schema what it changes. Nothing is changed by a call that
    raises.

    Args:
        centroids: (heads, clusters, head_dim) float32, contiguous; changed.
        counts: (heads, clusters) float32, contiguous; changed. Where they start from 1, the first steps move far, and
            later ones by 1 - decay of the way.
        query: (batch, heads, length, head_dim).
        key: (batch, kv_heads, length, head_dim).
        decay: :math:`\lambda`.
        group: a process group over which sums and counts are added up first, so that all of its processes end with the
            same centroids as one process with all the data. Each of them has to call this.
        seqused_q, leftpad_q, seqused_k, leftpad_k: as in :func:`route`; padding moves nothing. Packed sequences are
            one, ``rows.transpose(0, 1)[None]``, and where padding follows the last one ``cu_seqlens[-1:]`` is its
            length.

    Raises:
        RuntimeError: an argument does not fit; the message names it, what was expected and what came.
    """
    _arguments.tensors(query=query, key=key, counts=counts)
    _check_centroids(centroids)
    decay = _arguments.share("decay", decay, "from 0 to 1")
    if centroids.dim() != 3 or counts.shape != centroids.shape[:2] or counts.dtype != torch.float32:
        raise RuntimeError(
            f"counts: expected float32 of shape {tuple(centroids.shape[:2])}, got {counts.dtype} of shape "
            f"{tuple(counts.shape)}"
        )
    used = _Used.of(query, key, seqused_q, leftpad_q, seqused_k, leftpad_k)
    update(centroids, counts, query.detach(), key.detach(), used, decay, _name(group))


def _name(group: ProcessGroup | str | None) -> str:
    return "" if group is None else group if isinstance(group, str) else group.group_name


def move_centroids_in_backward(
    query: Tensor,
    key: Tensor,
    centroids: Tensor,
    counts: Tensor,
    *,
    decay: float,
    group: ProcessGroup | str | None,
    seqused_q: Tensor | None = None,
    leftpad_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
) -> Tensor:
    """The query again, whose backward calls :func:`update_centroids_`."""
    used = _Used.of(query, key, seqused_q, leftpad_q, seqused_k, leftpad_k)
    return _ops.move_centroids_in_backward(query, key, centroids, counts, *used, decay, _name(group))
