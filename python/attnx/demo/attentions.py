"""The attentions that the demo compares. A further one is one more entry of ``ATTENTIONS``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnx
from attnx import reference
from attnx.routing import move_centroids_in_backward

CausalAttention = Callable[[Tensor, Tensor, Tensor], Tensor]

# Below -log(256), the rule for the model's 256 keys: weights clear of saturation single a key out as sharply as softmax
# does, and the model's output norm takes out how small they are.
SIGMOID_BIAS = -8.0


@dataclass(frozen=True)
class Attention:
    """Causal attention over (batch, heads, length, head_dim), and the float64 definition that its output is held to."""

    name: str
    label: str
    colour: str
    function: CausalAttention
    reference: CausalAttention
    module: Callable[[int], nn.Module] | None = None  # what is trained, by head_dim; None: the function

    def build(self, head_dim: int) -> CausalAttention:
        return self.module(head_dim) if self.module else self.function


# The context is 8 blocks of 64, of which 1 is critical.
_SPARSE_LINEAR: dict[str, Any] = {"critical": 0.125, "negligible": 0.1, "is_causal": True}
_DENSITY = 0.5


class _SparseLinear(nn.Module):
    """The critical blocks' softmax, and the marginal blocks' linear attention through a projection that starts at 0."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.projection = nn.utils.skip_init(nn.Linear, head_dim, head_dim)  # draws no number: the others draw the same
        nn.init.zeros_(self.projection.weight)
        nn.init.zeros_(self.projection.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        sparse, linear = attnx.sparse_linear_attention(query, key, value, **_SPARSE_LINEAR)
        return sparse + self.projection(linear)


class _Probabilistic(nn.Module):
    """Other blocks in every step; all of them in validation."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        function = attnx.probabilistic_attention
        return function(query, key, value, density=_DENSITY, is_causal=True, training=self.training)


# Of the 22 that are the root of the context, somewhat fewer: clusters of the nearest centroids are uneven.
_CLUSTERS, _WINDOW = 16, 64
_ROUTED: dict[str, Any] = {"routing": "argmax", "is_causal": True}  # under "topk" early bytes would know of later ones


def _centroids(heads: int, head_dim: int) -> Tensor:
    return torch.randn(heads, _CLUSTERS, head_dim, generator=torch.Generator().manual_seed(0))


class _Routing(nn.Module):
    """Half of the heads within a window, the others within clusters around centroids that follow them."""

    centroids: Tensor
    counts: Tensor

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.register_buffer("centroids", torch.empty(0, _CLUSTERS, head_dim))
        self.register_buffer("counts", torch.empty(0, _CLUSTERS))

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        local = query.shape[1] // 2
        if not len(self.centroids):  # the number of heads is known now
            self.centroids = _centroids(query.shape[1] - local, query.shape[3]).to(query.device)
            self.counts = torch.ones_like(self.centroids[..., 0])
        near = attnx.softmax_attention(
            query[:, :local], key[:, :local], value[:, :local], is_causal=True, window=(_WINDOW, -1)
        )
        query, key, value = (x[:, local:] for x in (query, key, value))
        if self.training:
            options: dict[str, Any] = {"decay": 0.99, "group": None}
            query = move_centroids_in_backward(query, key, self.centroids, self.counts, **options)
        return torch.cat((near, attnx.routing_attention(query, key, value, self.centroids, **_ROUTED)), dim=1)


def _routed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return attnx.routing_attention(query, key, value, _centroids(query.shape[1], query.shape[3]), **_ROUTED)


def _routed_reference(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    routes = attnx.route(query, key, _centroids(query.shape[1], query.shape[3]), **_ROUTED)
    return reference.routing_attention(query, key, value, routes, is_causal=True)


def _sparse_plus_linear(function: Callable[..., tuple[Tensor, Tensor]]) -> CausalAttention:
    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        sparse, linear = function(query, key, value, **_SPARSE_LINEAR)
        return sparse + linear

    return attention


BASELINE = Attention(
    name="sdpa",
    label="PyTorch softmax",
    colour="#5f6b7a",
    function=partial(F.scaled_dot_product_attention, is_causal=True),
    reference=partial(reference.softmax_attention, is_causal=True),
)

ATTENTIONS = {
    attention.name: attention
    for attention in (
        BASELINE,
        Attention(
            name="softmax",
            label="attnx softmax",
            colour="#2f7fc1",
            function=partial(attnx.softmax_attention, is_causal=True),
            reference=partial(reference.softmax_attention, is_causal=True),
        ),
        Attention(
            name="sigmoid",
            label="attnx sigmoid",
            colour="#e07a1f",
            function=partial(attnx.sigmoid_attention, bias=SIGMOID_BIAS, is_causal=True),
            reference=partial(reference.sigmoid_attention, bias=SIGMOID_BIAS, is_causal=True),
        ),
        Attention(
            name="sparse-linear",
            label="attnx sparse-linear",
            colour="#7a4fb5",
            function=_sparse_plus_linear(attnx.sparse_linear_attention),
            reference=_sparse_plus_linear(reference.sparse_linear_attention),
            module=_SparseLinear,
        ),
        Attention(
            name="probabilistic",
            label="attnx probabilistic",
            colour="#1d9a6c",
            function=partial(attnx.probabilistic_attention, density=_DENSITY, is_causal=True, seed=0, offset=0),
            reference=partial(reference.probabilistic_attention, density=_DENSITY, is_causal=True, seed=0, offset=0),
            module=_Probabilistic,
        ),
        Attention(
            name="routing",
            label="attnx routing",
            colour="#c0447a",
            function=_routed,
            reference=_routed_reference,
            module=_Routing,
        ),
    )
}
