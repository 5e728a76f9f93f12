"""Softplus attention by the mainloops for Hopper, sm_90a: every path of them against float64, and when they are chosen.

On a GPU of compute capability 9.0, or on the emulator under CUDAEMU_CC=90.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import attnx
from attnx import reference
from attnx.testing import assert_close
from cases import DTYPES, MASKS, Shape, pack, random_inputs
from compare import forward_backward
from test_softplus import check, eager

pytestmark = [pytest.mark.backends("cuda", "emulated"), pytest.mark.needs("sm90"), pytest.mark.usefixtures("backend")]

# Those that have tiles of their own, one that is padded, and one whose values are narrower.
HEAD_DIMS = [(64, 64), (128, 128), (256, 256), (96, 96), (128, 40)]


@pytest.fixture
def sm90() -> Iterator[None]:
    """Calls that another mainloop would serve are errors."""
    with attnx.cuda_mainloop("sm90"):
        yield


def check_forward(inputs: dict[str, Tensor], **options: Any) -> Tensor:
    """Holds the output against float64; returns it."""
    output = attnx.softplus_attention(**inputs, **options)
    expected = reference.softplus_attention(**{name: x.double() for name, x in inputs.items()}, **options)
    assert_close(output, expected, eager(**inputs, **options))
    return output


@pytest.mark.usefixtures("sm90")
@pytest.mark.parametrize("mask", ["full", "causal", "window_both", "window_right", "window_diagonal"])
@pytest.mark.parametrize(("head_dim", "value_dim"), HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masks(dtype: torch.dtype, head_dim: int, value_dim: int, mask: str, device: torch.device) -> None:
    """Several tiles of rows and of keys, the last ones ragged."""
    check(*random_inputs(Shape(200, 300, head_dim, value_dim, heads=2), dtype, device), **MASKS[mask])


@pytest.mark.usefixtures("sm90")
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("group", [2, 3, 16])
def test_groups(group: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    """Query heads in one tile where they divide its rows, and in tiles of their own where they do not."""
    shape = Shape(70, 150, head_dim, batch=2, heads=2 * group, kv_heads=2)
    check(*random_inputs(shape, dtype, device), is_causal=True)


@pytest.mark.usefixtures("sm90")
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_neighbouring_sequences(head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    """Tiles read on into the next sequence, whose numbers may be none: they leave no trace."""
    lengths = ([70, 70, 0, 130], [90, 33, 5, 200])
    inputs, grad_output, sizes = pack(lengths, dtype, device, kv_heads=1, head_dim=head_dim, value_dim=head_dim)
    clean = check(inputs, grad_output, "softplus_attention_varlen", is_causal=True, **sizes)
    poisoned = {name: x.clone() for name, x in inputs.items()}
    for name, x in poisoned.items():
        x[lengths[name != "query"][0] :] = torch.nan
    grad_output = grad_output.clone()
    grad_output[lengths[0][0] :] = torch.nan
    results = forward_backward(attnx.softplus_attention_varlen, poisoned, grad_output, is_causal=True, **sizes)
    for name, x in results.items():
        own = lengths[name not in ("output", "grad_query")][0]
        tolerance = 4 * torch.finfo(dtype).eps * clean[name][:own].abs().max().item()  # atomics in another order
        torch.testing.assert_close(x[:own], clean[name][:own], rtol=0, atol=tolerance, msg=name)


@pytest.mark.usefixtures("sm90")
def test_lengths_of_keys(dtype: torch.dtype, device: torch.device) -> None:
    inputs, grad_output = random_inputs(Shape(100, 220, 64, batch=3, heads=4, kv_heads=2), dtype, device)
    used = {"seqused_k": torch.tensor([220, 0, 37]).int(), "leftpad_k": torch.tensor([5, 0, 31]).int()}
    check(inputs, grad_output, is_causal=True, **{name: x.to(device) for name, x in used.items()})


@pytest.mark.usefixtures("sm90")
def test_more_tiles_than_blocks(dtype: torch.dtype, device: torch.device) -> None:
    """Blocks take several tiles of rows, whose sums start at 0 each."""
    inputs, _ = random_inputs(Shape(70, 140, 128, batch=3, heads=70, kv_heads=35), dtype, device)
    output = check_forward(inputs, is_causal=True)
    assert torch.equal(attnx.softplus_attention(**inputs, is_causal=True), output)


@pytest.mark.usefixtures("sm90")
def test_keys_in_shares(dtype: torch.dtype, device: torch.device) -> None:
    """The shares merge by ln Z."""
    inputs, _ = random_inputs(Shape(80, 2000, 64, heads=1), dtype, device)
    assert "shares" in str(attnx.explain(attnx.softplus_attention, **inputs))
    check_forward(inputs)


@pytest.mark.usefixtures("sm90")
@pytest.mark.parametrize("scale", [9.0, -9.0])
def test_large_logits(scale: float, dtype: torch.dtype, device: torch.device) -> None:
    """Softplus is its logit at one end, and a power, which must not be lost, at the other."""
    inputs, grad_output = random_inputs(Shape(100, 140, 64), dtype, device)
    steps = torch.linspace(-1, 1, 140, device=device, dtype=torch.float64)[:, None]
    inputs["key"] = (inputs["key"].double() + steps * 4 * inputs["query"][:, :, :1].double()).to(dtype)
    check(inputs, grad_output, scale=scale)


@pytest.mark.usefixtures("sm90")
@pytest.mark.parametrize("head_dim", [64, 256])
def test_logsumexp(head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    inputs, _ = random_inputs(Shape(100, 70, head_dim, heads=4, kv_heads=2), dtype, device)
    _, actual = attnx.softplus_attention(**inputs, return_logsumexp=True, is_causal=True)
    exact = {name: x.double() for name, x in inputs.items()}
    _, expected = reference.softplus_attention(**exact, return_logsumexp=True, is_causal=True)
    assert torch.equal(actual.isneginf(), expected.isneginf())
    tolerance = 20 * torch.finfo(dtype).eps
    torch.testing.assert_close(actual[:, :, 30:].double(), expected[:, :, 30:], rtol=0, atol=tolerance)


@pytest.mark.usefixtures("sm90", "deterministic")
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("mask", ["full", "window_causal"])
def test_repeats_bitwise(mask: str, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    inputs, grad_output = random_inputs(Shape(260, 300, head_dim, batch=2, heads=2, kv_heads=1), dtype, device)
    first = check(inputs, grad_output, **MASKS[mask])
    for _ in range(3):
        again = forward_backward(attnx.softplus_attention, inputs, grad_output, **MASKS[mask])
        assert all(torch.equal(again[name], x) for name, x in first.items())


def test_the_kernels_are_named(dtype: torch.dtype, device: torch.device) -> None:
    inputs, _ = random_inputs(Shape(100, 100, 96), dtype, device)
    explanation = attnx.explain(attnx.softplus_attention, **inputs)
    assert explanation.kernel == "softplus_attention [sm90]"
    for kernel in ("attnx_forward_sm90, 128 rows x 128 keys", "attnx_backward_sm90, 80 rows x 128 keys"):
        assert any(f"{kernel}, head_dim padded to 128" in reason for reason in explanation.reasons)
    with attnx.cuda_mainloop("sm80"):
        assert attnx.explain(attnx.softplus_attention, **inputs).kernel == "softplus_attention [sm80]"


def test_the_sharpened_form_has_none(dtype: torch.dtype, device: torch.device) -> None:
    inputs, _ = random_inputs(Shape(100, 100, 64), dtype, device)
    explanation = attnx.explain(attnx.softplus_attention, **inputs, sharpen=3)
    assert explanation.kernel == "sharpened_softplus_attention [sm80]"
    assert any("it has no kernels of this score" in reason for reason in explanation.reasons)
    with attnx.cuda_mainloop("sm90"), pytest.raises(RuntimeError, match="it has no kernels of this score"):
        attnx.softplus_attention(**inputs, sharpen=3)
