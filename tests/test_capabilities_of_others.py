"""Random calls of the operators over lists, clusters and caches, drawn from the capability table like those of the
dense ones in test_capabilities.py: whatever the table promises must work, forward and backward."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import attnx
from attnx import reference
from attnx._capability import Capability, table
from attnx._operators.linear_state import features
from backends import Backend
from calls import has_kernel, random_positions
from cases import Shape, pack, random_inputs, random_parameter
from compare import forward_backward
from delta_rule_cases import DeltaShape, delta_inputs, with_state
from routing_cases import eager_routing_attention, random_centroids, random_memory, with_memory

# The largest error over the largest number, or the largest of the terms whose difference it is: a few times what
# rounding of weights and results makes of it.
BOUNDS = {torch.float64: 1e-10, torch.float32: 2e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}


class Call(NamedTuple):
    own: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    terms: Callable[..., Tensor]  # its gradients are the terms whose sums and differences the reference's are
    inputs: dict[str, Tensor]


def one(function: Callable[..., Any], **options: Any) -> Callable[..., Tensor]:
    """The function's results as one tensor."""

    def call(**inputs: Tensor) -> Tensor:
        results = function(**inputs, **options)
        if not isinstance(results, tuple):
            return results
        return torch.cat([finite(x).to(results[0]) if x.dim() < results[0].dim() else x for x in results], -1)

    return call


def finite(logsumexp: Tensor) -> Tensor:
    """The logsumexp as a column; that of a row which sees no key is -inf, and 0 stands for it."""
    return logsumexp.where(logsumexp.isfinite(), 0.0)[..., None]


def with_constant_sums(reference: Callable[..., Any], **options: Any) -> Callable[..., Tensor]:
    """The definition whose softmax divides by a sum that is not differentiated.

    The gradient of a softmax's logit is P (dP - delta), which cancels where few keys take the whole weight; this one's
    is P dP. The factor is exp(logsumexp - logsumexp), whose value is 1.
    """
    if options.get("score") == "sigmoid":
        return one(reference, **options)

    def call(**inputs: Tensor) -> Tensor:
        output, logsumexp = reference(**inputs, **options | {"return_logsumexp": True})
        column = finite(logsumexp)
        output = output * (column - column.detach()).exp()
        return torch.cat([output, column], -1) if options.get("return_logsumexp") else output

    return call


def call_of(name: str, inputs: dict[str, Tensor], **options: Any) -> Call:
    """A call of the function of that name, which can return its logsumexp."""
    own, definition = getattr(attnx, name), getattr(reference, name)
    return Call(one(own, **options), one(definition, **options), with_constant_sums(definition, **options), inputs)


def shapes(draw: st.DrawFn, row: Capability) -> Shape:
    features, head_dims = set(row.features), st.integers(*row.head_dim)
    kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3)) if "grouped_queries" in features else 1
    head_dim = draw(head_dims)
    return Shape(
        length_q=draw(st.integers(1, 150)),
        length_k=draw(st.integers(2, 150)),
        head_dim=head_dim,
        value_dim=draw(head_dims) if "value_dim" in features else head_dim,
        batch=draw(st.integers(1, 2)),
        heads=kv_heads * group,
        kv_heads=kv_heads,
    )


def of_score(draw: st.DrawFn, row: Capability) -> dict[str, Any]:
    score = draw(st.sampled_from(["softmax", "sigmoid"]))
    options = {"score": score, "is_causal": draw(st.booleans())}
    if score == "sigmoid":
        return options | {"bias": draw(st.sampled_from([None, "row", -2.0]))}
    return options | ({"return_logsumexp": draw(st.booleans())} if "logsumexp" in row.features else {})


def block_sparse(draw: st.DrawFn, row: Capability, dtype: torch.dtype, device: torch.device) -> Call:
    shape, options = shapes(draw, row), of_score(draw, row)
    block_size = draw(st.tuples(*[st.sampled_from([64, 128])] * 2))
    blocks = -(-shape.length_q // block_size[0]), -(-shape.length_k // block_size[1])
    visited = torch.rand(shape.batch, shape.heads, *blocks, generator=torch.Generator().manual_seed(0)) < 0.7
    options["block_mask"] = mask = attnx.BlockMask.from_dense(visited.to(device), block_size)
    inputs, _ = random_inputs(shape, dtype, device)
    if options["score"] == "softmax" and draw(st.booleans()):
        inputs["sink"] = random_parameter((shape.heads,), dtype, device)
    if draw(st.booleans()):
        bias = random_parameter(tuple(mask.kv_indices.shape), torch.float32, device)
        (inputs if "block_bias_gradient" in row.features else options)["block_bias"] = bias
    return call_of("block_sparse_attention", inputs, **options)


def disentangled(draw: st.DrawFn, row: Capability, dtype: torch.dtype, device: torch.device) -> Call:
    shape = shapes(draw, row)
    inputs, _ = random_inputs(shape, dtype, device)
    span = draw(st.integers(2, 9))
    index = attnx.log_distance_buckets(shape.length_q, shape.length_k, span=span, max_distance=40, device=device)
    names = draw(st.sampled_from([["pos_key"], ["pos_query"], ["pos_key", "pos_query"]]))
    inputs |= {name: random_positions((shape.heads, 2 * span, shape.head_dim), dtype, device) for name in names}
    # tests/test_disentangled.py tries the other features.
    options: dict[str, Any] = {"index": index, "is_causal": draw(st.booleans())}
    if draw(st.booleans()):
        options["window"] = draw(st.tuples(st.integers(-1, 99), st.integers(-1, 99)))
    return call_of("disentangled_attention", inputs, **options)


def softplus(draw: st.DrawFn, row: Capability, dtype: torch.dtype, device: torch.device) -> Call:
    shape = shapes(draw, row)
    inputs, _ = random_inputs(shape, dtype, device)
    # tests/test_softplus.py tries the other features.
    options: dict[str, Any] = {"is_causal": draw(st.booleans())}
    if draw(st.booleans()):
        options["window"] = draw(st.tuples(st.integers(-1, 99), st.integers(-1, 99)))
    if row.operator.startswith("sharpened"):
        options["sharpen"] = draw(st.integers(2, 3))  # a higher power says more of the rounding of inputs
    own, definition = (one(module.softplus_attention, **options) for module in (attnx, reference))
    terms = one(reference.softplus_attention, **options)
    return Call(own, definition, terms, inputs)


def weights(draw: st.DrawFn, row: Capability, dtype: torch.dtype, device: torch.device) -> Call:
    shape, options = shapes(draw, row), of_score(draw, row)
    inputs, _ = random_inputs(shape, dtype, device)
    del inputs["value"]
    first = draw(st.integers(0, shape.length_q - 1))
    options["rows"] = draw(st.sampled_from([None, range(first, shape.length_q), range(first + 1)]))
    if draw(st.booleans()):
        options |= {"is_causal": False, "window": draw(st.tuples(st.integers(-1, 99), st.integers(-1, 99)))}
    own, definition = (one(getattr(module, row.operator), **options) for module in (attnx, reference))
    return Call(own, definition, definition, inputs)


def delta_rule(draw: st.DrawFn, row: Capability, dtype: torch.dtype, device: torch.device) -> Call:
    low, high = row.head_dim
    dims = st.one_of(st.sampled_from([low, high]), st.integers(low, min(high, 80)))
    heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    shape = DeltaShape(draw(st.integers(1, 2)), heads, heads * group, draw(st.integers(1, 200)), draw(dims), draw(dims))
    decay = draw(st.sampled_from([0.0, 0.01, 0.1, 3.0]))
    inputs = delta_inputs(shape, dtype, device, decay=decay, with_state=draw(st.booleans()))
    options = {"normalize_qk": draw(st.booleans())}
    if "carry" in row.features and draw(st.booleans()):
        chunks = shape.batch, shape.value_heads, -(-shape.length // 64)
        inputs["carry"] = random_parameter(chunks, dtype, device)
    own, definition = (with_state(partial(module.gated_delta_rule, **options)) for module in (attnx, reference))
    return Call(own, definition, definition, inputs)


def linear(draw: st.DrawFn, row: Capability, dtype: torch.dtype, device: torch.device) -> Call:
    feature_map = draw(st.sampled_from(["taylor", "elu", "softmax"]))
    shape = shapes(draw, row)
    is_causal = draw(st.booleans())
    head_dim = min(shape.head_dim, 20 if feature_map == "taylor" else 256)
    length_k = shape.length_q if is_causal else shape.length_k
    shape = dataclasses.replace(
        shape, head_dim=head_dim, length_k=length_k, value_dim=shape.value_dim or shape.head_dim
    )
    inputs, _ = random_inputs(shape, dtype, device)
    if draw(st.booleans()):
        size = inputs["value"].shape[:2], features(feature_map, head_dim), inputs["value"].shape[3] + 1
        inputs["initial_state"] = random_parameter((*size[0], *size[1:]), dtype, device)
    options = {"feature_map": feature_map, "is_causal": is_causal}
    own, definition = (partial(module.linear_attention, **options) for module in (attnx, reference))
    return Call(own, definition, definition, inputs)


def probabilistic(draw: st.DrawFn, row: Capability, dtype: torch.dtype, device: torch.device) -> Call:
    shape, options = shapes(draw, row), of_score(draw, row) | {"seed": 3, "offset": draw(st.integers(0, 9))}
    options["keep"] = draw(st.sampled_from(["harmonic", "geometric", "power", "gaussian"]))
    options["mode"] = draw(st.sampled_from(["bernoulli", "topm"]))
    options["importance"] = options["mode"] == "bernoulli" and draw(st.booleans())
    options["density"] = draw(st.sampled_from([None, 0.3, 0.8]))
    return call_of("probabilistic_attention", random_inputs(shape, dtype, device)[0], **options)


def sparse_linear(draw: st.DrawFn, row: Capability, dtype: torch.dtype, device: torch.device) -> Call:
    options: dict[str, Any] = {
        "feature_map": draw(st.sampled_from(["softmax", "elu"])),
        "linear_scope": draw(st.sampled_from(["marginal", "noncritical", "all"])),
        "is_causal": draw(st.booleans()),
    }
    choice = {"critical": draw(st.sampled_from([0.05, 0.5])), "negligible": 0.3, "is_causal": options["is_causal"]}
    if draw(st.booleans()):
        lengths = [draw(st.lists(st.integers(0, 100), min_size=2, max_size=2)) for _ in range(2)]
        inputs, _, sizes = pack((lengths[0], lengths[1]), dtype, device)
        of_map = {name: x for name, x in inputs.items() if name != "value"}
        options |= sizes | {"block_map": attnx.sparse_linear_block_map_varlen(**of_map, **sizes, **choice)}
        functions: Any = attnx.sparse_linear_attention_varlen, reference.sparse_linear_attention_varlen
    else:
        inputs, _ = random_inputs(shapes(draw, row), dtype, device)
        options["block_map"] = attnx.sparse_linear_block_map(inputs["query"], inputs["key"], **choice)
        functions = attnx.sparse_linear_attention, reference.sparse_linear_attention
    own, definition = (one(function, **options) for function in functions)
    return Call(own, definition, definition, inputs)


def routing(draw: st.DrawFn, row: Capability, dtype: torch.dtype, device: torch.device) -> Call:
    shape, options = shapes(draw, row), of_score(draw, row)
    inputs, _ = random_inputs(shape, dtype, device)
    centroids = random_centroids(shape.heads, draw(st.integers(1, 4)), shape.head_dim).to(device)
    by_size = draw(st.booleans())
    how: dict[str, Any] = {"cluster_size": draw(st.integers(1, 60))} if by_size else {"routing": "argmax"}
    options["routes"] = attnx.route(inputs["query"], inputs["key"], centroids, **how)
    if draw(st.booleans()):
        assert shape.kv_heads is not None
        value_dim = shape.value_dim or shape.head_dim
        memory = random_memory(shape.kv_heads, 3, shape.head_dim, value_dim, dtype)
        inputs |= {name: x.to(device) for name, x in memory.items()}
    own, definition = (with_memory(module.routing_attention) for module in (attnx, reference))
    terms = one(with_memory(eager_routing_attention), constant_sums=True, **options)
    return Call(one(own, **options), one(definition, **options), terms, inputs)


SOFTPLUS = {"grouped_queries", "value_dim", "causal", "window", "varlen", "key_lengths", "position_offset", "padding"}
# The features that the calls above make use of: a row that promises another is not tried.
DRAWN: dict[str, tuple[Callable[..., Call], set[str]]] = {
    "attention_key_weights": (weights, {"grouped_queries", "causal", "window"}),
    "attention_row_weights": (weights, {"grouped_queries", "causal", "window"}),
    "block_sparse_attention": (
        block_sparse,
        {"grouped_queries", "value_dim", "causal", "logsumexp", "block_bias", "block_bias_gradient", "sink"}
        | {"sink_gradient"}
        # tests/test_key_lengths.py, tests/test_logit_terms.py and tests/test_element_masks.py try these
        | {"key_lengths", "softcap", "attn_mask", "attn_mask_gradient", "key_bias", "key_bias_gradient", "key_mask"}
        # tests/test_packed_lists.py tries these
        | {"varlen", "padding"}
        # tests/test_distance_bias.py tries these
        | {"key_mask_gradient", "dropout", "row_bounds", "distance_bias", "distance_bias_gradient"},
    ),
    "disentangled_attention": (
        disentangled,
        {"grouped_queries", "value_dim", "causal", "window", "logsumexp", "softcap", "dropout"}
        | {"key_bias", "key_bias_gradient", "key_mask", "key_mask_gradient"},
    ),
    "gated_delta_rule": (delta_rule, {"grouped_values", "value_dim", "initial_state", "carry"}),
    "linear_attention": (linear, {"grouped_queries", "value_dim", "causal", "initial_state"}),
    "softplus_attention": (softplus, SOFTPLUS | {"logsumexp"}),
    "sharpened_softplus_attention": (softplus, SOFTPLUS),
    "probabilistic_attention": (
        probabilistic,
        # tests/test_packed_lists.py tries the last three
        {"grouped_queries", "value_dim", "causal", "logsumexp", "importance", "varlen", "padding", "key_lengths"},
    ),
    "sparse_linear_attention": (
        sparse_linear,
        # tests/test_key_lengths.py tries the last one
        {"grouped_queries", "value_dim", "causal", "varlen", "logsumexp", "key_lengths"},
    ),
    "routing_attention": (
        routing,
        # tests/test_routing_lengths.py tries the last three
        {"grouped_queries", "value_dim", "causal", "memory_kv", "varlen", "padding", "key_lengths"},
    ),
}
ELSEWHERE = {"hidden_nonfinite"}  # in test_nonfinite.py
WITHOUT_GRADIENT = {"attention_max_logits", "pointer_sample"}  # in test_weights.py and test_pointer_sample.py
WITHOUT_GRADIENT |= {"sigmoid_attention_jvp", "softmax_attention_jvp"}  # in test_jvp.py
DENSE = {"sigmoid_attention", "softmax_attention"}  # in test_capabilities.py


def row_of(operator: str, backend: Backend) -> Capability:
    (row,) = (row for row in table() if (row.operator, row.backend) == (operator, backend.kernels))
    return row


def assert_near(actual: Tensor, expected: Tensor, name: str, terms: Tensor | None = None) -> None:
    if not actual.numel():
        return
    error = (actual.double() - expected).abs().max()
    size = max(float(x.abs().max()) for x in (expected, terms) if x is not None)
    assert error <= BOUNDS[actual.dtype] * max(size, 1.0), name


@pytest.mark.parametrize("operator", DRAWN)
@settings(max_examples=15)
@given(data=st.data())
def test_calls_from_the_table(data: st.DataObject, operator: str, backend: Backend) -> None:
    if not has_kernel(operator, backend.device):
        pytest.skip("no kernel on this device")
    row = row_of(operator, backend)
    make, features = DRAWN[operator]
    assert set(row.features) <= features | ELSEWHERE
    dtype = getattr(torch, data.draw(st.sampled_from(row.dtypes)))
    call = data.draw(st.composite(make)(row, dtype, backend.device))
    exact = {name: x.double() for name, x in call.inputs.items()}
    output = call.reference(**exact)
    generator = torch.Generator().manual_seed(5)
    grad_output = torch.randn(output.shape, generator=generator).to(backend.device, dtype)
    results = forward_backward(call.own, call.inputs, grad_output)
    expected, terms = (forward_backward(f, exact, grad_output.double()) for f in (call.reference, call.terms))
    for name, x in results.items():
        rounded = x.to(dtype) if dtype in (torch.bfloat16, torch.float16) else x
        assert_near(rounded, expected[name], name, terms[name])


@settings(max_examples=15)
@given(data=st.data())
def test_caches_from_the_table(data: st.DataObject, backend: Backend) -> None:
    row = row_of("staircase_attention", backend)
    assert set(row.features) <= {"grouped_queries", "causal", "logsumexp", "bias"}
    dtype = getattr(torch, data.draw(st.sampled_from(row.dtypes)))
    heads, group = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3))
    head_dim = 32 * data.draw(st.integers(row.head_dim[0] // 32, row.head_dim[1] // 32))
    length = data.draw(st.integers(1, 200))
    queries = data.draw(st.integers(1, min(length, 5)))
    shape = Shape(queries, length, head_dim, batch=2, heads=heads * group, kv_heads=heads)
    inputs, _ = random_inputs(shape, dtype, backend.device)
    cache = attnx.StaircaseCache(2, heads, head_dim, 256, window=32, dtype=dtype, device=backend.device)
    cache.append(inputs["key"], inputs["value"])
    key, value = cache.dequantize()
    options: dict[str, Any] = {"is_causal": data.draw(st.booleans())}
    if data.draw(st.booleans()):
        bias = data.draw(st.sampled_from([None, (shape.heads,)]))
        options["bias"] = bias if bias is None else random_parameter(bias, dtype, backend.device)
        expected = reference.sigmoid_attention(inputs["query"], key, value, **options)
        assert_near(cache.attend(inputs["query"], score="sigmoid", **options), expected, "output")
        return
    both = cache.attend(inputs["query"], return_logsumexp=True, **options)
    definition = reference.softmax_attention(inputs["query"], key, value, return_logsumexp=True, **options)
    for name, x, y in zip(("output", "logsumexp"), both, definition, strict=True):
        assert_near(x.to(dtype), y, name)


def test_every_operator_of_the_table_is_drawn() -> None:
    assert {row.operator for row in table()} == DENSE | set(DRAWN) | WITHOUT_GRADIENT | {"staircase_attention"}
