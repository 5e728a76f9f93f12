"""Routing attention: its clusters, its definition in float64, its gradients, and what the centroids follow."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import attnx
from attnx import reference
from cases import DTYPES, Shape, random_inputs
from compare import forward_backward
from memory import LAYOUTS
from routing_cases import check, random_centroids, random_memory, with_memory

on_cpu = pytest.mark.backends("cpu")
on_host = pytest.mark.backends("cpu", "emulated")

SHAPE = Shape(length_q=96, length_k=96, head_dim=16, value_dim=24, batch=2, heads=4, kv_heads=2)
CLUSTERS = 6


def routes_of(inputs: dict[str, Tensor], clusters: int = CLUSTERS, **options: Any) -> attnx.Routes:
    query = inputs["query"]
    return attnx.route(query, inputs["key"], random_centroids(query.shape[1], clusters, query.shape[3]), **options)


def members(routes: attnx.Routes) -> list[list[int]]:
    """The queries of each cluster of each head, one after the other."""
    return [
        x[a:b].tolist()
        for x, offsets in zip(routes.query_indices.flatten(0, 1), routes.query_offsets.flatten(0, 1), strict=True)
        for a, b in itertools.pairwise(offsets)
    ]


# Clusters ------------------------------------------------------------------------------------------------------------

ROUTINGS: dict[str, dict[str, Any]] = {
    "topk": {},
    "topk_shared": {"is_causal": True},
    "topk_small": {"cluster_size": 5},
    "topk_all": {"cluster_size": 1000},
    "argmax": {"routing": "argmax"},
    "argmax_shared": {"routing": "argmax", "shared_qk": True},
}


@on_cpu
@pytest.mark.parametrize("options", ROUTINGS.values(), ids=ROUTINGS)
@pytest.mark.parametrize("clusters", [1, 6, 48])
def test_routes_are_the_reference_s(
    clusters: int, options: dict[str, Any], instruction_set: str | None, backend: Any
) -> None:
    """In float64, whose products tell any two rows apart."""
    inputs, _ = random_inputs(SHAPE, torch.float64, backend.device)
    centroids = random_centroids(4, clusters, 16)
    actual = attnx.route(inputs["query"], inputs["key"], centroids, **options)
    expected = reference.route(inputs["query"], inputs["key"], centroids, **options)
    for x, y in zip(actual[:4], expected[:4], strict=True):
        assert torch.equal(x, y)


@on_host
@pytest.mark.parametrize("routing", ["topk", "argmax"])
def test_long_lists_have_the_largest_products(routing: Any, threads: int, dtype: torch.dtype, backend: Any) -> None:
    """Many tokens for each centroid, so that candidates are cut again and again; up to the rounding of float32."""
    inputs, _ = random_inputs(Shape(length_q=5000, length_k=100, heads=1, head_dim=24), dtype, backend.device)
    inputs["query"][0, 0, 3000] = math.nan
    centroids = random_centroids(1, 20, 24)
    options = {} if routing == "argmax" else {"cluster_size": 40}
    routes = attnx.route(inputs["query"], inputs["key"], centroids, routing=routing, **options)
    products = reference._routing_products(inputs["query"], centroids)[0, 0].nan_to_num(nan=-math.inf)
    lists = members(routes)
    if routing == "topk":
        assert all(len(tokens) == 40 for tokens in lists)
        for tokens, x in zip(lists, products, strict=True):
            assert x[tokens].min() > x.sort().values[-40] - 1e-4
    else:
        assert sorted(t for tokens in lists for t in tokens) == [t for t in range(5000) if t != 3000]
        for tokens, x in zip(lists, products, strict=True):
            assert (x[tokens] > products.max(0).values[tokens] - 1e-4).all()
    assert all(tokens == sorted(set(tokens)) for tokens in lists)


@on_host
def test_ties_go_to_the_lower_index(dtype: torch.dtype, device: torch.device) -> None:
    rows = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    query = rows.repeat(40, 1)[None, None].to(device, dtype)  # row i again at i + 5, i + 10, ...
    centroids = attnx.reference._normalised(rows).float()[None]
    routes = attnx.route(query, query, centroids, cluster_size=7)
    assert members(routes) == [[i + 5 * n for n in range(7)] for i in range(5)]
    same = centroids[:, :1].expand(1, 40, -1).contiguous()  # more than a vector has lanes
    routes = attnx.route(query, query, same, routing="argmax")
    assert members(routes) == [list(range(200))] + [[]] * 39


@on_host
def test_a_constant_token_lies_at_the_origin(dtype: torch.dtype, device: torch.device) -> None:
    """Its variance is 0, and all its products are."""
    query = torch.full((1, 1, 6, 8), 2.0, dtype=dtype, device=device)
    routes = attnx.route(query, query, random_centroids(1, 3, 8), routing="argmax")
    assert members(routes) == [list(range(6)), [], []]


@on_host
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("routing", ["topk", "argmax"])
def test_a_token_that_is_not_finite_is_in_no_cluster(
    routing: Any, bad: float, dtype: torch.dtype, backend: Any
) -> None:
    inputs, _ = random_inputs(SHAPE, dtype, backend.device)
    inputs["query"][:, :, [0, 17, 95], 3] = bad
    size = {"cluster_size": 96} if routing == "topk" else {}
    routes = routes_of(inputs, routing=routing, shared_qk=True, **size)
    assert not any({0, 17, 95} & set(tokens) for tokens in members(routes))
    assert routes.query_offsets[..., -1].unique().tolist() == [93 * (CLUSTERS if routing == "topk" else 1)]
    output = attnx.routing_attention(**inputs, routes=routes)
    assert output.isfinite().all()
    assert not output[:, :, [0, 17, 95]].any()
    centroids = random_centroids(4, 2, 16)
    centroids[:, 1] = math.nan
    assert [len(x) for x in members(attnx.route(inputs["query"], inputs["key"], centroids, cluster_size=5))] == [
        5,
        0,
    ] * 8


# Attention -----------------------------------------------------------------------------------------------------------


CALLS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"is_causal": True},
    "causal_apart": {"is_causal": True, "shared_qk": False},
    "argmax_causal": {"routing": "argmax", "is_causal": True},
    "memory": {"is_causal": True, "memory": 3},
    "memory_apart": {"memory": 2},
    "overlapping": {"cluster_size": 40},
    "sigmoid": {"score": "sigmoid"},
    "sigmoid_causal_memory": {"score": "sigmoid", "is_causal": True, "memory": 1},
    "sigmoid_bias": {"score": "sigmoid", "bias": -2.0, "shared_qk": True},
    "normalised": {"normalize_qk": True, "scale": 0.3},
}
_OF_ROUTES = ("cluster_size", "clusters", "routing", "shared_qk")


def prepare(call: dict[str, Any], shape: Shape, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor, dict[str, Any]]:
    """Inputs, a gradient of the output, and the options of the attention."""
    inputs, grad_output = random_inputs(shape, dtype, torch.device("cpu"))
    of_routes = {name: call[name] for name in _OF_ROUTES if name in call}
    routes = routes_of(inputs, is_causal=call.get("is_causal", False), **of_routes)
    if memory := call.get("memory", 0):
        kv_heads, value_dim = shape.key()[1], shape.value()[3]
        inputs |= random_memory(kv_heads, memory, shape.head_dim, value_dim, dtype)
    options = {name: x for name, x in call.items() if name not in (*_OF_ROUTES, "memory")}
    return inputs, grad_output, {"routes": routes, **options}


@on_host
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_against_float64(call: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
    inputs, grad_output, options = prepare(call, SHAPE, dtype)
    check(inputs, grad_output, **options)


SHAPES = [
    Shape(length_q=60, length_k=120, head_dim=40),
    Shape(length_q=120, length_k=60, head_dim=3, value_dim=130),
    Shape(length_q=600, length_k=600, head_dim=64, heads=1),
    Shape(length_q=6, length_k=6, head_dim=1, value_dim=1),
]


@on_host
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: Shape, is_causal: bool, instruction_set: str | None, dtype: torch.dtype, backend: Any) -> None:
    inputs, grad_output, options = prepare({"is_causal": is_causal}, shape, dtype)
    check(inputs, grad_output, **options)


@on_cpu
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_one_cluster_of_all_tokens_is_dense_attention(
    score: Any, is_causal: bool, dtype: torch.dtype, device: torch.device
) -> None:
    inputs, grad_output = random_inputs(SHAPE, dtype, device)
    bias = {"bias": "row"} if score == "sigmoid" and is_causal else {}
    dense = getattr(attnx, f"{score}_attention")
    expected = forward_backward(dense, inputs, grad_output, is_causal=is_causal, **bias)
    for routing in ("topk", "argmax"):
        options = {"routes": random_centroids(4, 1, 16), "routing": routing, "is_causal": is_causal, "score": score}
        for name, x in forward_backward(attnx.routing_attention, inputs, grad_output, **options).items():
            torch.testing.assert_close(x, expected[name], msg=lambda text, name=name: f"{name}: {text}")


@on_host
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("shared_qk", [False, True], ids=["apart", "shared"])
def test_argmax_is_causal(score: Any, shared_qk: bool, dtype: torch.dtype, device: torch.device) -> None:
    """Later tokens change no earlier output, not by a bit; and no earlier gradient, where later outputs have none."""
    inputs, grad_output = random_inputs(SHAPE, dtype, device)
    changed = {name: torch.cat((x[:, :, :50], -x[:, :, 50:].flip(2)), 2) for name, x in inputs.items()}
    grad_output[:, :, 50:] = 0
    options = {"routes": random_centroids(4, CLUSTERS, 16), "is_causal": True, "shared_qk": shared_qk, "score": score}
    before, after = (
        forward_backward(attnx.routing_attention, x, grad_output, routing="argmax", **options)
        for x in (inputs, changed)
    )
    for name in before:
        assert torch.equal(before[name][:, :, :50], after[name][:, :, :50]), name
    # The balanced form takes no later key, but which tokens are in a cluster depends on all of them.
    before, after = (attnx.routing_attention(**x, routing="topk", **options) for x in (inputs, changed))
    assert not torch.equal(before[:, :, :50], after[:, :, :50])


@on_host
@pytest.mark.needs("hidden_nonfinite")
def test_given_routes_topk_is_causal(dtype: torch.dtype, device: torch.device) -> None:
    inputs, _ = random_inputs(SHAPE, dtype, device)
    routes = routes_of(inputs, is_causal=True)
    before = attnx.routing_attention(**inputs, routes=routes, is_causal=True)
    for x in inputs.values():
        x[:, :, 50:] = 7
    inputs["key"][:, :, 70:] = math.nan
    inputs["value"][:, :, 70:] = math.nan
    after = attnx.routing_attention(**inputs, routes=routes, is_causal=True)
    assert torch.equal(before[:, :, :50], after[:, :, :50])
    assert after[:, :, :70].isfinite().all()


@on_cpu
@pytest.mark.parametrize("call", ["causal", "memory", "sigmoid", "argmax_causal", "overlapping", "normalised"])
def test_gradcheck(call: str, device: torch.device) -> None:
    shape = Shape(length_q=12, length_k=12, head_dim=5, value_dim=3, heads=2, kv_heads=1)
    inputs, _, options = prepare(CALLS[call], shape, torch.float64)
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}

    def function(*tensors: Tensor) -> Tensor:
        return with_memory(attnx.routing_attention)(**dict(zip(leaves, tensors, strict=True)), **options)

    assert torch.autograd.gradcheck(function, tuple(leaves.values()))


@on_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_with_any_number_of_threads(dtype: torch.dtype, device: torch.device) -> None:
    inputs, grad_output, options = prepare(CALLS["memory"], Shape(length_q=600, length_k=600, head_dim=16), dtype)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(forward_backward(with_memory(attnx.routing_attention), inputs, grad_output, **options))
    torch.set_num_threads(1)
    for other in results[1:]:
        for name, x in results[0].items():
            assert torch.equal(x, other[name]), name


# The CPU's backward cuts clusters of these calls into blocks.
LONG_CALLS: dict[str, dict[str, Any]] = {
    "causal": {"routing": "argmax", "clusters": 2, "is_causal": True, "memory": 3},
    "apart": {"routing": "argmax", "clusters": 2, "is_causal": True, "shared_qk": False},
    "sigmoid": {"routing": "argmax", "clusters": 1, "score": "sigmoid", "bias": -7.0},
}


@on_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("call", LONG_CALLS.values(), ids=LONG_CALLS)
def test_long_clusters(call: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
    """They are right, and the same bits with any number of threads."""
    shape = Shape(length_q=3000, length_k=3000, head_dim=16, heads=1)
    inputs, grad_output, options = prepare(call, shape, dtype)
    expected = check(inputs, grad_output, **options)
    for threads in (2, 5):
        torch.set_num_threads(threads)
        results = forward_backward(with_memory(attnx.routing_attention), inputs, grad_output, **options)
        torch.set_num_threads(1)
        for name, x in expected.items():
            assert torch.equal(x, results[name]), name


@on_host
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(layout: Any, dtype: torch.dtype, poisoned_allocations: None, backend: Any) -> None:
    inputs, grad_output, _ = prepare(CALLS["causal"], SHAPE, dtype)
    inputs = {name: layout(x) for name, x in inputs.items()}
    routes = routes_of(inputs, is_causal=True)
    expected = routes_of({name: x.contiguous() for name, x in inputs.items()}, is_causal=True)
    assert all(torch.equal(x, y) for x, y in zip(routes[:4], expected[:4], strict=True))
    check(inputs, layout(grad_output), routes, is_causal=True)


@on_host
@pytest.mark.parametrize("routing", ["topk", "argmax"])
@pytest.mark.parametrize("shape", [Shape(batch=0), Shape(length_q=0), Shape(length_k=0)], ids=str)
def test_empty_gives_zeros(shape: Shape, routing: Any, dtype: torch.dtype, device: torch.device) -> None:
    inputs, grad_output = random_inputs(shape, dtype, device)
    size = {"cluster_size": 4} if routing == "topk" else {}
    options = {"routes": random_centroids(2, 3, 16), "routing": routing, "is_causal": True, **size}
    assert not any(x.any() for x in forward_backward(attnx.routing_attention, inputs, grad_output, **options).values())


# Bad input -----------------------------------------------------------------------------------------------------------


def _bad_routes(**changes: Any) -> attnx.Routes:
    inputs, _ = random_inputs(SHAPE, torch.float32, torch.device("cpu"))
    routes = routes_of(inputs)
    return routes._replace(**{name: change(getattr(routes, name)) for name, change in changes.items()})


def _with(index: int, value: int) -> Any:
    def change(x: Tensor) -> Tensor:
        x = x.clone()
        x[0, 0, index] = value
        return x

    return change


CENTROIDS = random_centroids(4, CLUSTERS, 16)
BAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "rank": (CENTROIDS[0], {}, "centroids: expected 3 dimensions, (heads, clusters, head_dim), got shape (6, 16)"),
    "heads": (CENTROIDS[:2].clone(), {}, "centroids: expected shape (4, clusters, 16), got (2, 6, 16)"),
    "head_dim": (CENTROIDS[..., :8].clone(), {}, "centroids: expected shape (4, clusters, 16), got (4, 6, 8)"),
    "no_cluster": (CENTROIDS[:, :0].clone(), {}, "centroids: expected one cluster or more, got shape (4, 0, 16)"),
    "dtype": (CENTROIDS.double(), {}, "centroids: expected float32, got float64"),
    "strides": (CENTROIDS.mT.contiguous().mT, {}, "centroids: expected a contiguous tensor"),
    "size_0": (CENTROIDS, {"cluster_size": 0}, "cluster_size: expected an int, 1 or more, got 0"),
    "size_bool": (CENTROIDS, {"cluster_size": True}, "cluster_size: expected an int, 1 or more, got True"),
    "indivisible": (
        random_centroids(4, 7, 16),
        {},
        "cluster_size: expected a number where the 96 rows of query are not divisible by 7 clusters, got None",
    ),
    "size_of_argmax": (
        CENTROIDS,
        {"routing": "argmax", "cluster_size": 4},
        'cluster_size: expected None with routing="argmax", got 4',
    ),
    "routing": (CENTROIDS, {"routing": "random"}, 'routing: expected "topk" or "argmax", got \'random\''),
    "score": (CENTROIDS, {"score": "relu"}, 'score: expected "sigmoid" or "softmax", got \'relu\''),
    "bias": (CENTROIDS, {"bias": -1.0}, 'bias: expected None with score="softmax", got -1.0'),
    "bias_tensor": (CENTROIDS, {"bias": torch.ones(4), "score": "sigmoid"}, 'bias: expected None, "row" or a float'),
    "scale": (CENTROIDS, {"scale": math.nan}, "scale: expected a finite number, got nan"),
    "memory": (CENTROIDS, {"memory_kv": torch.ones(3)}, "memory_kv: expected a pair of tensors, keys and values"),
    "memory_shape": (
        CENTROIDS,
        {"memory_kv": (torch.ones(4, 1, 16), torch.ones(4, 1, 24))},
        "memory_key: expected shape (2, 1, 16), got (4, 1, 16)",
    ),
    "memory_lengths": (
        CENTROIDS,
        {"memory_kv": (torch.ones(2, 1, 16), torch.ones(2, 2, 24))},
        "memory_value: expected shape (2, 1, 24), got (2, 2, 24)",
    ),
    "memory_dtype": (
        CENTROIDS,
        {"memory_kv": (torch.ones(2, 1, 16).double(), torch.ones(2, 1, 24))},
        "memory_key: expected float32 like query, got float64",
    ),
    "routes_type": ("centroids", {}, "routes: expected centroids, a tensor, or attnx.Routes, got 'centroids'"),
    "other_length": (
        lambda: _bad_routes(length_q=lambda n: 100),
        {},
        "routes: expected those of 96 queries and 96 keys, got those of 100 and 96",
    ),
    "routes_and_size": (
        _bad_routes,
        {"cluster_size": 4},
        "cluster_size: expected None where routes are given, got 4",
    ),
    "index_too_large": (
        lambda: _bad_routes(query_indices=_with(15, 96)),
        {},
        "query_indices: expected indices of query from 0 to 95, got 96",
    ),
    "index_negative": (
        lambda: _bad_routes(key_indices=_with(0, -1)),
        {},
        "key_indices: expected indices of key from 0 to 95",
    ),
    "not_ascending": (
        lambda: _bad_routes(query_indices=_with(1, 0)),
        {},
        "query_indices: expected ascending indices in each cluster, got 0 after",
    ),
    "offsets_falling": (
        lambda: _bad_routes(key_offsets=_with(1, 50)),
        {},
        "key_offsets: expected rising offsets, got 32 after 50",
    ),
    "offsets_end": (
        lambda: _bad_routes(query_offsets=_with(6, 97)),
        {},
        "query_offsets: expected offsets from 0 to at most the",
    ),
    "offsets_dtype": (lambda: _bad_routes(query_offsets=Tensor.long), {}, "query_offsets: expected int32, got int64"),
    "fewer_heads": (
        lambda: _bad_routes(query_indices=lambda x: x[:, :2].contiguous()),
        {},
        "query_indices: expected shape (2, 4, slots), got (2, 2, 96)",
    ),
    "fewer_clusters": (
        lambda: _bad_routes(key_offsets=lambda x: x[..., :-1].contiguous()),
        {},
        "key_offsets: expected shape (2, 4, 7), got (2, 4, 6)",
    ),
}


@on_cpu
@pytest.mark.parametrize(("routes", "options", "message"), BAD.values(), ids=BAD)
def test_bad_input(routes: Any, options: dict[str, Any], message: str, device: torch.device) -> None:
    inputs, _ = random_inputs(SHAPE, torch.float32, device)
    with pytest.raises(RuntimeError) as error:
        attnx.routing_attention(**inputs, routes=routes() if callable(routes) else routes, **options)
    assert str(error.value).startswith(message)


@on_cpu
def test_shared_lengths(device: torch.device) -> None:
    inputs, _ = random_inputs(Shape(length_q=6, length_k=12), torch.float32, device)
    with pytest.raises(RuntimeError, match=r"^shared_qk: expected False where query and key differ in length"):
        attnx.routing_attention(**inputs, routes=random_centroids(2, 3, 16), shared_qk=True)
    # The default does not share then.
    attnx.routing_attention(**inputs, routes=random_centroids(2, 3, 16), is_causal=True)


# Centroids -----------------------------------------------------------------------------------------------------------


@on_host
def test_update_is_the_reference_s(dtype: torch.dtype, device: torch.device) -> None:
    inputs, _ = random_inputs(SHAPE, dtype, device)
    inputs["query"][0, 0, 5] = math.nan
    centroids, counts = random_centroids(4, 20, 16), torch.ones(4, 20)
    centroids[:, 3] *= 1e-3  # nobody's nearest
    for decay in (0.9, 0.999):
        expected = reference.update_centroids(centroids, counts, inputs["query"], inputs["key"], decay=decay)
        unused = centroids[:, 3].clone()
        version = centroids._version
        attnx.update_centroids_(centroids, counts, inputs["query"], inputs["key"], decay=decay)
        assert centroids._version > version
        torch.testing.assert_close((centroids, counts), tuple(x.float() for x in expected))
        assert torch.equal(centroids[:, 3], unused)
    counts.zero_()
    before = centroids.clone()
    attnx.update_centroids_(centroids, counts, inputs["query"], inputs["key"], decay=1.0)
    assert torch.equal(centroids, before)
    assert not counts.any()
    schema = torch.ops.attnx.update_centroids_.default._schema
    assert [x.alias_info is not None and x.alias_info.is_write for x in schema.arguments] == [True, True] + [False] * 3


@on_cpu
def test_centroids_find_clusters(device: torch.device) -> None:
    """Tokens around a few directions: after some steps each centroid in use is one of them."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(8, 16, generator=generator)
    tokens = directions[torch.randint(8, (1, 1, 4000), generator=generator)]
    tokens = tokens + 0.05 * torch.randn(tokens.shape, generator=generator)
    centroids, counts = random_centroids(1, 32, 16), torch.ones(1, 32)
    before = attnx.commitment_loss(tokens, tokens, centroids, beta=1.0)
    for _ in range(60):
        attnx.update_centroids_(centroids, counts, tokens, tokens, decay=0.8)
    after = attnx.commitment_loss(tokens, tokens, centroids, beta=1.0)
    assert after < 0.2 * before
    nearest = attnx.nearest_centroids(tokens, centroids)
    assert nearest.dtype == torch.int32
    assert 2 <= len(nearest.unique()) <= 8


@on_host
def test_commitment_loss(dtype: torch.dtype, device: torch.device) -> None:
    inputs, _ = random_inputs(SHAPE, dtype, device)
    query, key = inputs["query"].requires_grad_(), inputs["key"]
    loss = attnx.commitment_loss(query, key, CENTROIDS, beta=0.5)
    errors = []
    for rows in (query, key):
        x = reference._normalised(rows).repeat_interleave(4 // rows.shape[1], 1)
        nearest = (CENTROIDS.double() @ x.mT).argmax(-2)
        target = torch.stack([CENTROIDS[h][nearest[:, h]] for h in range(4)], 1)
        errors.append((x - target).square())
    expected = 0.5 * torch.cat([x.flatten() for x in errors]).mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(loss, query)
    (of_definition,) = torch.autograd.grad(expected, query)
    torch.testing.assert_close(gradient, of_definition, rtol=1e-4, atol=1e-8)


@on_cpu
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"centroids": CENTROIDS.double()}, "centroids: expected float32, got float64"),
        ({"centroids": CENTROIDS[:2].clone(), "counts": torch.ones(2, 6)}, "centroids: expected shape (4, clusters"),
        ({"counts": torch.ones(4, 5)}, "counts: expected float32 of shape (4, 6), got"),
        ({"counts": torch.ones(4, 6).double()}, "counts: expected float32 of shape (4, 6), got torch.float64"),
        ({"counts": torch.ones(6, 4).mT}, "counts: expected a contiguous tensor"),
        ({"counts": torch.full((4, 6), -1.0)}, "counts: expected finite numbers of 0 or more, got -1"),
        ({"counts": torch.full((4, 6), math.nan)}, "counts: expected finite numbers of 0 or more, got nan"),
        ({"decay": 1.5}, "decay: expected from 0 to 1, got 1.5"),
        ({"key": torch.ones(2, 3, 96, 16)}, "query: expected heads to be a multiple of the 3 heads of key, got 4"),
    ],
)
def test_bad_update_changes_nothing(change: dict[str, Any], message: str, device: torch.device) -> None:
    inputs, _ = random_inputs(SHAPE, torch.float32, device)
    arguments = {"centroids": CENTROIDS.clone(), "counts": torch.ones(4, 6), "query": inputs["query"]}
    arguments |= {"key": inputs["key"], **change}
    before = {name: x.clone() for name, x in arguments.items() if isinstance(x, Tensor)}
    with pytest.raises(RuntimeError) as error:
        attnx.update_centroids_(**arguments)
    assert str(error.value).startswith(message)
    assert all(torch.equal(arguments[name].nan_to_num(7), x.nan_to_num(7)) for name, x in before.items())


@on_cpu
@pytest.mark.parametrize("decay", [-0.5, 1.5, math.nan])
def test_the_operator_checks_the_decay_too(decay: float, device: torch.device) -> None:
    centroids, counts = torch.ones(1, 2, 4), torch.ones(1, 2)
    with pytest.raises(RuntimeError, match=r"^decay: expected from 0 to 1, got"):
        torch.ops.attnx.update_centroids_(centroids, counts, centroids.clone(), counts.clone(), decay)


# In PyTorch ----------------------------------------------------------------------------------------------------------


@on_host
def test_opcheck(dtype: torch.dtype, device: torch.device) -> None:
    inputs, grad_output, options = prepare(CALLS["memory_apart"], SHAPE, dtype)
    routes = options["routes"]
    memory = inputs.pop("memory_key"), inputs.pop("memory_value")
    query, key, value = (x.requires_grad_() for x in inputs.values())
    arguments = (*routes[:4], None, *memory, "softmax", "none", 0.0, None, False)
    ops = torch.ops.attnx
    torch.library.opcheck(ops.routing_attention.default, (query, key, value, *arguments))
    output, logsumexp = (x.detach() for x in ops.routing_attention(query, key, value, *arguments))
    tensors = (grad_output, torch.zeros_like(logsumexp), *(x.detach() for x in (query, key, value)), output, logsumexp)
    torch.library.opcheck(ops.routing_attention_backward.default, (*tensors, *arguments, False))
    used = [torch.tensor(x, dtype=torch.int32) for x in ([90, 96], [0, 7], [96, 50], [3, 50])]
    for routing, shared in (("topk", False), ("argmax", False), ("topk", True)):
        for lengths in ([None] * 4, used):
            route = (query.detach(), key.detach(), CENTROIDS, *lengths, 7, 9, routing, shared)
            torch.library.opcheck(ops.route.default, route)
    for lengths in ([None] * 4, used):
        torch.library.opcheck(ops.nearest_centroids.default, (query.detach(), CENTROIDS, *lengths[:2]))
        torch.library.opcheck(ops.centroid_sums.default, (query.detach(), key.detach(), CENTROIDS, *lengths))
    centroids, counts, sums = CENTROIDS.clone(), torch.ones(4, 6), torch.ones(4, 6, 16)
    torch.library.opcheck(ops.update_centroids_.default, (centroids, counts, sums, torch.ones(4, 6), 0.9))


@on_cpu
def test_grad_of_logsumexp(device: torch.device) -> None:
    inputs, _, options = prepare(CALLS["causal"], Shape(length_q=12, length_k=12, head_dim=5), torch.float64)
    leaves = tuple(x.requires_grad_() for x in inputs.values())
    arguments = (*options["routes"][:4], None, None, None, "softmax", "none", 0.0, None, True)
    assert torch.autograd.gradcheck(lambda *x: torch.ops.attnx.routing_attention(*x, *arguments), leaves)


@on_host
@pytest.mark.parametrize("routing", ["topk", "argmax"])
def test_compile_once_for_all_lengths(routing: Any, dtype: torch.dtype, device: torch.device) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attnx.routing_attention(query, key, value, CENTROIDS, routing=routing, is_causal=True).sin()

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for length in (60, 96, 120):
        shape = Shape(length_q=length, length_k=length, heads=4, kv_heads=2)
        inputs, grad_output = random_inputs(shape, dtype, device)
        expected = forward_backward(function, inputs, grad_output)
        for name, x in forward_backward(compiled, inputs, grad_output).items():
            torch.testing.assert_close(x, expected[name])
    assert counter.frame_count == 1


@on_cpu
def test_vmap_and_autocast(device: torch.device) -> None:
    inputs, _ = random_inputs(SHAPE, torch.float32, device)
    routes = routes_of(inputs)
    several = {name: torch.stack((x, x.flip(0))) for name, x in inputs.items()}
    mapped = torch.vmap(lambda q, k, v: attnx.routing_attention(q, k, v, routes))(*several.values())
    each = [attnx.routing_attention(*(x[i] for x in several.values()), routes) for i in (0, 1)]
    assert torch.equal(mapped, torch.stack(each))
    with torch.autocast("cpu", torch.bfloat16):
        output = attnx.routing_attention(**inputs, routes=routes)
    assert torch.equal(output, attnx.routing_attention(*(x.bfloat16() for x in inputs.values()), routes))


@on_cpu
def test_no_second_derivative(device: torch.device) -> None:
    inputs, _, options = prepare({}, SHAPE, torch.float32)
    inputs["query"].requires_grad_()
    output = attnx.routing_attention(**inputs, **options)
    (gradient,) = torch.autograd.grad(output.sum(), inputs["query"], create_graph=True)
    with pytest.raises(NotImplementedError, match="routing_attention: no second derivative"):
        gradient.sum().backward()


@on_cpu
def test_other_backends_are_refused_by_the_table(device: torch.device) -> None:
    """Whatever the dispatcher finds no kernel for ends here."""
    inputs, _, options = prepare({}, SHAPE, torch.float32)
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.XPU)
    ops, arguments = torch.ops.attnx, (*options["routes"][:4], None, None, None, "softmax", "none", 0.0, None, False)
    refusal = r"(?s)^routing_attention: no kernel for this call.*required: .*supported: backend cpu.*missing:"
    with pytest.raises(NotImplementedError, match=refusal):
        ops.routing_attention.default.redispatch(keys, *inputs.values(), *arguments)
    with pytest.raises(NotImplementedError, match=refusal):
        ops.route.default.redispatch(keys, inputs["query"], inputs["key"], CENTROIDS, *[None] * 4, 7, 9, "topk", False)
    meta = {name: torch.empty_like(x, device="meta") for name, x in inputs.items()}
    explanation = attnx.explain(attnx.routing_attention, **meta, routes=CENTROIDS)
    assert not explanation.supported
    assert "missing: backend meta" in str(explanation)


@on_cpu
def test_explain(device: torch.device) -> None:
    inputs, _ = random_inputs(SHAPE, torch.float32, device)
    explanation = attnx.explain(attnx.routing_attention, **inputs, routes=CENTROIDS, memory_kv=(CENTROIDS, CENTROIDS))
    assert explanation.supported
    assert str(explanation).startswith("routing_attention: routing_attention [")
    assert "a centroid with a NaN" in explanation.reasons[-1]
