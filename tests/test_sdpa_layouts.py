"""The functions take what ``torch.nn.functional.scaled_dot_product_attention`` takes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import attnx

pytestmark = [pytest.mark.backends("cpu"), pytest.mark.usefixtures("backend")]

LENGTH_Q, LENGTH_K, HEAD_DIM, VALUE_DIM = 5, 6, 4, 3
Shape = tuple[int, ...]

# Leading sizes and heads of query, key and value.
LAYOUTS: dict[str, tuple[Shape, Shape, Shape]] = {
    "plain": ((2, 4), (2, 4), (2, 4)),
    "no_batch": ((4,), (4,), (4,)),
    "five": ((2, 3, 4), (2, 3, 4), (2, 3, 4)),
    "six": ((2, 1, 3, 4), (2, 1, 3, 4), (2, 1, 3, 4)),
    "query_of_batch_1": ((1, 4), (2, 4), (2, 4)),
    "key_of_batch_1": ((2, 4), (1, 4), (2, 4)),
    "value_of_batch_1": ((2, 4), (2, 4), (1, 4)),
    "query_of_1_head": ((2, 1), (2, 4), (2, 4)),
    "key_of_1_head": ((2, 4), (2, 1), (2, 4)),
    "value_of_1_head": ((2, 4), (2, 4), (2, 1)),
    "five_that_broadcast": ((2, 1, 4), (1, 3, 4), (2, 3, 1)),
    "no_batch_1_head": ((1,), (4,), (4,)),
}
GROUPED: dict[str, tuple[Shape, Shape, Shape]] = {
    "plain": ((2, 4), (2, 2), (2, 2)),
    "no_batch": ((4,), (2,), (2,)),
    "five": ((2, 3, 4), (2, 3, 2), (2, 3, 2)),
}


def tensors(shapes: tuple[Shape, Shape, Shape], value_dim: int = VALUE_DIM) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    sizes = (LENGTH_Q, HEAD_DIM), (LENGTH_K, HEAD_DIM), (LENGTH_K, value_dim)
    return tuple(
        torch.randn(*leading, *size, dtype=torch.float64, generator=generator).requires_grad_()
        for leading, size in zip(shapes, sizes, strict=True)
    )


def masks(shapes: tuple[Shape, Shape, Shape]) -> list[dict[str, Any]]:
    """Keywords of both functions, with masks of all their shapes."""
    of_output = torch.broadcast_shapes(shapes[0][:-1], shapes[1][:-1]), max(shapes[0][-1], shapes[1][-1])
    leading, heads = of_output
    generator = torch.Generator().manual_seed(1)
    random = partial(torch.randn, dtype=torch.float64, generator=generator)
    pairs = LENGTH_Q, LENGTH_K
    return [
        {},
        {"scale": 0.3},
        {"attn_mask": random(pairs)},
        {"attn_mask": random((*leading, heads, *pairs))},
        {"attn_mask": random((*(1 for _ in leading), heads, *pairs)).relu().bool() | torch.eye(*pairs).bool()},
        {"attn_mask": random((*leading[:1], *(1 for _ in leading[1:]), 1, *pairs)), "dropout_p": 0.0},
    ]


def agree(actual: Tensor, expected: Tensor, inputs: tuple[Tensor, ...], retain_graph: bool = False) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
    weights = torch.randn(actual.shape, dtype=actual.dtype, generator=torch.Generator().manual_seed(2))
    gradients = (
        torch.autograd.grad((x * weights).sum(), inputs, retain_graph=retain_graph) for x in (actual, expected)
    )
    for of_actual, of_expected in zip(*gradients, strict=True):
        torch.testing.assert_close(of_actual, of_expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_softmax_attention_is_sdpa_keyword_for_keyword(layout: str) -> None:
    inputs = tensors(LAYOUTS[layout])
    for keywords in masks(LAYOUTS[layout]):
        expected = F.scaled_dot_product_attention(*inputs, **keywords)
        agree(attnx.softmax_attention(*inputs, **keywords), expected, inputs)


@pytest.mark.parametrize("enable_gqa", [True, False, None])
@pytest.mark.parametrize("layout", GROUPED)
def test_grouped_heads(layout: str, enable_gqa: bool | None) -> None:
    inputs = tensors(GROUPED[layout])
    given = {} if enable_gqa is None else {"enable_gqa": enable_gqa}
    expected = F.scaled_dot_product_attention(*inputs, enable_gqa=True)
    agree(attnx.softmax_attention(*inputs, **given), expected, inputs)


def repeated(x: Tensor, leading: torch.Size, heads: int) -> Tensor:
    """(heads or 1, ...) or more leading dimensions as a plain tensor, whose copies are its own."""
    return x.expand(*leading, heads, *x.shape[-2:]).reshape(-1, heads, *x.shape[-2:])


def _routing(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    centroids = torch.randn(4, 2, HEAD_DIM, generator=torch.Generator().manual_seed(3))
    return attnx.routing_attention(query, key, value, centroids, cluster_size=4)


def _disentangled(query: Tensor, key: Tensor, value: Tensor) -> Any:
    pos_key = torch.randn(4, 3, HEAD_DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    index = torch.arange(LENGTH_Q + LENGTH_K - 1) % 3
    return attnx.disentangled_attention(query, key, value, index, pos_key=pos_key, return_logsumexp=True)


def _blocks(query: Tensor, key: Tensor, value: Tensor) -> Any:
    mask = attnx.BlockMask.from_dense(torch.ones(1, 1, 1, 1, dtype=torch.bool), (64, 64))
    return attnx.block_sparse_attention(query, key, value, mask, return_logsumexp=True)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "sigmoid": attnx.sigmoid_attention,
    "softmax": partial(attnx.softmax_attention, return_logsumexp=True),
    "block_sparse": _blocks,
    "probabilistic": partial(attnx.probabilistic_attention, seed=1, offset=0, return_logsumexp=True),
    "sparse_linear": partial(attnx.sparse_linear_attention, critical=1.0, negligible=0.0, linear_scope="all"),
    "routing": _routing,
    "disentangled": _disentangled,
    "softplus": partial(attnx.softplus_attention, return_logsumexp=True),
    "sharpened_softplus": partial(attnx.softplus_attention, sharpen=3),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_layouts_of_every_function(function: str, layout: str) -> None:
    shapes = LAYOUTS[layout]
    inputs = tensors(shapes)
    leading = torch.broadcast_shapes(*(shape[:-1] for shape in shapes))
    results = FUNCTIONS[function](*inputs)
    expected = FUNCTIONS[function](*(repeated(x, leading, 4) for x in inputs))
    for actual, plain in zip(*((x if isinstance(x, tuple) else (x,)) for x in (results, expected)), strict=True):
        agree(
            actual, plain.reshape(*leading, *plain.shape[1:]), inputs[: 2 if plain.dim() == 3 else 3], retain_graph=True
        )


@pytest.mark.parametrize("layout", ["no_batch", "five_that_broadcast"])
def test_compiles_in_one_graph(layout: str) -> None:
    inputs, mask = tensors(LAYOUTS[layout]), torch.randn(LENGTH_Q, LENGTH_K, dtype=torch.float64)
    compiled = torch.compile(attnx.softmax_attention, fullgraph=True, backend="aot_eager", dynamic=True)
    agree(compiled(*inputs, attn_mask=mask), attnx.softmax_attention(*inputs, attn_mask=mask), inputs)


def test_vmap_over_inputs_without_a_batch() -> None:
    inputs = tensors(LAYOUTS["plain"])
    mapped: Tensor = torch.vmap(attnx.softmax_attention)(*inputs)
    agree(mapped, attnx.softmax_attention(*inputs), inputs)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_flags_are_true_or_false(function: str) -> None:
    call, inputs = FUNCTIONS[function], tensors(LAYOUTS["plain"])
    flags = {} if function in ("block_sparse", "routing", "disentangled") else {"is_causal": None, "enable_gqa": 1}
    for name, flag in flags.items():
        with pytest.raises(RuntimeError, match=rf"^{name}: expected True or False, got {flag}"):
            call(*inputs, **{name: flag})


def test_flags_of_functions_with_more_arguments() -> None:
    x = tensors(LAYOUTS["plain"], HEAD_DIM)
    more: dict[Callable[..., Any], Any] = {
        attnx.block_sparse_attention: attnx.BlockMask.from_dense(torch.ones(1, 1, 1, 1, dtype=torch.bool), (64, 64)),
        attnx.routing_attention: torch.randn(4, 2, HEAD_DIM),
        attnx.disentangled_attention: torch.arange(LENGTH_Q + LENGTH_K - 1) % 3,
    }
    for function, argument in more.items():
        given = {} if function is not attnx.disentangled_attention else {"pos_key": x[0].detach()[0, :, :3]}
        for name, flag in {"is_causal": None, "enable_gqa": None}.items():
            with pytest.raises(RuntimeError, match=rf"^{name}: expected True or False, got None"):
                function(*x, argument, **given, **{name: flag})


@pytest.mark.parametrize(
    ("name", "shapes", "mask"),
    [
        ("key", ((2, 4), (4,), (4,)), None),
        ("query", ((4,), (2, 4), (2, 4)), None),
        ("key", ((2, 3, 4), (2, 2, 4), (2, 2, 4)), None),
        ("value", ((2, 4), (2, 4), (2, 3)), None),
        ("attn_mask", ((2, 3, 4), (2, 3, 4), (2, 3, 4)), (3, 3, 4, LENGTH_Q, LENGTH_K)),
        ("attn_mask", ((4,), (4,), (4,)), (2, 4, LENGTH_Q, LENGTH_K)),
    ],
)
def test_bad_layouts(name: str, shapes: tuple[Shape, Shape, Shape], mask: Shape | None) -> None:
    given = {} if mask is None else {"attn_mask": torch.zeros(mask, dtype=torch.bool)}
    with pytest.raises(RuntimeError, match=rf"^{name}: expected .*, got "):
        attnx.softmax_attention(*tensors(shapes), **given)
