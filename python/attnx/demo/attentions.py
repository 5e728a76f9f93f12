"""The attentions that the demo compares. A further one is one more entry of ``ATTENTIONS``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

import attnx
from attnx import reference

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
    )
}
