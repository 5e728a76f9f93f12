"""torch.utils.flop_counter knows every operator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import attnx
from calls import differentiable_calls, run_the_others
from cases import Shape, pack, random_inputs
from routing_cases import random_centroids
from staircase_cases import cache_of
from test_operators import NAMES

pytestmark = pytest.mark.backends("cpu")

CPU = torch.device("cpu")
SHAPE = Shape(batch=2, heads=4, kv_heads=2, length_q=128, length_k=192, head_dim=16, value_dim=8)
INPUTS = random_inputs(SHAPE, torch.float32, CPU)[0]
DIFFERENTIABLE = list(differentiable_calls(torch.float32, CPU))
HEADS, PAIRS, FORWARD, BACKWARD = 8, 128 * 192, 2 * (16 + 8), 2 * (3 * 16 + 2 * 8)


def count(function: Any, *args: Any, backward: bool = False, **options: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        results = function(*args, **options)
        if backward:
            (results[0] if isinstance(results, tuple) else results).sum().backward()
    return counter.get_total_flops()


def test_all_have_a_formula(backend: object) -> None:
    counter = FlopCounterMode(display=False)
    with counter:
        for function, inputs in differentiable_calls(torch.float32, CPU).values():
            function(**{name: x.requires_grad_() for name, x in inputs.items()}).sum().backward()
        run_the_others(torch.float32, CPU)
    counted = {str(op).removeprefix("attnx.") for op in counter.get_flop_counts()["Global"]}
    assert set(NAMES) <= counted


def test_like_pytorch(backend: object) -> None:
    inputs = [x.detach().requires_grad_() for x in INPUTS.values()]
    shapes = [tuple(x.shape) for x in inputs]
    expected = sdpa_flop_count(*shapes) + sdpa_backward_flop_count(SHAPE.output(), *shapes)
    assert expected == HEADS * PAIRS * (FORWARD + BACKWARD)
    assert count(attnx.softmax_attention, *inputs, backward=True) == expected


def test_what_is_not_visited_does_not_count(backend: object) -> None:
    assert count(attnx.sigmoid_attention, **INPUTS, window=(9, 10)) == HEADS * 128 * 20 * FORWARD
    mask = attnx.BlockMask.from_dense(torch.tensor([[[[True, False, True], [False, True, False]]]]))
    assert count(attnx.block_sparse_attention, **INPUTS, block_mask=mask) == HEADS * 3 * 64 * 64 * FORWARD
    drawn = attnx.probabilistic_block_mask(2, 4, 128, 192, seed=1, offset=0)
    visited = int(drawn.kv_num_blocks.sum()) * 64 * 64
    assert count(attnx.probabilistic_attention, **INPUTS, seed=1, offset=0) == visited * FORWARD
    block_map = attnx.sparse_linear_block_map(INPUTS["query"], INPUTS["key"], critical=0.5)
    critical, linear = int((block_map.labels == 1).sum()) * 64 * 64, 2 * HEADS * (128 + 192) * 16 * 8
    assert count(attnx.sparse_linear_attention, **INPUTS, block_map=block_map) == critical * FORWARD + linear
    routes = attnx.route(INPUTS["query"], INPUTS["key"], random_centroids(4, 3, 16), cluster_size=10)
    assert count(attnx.routing_attention, **INPUTS, routes=routes) == HEADS * 3 * 10 * 10 * FORWARD


def test_lengths_of_packed_sequences_and_caches(backend: object) -> None:
    packed, _, sizes = pack(([3, 0, 9], [4, 2, 9]), torch.float32, CPU)
    assert count(attnx.softmax_attention_varlen, **packed, **sizes) == 4 * (3 * 4 + 9 * 9) * 2 * (16 + 24)
    x = torch.randn(2, 2, 50, 32)
    cache = cache_of(x, x, window=32)
    assert count(cache.attend, torch.randn(2, 4, 1, 32)) == 2 * 4 * 50 * 2 * (32 + 32)


@pytest.mark.parametrize("name", [name for name in DIFFERENTIABLE if not name.startswith("move_")])
def test_traced_calls_count_the_longest(name: str, backend: object) -> None:
    """Fake tensors have no values to read."""
    calls = differentiable_calls(torch.float32, CPU)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        inputs = {k: mode.from_tensor(x) for k, x in calls[name].inputs.items()}
        assert count(calls[name].function, **inputs) > 0
