"""Routing attention: k-means clusters of queries and keys, attention within each cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

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
    "routing_attention",
    "update_centroids_",
]

Routing: TypeAlias = Literal["topk", "argmax"]

_ops = torch.ops.attnx


class Routes(NamedTuple):
    """Which tokens of each query head are in which cluster; :func:`route` makes them.

    Cluster c of a head holds the queries ``query_indices[..., a:b]`` with a and b from ``query_offsets[..., c]`` and
    ``[..., c + 1]``, ascending, and likewise keys. A token may be in none, one or several clusters.
    """

    query_indices: Tensor  # (batch, heads, slots) int32; what is not in use holds 0
    query_offsets: Tensor  # (batch, heads, clusters + 1) int32, from 0
    key_indices: Tensor
    key_offsets: Tensor
    length_q: int
    length_k: int

    @property
    def clusters(self) -> int:
        return self.query_offsets.shape[-1] - 1

    def to(self, device: torch.device | str) -> Routes:
        """The routes with all lists on the device."""
        query_indices, query_offsets, key_indices, key_offsets = (x.to(device) for x in self[:4])
        return Routes(query_indices, query_offsets, key_indices, key_offsets, self.length_q, self.length_k)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Routes):
            return NotImplemented
        lengths = self[4:] == other[4:]
        return lengths and all(same(x, y) for x, y in zip(self[:4], other[:4], strict=True))

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


def _check_rows(query: Tensor, key: Tensor, centroids: Tensor) -> None:
    _arguments.tensors(query=query, key=key)
    _check_centroids(centroids)
    for name, x, rank, shape in (
        ("query", query, 4, "(batch, heads, length, head_dim)"),
        ("key", key, 4, "(batch, kv_heads, length, head_dim)"),
        ("centroids", centroids, 3, "(heads, clusters, head_dim)"),
    ):
        if x.dim() != rank:
            raise RuntimeError(f"{name}: expected {rank} dimensions, {shape}, got shape {tuple(x.shape)}")
    if centroids.shape[1] < 1:
        raise RuntimeError(f"centroids: expected one cluster or more, got shape {tuple(centroids.shape)}")


def route(
    query: Tensor,
    key: Tensor,
    centroids: Tensor,
    *,
    cluster_size: int | None = None,
    routing: Routing = "topk",
    shared_qk: bool | None = None,
    is_causal: bool = False,
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

    Returns:
        :class:`Routes`.

    Raises:
        RuntimeError: an argument does not fit; the message names it, what was expected and what came.
        NotImplementedError: no kernel for this backend.

    Source: Roy et al., "Efficient Content-Based Sparse Attention with Routing Transformers", arXiv 2003.05997; the
    arg-max form, under which causal attention does not look ahead, is ours.
    """
    _shards.expect_whole("route")
    if not isinstance(routing, str) or routing not in ("topk", "argmax"):
        _arguments.refuse("routing", '"topk" or "argmax"', routing)
    _check_rows(query, key, centroids)
    length_q, length_k, clusters = query.shape[2], key.shape[2], centroids.shape[1]
    shared = _shared(shared_qk, is_causal, query, key)
    size_q = size_k = 0
    if routing == "topk":
        size_q = _cluster_size(cluster_size, "query", length_q, clusters)
        size_k = size_q if shared else _cluster_size(cluster_size, "key", length_k, clusters)
    elif cluster_size is not None:
        raise RuntimeError(f'cluster_size: expected None with routing="argmax", got {cluster_size!r}')
    query_indices, query_offsets, key_indices, key_offsets = _ops.route(
        query.detach(), key.detach(), centroids, size_q, size_k, routing, shared
    )
    if shared:
        key_indices, key_offsets = query_indices, query_offsets
    return Routes(query_indices, query_offsets, key_indices, key_offsets, length_q, length_k)


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
        cluster_size, routing, shared_qk: as in :func:`route`; only with centroids. ``routing`` is "topk" by default.
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
        )
    else:
        _check_routes(routes, query, key)
        for name, x in (("cluster_size", cluster_size), ("routing", routing), ("shared_qk", shared_qk)):
            if x is not None:
                raise RuntimeError(f"{name}: expected None where routes are given, got {x!r}")
    # A cluster's length depends on later tokens, so a causal row counts what it sees instead.
    s = resolve_score(score, bias, default_rule="row" if is_causal else "length")
    memory_key, memory_value = _memory(memory_kv)
    if normalize_qk:
        query, key = _normalise(query), _normalise(key)
    query, scale = _arguments.with_scale(query, scale)
    output, _ = _ops.routing_attention(
        query, key, value, *routes[:4], memory_key, memory_value, s.score, s.bias_rule, s.bias_value, scale, is_causal
    )
    return output


def _check_routes(routes: Routes, query: Tensor, key: Tensor) -> None:
    if not isinstance(routes, Routes):
        _arguments.refuse("routes", "centroids, a tensor, or attnx.Routes", routes)
    lengths = query.shape[-2], key.shape[-2]
    if (routes.length_q, routes.length_k) != lengths:
        raise RuntimeError(
            f"routes: expected those of {lengths[0]} queries and {lengths[1]} keys, got those of {routes.length_q} and "
            f"{routes.length_k}"
        )


def _memory(memory_kv: tuple[Tensor, Tensor] | None) -> tuple[Tensor | None, Tensor | None]:
    if memory_kv is None:
        return None, None
    memory_key, memory_value = _arguments.pair("memory_kv", memory_kv, "a pair of tensors, keys and values")
    _arguments.tensors(memory_key=memory_key, memory_value=memory_value)
    return memory_key, memory_value


def _normalise(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


def nearest_centroids(rows: Tensor, centroids: Tensor) -> Tensor:
    """The centroid with the largest product for each row, normalised as in :func:`route`.

    Args:
        rows: (batch, heads or a divisor of it, length, head_dim), queries or keys.
        centroids: (heads, clusters, head_dim) float32, contiguous.

    Returns:
        (batch, heads, length) int32; of equals the lower index; -1 where no product is a number.
    """
    _arguments.tensors(rows=rows)
    _check_centroids(centroids)
    return _ops.nearest_centroids(rows.detach(), centroids)


def commitment_loss(query: Tensor, key: Tensor | None, centroids: Tensor, *, beta: float = 1e-4) -> Tensor:
    r"""What draws queries and keys to their nearest centroids.

    .. math:: \beta\, \mathrm{mean} |x - \mathrm{sg}(\mu_x)|^2

    x are queries, and keys, normalised as in :func:`route`; the mean is over tokens and features. Centroids get no
    gradient: :func:`update_centroids_` moves them.

    Args:
        query: (batch, heads, length, head_dim).
        key: (batch, kv_heads, length, head_dim), or None: queries alone.
        centroids: (heads, clusters, head_dim) float32.
        beta: the weight of the loss.

    Returns:
        A scalar, float32 (float64 for float64). Tokens without a nearest centroid have no part in it.
    """

    def squares(rows: Tensor) -> tuple[Tensor, Tensor]:
        nearest = nearest_centroids(rows, centroids)
        x = _normalise(rows.double() if rows.dtype == torch.float64 else rows.float())
        heads, _, dim = centroids.shape
        x = x.repeat_interleave(heads // rows.shape[1], dim=1)
        index = nearest.clamp(min=0).long()[..., None].expand(*nearest.shape, dim)
        target = centroids.detach().expand(rows.shape[0], -1, -1, -1).gather(2, index)
        found = (nearest >= 0)[..., None]
        return (x - target.to(x)).where(found, 0.0).square().sum(), found.sum() * dim

    total, count = squares(query)
    if key is not None:
        of_keys = squares(key)
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
    update(centroids, counts, query.detach(), key.detach(), decay, _name(group))


def _name(group: ProcessGroup | str | None) -> str:
    return "" if group is None else group if isinstance(group, str) else group.group_name


def move_centroids_in_backward(
    query: Tensor, key: Tensor, centroids: Tensor, counts: Tensor, *, decay: float, group: ProcessGroup | str | None
) -> Tensor:
    """The query again, whose backward calls :func:`update_centroids_`."""
    return _ops.move_centroids_in_backward(query, key, centroids, counts, decay, _name(group))
