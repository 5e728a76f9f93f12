"""Softmax with a learned sink: one more logit of every row, which takes weight and has no value."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import attnx
from attnx import reference
from cases import DTYPES, FEW_SHAPES, MASKS, Shape, pack, parameter_dtype, random_inputs, random_parameter
from compare import Attention, check, forward_backward


def _sink(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A sink near the logits, so that it has a good part of the weight."""
    return random_parameter(shape, dtype, device) * 8


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", FEW_SHAPES, ids=str)
def test_masks(shape: Shape, dtype: torch.dtype, mask: str, device: torch.device) -> None:
    inputs, grad_output = random_inputs(shape, dtype, device)
    inputs["sink"] = _sink((shape.heads,), dtype, device)
    check("softmax_attention", inputs, grad_output, **MASKS[mask])


@pytest.mark.parametrize("head_dim", [1, 32, 64, 80, 128, 192, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_dims(head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    inputs, grad_output = random_inputs(Shape(140, 150, head_dim, heads=4, kv_heads=2), dtype, device)
    inputs["sink"] = _sink((4,), dtype, device)
    check("softmax_attention", inputs, grad_output, is_causal=True)


def test_one_number_for_all_heads(dtype: torch.dtype, device: torch.device) -> None:
    inputs, grad_output = random_inputs(Shape(heads=3), dtype, device)
    inputs["sink"] = _sink((), dtype, device)
    check("softmax_attention", inputs, grad_output)


def test_with_alibi_and_instruction_sets(dtype: torch.dtype, instruction_set: str | None, device: torch.device) -> None:
    inputs, grad_output = random_inputs(Shape(40, 70, 64, heads=4, kv_heads=1), dtype, device)
    inputs["alibi_slopes"] = random_parameter((4,), dtype, device)
    inputs["sink"] = _sink((4,), dtype, device)
    check("softmax_attention", inputs, grad_output, is_causal=True)


@pytest.mark.parametrize("length_k", [1, 700, 4000])
def test_few_queries_share_a_sink_once(length_k: int, dtype: torch.dtype, device: torch.device) -> None:
    """Keys are cut into shares there, of which one alone starts from the sink."""
    inputs, grad_output = random_inputs(Shape(1, length_k, 64, heads=4, kv_heads=1), dtype, device)
    inputs["sink"] = _sink((4,), dtype, device) + math.log(length_k)
    check("softmax_attention", inputs, grad_output)


def test_varlen(dtype: torch.dtype, device: torch.device) -> None:
    inputs, grad_output, sizes = pack(([70, 0, 9, 30], [80, 7, 0, 30]), dtype, device)
    inputs["sink"] = _sink((4,), dtype, device)
    check("softmax_attention_varlen", inputs, grad_output, is_causal=True, **sizes)


@pytest.mark.parametrize("block_size", [(64, 64), (128, 64)], ids=str)
def test_lists(block_size: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    """Some rows have no block."""
    shape = Shape(256, 256, 64, heads=2)
    visited = torch.rand(1, 2, 256 // block_size[0], 4, generator=torch.Generator().manual_seed(0)) < 0.5
    visited[:, :, 1] = False
    inputs, grad_output = random_inputs(shape, dtype, device)
    inputs["sink"] = _sink((2,), dtype, device)
    mask = attnx.BlockMask.from_dense(visited.to(device), block_size)
    exact = {name: x.double() for name, x in inputs.items()}
    actual = forward_backward(attnx.block_sparse_attention, inputs, grad_output, block_mask=mask)
    expected = forward_backward(reference.block_sparse_attention, exact, grad_output.double(), block_mask=mask)
    eps = torch.finfo(dtype).eps
    for name, want in expected.items():
        torch.testing.assert_close(actual[name].double(), want, rtol=4 * eps, atol=8 * eps * float(want.abs().max()))


def test_logsumexp_includes_it(dtype: torch.dtype, device: torch.device) -> None:
    """A row without keys has the sink as its logsumexp, and gives 0."""
    inputs, _ = random_inputs(Shape(9, 4), dtype, device)
    sink = _sink((2,), dtype, device)
    output, logsumexp = attnx.softmax_attention(**inputs, sink=sink, is_causal=True, return_logsumexp=True)
    _, expected = reference.softmax_attention(
        **{name: x.double() for name, x in inputs.items()}, sink=sink.double(), is_causal=True, return_logsumexp=True
    )
    eps = torch.finfo(parameter_dtype(dtype)).eps
    torch.testing.assert_close(logsumexp.double(), expected, rtol=16 * eps, atol=64 * eps)
    assert (output[:, :, :5] == 0).all()
    torch.testing.assert_close(logsumexp[:, :, :5], sink[:, None].expand(1, 2, 5), rtol=4 * eps, atol=4 * eps)


def test_gradient_of_the_logsumexp_reaches_it(dtype: torch.dtype, device: torch.device) -> None:
    """It also comes from rows that see no key, whose logsumexp is the sink."""
    inputs, _ = random_inputs(Shape(9, 4), dtype, device)
    sink = _sink((2,), dtype, device)

    def gradient(attention: Attention, precision: torch.dtype) -> Tensor:
        leaf = sink.to(parameter_dtype(precision)).requires_grad_()
        own = {name: x.to(precision) for name, x in inputs.items()}
        _, logsumexp = attention(**own, sink=leaf, is_causal=True, return_logsumexp=True)
        return torch.autograd.grad(logsumexp.sum(), leaf)[0]

    expected = gradient(reference.softmax_attention, torch.float64)
    actual = gradient(attnx.softmax_attention, dtype)
    torch.testing.assert_close(actual.double(), expected, rtol=8 * torch.finfo(dtype).eps, atol=0)


def test_minus_infinity_is_no_sink(dtype: torch.dtype, device: torch.device, deterministic: None) -> None:
    """Output and gradients are equal bit for bit; the gradient of the sink is 0."""
    inputs, grad_output = random_inputs(Shape(70, 150, 64, heads=4, kv_heads=2), dtype, device)
    plain = forward_backward(attnx.softmax_attention, inputs, grad_output, is_causal=True)
    inputs["sink"] = torch.full((4,), -math.inf, dtype=parameter_dtype(dtype), device=device)
    with_sink = forward_backward(attnx.softmax_attention, inputs, grad_output, is_causal=True)
    assert (with_sink.pop("grad_sink") == 0).all()
    assert all(torch.equal(plain[name], with_sink[name]) for name in plain)


@pytest.mark.parametrize("sink", [3e38, math.inf])
def test_an_enormous_sink_takes_all_weight(sink: float, dtype: torch.dtype, device: torch.device) -> None:
    inputs, _ = random_inputs(Shape(), dtype, device)
    sinks = torch.full((2,), sink, dtype=parameter_dtype(dtype), device=device)
    output = attnx.softmax_attention(**inputs, sink=sinks)
    assert (output.abs() < 1e-30).all()


def test_it_leaves_less_for_the_keys(dtype: torch.dtype, device: torch.device) -> None:
    """Values of 1 make the output the weight that the keys have together."""
    inputs, _ = random_inputs(Shape(), dtype, device)
    inputs["value"] = torch.ones_like(inputs["value"])
    output, logsumexp = attnx.softmax_attention(**inputs, return_logsumexp=True)
    sinks = logsumexp.mean((0, 2)).to(parameter_dtype(dtype))
    with_sink = attnx.softmax_attention(**inputs, sink=sinks)
    expected = torch.sigmoid(logsumexp - sinks[:, None])[..., None].expand_as(output)
    torch.testing.assert_close(with_sink.double(), expected.double(), rtol=0, atol=2 * torch.finfo(dtype).eps)


def test_vmap_and_compile(dtype: torch.dtype, device: torch.device) -> None:
    inputs, _ = random_inputs(Shape(batch=2, heads=4), dtype, device)
    sinks = _sink((3, 4), dtype, device)
    each = torch.stack([attnx.softmax_attention(**inputs, sink=sink) for sink in sinks])
    batched = torch.vmap(lambda sink: attnx.softmax_attention(**inputs, sink=sink))(sinks)
    assert torch.equal(each, batched)
    compiled = torch.compile(attnx.softmax_attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**inputs, sink=sinks[0]), each[0])


@pytest.mark.parametrize(
    ("sink", "message"),
    [
        (torch.zeros(3), r"sink: expected shape \(\) or \(2,\), one number per query head, got \(3,\)"),
        (torch.zeros(2, dtype=torch.int32), "sink: expected"),
    ],
    ids=["shape", "dtype"],
)
def test_bad_sinks(sink: Tensor, message: str, dtype: torch.dtype, device: torch.device) -> None:
    inputs, _ = random_inputs(Shape(), dtype, device)
    wrong = sink.to(device) if sink.dtype == torch.int32 else sink.to(device, parameter_dtype(dtype))
    with pytest.raises(RuntimeError, match=message):
        attnx.softmax_attention(**inputs, sink=wrong)


def test_the_sigmoid_has_none(dtype: torch.dtype, device: torch.device) -> None:
    inputs, _ = random_inputs(Shape(64, 64), dtype, device)
    mask = attnx.BlockMask.from_dense(torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device), (64, 64))
    with pytest.raises(RuntimeError, match='sink: expected None, or a tensor with score="softmax"'):
        attnx.block_sparse_attention(**inputs, block_mask=mask, score="sigmoid", sink=_sink((2,), dtype, device))
