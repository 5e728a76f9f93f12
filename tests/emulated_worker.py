"""Every CUDA kernel at small shapes, forward and backward: what test_emulated runs in a process of its own.

``python emulated_worker.py FILE`` saves the results there, by call and name. How the emulator is to schedule, and what
it is to check, stands in the environment; and where that asks for the mainloop sm90, the calls are those it serves.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

import attnx
from cases import Shape, pack, random_inputs, random_parameter
from compare import forward_backward
from delta_rule_cases import DeltaShape, delta_inputs
from logit_terms import GRADIENTS, draw_term, terms_of
from routing_cases import random_centroids, random_memory, with_memory
from staircase_cases import SMALL, cache_of, tokens

CPU = torch.device("cpu")
SCORES = ["sigmoid", "softmax"]
DTYPES = [torch.bfloat16, torch.float16]
ROUTED_HEAD_DIMS = [(torch.bfloat16, 64), (torch.bfloat16, 128), (torch.bfloat16, 256), (torch.float16, 64)]
PADDED_HEAD_DIMS = [32, 64, 96, 128, 192, 256]

Results = dict[str, Tensor]


def hopper_calls() -> Iterator[tuple[str, Results]]:
    """float16 shares all with bfloat16 but the arithmetic."""
    for score, head_dim in product(SCORES, [64, 128, 256]):
        yield f"{score} {head_dim} float16", _hopper_dense(score, torch.float16, head_dim)
        for kind in (_hopper_dense, _hopper_causal, _hopper_varlen, _hopper_shares, _hopper_many, *LISTED):
            yield f"{score} {head_dim} {kind.__name__[1:]}", kind(score, torch.bfloat16, head_dim)
    for score, dtype, head_dim in product(SCORES, DTYPES, [64, 128]):
        yield f"{score} {dtype} {head_dim} hopper_terms", _hopper_terms(score, dtype, head_dim)
    for dtype, head_dim in product(DTYPES, [64, 128, 256]):
        yield from softplus_calls(dtype, head_dim)
    for score, (dtype, head_dim) in product(SCORES, ROUTED_HEAD_DIMS):
        for kind in (_hopper_routing, _hopper_argmax_routing, _routing, _large_clusters):
            yield f"{score} {dtype} {head_dim} {kind.__name__[1:]}", kind(score, dtype, head_dim)
    yield from _block_maps()
    yield from _sparse_linear([48, 128, 256])


def softplus_calls(dtype: torch.dtype, head_dim: int, *powers: int | None) -> Iterator[tuple[str, Results]]:
    """Whole tiles and masked ones, heads that share keys, a packed batch; plain, or by these powers."""
    shape = Shape(length_q=200, length_k=290, head_dim=head_dim, heads=2, kv_heads=1)
    packed = pack(([70, 0, 9, 130], [80, 7, 130, 200]), dtype, CPU, head_dim=head_dim, value_dim=head_dim)
    for sharpen in powers or (None,):
        options = {"is_causal": True, "sharpen": sharpen}
        name = f"softplus {sharpen} {dtype} {head_dim}"
        yield name, _run("softplus_attention", *random_inputs(shape, dtype, CPU), **options)
        inputs, grad_output, sizes = packed
        yield f"{name} varlen", _run("softplus_attention_varlen", inputs, grad_output, **options, **sizes)


def _hopper_dense(score: str, dtype: torch.dtype, head_dim: int) -> Results:
    """Every addition to the logits; several heads in a tile of rows; sums of more than two tiles of keys."""
    shape = Shape(length_q=130, length_k=290, head_dim=head_dim, heads=2, kv_heads=1)
    inputs, grad_output = random_inputs(shape, dtype, CPU)
    inputs["alibi_slopes"] = random_parameter((shape.heads,), dtype, CPU)
    if score == "sigmoid":
        inputs["bias"] = random_parameter((shape.heads,), dtype, CPU) - 4
    return _run(f"{score}_attention", inputs, grad_output)


def _hopper_causal(score: str, dtype: torch.dtype, head_dim: int) -> Results:
    """Masked tiles and whole ones; a padded head dimension; heads that do not fit a tile together."""
    shape = Shape(length_q=200, length_k=400, head_dim=head_dim - 24, heads=5, kv_heads=1)
    return _run(f"{score}_attention", *random_inputs(shape, dtype, CPU), is_causal=True)


def _hopper_varlen(score: str, dtype: torch.dtype, head_dim: int) -> Results:
    lengths = ([70, 0, 9, 130], [80, 7, 130, 200])
    inputs, grad_output, sizes = pack(lengths, dtype, CPU, head_dim=head_dim, value_dim=head_dim)
    return _run(f"{score}_attention_varlen", inputs, grad_output, is_causal=True, **sizes)


def _hopper_shares(score: str, dtype: torch.dtype, head_dim: int) -> Results:
    shape = Shape(length_q=70, length_k=900, head_dim=head_dim, heads=1)
    return _forward(f"{score}_attention", random_inputs(shape, dtype, CPU)[0])


def _hopper_many(score: str, dtype: torch.dtype, head_dim: int) -> Results:
    """More tiles of rows than blocks."""
    shape = Shape(length_q=65, length_k=65, head_dim=head_dim, heads=140)
    return _forward(f"{score}_attention", random_inputs(shape, dtype, CPU)[0])


def _hopper_routing(score: str, dtype: torch.dtype, head_dim: int) -> Results:
    """Two tiles of rows and three or more of keys to a cluster, with a memory; more tiles than blocks."""
    shape = Shape(length_q=200, length_k=330, head_dim=head_dim, heads=35)
    inputs, _ = random_inputs(shape, dtype, CPU)
    memory = random_memory(35, 9, head_dim, head_dim, dtype)
    options = {"routes": random_centroids(35, 2, head_dim), "cluster_size": 135, "shared_qk": False, "score": score}
    inputs |= {"memory_kv": tuple(memory.values())}
    return _forward("routing_attention", inputs, is_causal=True, **options)


def _hopper_argmax_routing(score: str, dtype: torch.dtype, head_dim: int) -> Results:
    """Ragged clusters; heads that share keys; a padded head dimension."""
    shape = Shape(length_q=260, length_k=500, head_dim=head_dim - 8, heads=2, kv_heads=1)
    options = {"routes": random_centroids(2, 3, head_dim - 8), "routing": "argmax", "score": score}
    return _forward("routing_attention", random_inputs(shape, dtype, CPU)[0], **options)


def _forward(operator: str, inputs: dict[str, Any], **options: Any) -> Results:
    return {"output": getattr(attnx, operator)(**inputs, **options)}


def calls() -> Iterator[tuple[str, Results]]:
    """The name of each call and its results."""
    for score, dtype, head_dim in product(SCORES, DTYPES, PADDED_HEAD_DIMS):
        listed = LISTED if dtype == torch.bfloat16 else LISTED[:1]  # float16 shares the rest
        for kind in (_dense, _causal, _window, _varlen, _decode, *listed):
            yield f"{score} {dtype} {head_dim} {kind.__name__[1:]}", kind(score, dtype, head_dim)
    for score, dtype, head_dim in product(SCORES, DTYPES, [64, 128, 256]):
        yield f"{score} {dtype} {head_dim} weights", _weights(score, dtype, head_dim)
        yield f"{score} {dtype} {head_dim} unaligned weights", _weights(score, dtype, head_dim - 3)
        for kind in (_terms, _shared_terms) if dtype == torch.bfloat16 else (_terms,):
            yield f"{score} {dtype} {head_dim} {kind.__name__[1:]}", kind(score, dtype, head_dim)
    for dtype, head_dim in product(DTYPES, [64, 128, 256]):
        yield from softplus_calls(dtype, head_dim, None, 3)
    for score, kind in product(SCORES, (_packed_terms, _listed_terms, _distances)):
        yield f"{score} {kind.__name__[1:]}", kind(score)
    for score, dtype, head_dim in product(SCORES, DTYPES, [64, 128]):
        yield f"{score} {dtype} {head_dim} tangents", _tangents(score, dtype, head_dim)
        yield f"{score} {dtype} {head_dim} unaligned tangents", _tangents(score, dtype, head_dim - 3)
    yield from _block_maps()
    yield from _sparse_linear([45, 128, 256])
    for dtype, (head_dim, levels) in product(DTYPES, [(64, (16, 8, 4, 2)), (128, (16, 8, 4, 1)), (160, (16, 8))]):
        yield f"staircase {dtype} {head_dim}", staircase(dtype, head_dim, levels)
    yield from routing_calls()
    yield from state_calls()


def state_calls() -> Iterator[tuple[str, Results]]:
    """Several segments, tiles of columns and chunks; few tokens. Less shared memory makes the same tiles of them."""
    for dtype, feature_map, is_causal in product(DTYPES, ["taylor", "softmax"], [True, False]):
        shape = Shape(290, 290 if is_causal else 140, 6, value_dim=75, heads=4, kv_heads=2)
        inputs, _ = random_inputs(shape, dtype, CPU)
        features = 28 if feature_map == "taylor" else 6
        inputs["initial_state"] = random_parameter((1, 2, features, 76), torch.float32, CPU).abs()
        options = {"feature_map": feature_map, "is_causal": is_causal}
        yield f"linear {dtype} {options}", _with_state(attnx.linear_attention, inputs, **options)
    for dtype, length in product(DTYPES, [3, 130]):
        inputs = delta_inputs(DeltaShape(1, 2, 4, length, 24, 70), dtype)
        yield f"delta rule {dtype} {length}", _with_state(attnx.gated_delta_rule, inputs)


def _with_state(function: Any, inputs: dict[str, Tensor], **options: Any) -> Results:
    def both(**inputs: Tensor) -> Tensor:
        output, state = function(**inputs, **options, return_state=True)
        return torch.cat((output.flatten(), state.flatten().to(output.dtype)))

    return forward_backward(both, inputs, torch.ones_like(both(**inputs)))


def _block_maps() -> Iterator[tuple[str, Results]]:
    """Aligned queries and others; packed ones; a row of blocks that does not fit in shared memory.

    64 blocks fill whole tiles of CUTLASS, which reads, but does not use, what no copy has written of others.
    """
    options: dict[str, Any] = {"critical": 0.3, "negligible": 0.3, "smooth_k": True}
    for dtype, head_dim in product(DTYPES, [45, 128]):
        inputs, _ = random_inputs(Shape(4090, 4050, head_dim, heads=2, kv_heads=1), dtype, CPU)
        block_map = attnx.sparse_linear_block_map(inputs["query"], inputs["key"], is_causal=True, **options)
        yield f"block map {dtype} {head_dim}", {"labels": block_map.labels.float()}
        inputs, _, sizes = pack(([70, 4050, 0], [4090, 7, 130]), dtype, CPU, 2, 1, head_dim)
        block_map = attnx.sparse_linear_block_map_varlen(inputs["query"], inputs["key"], **sizes, **options)
        yield f"block map {dtype} {head_dim} varlen", {"labels": block_map.labels.float()}
    products = torch.randn(1, 1, 1, 60_001, generator=torch.Generator().manual_seed(0))
    labels = torch.ops.attnx.sparse_linear_labels(products, 64, 60_001 * 64, 64, 64, 0.1, 0.1, "ceil", False, 0)
    yield "labels of a long row", {"labels": labels.float()}


def _sparse_linear(head_dims: list[int]) -> Iterator[tuple[str, Results]]:
    """Every width of the linear branch's tiles; blocks that some queries see; packed rows, not all on 16 bytes."""
    generator = torch.Generator().manual_seed(0)

    def options(block_size: tuple[int, int], shape: tuple[int, ...], is_causal: bool) -> dict[str, Any]:
        labels = torch.randint(-1, 2, shape, generator=generator, dtype=torch.int8)
        block_map = attnx.SparseLinearMap(labels, block_size)
        return {"block_map": block_map, "linear_scope": "all", "is_causal": is_causal}

    for dtype, head_dim in [*((torch.bfloat16, d) for d in head_dims), (torch.float16, 64)]:
        shape = Shape(length_q=200, length_k=330, head_dim=head_dim, heads=2, kv_heads=1)
        for own in (options((128, 64), (1, 2, 2, 6), False), options((64, 128), (1, 2, 4, 3), True)):
            results = _run_parts("sparse_linear_attention", *random_inputs(shape, dtype, CPU), **own)
            yield f"sparse linear {dtype} {head_dim} {own['is_causal']}", results
        inputs, grad_output, sizes = pack(([70, 0, 9, 130], [80, 7, 130, 200]), dtype, CPU, 2, 1, head_dim)
        own = options((64, 64), (4, 2, 3, 4), True)
        for b, (rows, blocks) in enumerate(((2, 2), (0, 1), (1, 3), (3, 4))):
            own["block_map"].labels[b, :, rows:] = own["block_map"].labels[b, :, :, blocks:] = -1
        results = _run_parts("sparse_linear_attention_varlen", inputs, grad_output, **own, **sizes)
        yield f"sparse linear {dtype} {head_dim} varlen", results


def _run_parts(operator: str, inputs: dict[str, Tensor], grad_output: Tensor, **options: Any) -> Results:
    def attention(**leaves: Any) -> Tensor:
        sparse, linear = getattr(attnx, operator)(**leaves)
        return sparse - linear

    torch.use_deterministic_algorithms(True)
    results = forward_backward(attention, inputs, grad_output, **options)
    torch.use_deterministic_algorithms(False)
    return results


def routing_calls() -> Iterator[tuple[str, Results]]:
    """Clusters that overlap, whose keys are others than their queries and come with a memory; and ragged ones."""
    for score, (dtype, head_dim) in product(SCORES, ROUTED_HEAD_DIMS):
        yield f"{score} {dtype} {head_dim} routing", _routing(score, dtype, head_dim)
        yield f"{score} {dtype} {head_dim} argmax_routing", _argmax_routing(score, dtype, head_dim)


def _routing(score: str, dtype: torch.dtype, head_dim: int, length: int = 150, cluster_size: int = 90) -> Results:
    inputs, grad_output = random_inputs(Shape(length, length, head_dim, heads=2), dtype, CPU)
    inputs |= random_memory(2, 3, head_dim, head_dim, dtype)
    options = {"routes": random_centroids(2, 2, head_dim), "is_causal": True, "shared_qk": False, "score": score}
    return _run("routing_attention", inputs, grad_output, cluster_size=cluster_size, **options)


def _large_clusters(score: str, dtype: torch.dtype, head_dim: int) -> Results:
    """Three tiles of keys and more to a cluster, which add to the gradients of the same queries."""
    return _routing(score, dtype, head_dim, length=290, cluster_size=270)


def _argmax_routing(score: str, dtype: torch.dtype, head_dim: int) -> Results:
    """Rows that do not start on 16 bytes; heads that share keys; centroids that move."""
    shape = Shape(length_q=90, length_k=110, head_dim=head_dim - 3, heads=2, kv_heads=1)
    inputs, grad_output = random_inputs(shape, dtype, CPU)
    centroids, counts = random_centroids(2, 3, shape.head_dim), torch.ones(2, 3)
    attnx.update_centroids_(centroids, counts, inputs["query"], inputs["key"], decay=0.5)
    options = {"routes": centroids, "routing": "argmax", "score": score}
    results = _run("routing_attention", inputs, grad_output, **options)
    return results | {"centroids": centroids, "counts": counts}


def _dense(score: str, dtype: torch.dtype, head_dim: int) -> Results:
    """Wide tiles, every addition to the logits."""
    shape = Shape(length_q=130, length_k=150, head_dim=head_dim, heads=2, kv_heads=1)
    inputs, grad_output = random_inputs(shape, dtype, CPU)
    inputs["alibi_slopes"] = random_parameter((shape.heads,), dtype, CPU)
    if score == "sigmoid":
        inputs["bias"] = random_parameter((shape.heads,), dtype, CPU) - 4
    return _run(f"{score}_attention", inputs, grad_output)


def _causal(score: str, dtype: torch.dtype, head_dim: int) -> Results:
    """Narrow tiles."""
    shape = Shape(length_q=40, length_k=150, head_dim=head_dim, heads=1)
    return _run(f"{score}_attention", *random_inputs(shape, dtype, CPU), is_causal=True)


def _window(score: str, dtype: torch.dtype, head_dim: int) -> Results:
    """Rows that do not start on 16 bytes."""
    shape = Shape(length_q=150, length_k=140, head_dim=head_dim - 3, heads=1)
    return _run(f"{score}_attention", *random_inputs(shape, dtype, CPU), window=(50, 20))


def _varlen(score: str, dtype: torch.dtype, head_dim: int) -> Results:
    inputs, grad_output, sizes = pack(([70, 0, 9], [80, 7, 130]), dtype, CPU, head_dim=head_dim, value_dim=head_dim)
    return _run(f"{score}_attention_varlen", inputs, grad_output, is_causal=True, **sizes)


def _decode(score: str, dtype: torch.dtype, head_dim: int) -> Results:
    """One query and many keys, which several blocks share."""
    shape = Shape(length_q=1, length_k=700, head_dim=head_dim, heads=4, kv_heads=1)
    return _run(f"{score}_attention", *random_inputs(shape, dtype, CPU))


def _visited() -> Tensor:
    """The blocks that two heads visit."""
    return torch.tensor([[[[1, 0, 1, 0], [1, 1, 0, 1], [0, 0, 1, 1]], [[0, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]]])


def _block_sparse(score: str, dtype: torch.dtype, head_dim: int) -> Results:
    shape = Shape(length_q=150, length_k=200, head_dim=head_dim, heads=2)
    mask = attnx.BlockMask.from_dense(_visited().bool(), (64, 64))
    inputs, grad_output = random_inputs(shape, dtype, CPU)
    inputs["block_bias"] = torch.linspace(-1, 1, 24).view(mask.kv_indices.shape)
    return _run("block_sparse_attention", inputs, grad_output, block_mask=mask, score=score)


def _weights(score: str, dtype: torch.dtype, head_dim: int) -> Results:
    """Tiles that a window cuts, of heads that share keys."""
    inputs, _ = random_inputs(Shape(length_q=150, length_k=200, head_dim=head_dim, heads=2, kv_heads=1), dtype, CPU)
    del inputs["value"]
    results = {"maxima": attnx.attention_max_logits(**inputs, window=(90, 20))}
    mask = torch.rand(150, 200, generator=torch.Generator().manual_seed(0)) < 0.8
    drawn = attnx.pointer_sample(**inputs, window=(90, 20), softcap=5.0, attn_mask=mask, seed=1, offset=2)
    results["drawn"] = drawn.float()
    for name in ("attention_key_weights", "attention_row_weights"):
        results[name] = getattr(attnx, name)(**inputs, score=score, window=(90, 20))
    return results


def _terms(score: str, dtype: torch.dtype, head_dim: int) -> Results:
    """Every term of a logit, each with its gradient, in tiles that a window cuts."""
    shape = Shape(length_q=100, length_k=90, head_dim=head_dim, heads=2, kv_heads=1)
    inputs, grad_output = random_inputs(shape, dtype, CPU)
    terms = terms_of(("softcap", "attn_mask", "key_bias", "key_mask", "dropout"), shape, dtype, CPU)
    return _run(f"{score}_attention", inputs, grad_output, window=(70, 20), **terms)


def _hopper_terms(score: str, dtype: torch.dtype, head_dim: int) -> Results:
    """Every term of a logit, of a forward alone, in tiles that a window cuts, and in lists."""
    shape = Shape(length_q=256, length_k=320, head_dim=head_dim, heads=2, kv_heads=1)
    inputs, _ = random_inputs(shape, dtype, CPU)
    terms = terms_of(("softcap", "attn_mask", "key_bias", "key_mask", "dropout"), shape, dtype, CPU)
    mask = attnx.BlockMask.from_dense(torch.ones(1, 1, 4, 5).tril(1).bool(), (64, 64))
    listed = {name: x for name, x in terms.items() if name in ("attn_mask", "key_bias", "key_mask")}
    return {
        "dense": getattr(attnx, f"{score}_attention")(**inputs, window=(150, 100), **terms),
        "listed": attnx.block_sparse_attention(**inputs, block_mask=mask, score=score, **listed),
    }


def _shared_terms(score: str, dtype: torch.dtype, head_dim: int) -> Results:
    """Numbers that all sequences and heads share; rows that do not start on 16 bytes, and an odd number of keys."""
    shape = Shape(length_q=70, length_k=75, head_dim=head_dim - 3, batch=2, heads=2)
    inputs, grad_output = random_inputs(shape, dtype, CPU)
    terms = terms_of(("input_mask", "key_bias", "key_mask", "row_bounds"), shape, dtype, CPU, "all")
    return _run(f"{score}_attention", inputs, grad_output, is_causal=True, **terms)


def _distances(score: str) -> Results:
    """Numbers by distance that heads share, in bands of narrow tiles that a window cuts, and in lists."""
    dtype, shape = torch.bfloat16, Shape(length_q=150, length_k=200, head_dim=256, batch=2, heads=2, kv_heads=1)
    inputs, grad_output = random_inputs(shape, dtype, CPU)
    inputs |= terms_of(("distance_bias",), shape, dtype, CPU, "heads")
    mask = attnx.BlockMask.from_dense(_visited().bool(), (64, 64))
    listed = _run("block_sparse_attention", inputs, grad_output, block_mask=mask, score=score)
    dense = _run(f"{score}_attention", inputs, grad_output, window=(70, 20))
    return dense | {f"{name}_listed": x for name, x in listed.items()}


def _tangents(score: str, dtype: torch.dtype, head_dim: int) -> Results:
    """Masked tiles and whole ones, and each set of tangents."""
    shape = Shape(length_q=70, length_k=200, head_dim=head_dim, heads=2, kv_heads=1)
    inputs, directions = (tuple(random_inputs(shape, dtype, CPU, seed=seed)[0].values()) for seed in range(2))
    bias = ("length", 0.0) if score == "sigmoid" else ()
    along = getattr(torch.ops.attnx, f"{score}_attention_jvp")
    results = {}
    for given in product([False, True], repeat=3):
        tangents = [x if wanted else None for x, wanted in zip(directions, given, strict=True)]
        for i, x in enumerate(along(*inputs, *tangents, *bias, None, False, 130, 20, 0)):
            results[f"{given} {i}"] = x
    return results


def _packed_terms(score: str) -> Results:
    dtype = torch.bfloat16
    inputs, grad_output, sizes = pack(([70, 0, 9], [80, 7, 130]), dtype, CPU, head_dim=64, value_dim=64)
    shape = Shape(length_k=len(inputs["key"]), heads=inputs["query"].shape[1])
    terms = {name: draw_term(name, shape, dtype, CPU)[0] for name in ("key_bias", "key_mask")}
    return _run(f"{score}_attention_varlen", inputs, grad_output, **terms, **sizes)


def _listed_terms(score: str) -> Results:
    """Lists of their own for two heads that share a mask, which has rows of its own."""
    dtype, shape = torch.bfloat16, Shape(length_q=150, length_k=200, head_dim=64, heads=2)
    mask = attnx.BlockMask.from_dense(_visited().bool(), (64, 64))
    mask = replace(mask, row_bounds=draw_term("row_bounds", shape, dtype, CPU))
    inputs, grad_output = random_inputs(shape, dtype, CPU)
    inputs["block_bias"] = torch.linspace(-1, 1, 24).view(mask.kv_indices.shape)
    terms = terms_of(("attn_mask", "key_bias", "key_mask"), shape, dtype, CPU, "heads")
    return _run("block_sparse_attention", inputs, grad_output, block_mask=mask, score=score, **terms)


def _tall_blocks(score: str, dtype: torch.dtype, head_dim: int) -> Results:
    """Tiles of 128 rows and 64 keys, and what makes up for the blocks that are left out."""
    return _probabilistic(score, dtype, head_dim, block_size=(128, 64), importance=True)


def _large_blocks(score: str, dtype: torch.dtype, head_dim: int) -> Results:
    """Tiles of 128 rows and keys, as many in each row."""
    return _probabilistic(score, dtype, head_dim, block_size=(128, 128), mode="topm", is_causal=True)


def _probabilistic(score: str, dtype: torch.dtype, head_dim: int, **options: Any) -> Results:
    shape = Shape(length_q=260, length_k=300, head_dim=head_dim, heads=1)
    inputs, grad_output = random_inputs(shape, dtype, CPU)
    return _run("probabilistic_attention", inputs, grad_output, score=score, seed=1, offset=2, **options)


LISTED = (_block_sparse, _tall_blocks, _large_blocks)


def staircase(dtype: torch.dtype, head_dim: int, levels: tuple[int, ...]) -> Results:
    """Appends that fill windows, shares of several blocks, the tail, a chunk, and a crop that cuts a window open.

    With 128 features blocks quantise a group in two turns.
    """
    key, value = tokens(420, heads=1, head_dim=head_dim, dtype=dtype)
    layout = SMALL | {"group": 64 if head_dim == 128 else 32, "residual": 20, "levels": levels}
    cache = cache_of(key[:, :, :63], value[:, :, :63], 600, **layout)
    for k, v in zip(key[:, :, 63:].split((1, 200, 156), 2), value[:, :, 63:].split((1, 200, 156), 2), strict=True):
        cache.append(k, v)
    query = torch.randn(2, 4, 3, head_dim, generator=torch.Generator().manual_seed(1)).to(dtype)
    with attnx.cuda_mainloop("decode"):  # also where the environment asks for another one
        softmax, logsumexp = cache.attend(query, return_logsumexp=True)
        sigmoid = cache.attend(query, score="sigmoid", query_lengths=torch.tensor([3, 1]))
    assert isinstance(sigmoid, Tensor)
    chunk = torch.randn(2, 4, 37, head_dim, generator=torch.Generator().manual_seed(2)).to(dtype)
    chunk_softmax, chunk_logsumexp = cache.attend(chunk, return_logsumexp=True, query_lengths=torch.tensor([37, 20]))
    chunk_sigmoid = cache.attend(chunk, score="sigmoid")
    assert isinstance(chunk_sigmoid, Tensor)
    of_chunk = {"chunk softmax": chunk_softmax, "chunk logsumexp": chunk_logsumexp, "chunk sigmoid": chunk_sigmoid}
    cache.crop(torch.tensor([-9, 100]))
    read = dict(zip(("key", "value"), cache.dequantize(), strict=True))
    return {"softmax": softmax, "logsumexp": logsumexp, "sigmoid": sigmoid, **of_chunk, **read}


def _run(operator: str, inputs: dict[str, Tensor], grad_output: Tensor, **options: Any) -> Results:
    """Results in the order that does not depend on the schedule, and gradients in the one that may, as ``fast_``.

    Terms are inputs, too.
    """
    terms = {name: options.pop(name) for name in GRADIENTS if name in options}
    inputs = inputs | terms
    attention = getattr(attnx, operator)
    if operator == "routing_attention":
        attention = with_memory(attention)
    torch.use_deterministic_algorithms(True)
    results = forward_backward(attention, inputs, grad_output, **options)
    torch.use_deterministic_algorithms(False)
    fast = forward_backward(attention, inputs, grad_output, **options)
    return results | {f"fast_{name}": x for name, x in fast.items() if name != "output"}


if __name__ == "__main__":
    torch.save(dict(hopper_calls() if attnx._C.cuda_mainloop() == "sm90" else calls()), sys.argv[1])
