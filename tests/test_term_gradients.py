"""Gradients of terms of logits in the tiles, head dimensions and lists that CUDA's loop of sums tells apart."""

from __future__ import annotations

import pytest
import torch

import attnx
from backends import Backend
from cases import OPERATORS, Shape, pack, random_inputs
from compare import forward_backward
from logit_terms import GRADIENTS, check, check_lists, check_packed, needs, terms_of
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
    results = check_packed(operator, inputs | {name: x[0] for name, x in terms.items()}, grad_output, sizes)
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
    check_lists(leaves, grad_output, mask, score, is_causal=True, **terms)


@pytest.mark.parametrize("score", SCORES)
def test_bias_of_blocks_beside_bounds(score: str, dtype: torch.dtype, backend: Backend, device: torch.device) -> None:
    """Bounds of rows are no term of the logits on the CPU, but on CUDA they are one, also where they come alone."""
    shape = Shape(batch=2, length_q=200, length_k=330, heads=4, kv_heads=2, head_dim=64)
    mask = attnx.BlockMask.window(shape.length_q, shape.length_k, (70, 9), device=device)
    inputs, grad_output = random_inputs(shape, dtype, device)
    inputs["block_bias"] = random_bias(mask, shape)
    check_lists(inputs, grad_output, mask, score)
