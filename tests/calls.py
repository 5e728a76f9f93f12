"""A small call of every function, which together run every operator, and what operators were called with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import pytest
import torch
from torch import Tensor

import attnx
from attnx import _capability
from attnx.routing import move_centroids_in_backward
from cases import Shape, pack, random_inputs, random_parameter
from delta_rule_cases import DeltaShape, delta_inputs, with_state
from routing_cases import random_centroids, random_memory, with_memory

T = TypeVar("T")
SHAPE = Shape(batch=2, heads=4, kv_heads=2, length_q=70, length_k=70, head_dim=32)


class Call(NamedTuple):
    """``function(**inputs)`` gives the output; all inputs have a gradient."""

    function: Callable[..., Tensor]
    inputs: dict[str, Tensor]


def differentiable_calls(dtype: torch.dtype, device: torch.device) -> dict[str, Call]:
    """Each function with a gradient has a call, by its name, with all of its arguments that may have one."""
    inputs, _ = random_inputs(SHAPE, dtype, device)
    packed, _, sizes = pack(([3, 0, 70], [4, 2, 70]), dtype, device, head_dim=32, value_dim=32)
    slopes, bias = ({name: random_parameter((4,), dtype, device)} for name in ("alibi_slopes", "bias"))
    sink = {"sink": random_parameter((4,), dtype, device)}
    centroids = random_centroids(4, 3, 32).to(device)
    mask = attnx.BlockMask.from_dense(torch.tensor([[[[True, False], [True, True]]]], device=device))

    def call(name: str, inputs: dict[str, Tensor], *more: dict[str, Tensor], **options: Any) -> Call:
        function = getattr(attnx, name)

        def output(**inputs: Tensor) -> Tensor:
            results = function(**inputs, **options)
            return torch.cat(results, -1) if isinstance(results, tuple) else results

        return Call(output, {name: x for group in (inputs, *more) for name, x in group.items()})

    def routed(**inputs: Tensor) -> Tensor:
        return with_memory(attnx.routing_attention)(**inputs, routes=centroids, cluster_size=30, is_causal=True)

    def moving(query: Tensor) -> Tensor:
        moved, counts = centroids.clone(), torch.ones(4, 3, device=device)
        return move_centroids_in_backward(query, inputs["key"].detach(), moved, counts, decay=0.9, group=None)

    def averaging(x: Tensor) -> Tensor:
        return torch.ops.attnx.move_average_in_backward(
            x, torch.zeros(4, device=device), x.detach().mean((0, 2, 3)), 0.9
        )

    operands = {"query": inputs["query"], "key": inputs["key"]}
    row_weights = {"row_weights": torch.rand(2, 4, 70, device=device).to(random_parameter((1,), dtype, device).dtype)}

    def disentangled(**inputs: Tensor) -> Tensor:
        index = attnx.log_distance_buckets(70, 70, span=4, max_distance=32, device=device)
        return attnx.disentangled_attention(**inputs, index=index, is_causal=True)

    calls = {
        "attention_key_weights": call("attention_key_weights", operands, row_weights, is_causal=True),
        "attention_row_weights": call("attention_row_weights", operands, rows=range(60, 70)),
        "sigmoid_attention": call("sigmoid_attention", inputs, slopes, bias, is_causal=True),
        "softmax_attention": call("softmax_attention", inputs, slopes, sink, is_causal=True),
        "sigmoid_attention_varlen": call("sigmoid_attention_varlen", packed, slopes, bias, **sizes),
        "softmax_attention_varlen": call("softmax_attention_varlen", packed, slopes, sink, **sizes),
        "block_sparse_attention": call("block_sparse_attention", inputs, sink, block_mask=mask),
        "block_sparse_attention_varlen": call("block_sparse_attention_varlen", packed, sink, block_mask=mask, **sizes),
        "probabilistic_attention": call("probabilistic_attention", inputs, seed=3, offset=0),
        "probabilistic_attention_varlen": call("probabilistic_attention_varlen", packed, seed=3, offset=0, **sizes),
        "sparse_linear_attention": call("sparse_linear_attention", inputs, is_causal=True),
        "sparse_linear_attention_varlen": call("sparse_linear_attention_varlen", packed, **sizes),
        "routing_attention": Call(routed, inputs | random_memory(2, 3, 32, 32, dtype)),
        "routing_attention_varlen": call(
            "routing_attention_varlen", packed, routes=centroids, cluster_size=30, shared_qk=False, **sizes
        ),
        "move_centroids_in_backward": Call(moving, {"query": inputs["query"]}),
        "move_average_in_backward": Call(averaging, {"x": inputs["query"]}),
    }
    if has_kernel("softplus_attention", device):
        for name, options in {"softplus_attention": {}, "sharpened_softplus_attention": {"sharpen": 3}}.items():
            calls[name] = call("softplus_attention", inputs, is_causal=True, **options)
            calls[f"{name}_varlen"] = call("softplus_attention_varlen", packed, **sizes, **options)
    if has_kernel("disentangled_attention", device):
        positions = {name: random_positions((4, 8, 32), dtype, device) for name in ("pos_key", "pos_query")}
        calls["disentangled_attention"] = Call(disentangled, inputs | positions)
    if has_kernel("linear_attention", device):
        state = {"initial_state": random_parameter((2, 2, 561, 33), dtype, device)}
        calls["linear_attention"] = call("linear_attention", inputs, state)
    if has_kernel("gated_delta_rule", device):
        shape = DeltaShape(heads=2, value_heads=4, length=70, key_dim=32, value_dim=32)
        calls["gated_delta_rule"] = Call(with_state(attnx.gated_delta_rule), delta_inputs(shape, dtype, device))
    return calls


def has_kernel(operator: str, device: torch.device) -> bool:
    backend = _capability.backend_of(device)
    return any((row.operator, row.backend) == (operator, backend) for row in _capability.table())


def of_operator(name: str, of_all: Mapping[str, T]) -> T:
    """What is said of an operator, or of its backward; a test is skipped whose operator has no kernel on the device."""
    if name not in of_all:
        pytest.skip(f"no kernel for {name} on this device")
    return of_all[name]


def random_positions(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(device, dtype)


def run_the_others(dtype: torch.dtype, device: torch.device) -> None:
    """Calls what has no gradient: lists, clusters, caches."""
    inputs, _ = random_inputs(SHAPE, dtype, device)
    query, key, value = inputs.values()
    centroids, counts = random_centroids(4, 3, 32).to(device), torch.ones(4, 3, device=device)
    for function in (attnx.softmax_attention, attnx.sigmoid_attention):
        if has_kernel(f"{function.__name__}_jvp", device):
            torch.func.jvp(function, (query, key, value), (query, key, value))
    attnx.attention_max_logits(query, key)
    attnx.pointer_argmax(query, key)
    attnx.pointer_sample(query, key, seed=1, offset=2)
    attnx.probabilistic_block_mask(2, 4, 70, 70, density=0.5, mode="topm", seed=3, offset=0, device=device)
    products = torch.randn(2, 4, 2, 2, device=device)
    torch.ops.attnx.sparse_linear_labels(products, 70, 70, 64, 64, 0.05, 0.1, "ceil", True, 0)
    attnx.nearest_centroids(query, centroids)
    torch.ops.attnx.range_means(query, torch.tensor([[[0, 3], [2, 70]]], dtype=torch.int32, device=device))
    torch.ops.attnx.block_means(query, 64)
    torch.ops.attnx.block_statistics(query, 64)
    attnx.update_centroids_(centroids, counts, query, key, decay=0.9)
    cache = attnx.StaircaseCache(2, 2, 32, 200, window=32, dtype=dtype, device=device)
    cache.append(key, value)
    cache.crop(60)
    cache.reorder(torch.tensor([1, 0]))
    cache.dequantize()
    cache.attend(query)


class RecordedCalls(torch.utils._python_dispatch.TorchDispatchMode):
    """Keeps the arguments of every attnx operator that runs, as they were before it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[torch._ops.OpOverload, tuple[object, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if op.namespace == "attnx":
            differentiable = not op._opname.endswith("_backward")
            self.seen.append((op, tuple(_leaf(x, differentiable) for x in args), kwargs))
        return op(*args, **kwargs)


def _leaf(x: object, requires_grad: bool) -> object:
    if not isinstance(x, Tensor):
        return x
    return x.detach().clone().requires_grad_(requires_grad and x.is_floating_point())


def every_operator(dtype: torch.dtype, device: torch.device) -> dict[str, tuple[Any, ...]]:
    """The arguments of one call of each operator, by the operator's name; none of them requires grad."""
    with RecordedCalls() as calls:
        for function, inputs in differentiable_calls(dtype, device).values():
            function(**{name: x.requires_grad_() for name, x in inputs.items()}).float().sum().backward()
        run_the_others(dtype, device)
    return {op._opname: tuple(x.detach() if isinstance(x, Tensor) else x for x in args) for op, args, _ in calls.seen}
