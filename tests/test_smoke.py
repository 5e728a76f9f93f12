"""A few seconds that tell whether a wheel loads and computes under the torch at hand: ``pytest -m smoke``."""

import pytest
import torch

import attnx
from cases import DTYPES, VARLEN_OPERATORS, Shape, pack, random_inputs
from compare import check, forward_backward

pytestmark = pytest.mark.smoke

SHAPE = Shape(batch=2, heads=4, kv_heads=2, length_q=65, length_k=70, head_dim=40, value_dim=24)
OPERATORS = ["sigmoid_attention", "softmax_attention"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_forward_and_backward(
    operator: str, dtype: torch.dtype, instruction_set: str | None, device: torch.device
) -> None:
    check(operator, *random_inputs(SHAPE, dtype, device), is_causal=True)


@pytest.mark.parametrize("operator", VARLEN_OPERATORS)
def test_packed(operator: str, dtype: torch.dtype, device: torch.device) -> None:
    inputs, grad_output, lengths = pack(([5, 0, 9], [7, 3, 9]), dtype, device)
    check(operator, inputs, grad_output, **lengths)


def test_sampled_blocks(dtype: torch.dtype, device: torch.device, deterministic: None) -> None:
    shape = Shape(length_q=300, length_k=300)
    inputs, grad_output = random_inputs(shape, dtype, device)
    blocks = attnx.probabilistic_block_mask(1, shape.heads, 300, 300, seed=1, offset=2, device=device)
    expected = forward_backward(attnx.block_sparse_attention, inputs, grad_output, block_mask=blocks)
    actual = forward_backward(attnx.probabilistic_attention, inputs, grad_output, seed=1, offset=2)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("operator", OPERATORS)
def test_compile(operator: str, dtype: torch.dtype, device: torch.device, deterministic: None) -> None:
    inputs, grad_output = random_inputs(SHAPE, dtype, device)
    attention = getattr(attnx, operator)
    compiled = torch.compile(attention, fullgraph=True, dynamic=True, backend="aot_eager")
    expected = forward_backward(attention, inputs, grad_output)
    actual = forward_backward(compiled, inputs, grad_output)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_bad_input_is_refused(dtype: torch.dtype, device: torch.device) -> None:
    x = torch.zeros(1, 2, 8, 16, dtype=dtype, device=device)
    with pytest.raises(RuntimeError, match=r"key: expected shape \(1, 2, 8, 16\), got \(1, 2, 8, 4\)"):
        attnx.sigmoid_attention(x, x[..., :4], x)


def test_the_rest_answers(dtype: torch.dtype, device: torch.device) -> None:
    x = torch.zeros(1, 2, 8, 16, dtype=dtype, device=device)
    assert attnx.explain(attnx.sigmoid_attention, x, x, x).supported
    module = attnx.nn.SigmoidAttention(32, 2, dtype=dtype, device=device)
    assert module(torch.zeros(1, 5, 32, dtype=dtype, device=device)).shape == (1, 5, 32)
