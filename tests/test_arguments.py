"""Arguments of other types and values than functions take are refused by name; what means the same is taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import attnx
from cases import Shape, pack, random_inputs
from routing_cases import random_centroids
from staircase_cases import cache_of

pytestmark = [pytest.mark.backends("cpu"), pytest.mark.usefixtures("backend")]

CPU = torch.device("cpu")
INPUTS = random_inputs(Shape(length_q=70, length_k=70, heads=2, head_dim=32), torch.float32, CPU)[0]
PACKED, _, SIZES = pack(([3, 4], [4, 2]), torch.float32, CPU)
MASK = attnx.BlockMask.from_dense(torch.ones(1, 1, 2, 2, dtype=torch.bool))
CENTROIDS = random_centroids(2, 3, 32)
ROWS = {name: INPUTS[name] for name in ("query", "key")}
MAP = attnx.sparse_linear_block_map(**{name: x.bfloat16() for name, x in ROWS.items()})  # which every backend makes


def cache(**options: Any) -> Any:
    return cache_of(INPUTS["key"], INPUTS["value"], **options)


# Calls that are right, each with arguments that are wrong in one place, and what the message says of it.
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any], list[tuple[dict[str, Any], str]]]] = {
    "sigmoid_attention": (
        attnx.sigmoid_attention,
        INPUTS,
        [
            ({"query": None}, "query: expected a tensor, got None"),
            ({"key": [[1.0]]}, "key: expected a tensor, got list"),
            ({"value": np.ones(3)}, "value: expected a tensor, got numpy.ndarray"),
            ({"alibi_slopes": 0.5}, "alibi_slopes: expected a tensor, got 0.5"),
            ({"scale": "1"}, "scale: expected None, a number, or a tensor of shape () or (heads,), got '1'"),
            ({"scale": True}, "scale: expected None, a number, or a tensor of shape () or (heads,), got True"),
            (
                {"scale": torch.ones(3)},
                "scale: expected None, a number, or a floating point tensor of shape () or (2,), got torch.float32 of "
                "shape (3,)",
            ),
            (
                {"scale": torch.ones((), device="meta")},
                "scale: expected a tensor on cpu like query, got one on meta",
            ),
            ({"is_causal": 1}, "is_causal: expected True or False, got 1"),
            ({"window": 3}, "window: expected None or a pair (left, right), got 3"),
            ({"window": (3, 0.5)}, "window: expected an int, got 0.5"),
        ],
    ),
    "softmax_attention": (
        attnx.softmax_attention,
        INPUTS,
        [
            ({"query": 3}, "query: expected a tensor, got 3"),
            ({"sink": [0.0]}, "sink: expected a tensor, got [0.0]"),
        ],
    ),
    "sigmoid_attention_varlen": (
        attnx.sigmoid_attention_varlen,
        PACKED | SIZES,
        [
            ({"cu_seqlens_q": [0, 3, 7]}, "cu_seqlens_q: expected a tensor, got [0, 3, 7]"),
            ({"max_seqlen_k": 4.0}, "max_seqlen_k: expected an int, got 4.0"),
        ],
    ),
    "softmax_attention_varlen": (
        attnx.softmax_attention_varlen,
        PACKED | SIZES,
        [({"max_seqlen_q": None}, "max_seqlen_q: expected an int, got None")],
    ),
    "block_sparse_attention": (
        attnx.block_sparse_attention,
        INPUTS | {"block_mask": MASK},
        [
            ({"block_bias": 1.0}, "block_bias: expected a tensor, got 1.0"),
            ({"is_causal": None}, "is_causal: expected True or False, got None"),
            ({"value": None}, "value: expected a tensor, got None"),
        ],
    ),
    "sparse_linear_attention": (
        attnx.sparse_linear_attention,
        INPUTS,
        [
            ({"block_map": MASK}, "block_map: expected None or attnx.SparseLinearMap, got attnx.block_mask.BlockMask"),
            ({"critical": torch.tensor(0.5)}, "critical: expected a share of the blocks from 0 to 1, got a tensor of "),
            ({"negligible": [0.1]}, "negligible: expected a share of the blocks from 0 to 1, got [0.1]"),
            ({"block_size": (64.0, 64)}, "block_size: expected 64 or 128 on each side, got (64.0, 64)"),
            ({"protect": 0.5}, "protect: expected a number of keys, 0 or more, got 0.5"),
            ({"smooth_k": "no"}, "smooth_k: expected True or False, got 'no'"),
            ({"scale": torch.tensor(1.0)}, "scale: expected None or a number, got a tensor of shape ()"),
            ({"feature_map": None}, "feature_map: expected a string, got None"),
            ({"block_map": MAP, "critical": 0.5}, "critical: expected its default with block_map"),
        ],
    ),
    "sparse_linear_attention_varlen": (
        attnx.sparse_linear_attention_varlen,
        PACKED | SIZES,
        [({"cu_seqlens_k": None}, "cu_seqlens_k: expected a tensor, got None")],
    ),
    "probabilistic_attention": (
        attnx.probabilistic_attention,
        INPUTS | {"training": False},  # dense, but it checks what training would
        [
            ({"density": [0.5]}, "density: expected None or a share of the blocks from 0 to 1, got [0.5]"),
            ({"density": torch.tensor(0.5)}, "density: expected None or a share of the blocks from 0 to 1, got a tens"),
            ({"density": 1.5}, "density: expected None or a share of the blocks from 0 to 1, got 1.5"),
            ({"keep": "all"}, "keep: expected one of harmonic, geometric, power, gaussian or a tensor, got 'all'"),
            ({"keep": None}, "keep: expected one of harmonic, geometric, power, gaussian or a tensor, got None"),
            ({"mode": ["topm"]}, 'mode: expected "bernoulli" or "topm", got [\'topm\']'),
            ({"block_size": 64}, "block_size: expected a pair (queries, keys), got 64"),
            ({"block_size": (32, 64)}, "block_size: expected 64 or 128 on each side, got (32, 64)"),
            ({"training": None}, "training: expected True or False, got None"),
            ({"seed": 0.5, "offset": 0}, f"seed: expected an int from {-(2**63)} to {2**63 - 1}, got 0.5"),
        ],
    ),
    "keep_probabilities": (
        attnx.keep_probabilities,
        {"keep": "harmonic", "key_blocks": 3},
        [
            ({"key_blocks": -1}, "key_blocks: expected an int, 0 or more, got -1"),
            ({"key_blocks": 2.5}, "key_blocks: expected an int, 0 or more, got 2.5"),
            ({"parameter": "1"}, "parameter: expected 0 or more, and at most 1 for geometric, got '1'"),
        ],
    ),
    "probabilistic_block_mask": (
        attnx.probabilistic_block_mask,
        {"batch": 1, "heads": 2, "length_q": 3, "length_k": 4},
        [
            ({"heads": None}, "heads: expected an int, 0 or more, got None"),
            ({"length_k": -1}, "length_k: expected an int, 0 or more, got -1"),
        ],
    ),
    "routing_attention": (
        attnx.routing_attention,
        INPUTS | {"routes": CENTROIDS, "cluster_size": 8},
        [
            ({"routes": None}, "routes: expected centroids, a tensor, or attnx.Routes, got None"),
            ({"cluster_size": 8.0}, "cluster_size: expected an int, 1 or more, got 8.0"),
            ({"routing": 1}, 'routing: expected "topk" or "argmax", got 1'),
            (
                {"memory_kv": CENTROIDS},
                "memory_kv: expected a pair of tensors, keys and values, got a tensor of shape ",
            ),
            ({"memory_kv": (CENTROIDS, None)}, "memory_value: expected a tensor, got None"),
            (
                {"routes": CENTROIDS.clone().requires_grad_()},
                "centroids: expected a tensor that needs no gradient, as update_centroids_ moves them",
            ),
        ],
    ),
    "route": (
        attnx.route,
        ROWS | {"centroids": CENTROIDS, "cluster_size": 8},
        [({"centroids": None}, "centroids: exp")],
    ),
    "commitment_loss": (
        attnx.commitment_loss,
        ROWS | {"centroids": CENTROIDS},
        [({"centroids": CENTROIDS.clone().requires_grad_()}, "centroids: expected a tensor that needs no gradient")],
    ),
    "update_centroids_": (
        lambda **arguments: attnx.update_centroids_(CENTROIDS.clone(), **arguments),
        ROWS | {"counts": torch.ones(2, 3)},
        [({"decay": "0.9"}, "decay: expected from 0 to 1, got '0.9'"), ({"counts": 3}, "counts: expected a tensor")],
    ),
    "staircase_attention": (
        lambda **arguments: attnx.staircase_attention(**{"cache": cache()} | arguments),
        {"query": INPUTS["query"]},
        [
            ({"cache": INPUTS["key"]}, "cache: expected attnx.StaircaseCache, got a tensor of shape (1, 2, 70, 32)"),
            ({"query": None}, "query: expected a tensor, got None"),
        ],
    ),
    "append": (
        lambda **x: cache().append(**x),
        {"key": ROWS["key"][:, :, :2], "value": ROWS["key"][:, :, :2]},
        [({"value": None}, "value: expected a tensor, got None")],
    ),
    "crop": (
        lambda length: cache().crop(length),
        {"length": 3},
        [({"length": 3.5}, "length: expected an int, got 3.5")],
    ),
    "StaircaseCache": (cache, {}, [({"window": 64.0}, "window: expected an int, got 64.0")]),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_call_is_right(name: str, backend: object) -> None:
    function, arguments, _ = CALLS[name]
    function(**arguments)


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [(name, wrong, message) for name, (_, _, cases) in CALLS.items() for wrong, message in cases],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_wrong_arguments_are_named(name: str, wrong: dict[str, Any], message: str, backend: object) -> None:
    function, arguments, _ = CALLS[name]
    with pytest.raises(RuntimeError) as error:
        function(**arguments | wrong)
    assert str(error.value).startswith(message)


def test_integers_of_numpy_are_integers(backend: object) -> None:
    expected = attnx.softmax_attention(**INPUTS, window=(3, 5), scale=0.5)
    assert torch.equal(
        attnx.softmax_attention(**INPUTS, window=(np.int32(3), np.int64(5)), scale=np.float32(0.5)), expected
    )
    sizes = {name: np.int64(x) if isinstance(x, int) else x for name, x in SIZES.items()}
    assert torch.equal(
        attnx.softmax_attention_varlen(**PACKED, **sizes), attnx.softmax_attention_varlen(**PACKED, **SIZES)
    )
    shares = {"critical": np.float64(0.5), "protect": np.int16(3), "block_size": (np.int64(64), 64)}
    assert attnx.sparse_linear_block_map(**ROWS, **shares) == attnx.sparse_linear_block_map(
        **ROWS, critical=0.5, protect=3
    )
    every = attnx.sparse_linear_block_map(**ROWS, protect=2**70)  # more than an operator's int holds
    assert bool((every.labels == 1).all())
    sampled = attnx.probabilistic_block_mask(*(np.int64(n) for n in (1, 2, 3, 4)), seed=np.int64(3), offset=np.int8(0))
    assert sampled == attnx.probabilistic_block_mask(1, 2, 3, 4, seed=3, offset=0)
    assert repr(cache(window=np.int64(64))) == repr(cache(window=64))


@pytest.mark.parametrize(("rule", "value"), [("length", 0.0), ("row", 0.0), ("none", 0.5)])
def test_operators_refuse_a_bias_of_softmax(rule: str, value: float, backend: object) -> None:
    """Every operator that has a choice of scores refuses what the functions refuse."""
    lists = None, None, MASK.kv_num_blocks, MASK.kv_indices
    terms = None, None, None, None, None, None, 0.0, None, None
    with pytest.raises(
        RuntimeError, match=f"^bias: expected none with score softmax, got bias_rule {rule} and bias_val"
    ):
        torch.ops.attnx.block_sparse_attention(
            *INPUTS.values(), *lists, None, None, *terms, 64, 64, "softmax", rule, value, None, False
        )


def test_memory_that_is_not_there_is_named(backend: object) -> None:
    """More than an address has bits for, of which the query, expanded, takes next to none."""
    query, key = torch.zeros(1, 1, 1, 64).expand(1, 1000, 10**9, 64), torch.zeros(1, 1000, 4, 64)
    with pytest.raises(RuntimeError) as error:
        attnx.softmax_attention(query, key, key)
    expected = "memory: expected 2.56e+14 bytes on cpu for a result of shape (1, 1000, 1000000000, 64), got none"
    assert str(error.value) == f"softmax_attention: {expected}"


# Gradients of what may be a number or a tensor ------------------------------------------------------------------------


def temperatures() -> list[Tensor]:
    return [torch.tensor(0.3), torch.tensor([0.3, 0.7])]


@pytest.mark.parametrize("scale", temperatures(), ids=["one", "by_head"])
@pytest.mark.parametrize(
    "name", ["sigmoid_attention", "softmax_attention", "block_sparse_attention", "routing_attention"]
)
def test_scale_gets_a_gradient(name: str, scale: Tensor, backend: object) -> None:
    _, arguments, _ = CALLS[name]
    learned = scale.double().requires_grad_()
    (gradient,) = torch.autograd.grad(getattr(attnx, name)(**arguments, scale=learned).square().sum(), learned)
    reference = getattr(attnx.reference, name)(**arguments, scale=learned)
    (expected,) = torch.autograd.grad(reference.square().sum(), learned)
    assert gradient.shape == scale.shape
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)
    if scale.dim() == 0:  # the same as a number
        output = getattr(attnx, name)(**arguments, scale=learned)
        torch.testing.assert_close(output, getattr(attnx, name)(**arguments, scale=0.3))


def test_scale_of_packed_sequences(backend: object) -> None:
    scale = torch.tensor([0.1, 0.2, 0.3, 0.4], requires_grad=True)
    output = attnx.softmax_attention_varlen(**PACKED, **SIZES, scale=scale)
    assert isinstance(output, Tensor)
    for h, factor in enumerate(scale.tolist()):
        by_number = attnx.softmax_attention_varlen(**PACKED, **SIZES, scale=factor)
        torch.testing.assert_close(output[:, h], by_number[:, h])
    assert torch.autograd.grad(output.sum(), scale)[0].shape == (4,)


def test_scale_of_a_cache(backend: object) -> None:
    output = cache().attend(INPUTS["query"], scale=torch.tensor(0.3))
    torch.testing.assert_close(output, cache().attend(INPUTS["query"], scale=0.3))


def test_centroids_that_learn_are_refused_only_where_they_would(backend: object) -> None:
    centroids = torch.nn.Parameter(CENTROIDS.clone())
    with torch.no_grad():
        attnx.routing_attention(**INPUTS, routes=centroids, cluster_size=8)
    with pytest.raises(RuntimeError, match=r"^centroids: expected a tensor that needs no gradient"):
        attnx.nearest_centroids(INPUTS["query"], centroids)
