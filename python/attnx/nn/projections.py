"""What the attention modules share: projections, norms and rotary embeddings around an attention."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn
from typing_extensions import Unpack

from attnx.nn.arguments import ProjectionArguments, complete, shows_projection_arguments
from attnx.nn.buffers import KeepsDtype


@shows_projection_arguments
class ProjectedAttention(KeepsDtype):
    """Multi-head attention around :meth:`attend`, which is all that a subclass adds.

    Queries, keys and values stay in (batch, length, heads, head_dim) storage; the operators read them transposed,
    without a copy.

    Args:
        embed_dim: features of a token.
        num_heads: query heads.
        {projection_arguments}

    Raises:
        ValueError: an argument does not fit; the message names it, what was expected and what came.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        **projection: Unpack[ProjectionArguments],
    ) -> None:
        super().__init__()
        given = complete(self, projection)
        num_kv_heads, head_dim, rotary = given["num_kv_heads"], given["head_dim"], given["rotary"]
        self.embed_dim = positive("embed_dim", embed_dim)
        self.num_heads = positive("num_heads", num_heads)
        self.num_kv_heads = positive("num_kv_heads", num_heads if num_kv_heads is None else num_kv_heads)
        if num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads: expected a divisor of num_heads = {num_heads}, got {num_kv_heads}")
        if head_dim is None and embed_dim % num_heads:
            raise ValueError(
                f"num_heads: expected a divisor of embed_dim = {embed_dim} where head_dim is not given, got {num_heads}"
            )
        self.head_dim = positive("head_dim", embed_dim // num_heads if head_dim is None else head_dim)
        if rotary is not None and not callable(rotary):
            raise ValueError(f"rotary: expected a callable (query, key) -> (query, key), got {rotary!r}")
        self.rotary = rotary

        factory: dict[str, Any] = {"device": given["device"], "dtype": given["dtype"]}
        linear = functools.partial(nn.Linear, bias=given["linear_bias"], **factory)
        heads_dim, kv_heads_dim = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj = linear(embed_dim, heads_dim)
        self.k_proj = linear(embed_dim, kv_heads_dim)
        self.v_proj = linear(embed_dim, kv_heads_dim)
        self.out_proj = linear(heads_dim, embed_dim)

        def norm(wanted: bool, eps: float = 1e-5) -> nn.Module:
            return given["norm_layer"](self.head_dim, eps=eps, **factory) if wanted else nn.Identity()

        self.q_norm = norm(given["qk_norm"])
        self.k_norm = norm(given["qk_norm"])
        # A row's weights, and with them its output, may be small; a larger eps would swallow what they carry.
        self.output_norm = norm(given["output_norm"], eps=1e-8)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(batch, heads, length, head_dim) each, with num_kv_heads heads of key and value."""
        raise NotImplementedError

    def options(self) -> dict[str, Any]:
        """What :meth:`extra_repr` shows besides the sizes, where it is not None."""
        return {"num_kv_heads": None if self.num_kv_heads == self.num_heads else self.num_kv_heads}

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.merge(self.attend(*self.project(x, context)))

    def project(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The query, key and value that :meth:`attend` takes."""
        context = x if context is None else context
        for name, tokens in (("x", x), ("context", context)):
            if tokens.dim() != 3 or tokens.shape[2] != self.embed_dim:
                raise ValueError(
                    f"{name}: expected (batch, length, {self.embed_dim}), got a tensor of shape {tuple(tokens.shape)}"
                )
        # The projections say how many heads there are: under tensor parallelism each process has a share of them.
        query = self.q_norm(self.q_proj(x).unflatten(2, (-1, self.head_dim))).transpose(1, 2)
        key = self.k_norm(self.k_proj(context).unflatten(2, (-1, self.head_dim))).transpose(1, 2)
        value = self.v_proj(context).unflatten(2, (-1, self.head_dim)).transpose(1, 2)
        if self.rotary is not None:
            query, key = self.rotary(query, key)
        return query, key, value

    def merge(self, output: Tensor) -> Tensor:
        """The heads' outputs, (batch, heads, length, head_dim), as (batch, length, embed_dim)."""
        return self.out_proj(self.output_norm(output.transpose(1, 2)).flatten(2))

    def extra_repr(self) -> str:
        sizes = f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, head_dim={self.head_dim}"
        return "".join([sizes, *(f", {name}={x!r}" for name, x in self.options().items() if x is not None)])


def positive(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: expected a positive int, got {value!r}")
    return value
