"""Gradients of terms of logits in the tiles, head dimensions and lists that CUDA's loop of sums tells apart."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import attnx
from attnx import reference
from attnx.block_mask import dense_bias
from attnx.testing import assert_close
from backends import Backend
from cases import OPERATORS, Shape, pack, random_inputs
from compare import forward_backward
from logit_terms import GRADIENTS, check, eager, needs, terms_of, within
from test_block_bias_gradient import random_bias
from test_block_sparse import BLOCK_SIZES, SCORES, random_mask

ALL = ("softcap", "attn_mask", "key_bias", "key_mask", "dropout")


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("served", ["each", "all", "rows"])
@pytest.mark.parametrize("head_dim", [64, 93, 128, 200, 256])
def test_head_dimensions(head_dim: int, served: str, operator: str, dtype: torch.dtype, backend: Backend) -> None:
    """93 features do not start on 16 bytes."""
    needs(backend, ALL)
    shape = Shape(length_q=90, length_k=85, head_dim=head_dim, heads=2, kv_heads=1, batch=2)
    inputs, grad_output = random_inputs(shape, dtype, backend.device)
    check(operator, inputs, grad_output, **terms_of(ALL, shape, dtype, backend.device, served), is_causal=True)


@pytest.mark.parametrize("operator", OPERATORS)
def test_strides(operator: str, dtype: torch.dtype, backend: Backend) -> None:
    """Inputs may be transposed, or start off 16 bytes."""
    needs(backend, GRADIENTS)
    shape = Shape(length_q=70, length_k=75, head_dim=64, heads=4, kv_heads=2)
    inputs, grad_output = random_inputs(shape, dtype, backend.device)
    terms = terms_of(GRADIENTS, shape, dtype, backend.device)
    for view in (
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: torch.cat((x[..., :3], x), -1)[..., 3:],
    ):
        check(operator, {name: view(x) for name, x in inputs.items()}, view(grad_output), **terms)


@pytest.mark.parametrize("served", ["each", "heads"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_packed_sequences(operator: str, served: str, dtype: torch.dtype, backend: Backend) -> None:
    """Keys of padding, which no sequence has, get 0."""
    names = ("key_bias", "key_mask")
    needs(backend, names)
    inputs, grad_output, sizes = pack(([70, 0, 9], [80, 7, 130]), dtype, backend.device)
    sizes["cu_seqlens_k"] = torch.tensor([0, 80, 87, 200], dtype=torch.int32, device=backend.device)
    sizes["has_padding"] = True
    terms = terms_of(names, Shape(length_k=217, heads=4), dtype, backend.device, served)
    leaves = inputs | {name: x[0] for name, x in terms.items()}
    results = forward_backward(getattr(attnx, f"{operator}_varlen"), leaves, grad_output, **sizes)
    exact = {name: x.double() for name, x in leaves.items()}
    expected = forward_backward(getattr(reference, f"{operator}_varlen"), exact, grad_output.double(), **sizes)
    tolerance = {torch.float32: 1e-5}.get(dtype, 3e-2)
    for name, x in results.items():
        torch.testing.assert_close(x.double(), expected[name], rtol=tolerance, atol=tolerance, msg=name)
    assert all((results[f"grad_{name}"][:, 200:] == 0).all() for name in names)


def test_a_hidden_key_may_weigh_any_number(dtype: torch.dtype, backend: Backend) -> None:
    """Without its key_mask of 0 the weight of key 3 would be e^200: its gradient is finite, and nothing else has it."""
    names = ("key_bias", "key_mask")
    needs(backend, names)
    shape = Shape(length_q=1, length_k=70)
    inputs, grad_output = random_inputs(shape, dtype, backend.device)
    terms = terms_of(names, shape, dtype, backend.device)
    terms["key_mask"][..., 3] = 0
    terms["key_bias"][..., 3] = 200
    results = forward_backward(attnx.softmax_attention, inputs | terms, grad_output / 64)
    assert all(x.isfinite().all() for x in results.values())
    assert results["grad_key_mask"][0, 0, 3].abs() > 1e30
    assert (results["grad_key_bias"][..., 3] == 0).all()
    several = Shape(length_q=40, length_k=70)  # whose sum is not finite
    inputs, grad_output = random_inputs(several, dtype, backend.device)
    results = forward_backward(attnx.softmax_attention, inputs | terms, grad_output * 64)
    assert not results["grad_key_mask"][..., 3].isfinite().all()
    assert (results["grad_key_bias"][..., 3] == 0).all()


def _check_lists(
    inputs: dict[str, Tensor], grad_output: Tensor, mask: attnx.BlockMask, score: str, **options: Any
) -> dict[str, Tensor]:
    """Holds the output and all gradients against float64, by the error of plain PyTorch in the same dtype."""
    length_q, length_k = inputs["query"].shape[2], inputs["key"].shape[2]
    block_q, block_k = mask.block_size

    def plain(block_bias: Tensor, attn_mask: Tensor | float = 0.0, **leaves: Any) -> Tensor:
        blocks = -(-length_k // block_k)
        numbers = dense_bias(mask.kv_num_blocks, mask.kv_indices, block_bias, blocks)
        numbers = numbers.masked_fill(~mask.to_dense(blocks), -math.inf)
        elements = numbers.repeat_interleave(block_q, -2).repeat_interleave(block_k, -1)[..., :length_q, :length_k]
        if mask.row_bounds is not None:
            elements = elements.masked_fill(~within(mask.row_bounds, length_k), -math.inf)
        return eager(**leaves, attn_mask=attn_mask + elements, score=score)

    listed = {"block_mask": mask, "score": score}
    exact = {name: x.double() for name, x in inputs.items()}, grad_output.double()
    results = forward_backward(attnx.block_sparse_attention, inputs, grad_output, **listed, **options)
    expected = forward_backward(reference.block_sparse_attention, *exact, **listed, **options)
    baseline = forward_backward(plain, inputs, grad_output, **options)
    terms = forward_backward(plain, *exact, constant_sums=True, **options)
    for name, x in results.items():
        sizes = terms[name] if name.startswith("grad_") else None
        assert_close(x, expected[name], baseline[name], terms=sizes, name=name, dtype=grad_output.dtype)
    return results


@pytest.mark.parametrize("served", ["each", "heads", "all"])
@pytest.mark.parametrize("block_size", BLOCK_SIZES, ids=str)
@pytest.mark.parametrize("score", SCORES)
def test_lists(
    score: str, block_size: tuple[int, int], served: str, dtype: torch.dtype, backend: Backend, device: torch.device
) -> None:
    """Heads that share numbers have lists of their own, and the bias of a block counts in all gradients."""
    shape = Shape(batch=2, length_q=200, length_k=330, heads=4, kv_heads=2, head_dim=64)
    mask = random_mask(shape, block_size, 0.6, device)
    inputs, grad_output = random_inputs(shape, dtype, device)
    inputs["block_bias"] = random_bias(mask, shape)
    terms = terms_of(ALL, shape, dtype, device, served)
    leaves = inputs | {name: terms.pop(name) for name in GRADIENTS}
    _check_lists(leaves, grad_output, mask, score, is_causal=True, **terms)


@pytest.mark.parametrize("score", SCORES)
def test_bias_of_blocks_beside_bounds(score: str, dtype: torch.dtype, backend: Backend, device: torch.device) -> None:
    """Bounds of rows are no term of the logits on the CPU, but on CUDA they are one, also where they come alone."""
    shape = Shape(batch=2, length_q=200, length_k=330, heads=4, kv_heads=2, head_dim=64)
    mask = attnx.BlockMask.window(shape.length_q, shape.length_k, (70, 9), device=device)
    inputs, grad_output = random_inputs(shape, dtype, device)
    inputs["block_bias"] = random_bias(mask, shape)
    _check_lists(inputs, grad_output, mask, score)
