"""Sparse-linear attention whose keys travel around a ring of processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd.function import once_differentiable

from attnx import _arguments
from attnx._operators.schema import signature, sum_dtype
from attnx.distributed import _group, _inputs
from attnx.distributed._group import Group, GroupLike
from attnx.merging import merge_attention
from attnx.sparse_linear import NEGLIGIBLE, FeatureMap, LinearScope, Rounding, sparse_linear_attention

__all__ = ["ring_sparse_linear_attention"]


def ring_sparse_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    group: GroupLike = None,
    critical: float = 0.05,
    negligible: float = 0.10,
    block_size: tuple[int, int] = (64, 64),
    feature_map: FeatureMap = "softmax",
    linear_scope: LinearScope = "marginal",
    is_causal: bool = False,
    scale: float | None = None,
    smooth_k: bool = False,
    protect: int = 0,
    rounding: Rounding = "ceil",
) -> tuple[Tensor, Tensor]:
    r"""Sparse-linear attention over a sequence of which each process of a group has a shard.

    The averages of all blocks of keys are gathered, so that each process ranks the blocks of the whole sequence for its
    queries. Keys and values then travel from process to process, as in :func:`ring_softmax_attention`, and each takes
    of a shard what its map says: critical blocks, merged by their logsumexp, and those of the linear scope, whose sums
    add. They all travel, as most blocks are marginal, and what a marginal block comes to in the linear part, a matrix
    of head_dim by value_dim + 1 sums, is no smaller than the block. The averages are one in ``block_size[1]`` of that.

    Args:
        query: (batch, heads, length_q, head_dim): the shard of this process, as :func:`shard_sequence` cuts it in the
            layout ``"contiguous"``. length_q is a multiple of ``block_size[0]``.
        key: (batch, kv_heads, length_k, head_dim), likewise; heads is a multiple of kv_heads, and length_k one of
            ``block_size[1]``.
        value: (batch, kv_heads, length_k, value_dim), likewise. Shapes and dtypes are the same on all processes; with
            ``ATTNX_DEBUG=1`` in the environment this is checked, and without it others wait for what never comes.
        group: the processes that share the sequence: a ProcessGroup, a DeviceMesh of one dimension, or None for all.
            All of them make the same calls in the same order.
        is_causal: hide later keys. length_q and length_k are equal then.
        protect: the first keys of the whole sequence, as in :func:`attnx.sparse_linear_attention`.

    The other arguments are those of :func:`attnx.sparse_linear_attention`; shares are of the blocks of the whole
    sequence.

    Returns:
        O^s and O^l, each (batch, heads, length_q, value_dim) in the dtype of query: the shards of the outputs. Both are
        differentiable, once; the map has no gradient.

    Raises:
        RuntimeError: an argument does not fit; the message names it, what was expected and what came.
        NotImplementedError: no kernel for these arguments on this device; the message names what is missing.

    Sources: Zhang et al., "SLA: Beyond Sparsity in Diffusion Transformers via Fine-Tunable Sparse-Linear Attention",
    arXiv 2509.24006; the ring is that of Liu et al., arXiv 2310.01889.
    """
    of_map: dict[str, Any] = {"critical": critical, "negligible": negligible, "protect": protect, "rounding": rounding}
    options: dict[str, Any] = {"block_size": block_size, "feature_map": feature_map, "linear_scope": linear_scope}
    options |= {"scale": scale, "is_causal": is_causal}
    results: tuple[Tensor, Tensor] = _attend(query, key, value, group, of_map | {"smooth_k": smooth_k}, options)
    return results


@torch.compiler.disable(reason="what is sent to single processes belongs in no graph")
def _attend(
    query: Tensor, key: Tensor, value: Tensor, group: GroupLike, of_map: dict[str, Any], options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    _group.expect_shards(query=query, key=key, value=value)
    processes = _group.resolve(group)
    _inputs.check_shapes(query, key, value, "contiguous")
    query, key, value = _inputs.autocast(query, key, value)
    # A call without rows refuses all else that does not fit, before anything is sent.
    sparse_linear_attention(*(x.detach()[:, :, :0] for x in (query, key, value)), **(of_map | options))
    block_size = options["block_size"]
    for name, x, block in (("query", query, block_size[0]), ("key", key, block_size[1])):
        if x.shape[2] % block:
            _arguments.refuse(name, f"a length in a multiple of {block}, as block_size={block_size} cuts shards", x)
    if options["is_causal"] and query.shape[2] != key.shape[2]:
        _arguments.refuse("key", f"the length of query, {query.shape[2]}, with is_causal", key)
    shapes = [tuple(x.shape) for x in (query, key, value)]
    _group.check_alike("shapes, dtype and options", (shapes, query.dtype, of_map, options), processes)
    plan = Plan(processes, **options)
    sparse, linear = RingSparseLinear.apply(plan, query, key, value, block_labels(plan, query, key, **of_map))
    return sparse, linear


@dataclass(frozen=True)
class Plan:
    """What a process does with the shards that come by.

    Attributes:
        group: the processes of the ring.
        block_size: queries and keys of a block.
        feature_map, linear_scope, scale, is_causal: as in :func:`attnx.sparse_linear_attention`.
    """

    group: Group
    block_size: tuple[int, int]
    feature_map: FeatureMap
    linear_scope: LinearScope
    scale: float | None
    is_causal: bool

    def sees(self, step: int) -> bool:
        """Whether some query sees a key of the step, in which a process has the shard of that many ranks before."""
        return not self.is_causal or step <= self.group.rank

    def is_cut(self, step: int) -> bool:
        """Whether some queries see only a part of the keys of the step."""
        return self.is_causal and step == 0

    def call(self, step: int, query: Tensor, held: dict[str, Tensor], labels: Tensor) -> dict[str, Any]:
        """The operator's arguments for one step."""
        options: dict[str, Any] = {"block_q": self.block_size[0], "block_k": self.block_size[1]}
        options |= {"feature_map": self.feature_map, "seqused_k": None, "leftpad_k": None}
        options |= {"linear_scope": self.linear_scope, "scale": self.scale, "is_causal": self.is_cut(step)}
        return options | held | {"query": query, "block_map": self.labels_of(step, labels)}

    def labels_of(self, step: int, labels: Tensor) -> Tensor:
        """The labels of the blocks of keys of a step."""
        return labels.chunk(self.group.size, 3)[(self.group.rank - step) % self.group.size].contiguous()

    def linear_weight(self, step: int, query: Tensor, key: Tensor, labels: Tensor) -> Tensor:
        """Returns phi(q) . sum phi(k) over the keys of a step in the linear scope, (batch, heads, length_q)."""
        phi_q, phi_k = (self._features(x.to(sum_dtype(x))) for x in (query, key))
        block_q, block_k = self.block_size
        groups = (key.shape[1], query.shape[1] // key.shape[1])
        if self.is_cut(step) and self.linear_scope == "all":
            return (phi_q.unflatten(1, groups) * phi_k.cumsum(2)[:, :, None]).sum(-1).flatten(1, 2)
        labels = self.labels_of(step, labels)
        low, high = {"marginal": (0, 0), "noncritical": (-1, 0), "all": (-1, 1)}[self.linear_scope]
        in_scope = (labels >= low) & (labels <= high)
        if self.is_cut(step):  # a block that only some queries of a row see is critical, and not in the scope
            rows, blocks = (torch.arange(n, device=labels.device) for n in labels.shape[2:])
            in_scope &= blocks * block_k < (rows[:, None] + 1) * block_q
        of_blocks = phi_k.unflatten(2, (-1, block_k)).sum(3).double()
        of_rows = (in_scope.double().unflatten(1, groups) @ of_blocks[:, :, None]).flatten(1, 2).to(phi_q.dtype)
        return (phi_q.unflatten(2, (-1, block_q)) * of_rows[:, :, :, None]).sum(-1).flatten(2, 3)

    def _features(self, x: Tensor) -> Tensor:
        if self.feature_map == "softmax":
            return x.softmax(-1)
        return torch.nn.functional.elu(x) + 1 if self.feature_map == "elu" else x.relu()


@torch.no_grad()
def block_labels(
    plan: Plan,
    query: Tensor,
    key: Tensor,
    *,
    critical: float,
    negligible: float,
    protect: int,
    rounding: Rounding,
    smooth_k: bool,
) -> Tensor:
    """Labels the blocks of keys of the whole sequence for the blocks of queries of this process.

    Returns:
        int8 (batch, heads, query_blocks, key_blocks of all processes): the rows of this process of the map that
        :func:`attnx.sparse_linear_block_map` makes in one process.
    """
    dtype, size, rank = sum_dtype(query), plan.group.size, plan.group.rank
    mean_q, mean_k = (
        x.unflatten(2, (-1, block)).mean(3, dtype=dtype) for x, block in zip((query, key), plan.block_size, strict=True)
    )
    of_all = [torch.empty_like(mean_k, memory_format=torch.contiguous_format) for _ in range(size)]
    dist.all_gather(of_all, mean_k.contiguous(), group=plan.group.processes)
    # Products of float32 are made in float64, as those of a GPU may be of ten bits.
    means = torch.cat(of_all, 2).double()
    if smooth_k:
        means -= means.mean(2, keepdim=True)
    groups = (key.shape[1], query.shape[1] // key.shape[1])
    products = (mean_q.double().unflatten(1, groups) @ means.mT[:, :, None]).flatten(1, 2).to(dtype)
    if plan.scale is not None:
        products *= (plan.scale > 0) - (plan.scale < 0)
    labels = torch.full_like(products, NEGLIGIBLE, dtype=torch.int8)
    # Under a causal mask the sequence ends for this process with its own shard.
    shards = rank + 1 if plan.is_causal else size
    seen = products.shape[3] // size * shards
    labels[..., :seen] = torch.ops.attnx.sparse_linear_labels(
        products[..., :seen].contiguous(),
        query.shape[2],
        key.shape[2] * shards,
        *plan.block_size,
        critical,
        negligible,
        rounding,
        plan.is_causal,
        protect,
    )
    return labels


class RingSparseLinear(torch.autograd.Function):
    """The results are O^s and O^l of the rows of this process."""

    @staticmethod
    def forward(
        ctx: Any, plan: Plan, query: Tensor, key: Tensor, value: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        of = signature("sparse_linear_attention")
        rows, dtype = query.shape[:3], sum_dtype(query)
        sparse, linear = query.new_zeros((2, *rows, value.shape[3]), dtype=dtype)
        logsumexp = query.new_full(rows, -torch.inf, dtype=dtype)
        weight = torch.zeros_like(logsumexp)
        for step, held in _group.pass_around({"key": key, "value": value}, plan.group, plan.group.size):
            if plan.sees(step):
                of_step = of.call(plan.call(step, query, held, labels))
                outputs = [sparse, of_step[0].to(dtype)]
                sparse, logsumexp = merge_attention(outputs, [logsumexp, of_step[2]])
                weight_of_step = plan.linear_weight(step, query, held["key"], labels)
                linear += weight_of_step[..., None] * of_step[1]
                weight += weight_of_step
        sparse = sparse.to(query.dtype)
        linear = _ratio(linear, weight[..., None]).to(query.dtype)
        ctx.plan = plan
        ctx.save_for_backward(query, key, value, labels, sparse, linear, logsumexp, weight)
        return sparse, linear

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sparse: Tensor, grad_linear: Tensor) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        query, key, value, labels, sparse, linear, logsumexp, weight = ctx.saved_tensors
        of = signature("sparse_linear_attention_backward")
        dtype = sum_dtype(query)
        given = {"grad_sparse": grad_sparse.contiguous(), "grad_logsumexp": torch.zeros_like(logsumexp)}
        given |= {"sparse": sparse, "linear": linear, "logsumexp": logsumexp}
        given["deterministic"] = torch.are_deterministic_algorithms_enabled()
        grad_query = torch.zeros_like(query, dtype=dtype)

        def differentiate(step: int, held: dict[str, Tensor]) -> dict[str, Tensor]:
            if not plan.sees(step):
                return {name: torch.zeros_like(x, dtype=dtype) for name, x in held.items()}
            # The operator divides by the weight of its own keys, where that of all processes belongs.
            share = _ratio(plan.linear_weight(step, query, held["key"], labels), weight)
            of_step = {"grad_linear": (grad_linear * share[..., None]).to(query.dtype).contiguous()}
            gradients = of.call(plan.call(step, query, held, labels) | given | of_step)
            grad_query.add_(gradients[0])
            return {"key": gradients[1].to(dtype), "value": gradients[2].to(dtype)}

        gradients = _group.pass_back({"key": key, "value": value}, plan.group, plan.group.size, differentiate)
        wanted = ctx.needs_input_grad[1:4]
        of_inputs = zip((grad_query, gradients["key"], gradients["value"]), wanted, strict=True)
        return None, *(x.to(query.dtype) if is_wanted else None for x, is_wanted in of_inputs), None


def _ratio(x: Tensor, total: Tensor) -> Tensor:
    """Returns x / total, and 0 where the total is."""
    return x / total.where(total != 0, torch.inf)
