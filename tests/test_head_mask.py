"""Factors of heads, their gradients, and heads that are left out."""

from __future__ import annotations

import itertools
import math
import re
import time
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import attnx
from attnx import reference
from attnx.testing import assert_close
from backends import Backend
from cases import DTYPES, Shape, pack, parameter_dtype, random_inputs
from compare import EAGER, forward_backward

OPERATORS = ["sigmoid_attention", "softmax_attention"]
EVERY = pytest.mark.parametrize("operator", OPERATORS)
SHAPE = Shape(length_q=70, length_k=90, head_dim=32, batch=2, heads=4, kv_heads=2)
MASKS = {
    "heads": torch.tensor([0.5, 0.0, -2.0, 1.0]),
    "both": torch.tensor([[0.0, 0.0, 0.3, 1.0], [1.0, 0.7, 0.0, 0.0]]),
}


def mask_of(which: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    return MASKS[which].to(device, parameter_dtype(dtype))


def eager(operator: str, head_mask: Tensor, **options: Any) -> Tensor:
    output = EAGER[operator](**options)
    return (output * head_mask[..., None, None]).to(output.dtype)


@pytest.mark.parametrize("wanted", [False, True], ids=["constant", "learned"])
@pytest.mark.parametrize("which", MASKS)
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window": (20, 5)}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EVERY
def test_definition(
    operator: str, dtype: torch.dtype, options: dict[str, Any], which: str, wanted: bool, device: torch.device
) -> None:
    inputs, grad_output = random_inputs(SHAPE, dtype, device)
    mask = {"head_mask": mask_of(which, dtype, device)}
    leaves, given = (inputs | mask, options) if wanted else (inputs, options | mask)
    got = forward_backward(getattr(attnx, operator), leaves, grad_output, **given)
    exact = {name: x.double() for name, x in leaves.items()}
    want = forward_backward(getattr(reference, operator), exact, grad_output.double(), **given)
    plain = forward_backward(lambda **x: eager(operator, **x), leaves, grad_output, **given)
    for name, x in got.items():
        assert_close(x, want[name], plain[name], name=name, dtype=dtype)
    hidden = (mask["head_mask"] == 0).expand(2, 4)
    assert not got["output"][hidden].any()
    assert not got["grad_query"][hidden].any()


@EVERY
def test_ones_change_no_bit(operator: str, dtype: torch.dtype, device: torch.device) -> None:
    inputs, grad_output = random_inputs(SHAPE, dtype, device)
    function = getattr(attnx, operator)
    plain = forward_backward(function, inputs, grad_output, is_causal=True)
    ones = torch.ones(4, device=device, dtype=parameter_dtype(dtype))
    got = forward_backward(function, inputs, grad_output, is_causal=True, head_mask=ones)
    assert all(torch.equal(x, plain[name]) for name, x in got.items())


def test_logsumexp(dtype: torch.dtype, device: torch.device) -> None:
    """A head that is left out has none, whether or not its factor learns, and with a sink, too."""
    inputs, _ = random_inputs(SHAPE, dtype, device)
    mask = mask_of("both", dtype, device)
    sink = torch.ones(4, device=device, dtype=parameter_dtype(dtype))
    for options in ({}, {"sink": sink}):
        want = reference.softmax_attention(**inputs, **options, head_mask=mask, return_logsumexp=True)[1]
        plain = attnx.softmax_attention(**inputs, **options, return_logsumexp=True)[1]
        for given in (mask, mask.clone().requires_grad_()):
            _, got = attnx.softmax_attention(**inputs, **options, head_mask=given, return_logsumexp=True)
            assert torch.equal(got == -math.inf, (mask == 0)[..., None].expand_as(got))
            assert_close(got.exp(), want.exp(), plain.exp(), dtype=dtype)


@pytest.mark.backends("cpu")
@EVERY
def test_beside_bounds_and_lengths(operator: str, backend: object) -> None:
    inputs, grad_output = random_inputs(SHAPE, torch.float32, torch.device("cpu"))
    bounds = torch.randint(0, 90, (2, 1, 70, 2), dtype=torch.int32)
    used = {
        "seqused_k": torch.tensor([80, 33], dtype=torch.int32),
        "leftpad_k": torch.tensor([5, 0], dtype=torch.int32),
    }
    mask = mask_of("both", torch.float32, torch.device("cpu"))
    for options in ({"row_bounds": bounds}, used, used | {"row_bounds": bounds}):
        function = getattr(attnx, operator)
        got = forward_backward(function, inputs, grad_output, head_mask=mask, **options)
        plain = forward_backward(function, inputs, grad_output * mask[..., None, None], **options)
        torch.testing.assert_close(got["output"], plain["output"] * mask[..., None, None])
        for name in ("grad_query", "grad_key", "grad_value"):
            torch.testing.assert_close(got[name], plain[name])


@pytest.mark.backends("cpu")
@EVERY
def test_left_out_heads_read_nothing(operator: str, backend: object) -> None:
    """Not even NaN in their keys and values comes through, where both query heads of a key head are left out."""
    inputs, grad_output = random_inputs(SHAPE, torch.float32, torch.device("cpu"))
    mask = torch.tensor([0.0, 0.0, 1.0, 0.5])
    clean = forward_backward(getattr(attnx, operator), inputs, grad_output, head_mask=mask)
    inputs["key"][:, 0], inputs["value"][:, 0] = math.nan, math.nan
    spoilt = forward_backward(getattr(attnx, operator), inputs, grad_output, head_mask=mask)
    assert all(torch.equal(x, spoilt[name]) for name, x in clean.items())


@pytest.mark.backends("cpu")
def test_left_out_heads_take_no_time(backend: object) -> None:
    inputs, _ = random_inputs(Shape(1024, 1024, 64, heads=8), torch.float32, torch.device("cpu"))

    def seconds(mask: Tensor | None) -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            attnx.softmax_attention(**inputs, head_mask=mask)
            times.append(time.perf_counter() - start)
        return min(times)

    assert seconds(torch.tensor([1.0] + 7 * [0.0])) < 0.5 * seconds(None)


@pytest.mark.backends("cpu")
@EVERY
def test_gradcheck(operator: str, backend: object) -> None:
    inputs, _ = random_inputs(Shape(5, 7, 4, heads=2), torch.float64, torch.device("cpu"))
    leaves = [x.requires_grad_() for x in (*inputs.values(), torch.tensor([0.0, 0.7], dtype=torch.float64))]
    function = getattr(attnx, operator)
    assert torch.autograd.gradcheck(lambda q, k, v, m: function(q, k, v, head_mask=m), leaves)
    (by_func,) = (torch.func.grad(lambda m: function(*leaves[:3], head_mask=m).sum())(leaves[3].detach()),)
    (expected,) = torch.autograd.grad(function(*leaves[:3], head_mask=leaves[3]).sum(), leaves[3:])
    torch.testing.assert_close(by_func, expected)
    with torch.no_grad():
        assert not function(*leaves[:3], head_mask=leaves[3])[:, 0].any()


@pytest.mark.backends("cpu")
@EVERY
def test_compiled(operator: str, backend: object) -> None:
    inputs, grad_output = random_inputs(SHAPE, torch.float32, torch.device("cpu"))
    function, mask = getattr(attnx, operator), mask_of("both", torch.float32, torch.device("cpu"))
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for leaves, given in ((inputs, {"head_mask": mask}), (inputs | {"head_mask": mask}, {})):
        want = forward_backward(function, leaves, grad_output, **given)
        got = forward_backward(compiled, leaves, grad_output, **given)
        for name, x in got.items():
            torch.testing.assert_close(x, want[name])


def test_layouts(dtype: torch.dtype, device: torch.device) -> None:
    inputs, _ = random_inputs(SHAPE, dtype, device)
    mask = mask_of("heads", dtype, device)
    one = attnx.softmax_attention(*(x[1] for x in inputs.values()), head_mask=mask)
    assert torch.equal(one, attnx.softmax_attention(**inputs, head_mask=mask)[1])


@EVERY
def test_bad_input(operator: str, backend: Backend, dtype: torch.dtype, device: torch.device) -> None:
    inputs, _ = random_inputs(SHAPE, dtype, device)
    number = {torch.float64: "float64"}.get(dtype, "float32")
    for mask, got in (
        (torch.ones(3, device=device), "float32 of shape (3,)"),
        (torch.ones(1, 4, device=device), "float32 of shape (1, 4)"),
        (torch.ones(4, dtype=torch.bool, device=device), "bool of shape (4,)"),
    ):
        message = f"head_mask: expected {number} of shape (4,) or (2, 4), heads or sequences and heads, got {got}"
        with pytest.raises(RuntimeError, match=re.escape(message)):
            getattr(attnx, operator)(**inputs, head_mask=mask)
    with pytest.raises(RuntimeError, match=r"head_mask: expected a tensor, got 1\.0"):
        getattr(attnx, operator)(**inputs, head_mask=1.0)


def eager_packed(operator: str, query: Tensor, head_mask: Tensor, **options: Any) -> Tensor:
    """Each sequence on its own, causally, in plain PyTorch; what follows the last one is 0."""
    ends = [itertools.pairwise(options[name].tolist()) for name in ("cu_seqlens_q", "cu_seqlens_k")]
    outputs = []
    for b, ((q0, q1), (k0, k1)) in enumerate(zip(*ends, strict=True)):
        own = (query[q0:q1], options["key"][k0:k1], options["value"][k0:k1])
        q, k, v = (x.transpose(0, 1)[None] for x in own)
        factors = head_mask if head_mask.dim() == 1 else head_mask[b : b + 1]
        output = eager(operator, factors, query=q, key=k, value=v, is_causal=True)
        outputs.append(output[0].transpose(0, 1))
    rows = torch.cat(outputs)
    return torch.cat((rows, rows.new_zeros(len(query) - len(rows), *rows.shape[1:])))


@pytest.mark.parametrize("wanted", [False, True], ids=["constant", "learned"])
@pytest.mark.parametrize("which", MASKS)
@pytest.mark.parametrize("padding", [0, 5])
@EVERY
def test_packed(
    operator: str, padding: int, which: str, wanted: bool, dtype: torch.dtype, device: torch.device
) -> None:
    """Each sequence has factors of its own, or all have the same; there is a sequence without queries."""
    inputs, grad_output, sizes = pack(([40, 0, 33, padding], [50, 4, 70, padding]), dtype, device, head_dim=64)
    sizes |= {name: sizes[name][:-1] for name in ("cu_seqlens_q", "cu_seqlens_k")} | {"has_padding": True}
    mask = mask_of(which, dtype, device)
    mask = torch.cat((mask[:1], mask)) if which == "both" else mask
    leaves, given = (inputs | {"head_mask": mask}, {}) if wanted else (inputs, {"head_mask": mask})
    function, definition = (getattr(module, f"{operator}_varlen") for module in (attnx, reference))
    got = forward_backward(function, leaves, grad_output, **sizes, **given, is_causal=True)
    exact = {name: x.double() for name, x in leaves.items()}
    want = forward_backward(definition, exact, grad_output.double(), **sizes, **given, is_causal=True)
    plain = forward_backward(partial(eager_packed, operator), leaves, grad_output, **sizes, **given)
    for name, x in got.items():
        assert_close(x, want[name], plain[name], name=name, dtype=dtype)
    starts = sizes["cu_seqlens_q"].tolist()
    for b, (start, end) in enumerate(itertools.pairwise(starts)):
        factors = mask if which == "heads" else mask[b]
        assert not got["output"][start:end, factors == 0].any()
    if operator == "softmax_attention":
        _, logsumexp = attnx.softmax_attention_varlen(**inputs, **sizes, head_mask=mask, return_logsumexp=True)
        factors = mask[None].expand(3, -1) if which == "heads" else mask
        for b, (start, end) in enumerate(itertools.pairwise(starts)):
            assert (logsumexp[factors[b] == 0, start:end] == -math.inf).all()
            assert logsumexp[factors[b] != 0, start:end].isfinite().all()


@pytest.mark.backends("cpu")
@EVERY
def test_bad_packed(operator: str, dtype: torch.dtype, device: torch.device) -> None:
    inputs, _, sizes = pack(([4, 3], [5, 6]), dtype, device)
    for mask in (torch.ones(3), torch.ones(3, 4), torch.ones(7, 4), torch.ones(2, 4).half()):
        with pytest.raises(RuntimeError, match=r"^head_mask: expected float32 of shape \(4,\) or \(2, 4\), heads or"):
            getattr(attnx, f"{operator}_varlen")(**inputs, **sizes, head_mask=mask)
    none = {name: torch.zeros(1, dtype=torch.int32) for name in ("cu_seqlens_q", "cu_seqlens_k")}
    empty = {name: x[:0] for name, x in inputs.items()}
    options = sizes | none | {"head_mask": torch.ones(0, 4)}
    assert getattr(attnx, f"{operator}_varlen")(**empty, **options).shape == (0, 4, 24)


@pytest.mark.backends("cpu")
@EVERY
def test_nested(operator: str, dtype: torch.dtype, device: torch.device) -> None:
    """Packed sequences as nested tensors take the same factors."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(n, 4, 16, generator=generator).to(dtype) for n in (9, 30)]
    x = torch.nested.nested_tensor(rows, layout=torch.jagged).transpose(1, 2)
    mask = mask_of("both", dtype, device)
    output = getattr(attnx, operator)(x, x, x, head_mask=mask)
    for b, (own, result) in enumerate(zip(rows, output.unbind(), strict=True)):
        sequence = own.transpose(0, 1)[None]
        expected = getattr(attnx, operator)(sequence, sequence, sequence, head_mask=mask[b])
        torch.testing.assert_close(result, expected[0])
