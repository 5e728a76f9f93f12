"""Routing attention over sequences of several lengths: padded ones, caches that are partly filled, and packed ones."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import attnx
from attnx import reference
from attnx.testing import assert_close
from cases import DTYPES, Shape, pack, random_inputs
from compare import forward_backward
from routing_cases import check, eager_routing_attention, random_centroids, random_memory, with_memory

on_cpu = pytest.mark.backends("cpu")
on_host = pytest.mark.backends("cpu", "emulated")

HEADS, CLUSTERS, HEAD_DIM, VALUE_DIM = 4, 5, 16, 24
CENTROIDS = random_centroids(HEADS, CLUSTERS, HEAD_DIM)
# The first rows of four sequences, and the ends: all, none, a few, and a part in the middle.
USED = ([0, 9, 0, 21], [96, 9, 3, 81])


def int32(*rows: list[int]) -> list[Tensor]:
    return [torch.tensor(x, dtype=torch.int32) for x in rows]


def lengths_of(suffix: str = "_k", used: tuple[list[int], list[int]] = USED) -> dict[str, Tensor]:
    starts, ends = int32(*used)
    return {f"seqused{suffix}": ends, f"leftpad{suffix}": starts}


def padded_inputs(
    dtype: torch.dtype, length_q: int = 96, length_k: int = 96, device: torch.device | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    shape = Shape(length_q, length_k, HEAD_DIM, VALUE_DIM, batch=4, heads=HEADS, kv_heads=2)
    return random_inputs(shape, dtype, torch.device("cpu") if device is None else device)


def filled(inputs: dict[str, Tensor], value: float, names: tuple[str, ...]) -> dict[str, Tensor]:
    """The inputs with ``value`` wherever there is padding."""
    inputs = {name: x.clone() for name, x in inputs.items()}
    for name, (b, (start, end)) in itertools.product(names, enumerate(zip(*USED, strict=True))):
        inputs[name][b, :, :start] = value
        inputs[name][b, :, end:] = value
    return inputs


# Padding -------------------------------------------------------------------------------------------------------------

ROUTINGS: dict[str, dict[str, Any]] = {
    "topk": {"cluster_size": 12},
    "topk_shared": {"cluster_size": 12, "shared_qk": True},
    "topk_all": {"cluster_size": 1000},
    "argmax": {"routing": "argmax"},
    "argmax_shared": {"routing": "argmax", "shared_qk": True},
}


@on_cpu
@pytest.mark.parametrize("options", ROUTINGS.values(), ids=ROUTINGS)
@pytest.mark.parametrize("length_q", [96, 40])
def test_routes_are_the_reference_s(
    length_q: int, options: dict[str, Any], instruction_set: str | None, device: torch.device
) -> None:
    """In float64, whose products tell any two rows apart."""
    inputs, _ = padded_inputs(torch.float64, length_q)
    if length_q != 96 and options.get("shared_qk"):
        pytest.skip("queries and keys differ in length")
    rows = inputs["query"], inputs["key"]
    given: list[dict[str, Tensor]] = [lengths_of(), {"seqused_k": lengths_of()["seqused_k"]}]
    given.append(lengths_of() | lengths_of("_q", ([0, 3, 0, 5], [length_q, 3, 40, 31])))
    for lengths in given:
        actual = attnx.route(*rows, CENTROIDS, **options, **lengths)
        expected = reference.route(*rows, CENTROIDS, **options, **lengths)
        for x, y in zip(actual[:4], expected[:4], strict=True):
            assert torch.equal(x, y)
        plain = torch.zeros(4, 1) + 96 - length_q
        leads = [plain if x.lead is None else x.lead for x in (actual, expected)]
        assert torch.equal(leads[0].double(), leads[1].double())


@on_host
@pytest.mark.parametrize("options", ROUTINGS.values(), ids=ROUTINGS)
def test_padding_is_in_no_cluster(options: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
    """It would be in all of them, where it counted: it lies on a centroid."""
    inputs, _ = padded_inputs(dtype)
    rows = [filled(inputs, 0.0, (name,))[name] for name in ("query", "key")]
    for x, (b, (start, end)) in itertools.product(rows, enumerate(zip(*USED, strict=True))):
        for part in (x[b, :, :start], x[b, :, end:]):
            part.copy_((1000 * CENTROIDS[: len(part), :1]).to(dtype).expand_as(part))
    routes = attnx.route(*rows, CENTROIDS, **options, **lengths_of())
    size = 1 if options.get("routing") == "argmax" else CLUSTERS
    for indices, offsets in (routes[:2], routes[2:4]):
        for b, (start, end) in enumerate(zip(*USED, strict=True)):
            for x, ends in zip(indices[b], offsets[b], strict=True):
                used = x[: ends[-1]]
                assert ((used >= start) & (used < end)).all()
                assert not x[ends[-1] :].any()
                assert len(used) == (size * (end - start) if size == 1 else CLUSTERS * min(end - start, _size(options)))


def _size(options: dict[str, Any]) -> int:
    return min(int(options["cluster_size"]), 96)


CALLS: dict[str, dict[str, Any]] = {
    "full": {"cluster_size": 12},
    "causal": {"cluster_size": 12, "is_causal": True},
    "causal_apart": {"cluster_size": 12, "is_causal": True, "shared_qk": False},
    "argmax_causal": {"routing": "argmax", "is_causal": True},
    "memory": {"cluster_size": 12, "is_causal": True, "memory": 3},
    "sigmoid": {"cluster_size": 12, "score": "sigmoid"},
    "sigmoid_causal": {"routing": "argmax", "score": "sigmoid", "is_causal": True, "shared_qk": False},
    "normalised": {"cluster_size": 30, "normalize_qk": True, "scale": 0.3},
}
_OF_ROUTES = ("cluster_size", "routing", "shared_qk", "has_padding")


def split(call: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], int]:
    """What makes routes, what the attention is told besides, both, and the rows of the memory."""
    of_routes = {name: x for name, x in call.items() if name in _OF_ROUTES}
    others = {name: x for name, x in call.items() if name not in (*_OF_ROUTES, "memory")}
    return of_routes, others, of_routes | others, call.get("memory", 0)


@on_host
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("length_q", [96, 40], ids=["as_many", "fewer_queries"])
def test_against_float64(length_q: int, call: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
    of_routes, options, _, memory = split(call)
    inputs, grad_output = padded_inputs(dtype, length_q)
    is_causal = options.get("is_causal", False)
    rows = inputs["query"], inputs["key"]
    routes = attnx.route(*rows, CENTROIDS, is_causal=is_causal, **of_routes, **lengths_of())
    if memory:
        inputs |= random_memory(2, memory, HEAD_DIM, VALUE_DIM, dtype)
    check(inputs, grad_output, routes, **options)


@on_host
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("queries", ["as_many", "own", "fewer"])
def test_is_a_call_for_each_sequence(
    queries: str, call: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> None:
    """Each sequence, cut to length, gives the same on its own."""
    _, _, options, memory = split(call)
    inputs, _ = padded_inputs(dtype, 40 if queries == "fewer" else 96)
    memory_kv = tuple(random_memory(2, memory, HEAD_DIM, VALUE_DIM, dtype).values()) if memory else None
    lengths, used_q = lengths_of(), USED
    if queries != "as_many":
        used_q = ([0, 0, 0, 5], [40, 40, 40, 38]) if queries == "own" else ([0] * 4, [40] * 4)
        options |= {"shared_qk": False}
    if queries == "own":
        lengths |= lengths_of("_q", used_q)
    output = attnx.routing_attention(**inputs, routes=CENTROIDS, memory_kv=memory_kv, **options, **lengths)
    for b, (q0, q1, k0, k1) in enumerate(zip(*used_q, *USED, strict=True)):
        own = {"query": inputs["query"][b : b + 1, :, q0:q1]}
        own |= {name: inputs[name][b : b + 1, :, k0:k1] for name in ("key", "value")}
        expected = attnx.routing_attention(**own, routes=CENTROIDS, memory_kv=memory_kv, **options)
        torch.testing.assert_close(output[b : b + 1, :, q0:q1], expected, **_tolerance(dtype))
        assert not output[b, :, :q0].any()
        assert not output[b, :, q1:].any()


def _tolerance(dtype: torch.dtype) -> dict[str, float]:
    """Sums over tiles that start elsewhere are rounded elsewhere."""
    return {"rtol": 1e-5, "atol": 1e-5} if dtype in (torch.float32, torch.float64) else {"rtol": 2e-2, "atol": 2e-2}


@on_host
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("call", ["full", "causal", "argmax_causal", "memory", "sigmoid"])
def test_padding_holds_anything(call: str, value: float, dtype: torch.dtype, device: torch.device) -> None:
    """Results are the same, bit for bit, and gradients of padding are 0."""
    of_routes, options, _, _ = split(CALLS[call])
    inputs, grad_output = padded_inputs(dtype)
    lengths = lengths_of()

    def run(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return forward_backward(
            attnx.routing_attention, inputs, grad_output, routes=CENTROIDS, **of_routes, **options, **lengths
        )

    clean, dirty = run(inputs), run(filled(inputs, value, ("query", "key", "value")))
    for name, x in clean.items():
        assert torch.equal(x, dirty[name]), name
        assert torch.equal(filled({name: x}, 0.0, (name,))[name], x), name


@on_host
@pytest.mark.parametrize("options", ROUTINGS.values(), ids=ROUTINGS)
def test_whole_lengths_change_nothing(options: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
    inputs, grad_output = padded_inputs(dtype)
    plain, whole = (
        forward_backward(attnx.routing_attention, inputs, grad_output, routes=CENTROIDS, is_causal=True, **options, **x)
        for x in ({}, lengths_of(used=([0] * 4, [96] * 4)))
    )
    assert all(torch.equal(plain[name], whole[name]) for name in plain)


@on_host
def test_one_of_the_two(dtype: torch.dtype, device: torch.device) -> None:
    """What is not given has nothing unused on its side."""
    inputs, _ = padded_inputs(dtype)
    rows = inputs["query"], inputs["key"]
    for (name, x), whole in itertools.product(lengths_of().items(), [{"leftpad_k": [0] * 4}, {"seqused_k": [96] * 4}]):
        if name not in whole:
            other = {key: torch.tensor(n, dtype=torch.int32) for key, n in whole.items()}
            both = attnx.route(*rows, CENTROIDS, routing="argmax", **other, **{name: x})
            assert attnx.route(*rows, CENTROIDS, routing="argmax", **{name: x}) == both


@on_host
def test_other_tokens_of_the_same_length(dtype: torch.dtype, device: torch.device) -> None:
    """Lengths of queries say that padding of the keys is none of theirs."""
    inputs, _ = padded_inputs(dtype)
    options = {"routes": CENTROIDS, "routing": "argmax", **lengths_of(used=([0] * 4, [50] * 4))}
    assert not attnx.routing_attention(**inputs, **options)[:, :, 50:].any()
    whole = torch.full((4,), 96, dtype=torch.int32)
    output = attnx.routing_attention(**inputs, **options, seqused_q=whole)
    cut = {name: x if name == "query" else x[:, :, :50] for name, x in inputs.items()}
    expected = attnx.routing_attention(**cut, routes=CENTROIDS, routing="argmax")
    torch.testing.assert_close(output, expected, **_tolerance(dtype))


@on_cpu
def test_gradcheck(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(2, 1, 9, 4, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3)]
    starts, ends = int32([0, 2], [6, 9])
    routes = attnx.route(*leaves[:2], random_centroids(1, 2, 4), cluster_size=4, seqused_k=ends, leftpad_k=starts)
    assert torch.autograd.gradcheck(lambda *x: attnx.routing_attention(*x, routes, is_causal=True), leaves)


# Centroids -----------------------------------------------------------------------------------------------------------


@on_host
@pytest.mark.parametrize("length_q", [96, 40])
def test_padding_moves_no_centroid(length_q: int, dtype: torch.dtype, device: torch.device) -> None:
    inputs, _ = padded_inputs(dtype, length_q)
    names = ("query", "key") if length_q == 96 else ("key",)
    dirty = filled(inputs, math.nan, names)
    centroids, counts = CENTROIDS.clone(), torch.ones(HEADS, CLUSTERS)
    rows = inputs["query"], inputs["key"]
    expected = reference.update_centroids(centroids, counts, *rows, decay=0.9, **lengths_of())
    attnx.update_centroids_(centroids, counts, dirty["query"], dirty["key"], decay=0.9, **lengths_of())
    torch.testing.assert_close((centroids, counts), tuple(x.float() for x in expected))
    assert not torch.equal(centroids, CENTROIDS)
    # So it is in a backward.
    moved, counts = CENTROIDS.clone(), torch.ones(HEADS, CLUSTERS)
    leaf = dirty["query"].requires_grad_()
    attnx.routing.move_centroids_in_backward(
        leaf, dirty["key"], moved, counts, decay=0.9, group=None, **lengths_of()
    ).sum().backward()
    assert torch.equal(moved, centroids)
    assert leaf.grad is not None
    assert (leaf.grad == 1).all()


@on_host
def test_nearest_centroids(dtype: torch.dtype, device: torch.device) -> None:
    inputs, _ = padded_inputs(dtype)
    expected = attnx.nearest_centroids(inputs["key"], CENTROIDS)
    nearest = attnx.nearest_centroids(inputs["key"], CENTROIDS, **lengths_of(""))
    assert torch.equal(nearest, filled({"x": expected}, -1, ("x",))["x"])


@on_host
def test_commitment_loss(dtype: torch.dtype, device: torch.device) -> None:
    inputs, _ = padded_inputs(dtype)
    used = [slice(*x) for x in zip(*USED, strict=True)]
    query, key = (torch.cat([inputs[n][b : b + 1, :, x] for b, x in enumerate(used)], 2) for n in ("query", "key"))
    expected = attnx.commitment_loss(query, key, CENTROIDS, beta=0.5)
    loss = attnx.commitment_loss(inputs["query"], inputs["key"], CENTROIDS, beta=0.5, **lengths_of())
    torch.testing.assert_close(loss, expected)


# Packed sequences ----------------------------------------------------------------------------------------------------

LENGTHS = ([40, 0, 3, 70, 1, 9], [31, 5, 0, 70, 2, 90])
SAME = ([40, 0, 3, 70, 1, 9],) * 2

PACKED_CALLS: dict[str, dict[str, Any]] = {
    "full": {"cluster_size": 12},
    "causal": {"cluster_size": 12, "is_causal": True, "shared_qk": False},
    "shared": {"cluster_size": 12, "is_causal": True, "shared_qk": True},
    "argmax": {"routing": "argmax"},
    "argmax_causal": {"routing": "argmax", "is_causal": True, "shared_qk": False},
    "memory": {"cluster_size": 12, "memory": 3, "is_causal": True, "shared_qk": True},
    "sigmoid": {"cluster_size": 12, "score": "sigmoid"},
    "sigmoid_causal": {"routing": "argmax", "score": "sigmoid", "is_causal": True, "shared_qk": True},
    "normalised": {"cluster_size": 30, "normalize_qk": True, "scale": 0.3},
}


def packed_inputs(
    call: dict[str, Any], dtype: torch.dtype, device: torch.device, padding: int = 0
) -> tuple[dict[str, Tensor], Tensor, dict[str, Any]]:
    lengths = SAME if call.get("shared_qk") else LENGTHS
    lengths = tuple([*x, padding] for x in lengths) if padding else lengths
    inputs, grad_output, sizes = pack((lengths[0], lengths[1]), dtype, device)
    if padding:
        sizes |= {name: sizes[name][:-1] for name in ("cu_seqlens_q", "cu_seqlens_k")} | {"has_padding": True}
    return inputs, grad_output, sizes


@on_cpu
@pytest.mark.parametrize("call", PACKED_CALLS.values(), ids=PACKED_CALLS)
@pytest.mark.parametrize("padding", [0, 7])
def test_packed_routes_are_the_reference_s(
    padding: int, call: dict[str, Any], instruction_set: str | None, device: torch.device
) -> None:
    of_routes, options, _, _ = split(call)
    inputs, _, sizes = packed_inputs(call, torch.float64, device, padding)
    of_routes |= {"is_causal": options.get("is_causal", False)}
    actual = attnx.route_varlen(inputs["query"], inputs["key"], CENTROIDS, **sizes, **of_routes)
    expected = reference.route_varlen(inputs["query"], inputs["key"], CENTROIDS, **sizes, **of_routes)
    assert actual == expected
    assert actual.clusters == 6 * CLUSTERS


@on_host
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("call", PACKED_CALLS.values(), ids=PACKED_CALLS)
def test_packed_against_float64(call: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
    of_routes, options, _, memory = split(call)
    inputs, grad_output, sizes = packed_inputs(call, dtype, device, padding=7)
    rows, is_causal = (inputs["query"], inputs["key"]), options.get("is_causal", False)
    routes = attnx.route_varlen(*rows, CENTROIDS, **sizes, is_causal=is_causal, **of_routes)
    del sizes["has_padding"]
    if memory:
        inputs |= random_memory(2, memory, HEAD_DIM, VALUE_DIM, dtype)
    options |= {"routes": routes, **sizes}
    results = forward_backward(with_memory(attnx.routing_attention_varlen), inputs, grad_output, **options)
    exact = {name: x.double() for name, x in inputs.items()}
    expected = forward_backward(with_memory(reference.routing_attention_varlen), exact, grad_output.double(), **options)
    baseline = forward_backward(with_memory(_eager_varlen), inputs, grad_output, **options)
    terms = forward_backward(with_memory(_eager_varlen), exact, grad_output.double(), constant_sums=True, **options)
    for name, actual in results.items():
        assert_close(actual, expected[name], baseline[name], name=name, terms=terms[name])


def _eager_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    routes: attnx.Routes,
    **options: Any,
) -> Tensor:
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
    return eager_routing_attention(query, key, value, routes, **options)[0].transpose(0, 1)


@on_cpu
@pytest.mark.parametrize("call", PACKED_CALLS.values(), ids=PACKED_CALLS)
def test_packed_is_the_reference_of_each_sequence(call: dict[str, Any], device: torch.device) -> None:
    """Routes and gradients included, in float64."""
    _, _, options, memory = split(call)
    inputs, grad_output, sizes = packed_inputs(call, torch.float64, device, padding=7)
    if memory:
        inputs |= random_memory(2, memory, HEAD_DIM, VALUE_DIM, torch.float64)
    options |= {"routes": CENTROIDS, **sizes}
    actual = forward_backward(with_memory(attnx.routing_attention_varlen), inputs, grad_output, **options)
    expected = forward_backward(with_memory(reference.routing_attention_varlen), inputs, grad_output, **options)
    for name, x in actual.items():
        torch.testing.assert_close(x, expected[name], msg=lambda text, name=name: f"{name}: {text}")


@on_host
@pytest.mark.parametrize("call", PACKED_CALLS.values(), ids=PACKED_CALLS)
def test_packed_is_a_call_for_each_sequence(call: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
    _, _, options, memory = split(call)
    inputs, _, sizes = packed_inputs(call, dtype, device, padding=7)
    memory_kv = tuple(random_memory(2, memory, HEAD_DIM, VALUE_DIM, dtype).values()) if memory else None
    output = attnx.routing_attention_varlen(**inputs, **sizes, routes=CENTROIDS, memory_kv=memory_kv, **options)
    ends = [itertools.pairwise(sizes[name].tolist()) for name in ("cu_seqlens_q", "cu_seqlens_k")]
    for (q0, q1), (k0, k1) in zip(*ends, strict=True):
        own = [inputs["query"][q0:q1], inputs["key"][k0:k1], inputs["value"][k0:k1]]
        query, key, value = (x.transpose(0, 1)[None] for x in own)
        expected = attnx.routing_attention(query, key, value, CENTROIDS, memory_kv=memory_kv, **options)
        torch.testing.assert_close(output[q0:q1].transpose(0, 1)[None], expected, **_tolerance(dtype))
    assert not output[-7:].any()


@on_host
@pytest.mark.parametrize("routing", ["topk", "argmax"])
@pytest.mark.parametrize("lengths", [([], []), ([0, 0], [0, 0]), ([0, 4], [0, 0]), ([0], [3])], ids=str)
def test_empty_gives_zeros(
    lengths: tuple[list[int], list[int]], routing: Any, dtype: torch.dtype, device: torch.device
) -> None:
    inputs, grad_output, sizes = pack(lengths, dtype, device)
    options = {"routes": CENTROIDS, "routing": routing, "cluster_size": 4 if routing == "topk" else None}
    results = forward_backward(attnx.routing_attention_varlen, inputs, grad_output, **sizes, **options)
    assert not any(x.any() for x in results.values())


@on_host
@pytest.mark.parametrize("of_routes", [{"cluster_size": 170}, {"routing": "argmax"}], ids=["topk", "argmax"])
def test_clusters_of_several_tiles(of_routes: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
    """Two clusters for each sequence; on a Hopper GPU its own loop has them."""
    inputs, grad_output, sizes = pack(([270, 200], [333, 140]), dtype, device, heads=2, kv_heads=1, head_dim=64)
    centroids = random_centroids(2, 2, 64)
    options = {"is_causal": True, "shared_qk": False, **of_routes}
    routes = attnx.route_varlen(inputs["query"], inputs["key"], centroids, **sizes, **options)
    rows = {name: x.transpose(0, 1)[None] for name, x in inputs.items()}
    check(rows, grad_output.transpose(0, 1)[None], routes, is_causal=True)


@on_host
def test_many_short_sequences(dtype: torch.dtype, device: torch.device) -> None:
    """They have more clusters than a block has threads."""
    lengths = [n % 5 for n in range(110)]
    inputs, grad_output, sizes = pack((lengths, lengths), dtype, device, heads=1, kv_heads=1)
    starts, centroids = sizes["cu_seqlens_q"].tolist(), CENTROIDS[:1]
    for of_routes in ({"routing": "argmax"}, {"cluster_size": 3}):
        options = {"is_causal": True, "shared_qk": True, **of_routes}
        routes = attnx.route_varlen(inputs["query"], inputs["key"], centroids, **sizes, **options)
        ends = routes.query_offsets[0, 0].tolist()
        for s, (start, end) in enumerate(itertools.pairwise(starts)):
            of_sequence = routes.query_indices[0, 0, ends[s * CLUSTERS] : ends[(s + 1) * CLUSTERS]]
            assert ((of_sequence >= start) & (of_sequence < end)).all()
            assert len(of_sequence) == (CLUSTERS * min(end - start, 3) if "cluster_size" in of_routes else end - start)
    rows = {name: x.transpose(0, 1)[None] for name, x in inputs.items()}
    check(rows, grad_output.transpose(0, 1)[None], routes, reference=eager_routing_attention, is_causal=True)


@on_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_with_any_number_of_threads(dtype: torch.dtype, device: torch.device) -> None:
    inputs, grad_output, sizes = packed_inputs({}, dtype, device)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        options = {"routes": CENTROIDS, "cluster_size": 12, **sizes}
        results.append(forward_backward(attnx.routing_attention_varlen, inputs, grad_output, **options))
    torch.set_num_threads(1)
    for other in results[1:]:
        assert all(torch.equal(x, other[name]) for name, x in results[0].items())


@on_host
def test_packed_centroids(dtype: torch.dtype, device: torch.device) -> None:
    """Packed sequences are one to what moves centroids, and padding follows it."""
    inputs, _, sizes = packed_inputs({"shared_qk": True}, dtype, device, padding=7)
    rows = [inputs[name].transpose(0, 1)[None] for name in ("query", "key")]
    results = []
    for given, lengths in (
        (rows, {"seqused_k": sizes["cu_seqlens_k"][-1:]}),
        ([x[:, :, :-7] for x in rows], {}),
    ):
        centroids, counts = CENTROIDS.clone(), torch.ones(HEADS, CLUSTERS)
        attnx.update_centroids_(centroids, counts, *given, decay=0.9, **lengths)
        results.append(centroids)
    torch.testing.assert_close(*results)


# In PyTorch ----------------------------------------------------------------------------------------------------------


@on_host
def test_opcheck(dtype: torch.dtype, device: torch.device) -> None:
    inputs, grad_output, sizes = packed_inputs({}, dtype, device)
    ops, rows = torch.ops.attnx, (inputs["query"], inputs["key"], CENTROIDS)
    for routing, padding in (("topk", False), ("argmax", True)):
        arguments = (*rows, *sizes.values(), padding, 12, 9, routing, False)
        torch.library.opcheck(ops.route_varlen.default, arguments)
    lists = ops.route_varlen(*rows, *sizes.values(), False, 12, 9, "topk", False)
    lead = (sizes["cu_seqlens_k"][1:] - sizes["cu_seqlens_q"][1:])[None]
    query, key, value = (x.transpose(0, 1)[None].requires_grad_() for x in inputs.values())
    options = (*lists, lead, None, None, "softmax", "none", 0.0, None, True)
    torch.library.opcheck(ops.routing_attention.default, (query, key, value, *options))
    output, logsumexp = (x.detach() for x in ops.routing_attention(query, key, value, *options))
    saved = (torch.zeros_like(logsumexp), *(x.detach() for x in (query, key, value)), output, logsumexp)
    grad_output = grad_output.transpose(0, 1)[None]
    torch.library.opcheck(ops.routing_attention_backward.default, (grad_output, *saved, *options, False))


@on_cpu
@torch.compiler.config.patch(force_disable_caches=True)
def test_compiled(device: torch.device) -> None:
    torch._dynamo.reset()

    def packed(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, longest: int, routing: Any) -> Tensor:
        size = 7 if routing == "topk" else None
        options = {"routing": routing, "cluster_size": size, "is_causal": True, "shared_qk": True}
        return attnx.routing_attention_varlen(
            query, key, value, ends, ends, longest, longest, CENTROIDS, **options
        ).sin()

    def padded(query: Tensor, key: Tensor, value: Tensor, used: Tensor) -> Tensor:
        return attnx.routing_attention(query, key, value, CENTROIDS, routing="argmax", seqused_k=used).sin()

    compiled = torch.compile(packed, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths, routing in itertools.product(([30, 9, 20], [5, 40, 17, 2]), ("topk", "argmax")):
        inputs, _, sizes = pack((lengths, lengths), torch.float32, device)
        arguments = (*inputs.values(), sizes["cu_seqlens_q"], max(lengths), routing)
        torch.testing.assert_close(compiled(*arguments), packed(*arguments))
    compiled = torch.compile(padded, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (96, 40):
        inputs, _ = padded_inputs(torch.float32, length, length)
        used = torch.tensor([40, 3, 0, 17], dtype=torch.int32)
        torch.testing.assert_close(compiled(*inputs.values(), used), padded(*inputs.values(), used))


@on_cpu
def test_explain(device: torch.device) -> None:
    inputs, _, sizes = packed_inputs({}, torch.float32, device)
    explanation = attnx.explain(attnx.routing_attention_varlen, **inputs, **sizes, routes=CENTROIDS, routing="argmax")
    assert explanation.supported
    dense, _ = padded_inputs(torch.float32)
    assert attnx.explain(attnx.routing_attention, **dense, routes=CENTROIDS, routing="argmax", **lengths_of()).supported


# Bad input -----------------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no_tensor": ({"seqused_k": 3}, "seqused_k: expected a tensor, got 3"),
    "no_tensor_q": ({"leftpad_q": 3}, "leftpad_q: expected a tensor, got 3"),
    "dtype": ({"seqused_k": torch.ones(4)}, "seqused_q: expected int32, got float32"),
    "shape": ({"seqused_q": torch.ones(3).int()}, "seqused_q: expected shape (4,), got (3,)"),
    "long": (
        {"seqused_k": torch.tensor([97, 0, 0, 0]).int(), "seqused_q": torch.ones(4).int()},
        "seqused_k: expected lengths from 0 to 96, got 97 at 0",
    ),
    "starts": (
        {"leftpad_q": torch.tensor([0, 97, 0, 0]).int()},
        "leftpad_q: expected starts from 0 to seqused_q, 96, got 97 at 1",
    ),
}


@on_cpu
@pytest.mark.parametrize(("lengths", "message"), BAD.values(), ids=BAD)
def test_bad_lengths(lengths: dict[str, Any], message: str, device: torch.device) -> None:
    inputs, _ = padded_inputs(torch.float32)
    for call in (
        lambda: attnx.routing_attention(**inputs, routes=CENTROIDS, routing="argmax", **lengths),
        lambda: attnx.update_centroids_(
            CENTROIDS.clone(), torch.ones(HEADS, CLUSTERS), inputs["query"], inputs["key"], **lengths
        ),
    ):
        with pytest.raises(RuntimeError) as error:
            call()
        assert str(error.value).startswith(message)


@on_cpu
def test_lengths_beside_routes(device: torch.device) -> None:
    inputs, _ = padded_inputs(torch.float32)
    routes = attnx.route(inputs["query"], inputs["key"], CENTROIDS, routing="argmax")
    with pytest.raises(RuntimeError, match=r"^seqused_k: expected None where routes are given, got "):
        attnx.routing_attention(**inputs, routes=routes, seqused_k=lengths_of()["seqused_k"])
    lead = torch.zeros(4, 2, dtype=torch.int32)
    for bad, message in (
        (lead, r"lead: expected shape \(4, sequences\), the latter a divisor of the 5 clusters, got \(4, 2\)"),
        (lead[:, :1].contiguous().long(), "lead: expected int32, got int64"),
        (lead[:, :1], "lead: expected a contiguous tensor"),
    ):
        with pytest.raises(RuntimeError, match=f"^{message}"):
            attnx.routing_attention(**inputs, routes=routes._replace(lead=bad), is_causal=True)


BAD_PACKED: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"query": torch.ones(1, 4, 123, 16)}, "query: expected 3 dimensions"),
    "size": ({"cluster_size": None}, 'cluster_size: expected a number with routing="topk" and packed sequences, got'),
    "shared": ({"is_causal": True}, "shared_qk: expected True or False where is_causal, got None"),
    "not_shared": ({"shared_qk": True}, "shared_qk: expected False where query and key differ in length, got True"),
    "longest": ({"max_seqlen_k": 80}, "max_seqlen_k: expected at least the longest sequence, 90, got 80"),
    "fewer": ({"cu_seqlens_k": torch.tensor([0, 9]).int()}, "cu_seqlens_k: expected to end at the number of rows"),
    "falls": ({"cu_seqlens_q": torch.tensor([0, 9, 3]).int()}, "cu_seqlens_q: expected rising offsets, got 3 after 9"),
    "argmax": ({"routing": "argmax"}, 'cluster_size: expected None with routing="argmax", got 12'),
    "key_heads": ({"key": torch.ones(198, 3, 16)}, "query: expected heads to be a multiple of the 3 heads of key"),
}


@on_cpu
@pytest.mark.parametrize(("change", "message"), BAD_PACKED.values(), ids=BAD_PACKED)
def test_bad_packing(change: dict[str, Any], message: str, device: torch.device) -> None:
    inputs, _, sizes = packed_inputs({}, torch.float32, device)
    with pytest.raises(RuntimeError) as error:
        attnx.routing_attention_varlen(**inputs | sizes | {"routes": CENTROIDS, "cluster_size": 12} | change)
    assert str(error.value).startswith(message)


@on_cpu
def test_offsets_of_shared_clusters(device: torch.device) -> None:
    inputs, _, sizes = packed_inputs({"shared_qk": True}, torch.float32, device)
    other = sizes | {"cu_seqlens_k": torch.tensor([0, 39, 39, 43, 113, 114, 123]).int()}
    routes = attnx.route_varlen(inputs["query"], inputs["key"], CENTROIDS, **sizes, routing="argmax")
    with pytest.raises(
        RuntimeError, match=r"^shared_qk: expected False where cu_seqlens_q and cu_seqlens_k differ, got"
    ):
        attnx.routing_attention_varlen(**inputs, **other, routes=CENTROIDS, routing="argmax", shared_qk=True)
    fewer = {name: x[[0, -1]] if name.startswith("cu") else 123 for name, x in sizes.items()}
    with pytest.raises(RuntimeError, match=r"^routes: expected those of 1 sequences, got those of 6"):
        attnx.routing_attention_varlen(**inputs, **fewer, routes=routes)
