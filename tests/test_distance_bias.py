"""Numbers by distance: what the tables of T5 make of them, gradients, block lists, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attnx
from backends import Backend
from cases import MASKS, OPERATORS, Shape, random_inputs, random_parameter
from compare import forward_backward
from logit_terms import check, check_lists, draw_term, needs

SHAPE = Shape(length_q=70, length_k=130, batch=2, heads=4, kv_heads=2)


def as_mask(distance_bias: Tensor, length_q: int, length_k: int) -> Tensor:
    """The mask of pairs that numbers by distance stand for."""
    i, j = torch.arange(length_q)[:, None], torch.arange(length_k)
    return distance_bias[..., i - j + length_k - 1]


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("length_q", [1, 70, 131])
def test_equals_a_mask(length_q: int, operator: str, dtype: torch.dtype, backend: Backend) -> None:
    """The outputs and the gradients of query, key and value are those beside the mask, bit for bit."""
    needs(backend, ("distance_bias",), gradients=False)
    shape = Shape(length_q=length_q, length_k=130, batch=2, heads=4, kv_heads=2)
    inputs, grad_output = random_inputs(shape, dtype, backend.device)
    bias = draw_term("distance_bias", shape, dtype, backend.device)
    bias[..., ::7] = -torch.inf
    function = getattr(attnx, operator)
    torch.use_deterministic_algorithms(True)
    actual = forward_backward(function, inputs, grad_output, distance_bias=bias)
    expected = forward_backward(function, inputs, grad_output, attn_mask=as_mask(bias, length_q, 130))
    torch.use_deterministic_algorithms(False)
    for name, x in actual.items():
        assert torch.equal(x, expected[name]), name


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("mask", [mask for mask in MASKS if mask != "window_diagonal"])
def test_beside_bounds(mask: str, operator: str, dtype: torch.dtype, backend: Backend) -> None:
    needs(backend, ("distance_bias", "key_bias"))
    inputs, grad_output = random_inputs(SHAPE, dtype, backend.device)
    terms = {name: draw_term(name, SHAPE, dtype, backend.device, "heads") for name in ("distance_bias", "key_bias")}
    slopes = {"alibi_slopes": random_parameter((4,), dtype, backend.device)}
    check(operator, inputs | slopes, grad_output, **terms, **MASKS[mask])


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(("head_dim", "lengths"), [(128, (130, 70)), (129, (33, 200)), (256, (200, 150))])
def test_head_dims(
    head_dim: int, lengths: tuple[int, int], operator: str, dtype: torch.dtype, backend: Backend
) -> None:
    """Bands of tiles of all sizes, with more queries than keys and fewer."""
    needs(backend, ("distance_bias",))
    shape = Shape(*lengths, head_dim=head_dim, batch=2, heads=2, kv_heads=1)
    inputs, grad_output = random_inputs(shape, dtype, backend.device)
    bias = draw_term("distance_bias", shape, dtype, backend.device, "sequences")
    check(operator, inputs, grad_output, distance_bias=bias, window=(90, 40))


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_block_lists(score: str, dtype: torch.dtype, backend: Backend) -> None:
    needs(backend, ("distance_bias",))
    shape = Shape(batch=2, length_q=200, length_k=330, heads=4, kv_heads=2)
    visited = torch.rand(1, 4, 4, 6, generator=torch.Generator().manual_seed(5)) < 0.6
    mask = attnx.BlockMask.from_dense(visited.to(backend.device))
    inputs, grad_output = random_inputs(shape, dtype, backend.device)
    inputs["distance_bias"] = draw_term("distance_bias", shape, dtype, backend.device, "sequences")
    check_lists(inputs, grad_output, mask, score)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_a_table(score: Any, dtype: torch.dtype, backend: Backend) -> None:
    needs(backend, ("distance_bias",))
    """It is the bias that it is made into, and the gradient of a bucket is the sum over its distances."""
    inputs, grad_output = random_inputs(SHAPE, dtype, backend.device)
    table = random_parameter((4, 16), dtype, backend.device)
    index = attnx.relative_position_buckets(70, 130, buckets=16, max_distance=40, device=backend.device)
    options: dict[str, Any] = {"is_causal": True, "scale": 1.0}

    def attention(table: Tensor, **leaves: Any) -> Tensor:
        return attnx.relative_bias_attention(**leaves, table=table, index=index, score=score, **options)

    torch.use_deterministic_algorithms(True)
    actual = forward_backward(attention, inputs | {"table": table}, grad_output)
    bias = {"distance_bias": table[:, index][None]}
    expected = forward_backward(getattr(attnx, f"{score}_attention"), inputs | bias, grad_output, **options)
    torch.use_deterministic_algorithms(False)
    of_distances = expected.pop("grad_distance_bias")[0]
    for name, x in expected.items():
        assert torch.equal(actual[name], x), name
    exact = torch.zeros(4, 16, dtype=torch.float64, device=backend.device).index_add(1, index, of_distances.double())
    sizes = torch.zeros_like(exact).index_add(1, index, of_distances.double().abs())
    assert bool(((actual["grad_table"] - exact).abs() <= 64 * torch.finfo(table.dtype).eps * sizes).all())


@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets(bidirectional: bool) -> None:
    """Known values of T5's small model: 32 buckets up to 128 tokens."""
    index = attnx.relative_position_buckets(200, 200, bidirectional=bidirectional)
    at = {distance: int(index[distance + 199]) for distance in (0, 1, 7, 8, 15, 16, 20, 127, 128, 199, -1, -8, -199)}
    if bidirectional:
        expected = {0: 0, 1: 1, 7: 7, 8: 8, 15: 9, 16: 10, 20: 10, 127: 15, 128: 15, 199: 15, -1: 17, -8: 24, -199: 31}
    else:
        expected = {0: 0, 1: 1, 7: 7, 8: 8, 15: 15, 16: 16, 20: 17, 127: 31, 128: 31, 199: 31, -1: 0, -8: 0, -199: 0}
    assert at == expected
    later = attnx.relative_position_buckets(3, 50, bidirectional=bidirectional, position_offset=47)
    assert torch.equal(later, attnx.relative_position_buckets(50, 50, bidirectional=bidirectional)[47:])


def test_gradient(device: torch.device, backend: Backend) -> None:
    if torch.float64 not in backend.dtypes():
        pytest.skip("gradcheck needs float64")
    shape = Shape(length_q=5, length_k=7, head_dim=3, batch=2, heads=2)
    inputs, _ = random_inputs(shape, torch.float64, device)
    for batch, heads in ((2, 2), (1, 2), (2, 1), (1, 1)):
        bias = torch.randn(batch, heads, 11, dtype=torch.float64, device=device)
        leaves = [x.detach().requires_grad_() for x in (*inputs.values(), bias)]
        for operator in OPERATORS:
            function = getattr(attnx, operator)
            assert torch.autograd.gradcheck(lambda q, k, v, b, f=function: f(q, k, v, distance_bias=b), leaves)


def test_no_rows_or_keys(dtype: torch.dtype, backend: Backend) -> None:
    needs(backend, ("distance_bias",))
    for length_q, length_k in ((0, 5), (4, 0), (0, 0)):
        inputs, _ = random_inputs(Shape(length_q=length_q, length_k=length_k), dtype, backend.device)
        bias = torch.zeros(1, 1, max(length_q + length_k - 1, 0), device=backend.device, requires_grad=True)
        output = attnx.softmax_attention(**inputs, distance_bias=bias)
        output.sum().backward()
        assert not output.any()
        assert bias.grad is not None
        assert not bias.grad.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"distance_bias": torch.zeros(1, 1, 198)}, r"distance_bias: expected shape \(2 or 1, 4 or 1, 199\), .* 198\)"),
        ({"distance_bias": torch.zeros(4, 199)}, r"distance_bias: expected shape .* got \(4, 199\)"),
        ({"distance_bias": torch.zeros(1, 1, 199, dtype=torch.float16)}, "distance_bias: expected float32"),
        (
            {"distance_bias": torch.zeros(1, 1, 199), "attn_mask": torch.ones(70, 130, dtype=torch.bool)},
            "distance_bias: expected none beside attn_mask, got one",
        ),
        (
            {"distance_bias": torch.zeros(1, 1, 199), "seqused_k": torch.full((2,), 7, dtype=torch.int32)},
            "distance_bias: expected none beside seqused_k",
        ),
    ],
)
def test_bad_input(change: dict[str, Any], message: str, dtype: torch.dtype, backend: Backend) -> None:
    needs(backend, ("distance_bias",), gradients=False)
    inputs, _ = random_inputs(SHAPE, dtype, backend.device)
    with pytest.raises(RuntimeError, match=message):
        attnx.softmax_attention(**inputs, **{name: x.to(backend.device) for name, x in change.items()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"table": torch.zeros(3, 32)}, r"table: expected shape \(4, buckets\), got \(3, 32\)"),
        ({"index": torch.zeros(7, dtype=torch.int64)}, r"index: expected int64 or int32 of shape \(199,\)"),
        ({"index": torch.full((199,), 32)}, "index: expected numbers from 0 to below 32, the buckets of the table"),
        ({"attn_mask": torch.ones(70, 130, dtype=torch.bool)}, "attn_mask: expected None beside a table"),
        ({"score": "softplus"}, "score: expected"),
    ],
)
def test_bad_table(change: dict[str, Any], message: str, dtype: torch.dtype, backend: Backend) -> None:
    inputs, _ = random_inputs(SHAPE, dtype, backend.device)
    arguments = {"table": torch.zeros(4, 32, device=backend.device)} | change
    with pytest.raises(RuntimeError, match=message):
        attnx.relative_bias_attention(**inputs, **arguments)


def test_compiled(dtype: torch.dtype, backend: Backend) -> None:
    needs(backend, ("distance_bias",))
    inputs, _ = random_inputs(SHAPE, dtype, backend.device)
    table = torch.randn(4, 32, device=backend.device)
    compiled = torch.compile(attnx.relative_bias_attention, fullgraph=True, backend="aot_eager", dynamic=True)
    assert torch.equal(compiled(**inputs, table=table), attnx.relative_bias_attention(**inputs, table=table))
