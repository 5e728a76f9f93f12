"""Routing attention as a module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from attnx._scores import ScoreName
from attnx.functional import sigmoid_attention, softmax_attention
from attnx.nn.arguments import ProjectionArguments, shows_projection_arguments
from attnx.nn.projections import ProjectedAttention, positive
from attnx.routing import Routing, commitment_loss, move_centroids_in_backward, routing_attention

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["RoutingAttention"]


@shows_projection_arguments
class RoutingAttention(ProjectedAttention):
    """Multi-head attention, some heads local and the others routed: projections around :func:`attnx.routing_attention`.

    The first ``num_local_heads`` heads attend within a window, the others within clusters around ``centroids``, a
    buffer. In training every backward moves them by :func:`attnx.update_centroids_`, once it has the gradient of the
    routed queries: they are the same throughout a forward, its backward and a forward that activation checkpointing
    repeats, and a call that raises moves nothing. Where a module runs several times ahead of one backward, do not
    checkpoint its runs: the first of them to go backward moves the centroids of the others. Centroids are float32
    under any ``dtype``, and whatever the module is converted to.

    Made from a softmax attention (``from_softmax``, which takes ``num_clusters`` by keyword) a query sees its
    clusters and window alone, which takes fine-tuning. With one cluster and no local heads it gives the same.

    Args:
        embed_dim: features of a token.
        num_heads: heads, local ones included.
        num_clusters: clusters of a routed head; about the root of the length costs least.
        num_local_heads: of num_heads, in whole groups that share a key head; by default half of the groups, rounded
            down.
        window: how many keys before its own position, and after it unless causal, a query of a local head sees.
        cluster_size, routing, is_causal, shared_qk, normalize_qk, score, bias, scale: as in
            :func:`attnx.routing_attention`; the last three for local heads, too.
        num_memory: learned keys and values of a routed head that every cluster sees.
        decay: of the centroids' moving average, from 0 to 1.
        commitment: the weight of :func:`attnx.commitment_loss` of the routed heads.
        process_group: over which the centroids' update is added up, or its name, or ``"world"``; every process then
            ends with the same centroids, whatever its data. DistributedDataParallel needs it, or centroids follow the
            first process's data alone. Copies and pickles of the module have the name.
        {projection_arguments}

    Shapes:
        x: (batch, length, embed_dim).
        context: (batch, context_length, context_dim); x where not given.
        output: (batch, length, embed_dim); with ``return_loss=True`` a pair of it and the commitment loss, a scalar.

    Raises:
        ValueError: an argument does not fit; the message names it, what was expected and what came.

    Source: Roy et al., arXiv 2003.05997.
    """

    keeps_dtype = ("centroids", "counts")
    instead_of_masks = "attnx.nn.SigmoidAttention or attnx.softmax_attention"

    centroids: Tensor
    counts: Tensor
    memory_key: nn.Parameter | None
    memory_value: nn.Parameter | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_clusters: int,
        *,
        num_local_heads: int | None = None,
        window: int = 256,
        cluster_size: int | None = None,
        routing: Routing = "topk",
        is_causal: bool = False,
        shared_qk: bool | None = None,
        normalize_qk: bool = False,
        score: ScoreName = "softmax",
        bias: float | Literal["row"] | None = None,
        scale: float | None = None,
        num_memory: int = 0,
        decay: float = 0.999,
        commitment: float = 1e-4,
        process_group: ProcessGroup | str | None = None,
        **projection: Unpack[ProjectionArguments],
    ) -> None:
        super().__init__(embed_dim, num_heads, **projection)
        device, dtype = projection.get("device"), projection.get("dtype")
        group = self.num_heads // self.num_kv_heads
        if num_local_heads is None:
            num_local_heads = self.num_kv_heads // 2 * group
        if not 0 <= num_local_heads < self.num_heads or num_local_heads % group:
            raise ValueError(
                f"num_local_heads: expected a multiple of {group}, the query heads of a key head, from 0 to below "
                f"num_heads = {num_heads}, got {num_local_heads!r}"
            )
        if not 0 <= decay <= 1:
            raise ValueError(f"decay: expected from 0 to 1, got {decay!r}")
        if isinstance(num_memory, bool) or not isinstance(num_memory, int) or num_memory < 0:
            raise ValueError(f"num_memory: expected an int, 0 or more, got {num_memory!r}")
        self.num_clusters = positive("num_clusters", num_clusters)
        self.num_local_heads = num_local_heads
        self.window = positive("window", window)
        self.cluster_size = cluster_size
        self.routing: Routing = routing
        self.is_causal = is_causal
        self.shared_qk = shared_qk
        self.normalize_qk = normalize_qk
        self.score = score
        self.bias = bias
        self.scale = scale
        self.num_memory = num_memory
        self.decay = decay
        self.commitment = commitment
        self.process_group = process_group

        routed_heads, self.num_local_kv_heads = self.num_heads - num_local_heads, num_local_heads // group
        shape = routed_heads, num_clusters, self.head_dim
        self.register_buffer("centroids", torch.empty(shape, dtype=torch.float32, device=device))
        self.register_buffer("counts", torch.empty(shape[:2], dtype=torch.float32, device=device))
        if num_memory:
            memory = self.num_kv_heads - self.num_local_kv_heads, num_memory, self.head_dim
            self.memory_key = nn.Parameter(torch.empty(memory, device=device, dtype=dtype))
            self.memory_value = nn.Parameter(torch.empty(memory, device=device, dtype=dtype))
        else:
            self.memory_key = self.memory_value = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gives centroids and memory their start; the other submodules have a reset_parameters of their own."""
        nn.init.normal_(self.centroids)  # as long as normalised rows are, about
        nn.init.ones_(self.counts)
        for memory in (self.memory_key, self.memory_value):
            if memory is not None:
                nn.init.normal_(memory, std=self.head_dim**-0.5)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles hold the name of a process group, by which calls look the group up."""
        group = self.process_group
        return self.__dict__ | {"process_group": group if group is None or isinstance(group, str) else group.group_name}

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, is_causal: bool, return_loss: bool
    ) -> tuple[Tensor, Tensor | None]:
        if query.shape[1] != self.num_heads:
            raise ValueError(
                f"num_heads: expected projections of all {self.num_heads} heads, got one of {query.shape[1]}; which "
                "heads are local depends on their place, so that they cannot be shared out"
            )
        heads, kv_heads = self.num_local_heads, self.num_local_kv_heads
        routed_query, routed_key = query[:, heads:], key[:, kv_heads:]
        if self.training and torch.is_grad_enabled():
            group = torch.distributed.group.WORLD if self.process_group == "world" else self.process_group
            routed_query = move_centroids_in_backward(
                routed_query, routed_key, self.centroids, self.counts, decay=self.decay, group=group
            )
        memory = None if self.memory_key is None or self.memory_value is None else (self.memory_key, self.memory_value)
        output = routing_attention(
            routed_query,
            routed_key,
            value[:, kv_heads:],
            self.centroids,
            cluster_size=self.cluster_size,
            routing=self.routing,
            is_causal=is_causal,
            shared_qk=self.shared_qk,
            normalize_qk=self.normalize_qk,
            score=self.score,
            bias=self.bias if self.score == "sigmoid" else None,
            memory_kv=memory,
            scale=self.scale,
        )
        if heads:
            local = self._attend_locally(query[:, :heads], key[:, :kv_heads], value[:, :kv_heads], is_causal)
            output = torch.cat((local, output), dim=1)
        loss = commitment_loss(routed_query, routed_key, self.centroids, beta=self.commitment) if return_loss else None
        return output, loss

    def _attend_locally(self, query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
        options: dict[str, Any] = {
            "window": (self.window, -1 if is_causal else self.window),
            "is_causal": is_causal,
            "scale": self.scale,
        }
        if self.score == "sigmoid":
            return sigmoid_attention(query, key, value, bias="row" if self.bias is None else self.bias, **options)
        return softmax_attention(query, key, value, **options)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, is_causal: bool, **hides: Any) -> Tensor:
        return self._attend(query, key, value, is_causal, return_loss=False)[0]

    @overload
    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
        return_loss: Literal[False] = False,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
        return_loss: Literal[True],
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
        return_loss: bool,
    ) -> Tensor | tuple[Tensor, Tensor]: ...
    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
        return_loss: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attends as :meth:`attnx.nn.projections.ProjectedAttention.forward` says, which has no masks here.

        Args:
            return_loss: also return the commitment loss.
        """
        query, key, value = self.project(x, context)
        self.hides(query, key, attn_mask, key_padding_mask)
        output, loss = self._attend(query, key, value, self.causal(is_causal), return_loss=return_loss)
        output = self.merge(output)
        return output if loss is None else (output, loss)

    def options(self) -> dict[str, Any]:
        return super().options() | {
            "num_clusters": self.num_clusters,
            "num_local_heads": self.num_local_heads,
            "window": self.window if self.num_local_heads else None,
            "cluster_size": self.cluster_size,
            "routing": self.routing,
            "is_causal": self.is_causal or None,
            "shared_qk": self.shared_qk,
            "normalize_qk": self.normalize_qk or None,
            "score": self.score,
            "bias": self.bias,
            "scale": self.scale,
            "num_memory": self.num_memory or None,
            "decay": self.decay,
            "commitment": self.commitment,
        }
