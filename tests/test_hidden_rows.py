"""A row all of whose logits are -inf is a row that sees no key: output 0, logsumexp -inf, gradients 0."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import attnx
from attnx.testing import assert_close
from cases import DTYPES, Shape, random_inputs, random_parameter
from compare import forward_backward
from test_block_sparse import eager

SHAPE = Shape(length_q=200, length_k=330, head_dim=64, batch=2, heads=4, kv_heads=2)
SCORES = ["softmax", "softmax_sink", "sigmoid"]
HIDDEN, VISIBLE = 1, 0  # blocks of queries: one that sees nothing, and one that sees some


def lists(device: torch.device) -> tuple[attnx.BlockMask, Tensor]:
    """Blocks with biases, of which those of a block of queries are all -inf, and of others one."""
    mask = attnx.BlockMask.from_dense(torch.ones(1, 4, 4, 6, dtype=torch.bool, device=device))
    block_bias = torch.randn(1, 4, 4, 6, generator=torch.Generator().manual_seed(3)).to(device)
    block_bias[:, :, HIDDEN] = -math.inf
    block_bias[:, :, VISIBLE, 0] = -math.inf
    block_bias[:, 1, 2, 5] = -math.inf
    return mask, block_bias


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bias_that_hides_blocks(dtype: torch.dtype, score: str, is_causal: bool, device: torch.device) -> None:
    inputs, grad_output = random_inputs(SHAPE, dtype, device)
    mask, block_bias = lists(device)
    options = {"score": score.removesuffix("_sink"), "is_causal": is_causal}
    if score == "softmax_sink":
        inputs["sink"] = random_parameter((SHAPE.heads,), dtype, device)
    biased = {"block_mask": mask, "block_bias": block_bias} | options
    actual = forward_backward(attnx.block_sparse_attention, inputs, grad_output, **biased)
    exact = {name: x.double() for name, x in inputs.items()}
    expected = forward_backward(attnx.reference.block_sparse_attention, exact, grad_output.double(), **biased)
    # What plain PyTorch makes of it where the lists leave those blocks out.
    shown = block_bias != -math.inf
    order = (~shown).int().argsort(dim=-1, stable=True)
    left_out = {"block_mask": attnx.BlockMask.from_dense(shown)} | options
    left_out["block_bias"] = block_bias.gather(-1, order).nan_to_num(neginf=0.0)
    baseline = forward_backward(eager, inputs, grad_output, **left_out)
    for name, x in actual.items():
        assert expected[name].isfinite().all()
        assert_close(x, expected[name], baseline[name], name=name, dtype=dtype)
    hidden = slice(64 * HIDDEN, 64 * (HIDDEN + 1))
    assert not actual["output"][:, :, hidden].any()
    assert not actual["grad_query"][:, :, hidden].any()


@pytest.mark.needs("hidden_nonfinite")
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_nan_in_blocks_that_a_bias_hides(score: str, dtype: torch.dtype, device: torch.device) -> None:
    """What -inf hides counts as not listed, also between blocks that a row sees."""
    inputs, grad_output = random_inputs(Shape(length_q=130, length_k=256, head_dim=16), dtype, device)
    mask = attnx.BlockMask.from_dense(torch.ones(1, 1, 3, 4, dtype=torch.bool, device=device))
    block_bias = torch.zeros(1, 1, 3, 4, device=device)
    block_bias[..., 1] = -math.inf
    options = {"block_mask": mask, "block_bias": block_bias, "score": score}
    clean = forward_backward(attnx.block_sparse_attention, inputs, grad_output, **options)
    for name in ("key", "value"):
        inputs[name][:, :, 64:128] = torch.nan
    poisoned = forward_backward(attnx.block_sparse_attention, inputs, grad_output, **options)
    for name, x in clean.items():
        assert torch.equal(x, poisoned[name]), name


def test_logsumexp_of_hidden_blocks(dtype: torch.dtype, device: torch.device) -> None:
    inputs, _ = random_inputs(SHAPE, dtype, device)
    mask, block_bias = lists(device)
    for attention in (attnx.block_sparse_attention, attnx.reference.block_sparse_attention):
        _, logsumexp = attention(**inputs, block_mask=mask, block_bias=block_bias, return_logsumexp=True)
        blocks = logsumexp.cpu().split(64, dim=2)
        assert [bool(x.isneginf().all()) for x in blocks] == [False, True, False, False]
        assert all(x.isfinite().all() for i, x in enumerate(blocks) if i != HIDDEN)


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("length_q", [1, 3, 130], ids=str)
def test_logits_beyond_the_range(length_q: int, is_causal: bool, dtype: torch.dtype, device: torch.device) -> None:
    """The products of the first row and every key are -1e38, times 10: -inf in float32."""
    query = torch.zeros(1, 1, length_q, 64, dtype=dtype, device=device)
    key, value = torch.zeros(1, 1, 150, 64, dtype=dtype, device=device), torch.ones(1, 1, 150, 64, dtype=dtype)
    size = min(1e38, torch.finfo(dtype).max / 2)
    query[:, :, 0, 0], key[..., 0] = 1, -size
    scale = 1e39 / size
    leaves = [x.to(device).requires_grad_() for x in (query, key, value)]
    output, logsumexp = attnx.softmax_attention(*leaves, scale=scale, is_causal=is_causal, return_logsumexp=True)
    assert logsumexp[0, 0, 0] == -math.inf
    assert logsumexp[0, 0, 1:].isfinite().all()
    assert not output[0, 0, 0].any()
    for x in torch.autograd.grad(output[:, :, 0].sum(), leaves):
        assert not x.any(), x


@pytest.mark.backends("cpu")
def test_logits_beyond_the_range_of_float64(device: torch.device) -> None:
    """The reference's range."""
    query, key = torch.ones(1, 1, 3, 4, dtype=torch.float64), torch.full((1, 1, 5, 4), -1e308, dtype=torch.float64)
    value = torch.ones_like(key)
    for attention in (attnx.softmax_attention, attnx.reference.softmax_attention):
        leaves = [x.clone().requires_grad_() for x in (query, key, value)]
        output, logsumexp = attention(*leaves, scale=10.0, return_logsumexp=True)
        assert not output.any()
        assert logsumexp.isneginf().all()
        assert not any(x.any() for x in torch.autograd.grad(output.sum(), leaves))


@pytest.mark.parametrize("where", ["bias", "block_bias"])
@pytest.mark.parametrize("length_q", [1, 70], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sigmoid_reaches_zero(dtype: torch.dtype, length_q: int, where: str, device: torch.device) -> None:
    """Weights of -inf are 0, so that no value is large enough to show."""
    inputs, grad = random_inputs(Shape(length_q=length_q, length_k=130, head_dim=64), dtype, device)
    inputs["value"] = torch.full_like(inputs["value"], torch.finfo(dtype).max / 4)
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    if where == "bias":
        output = attnx.sigmoid_attention(**leaves, bias=-math.inf)
    else:
        mask = attnx.BlockMask.from_dense(torch.ones(1, 1, -(-length_q // 64), 3, dtype=torch.bool, device=device))
        block_bias = torch.full(mask.kv_indices.shape, -math.inf, device=device)
        output = attnx.block_sparse_attention(**leaves, block_mask=mask, score="sigmoid", block_bias=block_bias)
    assert not output.any()
    for x in torch.autograd.grad(output, list(leaves.values()), grad * 1e-3):
        assert not x.any()
