"""Terms of logits that take no gradient: the loops with them on the tiles, head dimensions and layouts that kernels
tell apart."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import attnx
from attnx import reference
from attnx.testing import assert_close
from backends import Backend
from cases import OPERATORS, Shape, pack, parameter_dtype, random_inputs, random_parameter
from compare import forward_backward
from logit_terms import check_lists, check_packed, eager, generator, needs, terms_of

ALL = ("softcap", "attn_mask", "key_bias", "key_mask", "dropout")
COMBINATIONS = [("bool_mask",), ("input_mask",), ("attn_mask",), ("key_bias",), ("key_mask",), ("dropout",), ALL]
# These take, on CUDA: tiles of 128 rows, tiles of 64, keys in shares, padding and storage off 16 bytes.
SHAPES = [
    Shape(length_q=150, length_k=130, head_dim=64, heads=4, kv_heads=2, batch=2),
    Shape(length_q=40, length_k=203, head_dim=40, value_dim=24, heads=2),
    Shape(length_q=3, length_k=700, head_dim=64, heads=4, kv_heads=1),
    Shape(length_q=70, length_k=96, head_dim=9, heads=2),
]


def _check(operator: str, inputs: dict[str, Tensor], grad_output: Tensor, **options: Any) -> None:
    results = forward_backward(getattr(attnx, operator), inputs, grad_output, **options)
    exact = {name: x.double() for name, x in inputs.items()}, grad_output.double()
    expected = forward_backward(getattr(reference, operator), *exact, **options)
    baseline = forward_backward(eager, inputs, grad_output, score=operator.split("_")[0], **options)
    for name, actual in results.items():
        assert_close(actual, expected[name], baseline[name], name=name, dtype=grad_output.dtype)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("names", COMBINATIONS, ids="-".join)
def test_shapes(names: tuple[str, ...], shape: Shape, operator: str, dtype: torch.dtype, backend: Backend) -> None:
    needs(backend, names, gradients=False)
    inputs, grad_output = random_inputs(shape, dtype, backend.device)
    _check(operator, inputs, grad_output, **terms_of(names, shape, dtype, backend.device))


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("head_dim", [128, 256])
def test_head_dimensions(head_dim: int, operator: str, dtype: torch.dtype, backend: Backend) -> None:
    needs(backend, ALL, gradients=False)
    shape = Shape(length_q=140, length_k=150, head_dim=head_dim, heads=2, kv_heads=1)
    inputs, grad_output = random_inputs(shape, dtype, backend.device)
    _check(operator, inputs, grad_output, **terms_of(ALL, shape, dtype, backend.device), is_causal=True)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("served", ["sequences", "heads", "all", "rows"])
def test_one_number_for_several(served: str, operator: str, dtype: torch.dtype, backend: Backend) -> None:
    needs(backend, ALL, gradients=False)
    shape = Shape(length_q=70, length_k=130, batch=2, heads=4, kv_heads=2)
    inputs, grad_output = random_inputs(shape, dtype, backend.device)
    _check(operator, inputs, grad_output, **terms_of(ALL, shape, dtype, backend.device, served))


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("name", ["softcap", "attn_mask"])
def test_beside_bands_and_distances(name: str, operator: str, dtype: torch.dtype, backend: Backend) -> None:
    """The slopes' gradient is that of the logits, the softcap's derivative left out."""
    needs(backend, (name, "softcap"), gradients=False)
    shape = Shape(length_q=140, length_k=150, heads=2)
    inputs, grad_output = random_inputs(shape, dtype, backend.device)
    slopes = {"alibi_slopes": random_parameter((2,), dtype, backend.device)}
    terms = terms_of((name, "softcap"), shape, dtype, backend.device)
    for window in ((-1, 0), (40, 20)):
        _check(operator, inputs, grad_output, **terms, window=window)
        _check(operator, inputs | slopes, grad_output, **terms, window=window)


@pytest.mark.parametrize("operator", OPERATORS)
def test_masks_of_any_strides(operator: str, dtype: torch.dtype, backend: Backend) -> None:
    """Those that start off an even element, whose rows have odd strides, or whose keys lie apart."""
    needs(backend, ("attn_mask",), gradients=False)
    shape = Shape(length_q=70, length_k=130, heads=2, batch=2)
    inputs, grad_output = random_inputs(shape, dtype, backend.device)

    def run(mask: Tensor) -> dict[str, Tensor]:
        return forward_backward(getattr(attnx, operator), inputs, grad_output, attn_mask=mask)

    for kind in ("bool_mask", "input_mask", "attn_mask"):
        mask = terms_of((kind,), shape, dtype, backend.device)["attn_mask"]
        expected = run(mask)
        odd = torch.zeros(2, 2, 70, 133, dtype=mask.dtype, device=backend.device)
        odd[..., 2:132] = mask
        off = torch.zeros(2, 2, 70, 132, dtype=mask.dtype, device=backend.device)
        off[..., 1:131] = mask
        apart = torch.stack((mask, mask.flip(-1)), -1)[..., 0]
        for same in (odd[..., 2:132], off[..., 1:131], apart, mask.mT.contiguous().mT):
            results = run(same)
            assert all(torch.equal(results[name], expected[name]) for name in ("output", "grad_key", "grad_value"))


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("block", [64, 128])
def test_lists(block: int, score: str, dtype: torch.dtype, backend: Backend, device: torch.device) -> None:
    rows = [row for row in attnx._capability.table() if row.operator == "block_sparse_attention"]
    (row,) = (row for row in rows if row.backend == backend.kernels)
    if not {"attn_mask", "key_bias", "key_mask", "softcap", "dropout"} <= set(row.features):
        pytest.skip("the capability table has not all of them for lists")
    shape = Shape(batch=2, length_q=200, length_k=330, heads=4, kv_heads=2)
    visited = torch.rand(1, 4, -(-200 // block), -(-330 // block), generator=generator()) < 0.6
    mask = attnx.BlockMask.from_dense(visited.to(device), block_size=(block, block))
    inputs, grad_output = random_inputs(shape, dtype, device)
    check_lists(inputs, grad_output, mask, score, is_causal=True, **terms_of(ALL, shape, dtype, device))


@pytest.mark.parametrize("operator", OPERATORS)
def test_packed_sequences(operator: str, dtype: torch.dtype, backend: Backend) -> None:
    """Numbers by key are packed as keys are."""
    names = ("softcap", "key_bias", "key_mask", "dropout")
    needs(backend, names, gradients=False)
    inputs, grad_output, sizes = pack(([70, 0, 9, 30], [80, 7, 0, 30]), dtype, backend.device)
    terms = terms_of(names, Shape(length_k=117, heads=4), dtype, backend.device)
    options = terms | {name: terms[name][0] for name in ("key_bias", "key_mask")}
    check_packed(operator, inputs, grad_output, sizes, **options)


@pytest.mark.parametrize("kind", ["bool_mask", "attn_mask", "key_mask", "key_bias"])
def test_rows_that_see_nothing(kind: str, dtype: torch.dtype, backend: Backend) -> None:
    needs(backend, (kind,), gradients=False)
    shape = Shape(length_q=70, length_k=90, heads=2, batch=2)
    inputs, grad_output = random_inputs(shape, dtype, backend.device)
    terms = terms_of((kind,), shape, dtype, backend.device)
    (term,) = terms.values()
    term[1:] = {"bool_mask": False, "key_mask": 0.0}.get(kind, -math.inf)
    for sink in (None, torch.ones(2, dtype=parameter_dtype(dtype), device=backend.device)):
        results = forward_backward(attnx.softmax_attention, inputs, grad_output, sink=sink, **terms)
        assert all((x[1] == 0).all() for x in results.values())
        assert all(x.isfinite().all() for x in results.values())
        _, logsumexp = attnx.softmax_attention(**inputs, sink=sink, return_logsumexp=True, **terms)
        assert (logsumexp[1] == (-math.inf if sink is None else 1.0)).all()


@pytest.mark.backends("cuda", "emulated")
def test_explain_says_which_loop_serves_terms(dtype: torch.dtype, device: torch.device, backend: Backend) -> None:
    needs(backend, ("softcap",), gradients=False)

    def explain(head_dim: int, **terms: Any) -> Any:
        inputs, _ = random_inputs(Shape(length_q=300, length_k=300, head_dim=head_dim), dtype, device)
        return attnx.explain(attnx.softmax_attention, **inputs, **terms)

    loop = "sm90" if "[sm90]" in str(explain(72)) else "sm80"
    narrow, wide = explain(72, softcap=2.0), explain(136, softcap=2.0)
    assert narrow.kernel == f"softmax_attention [{loop}]"
    assert any(f"attnx_forward_{loop}" in reason and "padded to 128" in reason for reason in narrow.reasons)
    assert wide.kernel == "softmax_attention [sm80]"
    assert any("at most 128 features" in reason for reason in wide.reasons) == (loop == "sm90")
