"""One of several processes that share a sequence: what test_distributed starts.

Each check makes the same inputs in every process, computes with all of them together, and compares with one process.
"""

from __future__ import annotations

import copy
import itertools
import json
import re
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.experimental import context_parallel as context_of_torch
from torch.distributed.tensor.experimental import implicit_replication
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import attnx
import attnx.distributed as attnx_distributed
from attnx.distributed import Layout, gather_sequence, shard_sequence
from attnx.testing import assert_close
from cases import Shape, parameter_dtype, random_inputs
from compare import check, forward_backward

CPU = torch.device("cpu")
LAYOUTS: tuple[Layout, ...] = ("contiguous", "zigzag")
RINGS: dict[str, Callable[..., Any]] = {
    "softmax_attention": attnx_distributed.ring_softmax_attention,
    "sigmoid_attention": attnx_distributed.ring_sigmoid_attention,
}
SHAPE = Shape(48, 48, head_dim=16, value_dim=24, batch=2, heads=4, kv_heads=2)


class _Everywhere(torch.autograd.Function):
    """A tensor that all processes have; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # Only a few sums exist in 16 bits, and these are to be as one process has them.
        whole = grad.to(torch.float64).contiguous()
        dist.all_reduce(whole)
        return whole.to(grad.dtype)


class _Gathered(torch.autograd.Function):
    """The whole sequence, of which each process differentiates its shard."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Layout) -> Tensor:
        ctx.layout = layout
        return gather_sequence(x.detach(), layout=layout)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return shard_sequence(grad, layout=ctx.layout), None


SEQUENCES = ("query", "key", "value", "key_bias", "key_mask")


def together(attention: Callable[..., Any], layout: Layout, **more: Any) -> Callable[..., Any]:
    """Makes a function of whole sequences of one that takes shards."""

    def attend(*args: Tensor, **options: Any) -> Any:
        options |= dict(zip(SEQUENCES, args, strict=False))
        for name, x in options.items():
            if isinstance(x, Tensor):
                x = _Everywhere.apply(x) if x.requires_grad else x
                options[name] = shard_sequence(x, layout=layout) if name in SEQUENCES else x
        results = attention(**options, layout=layout, **more)
        if isinstance(results, tuple):
            return tuple(_Gathered.apply(x, layout) for x in results)
        return _Gathered.apply(results, layout)

    return attend


def check_ring(operator: str, dtype: torch.dtype, layout: Layout, parameters: tuple[str, ...], **options: Any) -> None:
    inputs, grad_output = random_inputs(SHAPE, dtype, CPU)
    for name in parameters:
        inputs[name] = torch.linspace(0.1, 0.7, SHAPE.heads).to(parameter_dtype(dtype))
    check(operator, inputs, grad_output, attention=together(RINGS[operator], layout), **options)


def check_terms(operator: str, layout: Layout, **options: Any) -> None:
    """Terms of logits, and lengths that differ, in float64 beside one process."""
    shape = Shape(32, 64, head_dim=8, value_dim=12, batch=2, heads=4, kv_heads=1)
    inputs, grad_output = random_inputs(shape, torch.float64, CPU)
    generator = torch.Generator().manual_seed(1)
    inputs["key_bias"] = torch.randn(1, 4, 64, generator=generator, dtype=torch.float64)
    inputs["key_mask"] = torch.rand(2, 1, 64, generator=generator, dtype=torch.float64)
    inputs["scale"] = torch.tensor(0.3, dtype=torch.float64)
    expect_same(getattr(attnx, operator), together(RINGS[operator], layout), inputs, grad_output, **options)


def check_logsumexp(layout: Layout) -> None:
    """A loss of the logsumexp alone, with a sink, and rows that see no key."""
    inputs, _ = random_inputs(SHAPE, torch.float64, CPU)
    inputs["sink"] = torch.tensor([-torch.inf, 0.3, 1.0, 2.0], dtype=torch.float64)
    grad = torch.randn(2, 4, 48, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    options = {"is_causal": True, "position_offset": -5}

    def seen(attention: Callable[..., Any]) -> Callable[..., Tensor]:
        def logsumexp(**inputs: Any) -> Tensor:
            return attention(**inputs, return_logsumexp=True)[1].clamp(min=-100)

        return logsumexp

    ring = together(RINGS["softmax_attention"], layout)
    expect_same(seen(attnx.softmax_attention), seen(ring), inputs, grad, **options)


def check_heads(
    layout: Layout, attention: Callable[..., Any], shape: Shape = SHAPE, dtype: Any = torch.float64
) -> None:
    """All-to-all of heads and sequence gives the function what it would get in one process."""
    inputs, grad_output = random_inputs(shape, dtype, CPU)
    shared = together(partial(attnx_distributed.ulysses_attention, attention), layout)
    expect_same(_joined(partial(attention, local=lambda x: x)), _joined(shared), inputs, grad_output)


def _joined(attention: Callable[..., Any]) -> Callable[..., Tensor]:
    """Makes one tensor of several results of one shape."""

    def attend(query: Tensor, key: Tensor, value: Tensor, **others: Tensor) -> Tensor:
        results = attention(query, key, value, **others)
        return results if isinstance(results, Tensor) else results[0] + 0.5 * results[1]

    return attend


def _softmax(*inputs: Tensor, local: Callable[[Tensor], Tensor] = attnx_distributed.local_heads) -> Tensor:
    sink = torch.linspace(0.1, 0.7, 4, dtype=torch.float64)
    return attnx.softmax_attention(*inputs, is_causal=True, sink=local(sink))


def _sigmoid(*inputs: Tensor, local: Any = None) -> Tensor:
    return attnx.sigmoid_attention(*inputs, window=(9, 2), bias="row")


def _block_sparse(*inputs: Tensor, local: Any = None) -> Tensor:
    return attnx.block_sparse_attention(
        *inputs, attnx.BlockMask.window(inputs[0].shape[2], inputs[1].shape[2], (70, 0))
    )


def _sparse_linear(*inputs: Tensor, local: Any = None) -> tuple[Tensor, Tensor]:
    return attnx.sparse_linear_attention(*inputs, critical=0.5, negligible=0.2)


def _routing_of_all(*inputs: Tensor) -> Tensor:
    return _routing(*inputs, local=lambda x: x)


def _routing(*inputs: Tensor, local: Callable[[Tensor], Tensor] = attnx_distributed.local_heads) -> Tensor:
    centroids = torch.randn(4, 8, 16, generator=torch.Generator().manual_seed(3))
    return attnx.routing_attention(*inputs, local(centroids).contiguous())


def _probabilistic(*inputs: Tensor, local: Any = None) -> Tensor:
    return attnx.probabilistic_attention(*inputs, training=False, is_causal=True)


SPARSE_LINEAR: dict[str, dict[str, Any]] = {
    "defaults": {},
    "marginal": {"critical": 0.3, "negligible": 0.3, "smooth_k": True},
    "noncritical": {"critical": 0.3, "negligible": 0.3, "linear_scope": "noncritical", "feature_map": "elu"},
    "all": {"critical": 0.3, "negligible": 0.3, "linear_scope": "all", "feature_map": "relu"},
    "blocks": {"critical": 0.3, "negligible": 0.1, "block_size": (128, 64), "rounding": "floor", "protect": 70},
    "wide_blocks": {"critical": 0.3, "negligible": 0.1, "block_size": (64, 128), "scale": -0.2},
}
TOKENS = Shape(1024, 1024, head_dim=16, value_dim=24, batch=2, heads=4, kv_heads=2)


def _ring_sparse_linear(*inputs: Tensor, layout: Layout = "contiguous", **options: Any) -> tuple[Tensor, Tensor]:
    assert layout == "contiguous"
    return attnx_distributed.ring_sparse_linear_attention(*inputs, **options)


def check_sparse_linear(is_causal: bool, shape: Shape = TOKENS, dtype: Any = torch.float64, **options: Any) -> None:
    """The same blocks, the same two parts and the same gradients as in one process."""
    inputs, grad_output = random_inputs(shape, dtype, CPU)
    options["is_causal"] = is_causal
    seen: list[Tensor] = []
    own = attnx_distributed.sparse_linear.block_labels

    def labels(*args: Any, **of_map: Any) -> Tensor:
        seen.append(own(*args, **of_map))
        return seen[-1]

    alone, shared = _joined(attnx.sparse_linear_attention), _joined(together(_ring_sparse_linear, "contiguous"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attnx_distributed.sparse_linear, "block_labels", labels)
        if dtype == torch.float64:
            expect_same(alone, shared, inputs, grad_output, **options)
        else:
            exact = {name: x.double() for name, x in inputs.items()}
            expected = forward_backward(alone, exact, grad_output.double(), **options)
            baseline = forward_backward(alone, inputs, grad_output, **options)
            for name, x in forward_backward(shared, inputs, grad_output, **options).items():
                assert x.dtype == dtype, name
                assert_close(x, expected[name], baseline[name], name=name, dtype=dtype)
    of_map = {name: x for name, x in options.items() if name not in ("linear_scope", "feature_map")}
    whole = attnx.sparse_linear_block_map(inputs["query"], inputs["key"], **of_map)
    assert torch.equal(seen[0], shard_sequence(whole.labels))


MODULES: dict[str, Callable[[], nn.Module]] = {
    "sigmoid": lambda: attnx.nn.SigmoidAttention(32, 4, bias="trainable", bias_length=64, alibi="trainable"),
    "sparse_linear": lambda: attnx.nn.SparseLinearAttention(32, 4, critical=0.3),
    "probabilistic": lambda: attnx.nn.ProbabilisticAttention(32, 4, is_causal=True),
    "routing": lambda: attnx.nn.RoutingAttention(32, 4, 4),
    "affine": lambda: attnx.nn.AffineScaledAttention(32, 4, is_causal=True),
    "disentangled": lambda: Disentangled(),
    "sla2": lambda: attnx.nn.SparseLinearAttention(32, 4, critical=0.3, mix="sla2"),
}


class Disentangled(nn.Module):
    """Disentangled attention with the embeddings of relative positions that it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = attnx.nn.DisentangledSelfAttention(32, 4, span=8, max_distance=16)
        self.positions = nn.Parameter(torch.randn(16, 32))

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, self.positions)


def check_module(make: Callable[[], nn.Module], wrap: Callable[[nn.Module], nn.Module]) -> None:
    """Each has a share of the batch, and gradients are averaged. In training modules would draw, and learn."""
    torch.manual_seed(0)
    module = make().double().eval()
    shared = wrap(copy.deepcopy(module))
    x = torch.randn(8, 128, 32, dtype=torch.float64)
    module(x).square().mean().backward()
    shared(x.chunk(dist.get_world_size())[dist.get_rank()]).square().mean().backward()
    for (name, alone), together in zip(module.named_parameters(), shared.parameters(), strict=True):
        grad = together.grad
        assert grad is not None, name
        grad = grad.full_tensor() if isinstance(grad, DTensor) else grad
        torch.testing.assert_close(grad, alone.grad, rtol=1e-10, atol=1e-12, msg=partial(_named, name))


def fully_sharded(module: nn.Module) -> nn.Module:
    fully_shard(module, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return module


def check_sharded_training(make: Callable[[], nn.Module]) -> None:
    """A module whose batch is a DTensor trains, and its centroids and averages move, as in one process."""
    attnx_distributed.register_sharding()
    torch.manual_seed(0)
    module = make().double().train()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    shared = distribute_module(copy.deepcopy(module), mesh)
    x = torch.randn(4, 128, 32, dtype=torch.float64)
    module(x).square().mean().backward()
    with implicit_replication():
        shared(distribute_tensor(x, mesh, [Shard(0)])).square().mean().backward()
    for (key, alone), together in zip(module.named_parameters(), shared.parameters(), strict=True):
        assert isinstance(together.grad, DTensor), key
        same = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12, msg=partial(_named, key))
        same(together.grad.full_tensor(), alone.grad)
    for (key, alone), together in zip(module.named_buffers(), shared.buffers(), strict=True):
        assert isinstance(together, DTensor), key
        # These are float32, and sums over processes are rounded once more.
        torch.testing.assert_close(together.full_tensor(), alone, rtol=1e-6, atol=1e-6, msg=partial(_named, key))


def check_sharding(attention: Callable[..., Any], shape: Shape, placements: tuple[Placement, Placement]) -> None:
    """DTensors over a mesh of two dimensions; numbers of heads, and terms, are there in full."""
    attnx_distributed.register_sharding()
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2))
    inputs, grad_output = random_inputs(shape, torch.float64, CPU)
    generator = torch.Generator().manual_seed(1)
    sizes = OF_HEADS.get(attention, {})
    inputs |= {name: torch.rand(size, generator=generator, dtype=torch.float64) for name, size in sizes.items()}
    expected = forward_backward(_joined(attention), inputs, grad_output)
    leaves = {}
    for name, x in inputs.items():
        heads_are_shared = name not in ("query", "key", "value") or x.shape[1] == 1
        own = [Replicate() if heads_are_shared and placement == Shard(1) else placement for placement in placements]
        own = own if name in ("query", "key", "value") else [Replicate(), Replicate()]
        leaves[name] = distribute_tensor(x, mesh, own).requires_grad_()
    with implicit_replication():
        output = _joined(attention)(**leaves)
        assert isinstance(output, DTensor)
        assert attention is _draws or output.placements == placements, output.placements
        gradients = torch.autograd.grad(output.full_tensor(), list(leaves.values()), grad_output)
    same = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
    same(output.full_tensor(), expected["output"])
    for name, grad in zip(leaves, gradients, strict=True):
        assert isinstance(grad, DTensor)
        same(grad.full_tensor(), expected[f"grad_{name}"], msg=partial(_named, name))


def _with_terms(*inputs: Tensor, **options: Tensor) -> Tensor:
    return attnx.softmax_attention(*inputs, is_causal=True, softcap=3.0, **options)


def _key_weights(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return attnx.attention_key_weights(query, key, is_causal=True)[..., None] * value


def _packed(*inputs: Tensor) -> Tensor:
    ends = torch.tensor([0, 50, 128], dtype=torch.int32)
    rows = [x[0].transpose(0, 1) for x in inputs]
    softmax = attnx.softmax_attention_varlen(*rows, ends, ends, 78, 78, is_causal=True)
    sigmoid = attnx.sigmoid_attention_varlen(*rows, ends, ends, 78, 78)
    sparse, linear = attnx.sparse_linear_attention_varlen(*rows, ends, ends, 78, 78, critical=0.5)
    lists = attnx.BlockMask.from_dense(torch.ones(1, 1, 2, 2, dtype=torch.bool).tril(), (64, 64))
    listed = attnx.block_sparse_attention_varlen(*rows, ends, ends, 78, 78, lists)
    drawn = attnx.probabilistic_attention_varlen(*rows, ends, ends, 78, 78, seed=1, offset=2)
    softplus = sum(attnx.softplus_attention_varlen(*rows, ends, ends, 78, 78, sharpen=power) for power in (None, 3))
    centroids = torch.randn(rows[0].shape[1], 3, rows[0].shape[-1], generator=torch.Generator().manual_seed(3))
    routed = attnx.routing_attention_varlen(*rows, ends, ends, 78, 78, centroids, routing="argmax")
    return (softmax + sigmoid + sparse + linear + listed + drawn + softplus + routed).transpose(0, 1)[None]


def _disentangled(query: Tensor, key: Tensor, value: Tensor, pos_key: Tensor, pos_query: Tensor) -> Tensor:
    index = attnx.log_distance_buckets(query.shape[2], key.shape[2], span=8, max_distance=32)
    return attnx.disentangled_attention(query, key, value, index, pos_key=pos_key, pos_query=pos_query, is_causal=True)


def _delta_rule(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The state of some tokens goes into a call over them all."""
    log_decay, beta = -key[..., 0].abs(), query[..., 0].sigmoid()
    some = [x[:, :, :70] for x in (query, key / 4, value, log_decay, beta)]
    _, state = attnx.gated_delta_rule(*some, return_state=True)
    return attnx.gated_delta_rule(query, key / 4, value, log_decay, beta, initial_state=state)


def _linear(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    _, state = attnx.linear_attention(query[:, :, :70], key[:, :, :70], value[:, :, :70], return_state=True)
    return attnx.linear_attention(query, key, value, initial_state=state)


def _softplus(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return sum(attnx.softplus_attention(query, key, value, sharpen=power, is_causal=True) for power in (None, 3))


def _row_weights(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    weights = attnx.attention_row_weights(query, key, is_causal=True)
    statistics = attnx.attention_max_logits(query.detach(), key.detach()) + attnx.pointer_argmax(query, key)
    return weights @ value + statistics[..., None]


def _drawn_lists(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Lists are the same everywhere, as what they are drawn by is."""
    seed = torch.tensor(1)
    if isinstance(query, DTensor):
        seed = distribute_tensor(seed, query.device_mesh, [Replicate()] * query.device_mesh.ndim)
    mask = attnx.probabilistic_block_mask(*query.shape[:2], query.shape[2], key.shape[2], seed=seed, offset=2)
    return attnx.block_sparse_attention(query, key, value, mask)


def _labels(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Blocks from products of their own, and the nearest centroids."""
    products, length = (query @ key.mT).detach(), query.shape[2] * 64
    labels = torch.ops.attnx.sparse_linear_labels(products, length, length, 64, 64, 0.3, 0.3, "ceil", False, 0)
    nearest = attnx.nearest_centroids(query, torch.randn(4, 8, 16, generator=torch.Generator().manual_seed(3)))
    return labels.to(value.dtype) @ value + nearest[..., None] * (query + key).mean(-1, keepdim=True)


def _pooled(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Blocks of rows, and ranges that all sequences share."""
    means, deviations = torch.ops.attnx.block_statistics(query, 64)
    ranges = torch.tensor([[[0, 5], [3, 128]]], dtype=torch.int32)
    chosen = torch.ops.attnx.range_means(key.detach(), ranges)
    sums = (torch.ops.attnx.block_means(value, 64) * (means + deviations + chosen)).sum(2, keepdim=True)
    return sums * (query + key)


def _along_directions(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The derivatives along these directions have no gradient, so that only the rest of the sum has one."""
    q, k, v = (x.detach() for x in (query, key, value))
    _, _, of_softmax, _ = torch.ops.attnx.softmax_attention_jvp(q, k, v, q, None, v, None, True, -1, -1, 0)
    _, of_sigmoid = torch.ops.attnx.sigmoid_attention_jvp(q, k, v, q, k, v, "length", 0.0, None, True, -1, -1, 0)
    return attnx.softmax_attention(query, key, value, is_causal=True) + of_softmax + of_sigmoid


def _draws(*inputs: Tensor) -> Tensor:
    return attnx.probabilistic_attention(*inputs, seed=1, offset=2)


# What some functions take besides query, key and value.
OF_HEADS: dict[Callable[..., Any], dict[str, tuple[int, ...]]] = {
    _with_terms: {"sink": (4,), "alibi_slopes": (), "key_bias": (1, 4, 128), "key_mask": (4, 1, 128)},
    _disentangled: {"pos_key": (4, 16, 16), "pos_query": (4, 16, 16)},
}
ASKED: set[str] = set()  # the operators whose sharding DTensors asked for


def listen() -> None:
    """Has :data:`ASKED` fill."""
    own = attnx_distributed.sharding._shardings

    def shardings(of: Any, *args: Any) -> Any:
        ASKED.add(of.operator._schema.name.removeprefix("attnx::"))
        return own(of, *args)

    attnx_distributed.sharding._shardings = shardings


def check_operators_are_asked_for() -> None:
    """The checks before this one have called every operator that has a sharding.

    The others are those of caches, and those that compute numbers of lengths that a compiler does not know.
    """
    names = {name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if "attnx::" in name}
    of_lengths = {"probabilistic_keep", "probabilistic_blocks_per_row"}
    expected = {name for name in names if not name.startswith("staircase_")} - of_lengths
    assert expected == ASKED, f"asked for {sorted(ASKED - expected)} too, not for {sorted(expected - ASKED)}"


def check_context(dtype: torch.dtype = torch.float64) -> None:
    """A module that knows of no shards, within a context like torch's; buffers are whole again after it."""
    torch.manual_seed(0)
    module = attnx.nn.SigmoidAttention(32, 4, bias="trainable", bias_length=64, is_causal=True).to(dtype)
    x, grad_output = torch.randn(2, 2, 64, 32, dtype=dtype)
    alone = module(x)
    expected = torch.autograd.grad(alone, list(module.parameters()), grad_output)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    given, grad_shard = x.clone(), grad_output.clone()
    with attnx_distributed.context_parallel(mesh, buffers=[given, grad_shard], buffer_seq_dims=[1, 1]):
        assert given.shape[1] == 64 // dist.get_world_size()
        output = module(given)
        gradients = torch.autograd.grad(output, list(module.parameters()), grad_shard)
        whole = gather_sequence(output.detach(), 1, group=mesh, layout="zigzag")
        rows = given.unflatten(2, (4, 8)).transpose(1, 2)
        ulysses = partial(attnx_distributed.ulysses_attention, group=mesh, layout="zigzag")
        assert (
            ulysses(attnx.routing_attention, rows, rows, rows, routes=torch.randn(4 // mesh.size(), 4, 8)) is not None
        )
        with pytest.raises(NotImplementedError, match=r"^routing_attention: expected whole sequences"):
            attnx.routing_attention(rows, rows, rows, torch.randn(4, 4, 8))
        with pytest.raises(RuntimeError, match=r"^dropout_p: expected nothing within attnx.distributed.context_"):
            attnx.softmax_attention(rows, rows, rows, dropout_p=0.1)
    assert torch.equal(given, x)
    same = partial(torch.testing.assert_close, rtol=1e-11, atol=1e-12)
    same(whole, alone.detach())
    for grad, want in zip(gradients, expected, strict=True):
        dist.all_reduce(grad)
        same(grad, want)


def check_shared_cache() -> None:
    """Each process has a cache of other tokens, and all attend over the tokens of all."""
    rank = dist.get_rank()
    query = torch.randn(1, 4, 1, 32, generator=torch.Generator().manual_seed(0))
    tokens = torch.randn(2, 1, 2, 48, 32, generator=torch.Generator().manual_seed(rank + 1))
    cache = attnx.StaircaseCache(1, 2, 32, max_length=64, levels=(16, 8), window=32, group=32, dtype=torch.float32)
    cache.append(*tokens.unbind(0))
    output, logsumexp = attnx_distributed.all_merge_attention(*cache.attend(query, return_logsumexp=True))
    key, value = map(gather_sequence, cache.dequantize())
    expected = attnx.softmax_attention(query, key, value, return_logsumexp=True)
    torch.testing.assert_close((output, logsumexp), expected, rtol=1e-5, atol=1e-5)


def check_compiled() -> None:
    """Compiled code calls what is sent between its graphs."""
    x = torch.randn(1, 4, 16, 8, generator=torch.Generator().manual_seed(dist.get_rank()), dtype=torch.float64)
    ulysses = partial(attnx_distributed.ulysses_attention, attnx.softmax_attention)
    for attention in (*RINGS.values(), ulysses):

        def step(x: Tensor, attention: Callable[..., Tensor] = attention) -> Tensor:
            return attention(x.sin(), x, x.cos(), is_causal=True, layout="zigzag").square()

        results = []
        for call in (step, torch.compile(step, backend="aot_eager")):
            leaf = x.clone().requires_grad_()
            output = call(leaf)
            results.append((output.detach(), *torch.autograd.grad(output.sum(), leaf)))
        torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-13)


def check_autocast() -> None:
    """What travels has the dtype of autocast, and gradients that of their leaves."""
    x = torch.randn(1, 4, 16, 8, generator=torch.Generator().manual_seed(dist.get_rank()))
    for ring in RINGS.values():
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            output = ring(leaf, leaf, leaf)
        assert torch.equal(output, ring(*[x.to(torch.bfloat16)] * 3))
        assert torch.autograd.grad(output.sum(), leaf)[0].dtype == torch.float32


def check_debug() -> None:
    """Processes that do not agree on shapes learn of it, where they are asked to look."""
    x = torch.randn(1, 4, 8 if dist.get_rank() else 6, 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATTNX_DEBUG", "1")
        for call in (RINGS["softmax_attention"], partial(attnx_distributed.ulysses_attention, print)):
            with pytest.raises(RuntimeError, match=r"^shapes, .*: expected the same on all processes, got "):
                call(x, x, x)


PACKED = {"cu_seqlens_q": torch.tensor([0, 4]).int(), "cu_seqlens_k": torch.tensor([0, 4]).int()}
SIZES: dict[str, Any] = PACKED | {"max_seqlen_q": 4, "max_seqlen_k": 4}
CHUNKS = torch.tensor([[0, 30, 64]], dtype=torch.int32)
FUNCTIONS: dict[str, Callable[[Tensor], Any]] = {
    "softplus_attention": lambda x: attnx.softplus_attention(x, x, x),
    "softplus_attention_varlen": lambda x: attnx.softplus_attention_varlen(*[x[0]] * 3, **SIZES),
    "softmax_attention_varlen": lambda x: attnx.softmax_attention_varlen(*[x[0]] * 3, **SIZES),
    "sigmoid_attention_varlen": lambda x: attnx.sigmoid_attention_varlen(*[x[0]] * 3, **SIZES),
    "sparse_linear_attention_varlen": lambda x: attnx.sparse_linear_attention_varlen(*[x[0]] * 3, **SIZES),
    "sparse_linear_block_map_varlen": lambda x: attnx.sparse_linear_block_map_varlen(*[x[0]] * 2, **SIZES),
    "disentangled_attention": lambda x: attnx.disentangled_attention(
        x, x, x, torch.zeros(127, dtype=torch.int64), pos_key=torch.zeros(4, 1, 8)
    ),
    "gated_delta_rule": lambda x: attnx.gated_delta_rule(x, x, x, -x[..., 0].abs(), x[..., 0]),
    "linear_attention": lambda x: attnx.linear_attention(x, x, x),
    "softmax_attention": lambda x: attnx.softmax_attention(x, x, x),
    "sigmoid_attention": lambda x: attnx.sigmoid_attention(x, x, x),
    "block_sparse_attention": lambda x: attnx.block_sparse_attention(x, x, x, attnx.BlockMask.causal(64)),
    "probabilistic_attention": lambda x: attnx.probabilistic_attention(x, x, x),
    "sparse_linear_attention": lambda x: attnx.sparse_linear_attention(x, x, x),
    "sparse_linear_block_map": lambda x: attnx.sparse_linear_block_map(x, x),
    "routing_attention": lambda x: attnx.routing_attention(x, x, x, torch.randn(4, 4, 8)),
    "routing_attention_varlen": lambda x: attnx.routing_attention_varlen(
        *[x[0]] * 3, **SIZES, routes=torch.randn(64, 4, 8), routing="argmax"
    ),
    "route_varlen": lambda x: attnx.route_varlen(x[0], x[0], torch.randn(64, 4, 8), **SIZES, routing="argmax"),
    "route": lambda x: attnx.route(x, x, torch.randn(4, 4, 8)),
    "affine_attention": lambda x: attnx.affine_attention(x, x, x, x[..., 0]),
    "hierarchical_attention": lambda x: attnx.hierarchical_attention(x, x, x, CHUNKS),
    "hierarchical_routes": lambda x: attnx.hierarchical_routes(x, x, CHUNKS),
    "rectified_attention": lambda x: attnx.rectified_attention(x, x, x),
    "attention_key_weights": lambda x: attnx.attention_key_weights(x, x),
    "attention_row_weights": lambda x: attnx.attention_row_weights(x, x),
    "attention_max_logits": lambda x: attnx.attention_max_logits(x, x),
    "pointer_argmax": lambda x: attnx.pointer_argmax(x, x),
    "pointer_sample": lambda x: attnx.pointer_sample(x, x),
    "pointer_log_prob": lambda x: attnx.pointer_log_prob(x, x, torch.zeros(1, 4, 64, dtype=torch.int64)),
}


def check_context_of_torch() -> None:
    """torch's own context serves SDPA alone, and attnx would see shards for whole sequences."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    x = torch.randn(1, 4, 64, 8)
    with context_of_torch(mesh, buffers=[x.clone()], buffer_seq_dims=[2]):
        for name, call in FUNCTIONS.items():
            with pytest.raises(NotImplementedError, match=f"^{name}: expected whole sequences, got shards of torch's"):
                call(x)
    for call in FUNCTIONS.values():
        call(x)


def check_tensor_parallel(make: Callable[[], nn.Module]) -> None:
    """Projections whose heads processes share, as torch cuts them: the module counts heads by what is there."""
    torch.manual_seed(0)
    module = make().double().eval()
    plan = {name: ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj")} | {"out_proj": RowwiseParallel()}
    shared = parallelize_module(copy.deepcopy(module), init_device_mesh("cpu", (dist.get_world_size(),)), plan)
    x, grad_output = torch.randn(2, 2, 128, 32, dtype=torch.float64)
    results = []
    for block in (module, shared):
        leaf = x.clone().requires_grad_()
        output = block(leaf)
        grads = torch.autograd.grad(output, [leaf, block.q_proj.weight], grad_output)
        results.append([output.detach(), *(x.full_tensor() if isinstance(x, DTensor) else x for x in grads)])
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)


def check_refusals() -> None:
    """Bad input is refused by every process before anything is sent, so that none waits."""
    size, rank = dist.get_world_size(), dist.get_rank()
    x, odd = torch.randn(1, 4, 6, 8), torch.randn(1, 4, 5, 8)
    other = dist.new_group([0])
    ring, heads = RINGS["softmax_attention"], attnx_distributed.ulysses_attention
    refusals: list[tuple[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = [
        (f"length: expected a multiple of {size}, as layout='contiguous' ", shard_sequence, (odd[:, :, :1],), {}),
        (f"length: expected a multiple of {2 * size}, as layout='zigzag' ", shard_sequence, (x,), {"layout": "zigzag"}),
        ('layout: expected "contiguous" or "zigzag", got \'striped\'', shard_sequence, (x,), {"layout": "striped"}),
        ("dim: expected a dimension of a tensor of 4, got 4", shard_sequence, (x, 4), {}),
        ("x: expected a tensor that needs no gradient", gather_sequence, (torch.ones(1, requires_grad=True), 0), {}),
        ("query: expected two chunks of one length", ring, (odd, odd, odd), {"layout": "zigzag"}),
        ("query: expected two chunks of one length", heads, (ring, odd, odd, odd), {"layout": "zigzag"}),
        ("group: expected None, a ProcessGroup or a DeviceMesh", ring, (x, x, x), {"group": 3}),
        ("key: expected torch.float32 on cpu like query", ring, (x, x.double(), x), {}),
        ("key: expected a number of heads that divides the 4 of query", ring, (x, x[:, :3], x[:, :3]), {}),
        ("key: expected (1, kv_heads, length_k, 8)", ring, (x, x[..., :4], x), {}),
        ("value: expected (1, 4, 6, value_dim)", ring, (x, x, odd), {}),
        ("query: expected (batch, heads, length, head_dim)", ring, (x[0], x, x), {}),
        ("sink: expected torch.float32 of shape () or (4,) on cpu", ring, (x, x, x), {"sink": torch.ones(3)}),
        ("alibi_slopes: expected", ring, (x, x, x), {"alibi_slopes": torch.ones(3)}),
        ("key_bias: expected (1 or 1, 4 or 1, 6)", ring, (x, x, x), {"key_bias": torch.ones(1, 1, 5)}),
        ("window: expected -1 (no bound) or more", ring, (x, x, x), {"window": (-3, 1)}),
        ("position_offset: expected at most", ring, (x, x, x), {"position_offset": 2**29}),
        ("window: expected", ring, (x, x, x), {"window": 3}),
        ("is_causal: expected True or False", ring, (x, x, x), {"is_causal": 1}),
        (f"query: expected heads in a multiple of the number of processes, {size}", heads, (ring, x[:, :1], x, x), {}),
        ("key: expected heads in a multiple of the number of processes", heads, (ring, x, x[:, :3], x[:, :3]), {}),
        ("attention: expected a function that returns tensors of shape", heads, (lambda q, k, v: 3, x, x, x), {}),
        ("x: expected heads in a multiple of", attnx_distributed.local_heads, (torch.ones(5),), {}),
    ]
    blocks, sparse = torch.randn(1, 4, 128, 8), attnx_distributed.ring_sparse_linear_attention
    few = blocks[:, :, :100]
    refusals += [
        ("query: expected a length in a multiple of 64, as block_size=(64, 64) ", sparse, (few, blocks, blocks), {}),
        ("key: expected a length in a multiple of 64, as block_size=(64, 64) ", sparse, (blocks, few, few), {}),
        ("query: expected a length in a multiple of 128", sparse, (blocks[:, :, :64],) * 3, {"block_size": (128, 64)}),
        ("key: expected the length of query", sparse, (blocks[:, :, :64], blocks, blocks), {"is_causal": True}),
        ("critical: expected a share", sparse, (blocks,) * 3, {"critical": 2.0}),
        ("linear_scope: expected marginal, noncritical or all", sparse, (blocks,) * 3, {"linear_scope": "none"}),
        ("feature_map: expected softmax, elu or relu", sparse, (blocks,) * 3, {"feature_map": "exp"}),
        ("rounding: expected ceil or floor", sparse, (blocks,) * 3, {"rounding": "nearest"}),
        ("block_size: expected", sparse, (blocks,) * 3, {"block_size": 64}),
        ("is_causal: expected True or False", sparse, (blocks,) * 3, {"is_causal": 1}),
        ("value: expected (1, 4, 128, value_dim)", sparse, (blocks, blocks, few), {}),
    ]
    replicated = distribute_tensor(x, init_device_mesh("cpu", (size,)))
    refusals.append(("query: expected the shard of this process, as", ring, (replicated, x, x), {}))
    if rank:
        refusals.append(("group: expected one that this process is of", ring, (x, x, x), {"group": other}))
    for message, function, args, options in refusals:
        with pytest.raises(RuntimeError, match=re.escape(message)):
            function(*args, **options)


def expect_same(
    alone: Callable[..., Tensor],
    shared: Callable[..., Tensor],
    inputs: dict[str, Tensor],
    grad_output: Tensor,
    tolerance: float = 1e-12,
    **options: Any,
) -> None:
    expected = forward_backward(alone, inputs, grad_output, **options)
    for name, x in forward_backward(shared, inputs, grad_output, **options).items():
        assert x.isfinite().all() or name == "output", name
        torch.testing.assert_close(x, expected[name], rtol=tolerance, atol=tolerance, msg=partial(_named, name))


def _named(name: str, message: str) -> str:
    return f"{name}: {message}"


BANDS: dict[str, dict[str, Any]] = {
    "all": {},
    "causal": {"is_causal": True},
    "window": {"window": (7, 4)},
    "causal_window": {"is_causal": True, "window": (9, None)},
    "offset": {"is_causal": True, "position_offset": -6},
    "ahead": {"is_causal": True, "position_offset": 11},
}
PARAMETERS = {"softmax_attention": ("alibi_slopes", "sink"), "sigmoid_attention": ("alibi_slopes", "bias")}


def checks_for(size: int) -> dict[str, Callable[[], None]]:
    checks: dict[str, Callable[[], None]] = {}
    for operator, layout in itertools.product(RINGS, LAYOUTS):
        for band, options in BANDS.items():
            checks[f"{operator}-{layout}-{band}"] = partial(check_ring, operator, torch.float32, layout, (), **options)
            terms = partial(check_terms, operator, layout, softcap=2.0, **options)
            checks[f"{operator}-{layout}-{band}-terms"] = terms
        for dtype in (torch.bfloat16, torch.float64):
            name = f"{operator}-{layout}-causal-{str(dtype).removeprefix('torch.')}"
            checks[name] = partial(check_ring, operator, dtype, layout, (), is_causal=True)
        for parameter in PARAMETERS[operator]:
            name = f"{operator}-{layout}-{parameter}"
            checks[name] = partial(check_ring, operator, torch.float32, layout, (parameter,), window=(20, 4))
    for layout, band in itertools.product(LAYOUTS, ("all", "causal_window", "offset")):
        row = partial(check_ring, "sigmoid_attention", torch.float32, layout, (), bias="row", **BANDS[band])
        checks[f"sigmoid_attention-{layout}-{band}-row"] = row
    long = Shape(256, 256, head_dim=16, batch=2, heads=4, kv_heads=4)
    for layout in LAYOUTS:
        for attention in (_softmax, _sigmoid, _block_sparse, _sparse_linear, _routing, _probabilistic):
            name = f"heads-{layout}-{attention.__name__[1:]}"
            checks[name] = partial(check_heads, layout, attention, SHAPE if attention in (_softmax, _sigmoid) else long)
        checks[f"logsumexp-{layout}"] = partial(check_logsumexp, layout)
    for name, options in SPARSE_LINEAR.items():
        for is_causal in (False, True):
            key = f"sparse_linear-{'causal' if is_causal else 'all'}-{name}"
            checks[key] = partial(check_sparse_linear, is_causal, **options)
    for dtype in (torch.float32, torch.bfloat16):
        name = f"sparse_linear-{str(dtype).removeprefix('torch.')}"
        checks[name] = partial(check_sparse_linear, False, dtype=dtype, critical=0.3, negligible=0.3)
    across = Shape(512, 1024, head_dim=16, batch=2, heads=4, kv_heads=1)
    checks["sparse_linear-lengths"] = partial(check_sparse_linear, False, across, critical=0.3, smooth_k=True)
    apart: list[tuple[Placement, Placement]] = [(Shard(0), Replicate()), (Shard(0), Shard(1)), (Replicate(), Shard(1))]
    kept = (_with_terms, _sigmoid, _block_sparse, _sparse_linear, _routing_of_all, _key_weights, _row_weights, _draws)
    kept = (*kept, _along_directions, _delta_rule, _linear, _softplus, _disentangled, _drawn_lists, _labels, _pooled)
    for attention, placements in itertools.product(kept, apart):
        for kv_heads in (4, 1) if attention in (_with_terms, _sparse_linear) else (4,):
            shape = Shape(128, 128, head_dim=16, batch=4, heads=4, kv_heads=kv_heads)
            name = f"sharding-{attention.__name__[1:]}-{kv_heads}-{'-'.join(map(str, placements))}"
            checks[name] = partial(check_sharding, attention, shape, placements)
    for kv_heads in (4, 1):
        shape = Shape(128, 128, head_dim=16, heads=4, kv_heads=kv_heads)
        checks[f"sharding-packed-{kv_heads}"] = partial(check_sharding, _packed, shape, (Replicate(), Shard(1)))
    for name in ("sigmoid", "sparse_linear", "probabilistic"):
        make = MODULES[name] if name != "sigmoid" else lambda: attnx.nn.SigmoidAttention(32, 4, is_causal=True)
        checks[f"tensor_parallel-{name}"] = partial(check_tensor_parallel, make)
    # torch's DTensors cannot add the gradient of index_select, which a causal affine module has, to another.
    sharded = MODULES | {"affine": lambda: attnx.nn.AffineScaledAttention(32, 4)}
    for name in ("routing", "affine", "disentangled", "sparse_linear"):
        checks[f"sharded_training-{name}"] = partial(check_sharded_training, sharded[name])
    for name, make in MODULES.items():
        checks[f"data_parallel-{name}"] = partial(check_module, make, DistributedDataParallel)
        checks[f"fully_sharded-{name}"] = partial(check_module, make, fully_sharded)
    if size == 2:  # compilers take their time
        checks["compiled"] = check_compiled
    return checks | {
        "refusals": check_refusals,
        "autocast": check_autocast,
        "shared_cache": check_shared_cache,
        "debug": check_debug,
        "context": check_context,
        "context_of_torch": check_context_of_torch,
        "sharding-every_operator": check_operators_are_asked_for,
    }


def main(rank: int, size: int, folder: Path) -> None:
    """Runs the checks as the process of a rank, and writes what failed: the name of a check and its traceback.

    Checks after one that failed do not run, because the processes may then wait for each other.
    """
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=60),
    )
    listen()
    failures: dict[str, str] = {}
    for name, run in checks_for(size).items():
        if failures:
            failures[name] = f"did not run, as {next(iter(failures))} failed"
            continue
        try:
            run()
        except Exception:
            failures[name] = traceback.format_exc()
    (folder / f"{rank}.json").write_text(json.dumps(failures))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
