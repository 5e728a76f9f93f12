"""Softmax with a learned sink: one more logit of every row, which takes weight and has no value."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import attnx
from attnx.testing import assert_close
from cases import DTYPES, FEW_SHAPES, MASKS, Shape, pack, parameter_dtype, random_inputs, random_parameter
from compare import check, forward_backward


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


@pytest.mark.parametrize("kv_heads", [1, 4])  # with 4 there is one row for a key head, few enough for any CPU
@pytest.mark.parametrize("length_k", [1, 700, 4000])
def test_few_queries_share_a_sink_once(
    length_k: int, kv_heads: int, threads: int | None, dtype: torch.dtype, device: torch.device
) -> None:
    """Keys are cut into shares there, of which one alone starts from the sink."""
    inputs, grad_output = random_inputs(Shape(1, length_k, 64, heads=4, kv_heads=kv_heads), dtype, device)
    inputs["sink"] = _sink((4,), dtype, device) + math.log(length_k)
    check("softmax_attention", inputs, grad_output)


def test_varlen(dtype: torch.dtype, device: torch.device) -> None:
    inputs, grad_output, sizes = pack(([70, 0, 9, 30], [80, 7, 0, 30]), dtype, device)
    inputs["sink"] = _sink((4,), dtype, device)
    check("softmax_attention_varlen", inputs, grad_output, is_causal=True, **sizes)


def _logsumexp(query: Tensor, key: Tensor, value: Tensor, sink: Tensor, **options: Any) -> Tensor:
    return attnx.softmax_attention(query, key, value, sink=sink, return_logsumexp=True, **options)[1]


def _plain_logsumexp(query: Tensor, key: Tensor, sink: Tensor) -> Tensor:
    """The causal one in plain PyTorch, in the dtype of the sums, from inputs as they are."""
    query, key = query.to(sink.dtype), key.to(sink.dtype)
    visible = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
    logits = (query * query.shape[3] ** -0.5 @ key.mT).where(visible.tril(key.shape[2] - query.shape[2]), -math.inf)
    return torch.cat([logits, sink[:, None, None].expand(*logits.shape[:-1], 1)], -1).logsumexp(-1)


def test_logsumexp_includes_it(dtype: torch.dtype, device: torch.device) -> None:
    """A row without keys has the sink as its logsumexp, and gives 0; gradients come from it, too."""
    inputs, _ = random_inputs(Shape(9, 4, 64), dtype, device)
    query, key = inputs["query"], inputs["key"]
    sinks = _sink((2,), dtype, device)

    def value_and_gradient(sink: Tensor, logsumexp: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        sink = sink.clone().requires_grad_()
        result = logsumexp(sink)
        return result.detach(), torch.autograd.grad(result.sum(), sink)[0]

    actual = value_and_gradient(sinks, lambda sink: _logsumexp(**inputs, sink=sink, is_causal=True))
    expected = value_and_gradient(sinks.double(), lambda sink: _plain_logsumexp(query, key, sink))
    baseline = value_and_gradient(sinks, lambda sink: _plain_logsumexp(query, key, sink))
    for name, *three in zip(("logsumexp", "grad_sink"), actual, expected, baseline, strict=True):
        assert_close(*three, name=name)
    output = attnx.softmax_attention(**inputs, sink=sinks, is_causal=True)
    assert (output[:, :, :5] == 0).all()


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
