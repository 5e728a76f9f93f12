"""The gradient of block_bias: the sum over each listed block of what the logits get."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import attnx
from attnx._operators.schema import signature
from attnx.block_mask import dense_bias
from calls import RecordedCalls
from cases import Shape, random_inputs
from compare import forward_backward
from test_block_sparse import BLOCK_SIZES, SCORES, check, random_mask

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def random_bias(mask: attnx.BlockMask, shape: Shape, served: str = "each") -> Tensor:
    """Each head of each sequence has a bias, or several share one."""
    batch = 1 if served in ("sequences", "all") else shape.batch
    heads = 1 if served in ("heads", "all") else shape.heads
    generator = torch.Generator().manual_seed(3)
    return torch.randn(batch, heads, *mask.kv_indices.shape[2:], generator=generator).to(mask.kv_indices.device)


def exact_gradients(inputs: dict[str, Tensor], grad_output: Tensor, **options: Any) -> dict[str, Tensor]:
    exact = {name: x.double() for name, x in inputs.items()}
    return forward_backward(attnx.reference.block_sparse_attention, exact, grad_output.double(), **options)


@pytest.mark.parametrize("block_size", BLOCK_SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("score", SCORES)
def test_definition(score: str, dtype: torch.dtype, block_size: tuple[int, int], device: torch.device) -> None:
    shape = Shape(batch=2, length_q=200, length_k=330, head_dim=40, value_dim=24, heads=4, kv_heads=2)
    mask = random_mask(shape, block_size, 0.6, device)
    inputs, grad_output = random_inputs(shape, dtype, device)
    inputs["block_bias"] = random_bias(mask, shape)
    results = check(inputs, grad_output, mask, score=score, is_causal=True)
    unused = torch.arange(mask.kv_indices.shape[-1], device=device) >= mask.kv_num_blocks[..., None]
    assert not results["grad_block_bias"][unused].any()
    assert results["grad_block_bias"].dtype == torch.float32


@pytest.mark.parametrize("served", ["sequences", "heads", "all"])
def test_one_bias_for_several(served: str, dtype: torch.dtype, device: torch.device) -> None:
    shape = Shape(batch=2, length_q=200, length_k=130, head_dim=64, heads=4)
    visited = torch.rand(1, 1, 4, 3, generator=torch.Generator().manual_seed(0)) < 0.6
    mask = attnx.BlockMask.from_dense(visited.to(device))
    inputs, grad_output = random_inputs(shape, dtype, device)
    inputs["block_bias"] = random_bias(mask, shape, served)
    check(inputs, grad_output, mask)


@pytest.mark.parametrize("block_size", BLOCK_SIZES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("score", SCORES)
def test_head_dims(
    score: str, head_dim: int, block_size: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    shape = Shape(length_q=190, length_k=210, head_dim=head_dim, value_dim=56, heads=2, kv_heads=1)
    mask = random_mask(shape, block_size, 0.7, device)
    inputs, grad_output = random_inputs(shape, dtype, device)
    inputs["block_bias"] = random_bias(mask, shape)
    check(inputs, grad_output, mask, score=score)


def test_rows_that_do_not_lie_on_16_bytes(dtype: torch.dtype, device: torch.device) -> None:
    shape = Shape(length_q=70, length_k=130, head_dim=35, value_dim=13, heads=2)
    mask = random_mask(shape, (64, 64), 0.7, device)
    inputs, grad_output = random_inputs(shape, dtype, device)
    inputs["block_bias"] = random_bias(mask, shape)
    check(inputs, grad_output, mask)


def test_with_a_sink(dtype: torch.dtype, device: torch.device) -> None:
    """It takes weight from every block, so that their gradients no longer sum to 0."""
    shape = Shape(length_q=130, length_k=200, head_dim=64, heads=2)
    mask = random_mask(shape, (64, 64), 0.7, device)
    inputs, grad_output = random_inputs(shape, dtype, device)
    inputs["block_bias"] = random_bias(mask, shape)
    inputs["sink"] = torch.tensor([3.0, -1.0], device=device)
    results = check(inputs, grad_output, mask)
    assert results["grad_block_bias"].sum((0, 2, 3)).abs().max() > 0.1


@pytest.mark.parametrize("score", SCORES)
def test_a_block_that_is_hidden_gets_zero(score: str, dtype: torch.dtype, device: torch.device) -> None:
    """A bias of -inf hides a block: neither its values nor NaN among them come into the gradients."""
    shape = Shape(length_q=130, length_k=200, head_dim=64, heads=2)
    mask = attnx.BlockMask.from_dense(torch.ones(1, 2, 3, 4, dtype=torch.bool, device=device))
    inputs, grad_output = random_inputs(shape, dtype, device)
    inputs["block_bias"] = random_bias(mask, shape)
    inputs["block_bias"][0, :, :, 1] = -math.inf
    options: dict[str, Any] = {"block_mask": mask, "score": score}
    results = forward_backward(attnx.block_sparse_attention, inputs, grad_output, **options)["grad_block_bias"]
    assert not results[0, :, :, 1].any()
    shown = [0, 2, 3]
    fewer = attnx.BlockMask.from_dense(mask.to_dense(4) & (torch.arange(4, device=device) != 1))
    inputs["block_bias"] = torch.zeros(fewer.kv_indices.shape, device=device)
    inputs["block_bias"][..., :3] = random_bias(mask, shape)[..., shown]
    options["block_mask"] = fewer
    without = forward_backward(attnx.block_sparse_attention, inputs, grad_output, **options)["grad_block_bias"]
    assert torch.equal(results[..., shown], without[..., :3])


def test_same_bits_again(dtype: torch.dtype, device: torch.device) -> None:
    """No flag asks for it: each number has one sum of a fixed order."""
    shape = Shape(length_q=200, length_k=200, head_dim=64, heads=2)
    mask = random_mask(shape, (128, 128), 0.9, device)
    inputs, grad_output = random_inputs(shape, dtype, device)
    inputs["block_bias"] = random_bias(mask, shape)
    first, second = (
        forward_backward(attnx.block_sparse_attention, inputs, grad_output, block_mask=mask)["grad_block_bias"]
        for _ in range(2)
    )
    assert torch.equal(first, second)


def test_nothing_is_summed_for_a_bias_that_needs_no_gradient(dtype: torch.dtype, device: torch.device) -> None:
    shape = Shape(length_q=70, length_k=130, head_dim=64, heads=2)
    mask = random_mask(shape, (64, 64), 0.7, device)
    inputs, grad_output = random_inputs(shape, dtype, device)
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    output = attnx.block_sparse_attention(**leaves, block_mask=mask, block_bias=random_bias(mask, shape))
    with RecordedCalls() as calls:
        output.backward(grad_output)
    [(operator, arguments, _)] = calls.seen
    assert signature(operator._opname).bind(arguments)["block_bias_gradient"] is False


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("head_dim", [16, 200])  # rows of a block in one tile, and in several
def test_same_bits_with_any_number_of_threads(head_dim: int, threads: int, device: torch.device) -> None:
    """One key head, so that the tiles of its rows are dealt out."""
    shape = Shape(length_q=500, length_k=300, head_dim=head_dim, heads=2, kv_heads=1)
    mask = random_mask(shape, (128, 64), 0.6, device)
    inputs, grad_output = random_inputs(shape, torch.float32, device)
    inputs["block_bias"] = random_bias(mask, shape)
    options = {"block_mask": mask, "score": "sigmoid"}
    first, second = (forward_backward(attnx.block_sparse_attention, inputs, grad_output, **options) for _ in range(2))
    torch.set_num_threads(1)
    alone = forward_backward(attnx.block_sparse_attention, inputs, grad_output, **options)["grad_block_bias"]
    assert torch.equal(first["grad_block_bias"], second["grad_block_bias"])
    assert torch.equal(first["grad_block_bias"], alone)
    exact = exact_gradients(inputs, grad_output, **options)["grad_block_bias"]
    torch.testing.assert_close(alone, exact.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.backends("cpu")
def test_every_instruction_set(instruction_set: str, device: torch.device) -> None:
    shape = Shape(length_q=130, length_k=200, head_dim=160)
    mask = random_mask(shape, (128, 128), 0.9, device)
    inputs, grad_output = random_inputs(shape, torch.float64, device)
    inputs["block_bias"] = random_bias(mask, shape)
    results = forward_backward(attnx.block_sparse_attention, inputs, grad_output, block_mask=mask)
    expected = exact_gradients(inputs, grad_output, block_mask=mask)["grad_block_bias"]
    torch.testing.assert_close(results["grad_block_bias"], expected.float())


def test_a_learned_bias_finds_its_target(dtype: torch.dtype, device: torch.device) -> None:
    """What a step on the gradient does: attention moves to the block that the loss wants."""
    shape = Shape(length_q=64, length_k=192, head_dim=64, heads=1)
    mask = attnx.BlockMask.from_dense(torch.ones(1, 1, 1, 3, dtype=torch.bool, device=device))
    inputs, _ = random_inputs(shape, dtype, device)
    bias = torch.nn.Parameter(torch.zeros(mask.kv_indices.shape, device=device))
    second = torch.arange(192, device=device) // 64 == 1
    inputs["value"] = second.to(dtype)[:, None].expand(1, 1, 192, 64).contiguous()
    optimizer = torch.optim.SGD([bias], lr=1.0)
    for _ in range(30):
        optimizer.zero_grad()
        output = attnx.block_sparse_attention(**inputs, block_mask=mask, block_bias=bias)
        (64 * (1 - output.float()).mean()).backward()
        optimizer.step()
    learned = dense_bias(mask.kv_num_blocks, mask.kv_indices, bias.detach(), 3)[0, 0, 0]
    assert learned.argmax() == 1
    assert learned[1] - learned[0] > 2


def test_opcheck(dtype: torch.dtype, device: torch.device) -> None:
    shape = Shape(length_q=70, length_k=130, head_dim=64, heads=2)
    mask = random_mask(shape, (64, 64), 0.7, device)
    inputs, _ = random_inputs(shape, dtype, device)
    bias = random_bias(mask, shape)
    for given in (bias, bias[:, :1], None):
        arguments = [*(x.requires_grad_() for x in inputs.values()), None, None, mask.kv_num_blocks, mask.kv_indices]
        arguments += [None if given is None else given.clone().requires_grad_(), None]
        arguments += [None, None, None, None, None, None, 0.0, None, None, 64, 64, "softmax", "none", 0.0, None, False]
        torch.library.opcheck(torch.ops.attnx.block_sparse_attention.default, tuple(arguments))
