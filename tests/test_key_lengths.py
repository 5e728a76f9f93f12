"""Which keys a sequence has: lengths and starts in dense tensors, offsets of positions, and padding of packed ones."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import attnx
from attnx import reference
from attnx.testing import assert_close
from cases import (
    DTYPES,
    MASKS,
    OPERATORS,
    VARLEN_OPERATORS,
    Shape,
    pack,
    parameter_dtype,
    random_inputs,
    random_parameter,
)
from compare import EAGER, check, forward_backward
from test_block_sparse import eager as plain_block_sparse
from test_sparse_linear import both, random_map
from test_sparse_linear import eager as plain_sparse_linear
from test_sparse_linear import results as results_of

CAPACITY = 150
# (starts, ends) of the keys of four sequences: all, none, a few, and a part in the middle.
USED = ([0, 9, 0, 70], [CAPACITY, 9, 3, 141])

SHAPES = [
    Shape(40, CAPACITY, 64, batch=4, heads=4, kv_heads=2),
    Shape(1, CAPACITY, 64, batch=4, heads=4, kv_heads=1),
    Shape(130, CAPACITY, 16, value_dim=40, batch=4),
]


def _lengths(device: torch.device, used: tuple[list[int], list[int]] = USED) -> dict[str, Tensor]:
    starts, ends = (torch.tensor(x, dtype=torch.int32, device=device) for x in used)
    return {"seqused_k": ends, "leftpad_k": starts}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_against_reference(
    operator: str, shape: Shape, dtype: torch.dtype, mask: str, device: torch.device, poisoned_allocations: None
) -> None:
    """Gradients of keys that no sequence uses are 0, as the reference has them, and not what memory held."""
    inputs, grad_output = random_inputs(shape, dtype, device)
    inputs["alibi_slopes"] = random_parameter((shape.heads,), dtype, device)
    check(operator, inputs, grad_output, **_lengths(device), **MASKS[mask])


@pytest.mark.parametrize("bias", ["row", None, "tensor"])
def test_sigmoid_bias(bias: str | None, dtype: torch.dtype, device: torch.device) -> None:
    inputs, grad_output = random_inputs(SHAPES[0], dtype, device)
    options: dict[str, Any] = {"is_causal": True} | _lengths(device)
    if bias == "tensor":
        inputs["bias"] = random_parameter((4,), dtype, device) - 3
    else:
        options["bias"] = bias
    check("sigmoid_attention", inputs, grad_output, **options)


def test_sink(dtype: torch.dtype, device: torch.device) -> None:
    inputs, grad_output = random_inputs(SHAPES[0], dtype, device)
    inputs["sink"] = random_parameter((4,), dtype, device) * 8
    check("softmax_attention", inputs, grad_output, is_causal=True, **_lengths(device))


def test_logsumexp_of_rows_without_keys(dtype: torch.dtype, device: torch.device) -> None:
    inputs, _ = random_inputs(SHAPES[0], dtype, device)
    output, logsumexp = attnx.softmax_attention(**inputs, **_lengths(device), return_logsumexp=True)
    assert (output[1] == 0).all()
    assert (logsumexp[1] == -math.inf).all()
    assert logsumexp[[0, 2, 3]].isfinite().all()
    sink = random_parameter((4,), dtype, device)
    _, logsumexp = attnx.softmax_attention(**inputs, **_lengths(device), sink=sink, return_logsumexp=True)
    torch.testing.assert_close(logsumexp[1], sink[:, None].expand(-1, 40), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("length_q", [1, 5, 70])
@pytest.mark.parametrize("operator", OPERATORS)
def test_partly_filled_cache(operator: str, length_q: int, dtype: torch.dtype, device: torch.device) -> None:
    """Decoding and a chunk on a static cache are what the same calls are on the tensors cut to length."""
    inputs, _ = random_inputs(Shape(length_q, 128, 64, batch=3, heads=4, kv_heads=2), dtype, device)
    ends = [71, 128, 100]
    function, exact = getattr(attnx, operator), getattr(reference, operator)
    used = torch.tensor(ends, dtype=torch.int32, device=device)
    cached = function(**inputs, is_causal=True, seqused_k=used)
    for b, end in enumerate(ends):
        cut = {name: x[b : b + 1, :, : end if name != "query" else None] for name, x in inputs.items()}
        expected = exact(**{name: x.double() for name, x in cut.items()}, is_causal=True)
        assert_close(cached[b : b + 1], expected, EAGER[operator](**cut, is_causal=True))


@pytest.mark.parametrize("operator", OPERATORS)
def test_one_of_the_two(operator: str, dtype: torch.dtype, device: torch.device, deterministic: None) -> None:
    """What is not given has nothing unused on its side, bit for bit."""
    inputs, grad_output = random_inputs(SHAPES[0], dtype, device)
    both, function = _lengths(device), getattr(attnx, operator)
    for name, given in (("leftpad_k", 0), ("seqused_k", CAPACITY)):
        full = {name: torch.full((4,), given, dtype=torch.int32, device=device)}
        two = forward_backward(function, inputs, grad_output, is_causal=True, **both | full)
        one = forward_backward(function, inputs, grad_output, is_causal=True, **{n: both[n] for n in both if n != name})
        assert all(torch.equal(two[x], one[x]) for x in two)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_neutral_arguments(
    operator: str, shape: Shape, dtype: torch.dtype, device: torch.device, deterministic: None
) -> None:
    inputs, grad_output = random_inputs(shape, dtype, device)
    function = getattr(attnx, operator)
    plain = forward_backward(function, inputs, grad_output, is_causal=True, window=(70, -1))
    neutral = _lengths(device, ([0] * 4, [CAPACITY] * 4)) | {"position_offset": 0, "window": (70, None)}
    with_lengths = forward_backward(function, inputs, grad_output, is_causal=True, **neutral)
    assert all(torch.equal(plain[name], with_lengths[name]) for name in plain)


@pytest.mark.needs("hidden_nonfinite")
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("operator", OPERATORS)
def test_unused_keys_hold_anything(operator: str, value: float, dtype: torch.dtype, device: torch.device) -> None:
    inputs, grad_output = random_inputs(SHAPES[0], dtype, device)
    function, lengths = getattr(attnx, operator), _lengths(device)
    clean = forward_backward(function, inputs, grad_output, is_causal=True, **lengths)
    for b, (start, end) in enumerate(zip(*USED, strict=True)):
        for name in ("key", "value"):
            inputs[name][b, :, :start] = value
            inputs[name][b, :, end:] = value
    dirty = forward_backward(function, inputs, grad_output, is_causal=True, **lengths)
    assert all(torch.equal(clean[name], dirty[name]) for name in clean)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_listed_blocks(score: str, is_causal: bool, dtype: torch.dtype, device: torch.device) -> None:
    """Lists may name blocks beyond the used keys; blocks count from the first of these."""
    inputs, grad_output = random_inputs(Shape(130, CAPACITY, 64, batch=4, heads=2), dtype, device)
    visited = torch.tensor([[1, 0, 1], [1, 1, 1], [0, 1, 1]], dtype=torch.bool, device=device)[None, None]
    options: dict[str, Any] = {"block_mask": attnx.BlockMask.from_dense(visited), "score": score}
    options |= {"is_causal": is_causal} | _lengths(device)
    results = forward_backward(attnx.block_sparse_attention, inputs, grad_output, **options)
    exact = {name: x.double() for name, x in inputs.items()}
    expected = forward_backward(reference.block_sparse_attention, exact, grad_output.double(), **options)
    baseline = forward_backward(_plain_blocks, inputs, grad_output, visited=visited, **options)
    for name, x in results.items():
        assert_close(x, expected[name], baseline[name], name=name, dtype=dtype)


def _plain_blocks(
    query: Tensor, key: Tensor, value: Tensor, *, visited: Tensor, seqused_k: Tensor, leftpad_k: Tensor, **options: Any
) -> Tensor:
    """Plain PyTorch for each sequence over its used keys."""
    outputs = []
    for b, (first, end) in enumerate(zip(leftpad_k.tolist(), seqused_k.tolist(), strict=True)):
        blocks = -(-(end - first) // 64)
        own = options | {"block_mask": attnx.BlockMask.from_dense(visited[..., :blocks])}
        outputs.append(plain_block_sparse(query[b : b + 1], *(x[b : b + 1, :, first:end] for x in (key, value)), **own))
    return torch.cat(outputs)


@pytest.mark.parametrize("offset", [-300, -70, -1, 1, 70, 300])
@pytest.mark.parametrize("mask", ["full", "causal", "window_both", "window_causal", "window_right"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_position_offset(operator: str, mask: str, offset: int, dtype: torch.dtype, device: torch.device) -> None:
    """Queries stand so many keys further on, for masks and slopes alike; all of them may stand before the first key."""
    inputs, grad_output = random_inputs(Shape(140, 150, 64, heads=4, kv_heads=2), dtype, device)
    inputs["alibi_slopes"] = random_parameter((4,), dtype, device) / 8
    check(operator, inputs, grad_output, position_offset=offset, **MASKS[mask])


def test_offset_of_a_ring(dtype: torch.dtype, device: torch.device) -> None:
    """A causal call by chunks of keys: each chunk stands where its keys stand among all."""
    inputs, _ = random_inputs(Shape(64, 192, 64), dtype, device)
    visible = [attnx.softmax_attention(**_chunk(inputs, i), position_offset=128 - 64 * i, is_causal=True,
                                       return_logsumexp=True) for i in range(3)]  # fmt: skip
    whole = attnx.softmax_attention(**inputs, is_causal=True)
    logsumexp = torch.stack([x[1] for x in visible])
    weights = (logsumexp - logsumexp.logsumexp(0)).exp()[..., None]
    merged = sum(w * x[0].double() for w, x in zip(weights, visible, strict=True))
    torch.testing.assert_close(merged, whole.double(), rtol=0, atol=4 * torch.finfo(dtype).eps)


def _chunk(inputs: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    return {n: x if n == "query" else x[:, :, 64 * i : 64 * i + 64] for n, x in inputs.items()}


@pytest.mark.parametrize("operator", VARLEN_OPERATORS)
def test_padding_of_packed_tensors(
    operator: str, dtype: torch.dtype, device: torch.device, poisoned_allocations: None
) -> None:
    """Rows after the last sequence give 0 and get 0, whatever they hold; offsets may be int64."""
    inputs, grad_output, sizes = pack(([70, 0, 9, 30], [80, 7, 0, 30]), dtype, device)
    for name, x in inputs.items():
        inputs[name] = torch.cat([x, torch.full_like(x[:20], math.nan)])
    grad_output = torch.cat([grad_output, torch.full_like(grad_output[:20], math.nan)])
    options = sizes | {"has_padding": True, "is_causal": True}
    function = getattr(attnx, operator)
    padded = forward_backward(function, inputs, grad_output, **options)
    wide = options | {name: options[name].long() for name in ("cu_seqlens_q", "cu_seqlens_k")}
    assert all(torch.equal(x, padded[n]) for n, x in forward_backward(function, inputs, grad_output, **wide).items())
    for name, x in padded.items():
        assert (x[-20:] == 0).all(), name
    rows = {name: x[:-20] for name, x in inputs.items()}
    plain = check(operator, rows, grad_output[:-20], is_causal=True, **sizes)
    assert torch.equal(padded["output"][:-20], plain["output"])
    if operator.startswith("softmax"):
        _, logsumexp = function(**inputs, **options, return_logsumexp=True)
        _, expected = reference.softmax_attention_varlen(**inputs, **options, return_logsumexp=True)
        torch.testing.assert_close(logsumexp.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("operator", OPERATORS)
def test_gradcheck(operator: str, device: torch.device) -> None:
    if device.type != "cpu" or attnx._C.cuda_on_host:
        return
    inputs, _ = random_inputs(Shape(5, 7, 3, batch=3), torch.float64, device)
    lengths = _lengths(device, ([0, 2, 3], [7, 6, 3]))
    leaves = tuple(x.requires_grad_() for x in inputs.values())
    function = getattr(attnx, operator)
    assert torch.autograd.gradcheck(lambda *x: function(*x, **lengths, is_causal=True, position_offset=1), leaves)


@pytest.mark.parametrize("operator", OPERATORS)
def test_compiles_once_for_all_lengths(operator: str, dtype: torch.dtype, device: torch.device) -> None:
    inputs, _ = random_inputs(Shape(1, 64, 64, batch=3), dtype, device)
    function, graphs = getattr(attnx, operator), CompileCounter()
    compiled = torch.compile(function, fullgraph=True, backend=graphs)
    for ends in ([64, 1, 7], [3, 64, 64], [10, 11, 12]):
        used = torch.tensor(ends, dtype=torch.int32, device=device)
        result = compiled(**inputs, is_causal=True, seqused_k=used)
        assert torch.equal(result, function(**inputs, is_causal=True, seqused_k=used))
    assert graphs.frame_count == 1


def test_vmap(dtype: torch.dtype, device: torch.device) -> None:
    inputs, _ = random_inputs(Shape(5, CAPACITY, 16, batch=4), dtype, device)
    lengths, scales = _lengths(device), torch.tensor([0.5, 1.0, 2.0], device=device, dtype=parameter_dtype(dtype))

    def attend(scale: Tensor) -> Tensor:
        return attnx.softmax_attention(**inputs, **lengths, scale=scale)

    assert torch.equal(torch.vmap(attend)(scales), torch.stack([attend(scale) for scale in scales]))


def test_explain(dtype: torch.dtype, device: torch.device) -> None:
    inputs, _ = random_inputs(SHAPES[0], dtype, device)
    options = {"window": None, "position_offset": 3, "is_causal": True} | _lengths(device)
    assert attnx.explain(attnx.softmax_attention, **inputs, **options).supported
    for name in ("key_lengths", "position_offset"):
        required = attnx._capability.Requirement.of("softmax_attention", inputs | options).features
        assert name in required


INT = torch.int32


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ({"seqused_k": torch.tensor([34])}, "seqused_k: expected int32, got int64"),
        ({"leftpad_k": torch.tensor([1.0])}, "leftpad_k: expected int32, got float32"),
        ({"seqused_k": torch.tensor([1, 2], dtype=INT)}, r"seqused_k: expected shape \(1,\), got \(2,\)"),
        ({"leftpad_k": torch.tensor(3, dtype=INT)}, r"leftpad_k: expected shape \(1,\), got \(\)"),
        ({"seqused_k": torch.tensor([34], dtype=INT)}, "seqused_k: expected lengths from 0 to that of key, 33, got 34"),
        ({"seqused_k": torch.tensor([-1], dtype=INT)}, "seqused_k: expected lengths from 0 to that of key, 33, got -1"),
        ({"leftpad_k": torch.tensor([34], dtype=INT)}, "leftpad_k: expected starts from 0 to seqused_k, 33, got 34"),
        ({"leftpad_k": torch.tensor([-2], dtype=INT)}, "leftpad_k: expected starts from 0 to seqused_k, 33, got -2"),
        ({"seqused_k": torch.tensor([5], dtype=INT, device="meta")}, "seqused_k: expected a tensor on cpu like query"),
        ({"seqused_k": [5]}, "seqused_k: expected a tensor, got"),
        ({"position_offset": 2**28 + 1}, "position_offset: expected at most 268435456 either way, got 268435457"),
        ({"position_offset": 0.5}, "position_offset: expected an int, got 0.5"),
        ({"window": (None, 1.5)}, "window: expected an int, got 1.5"),
    ],
    ids=str,
)
@pytest.mark.parametrize("operator", OPERATORS)
def test_bad_input(operator: str, lengths: dict[str, Any], message: str, dtype: torch.dtype) -> None:
    inputs, _ = random_inputs(Shape(), dtype, torch.device("cpu"))
    if not inputs["query"].is_cpu:
        return
    with pytest.raises(RuntimeError, match=message):
        getattr(attnx, operator)(**inputs, **lengths)


def test_bad_packing(dtype: torch.dtype, device: torch.device) -> None:
    inputs, _, sizes = pack(([5, 4], [6, 7]), dtype, device)
    fewer = sizes | {"cu_seqlens_k": sizes["cu_seqlens_k"] - torch.tensor([0, 0, 1], dtype=INT, device=device)}
    with pytest.raises(RuntimeError, match=r"cu_seqlens_k: expected to end at the number of rows, 13 \(fewer need"):
        attnx.softmax_attention_varlen(**inputs, **fewer)
    more = sizes | {"cu_seqlens_k": sizes["cu_seqlens_k"] + torch.tensor([0, 0, 1], dtype=INT, device=device)}
    with pytest.raises(RuntimeError, match="cu_seqlens_k: expected to end at the number of rows, 13, or below, got 14"):
        attnx.softmax_attention_varlen(**inputs, **more | {"max_seqlen_k": 8}, has_padding=True)


def test_nested_tensors_have_lengths_of_their_own(dtype: torch.dtype, device: torch.device) -> None:
    rows = [torch.randn(n, 2, 16, device=device).to(dtype) for n in (3, 5)]
    x = torch.nested.nested_tensor(rows, layout=torch.jagged).transpose(1, 2)
    with pytest.raises(RuntimeError, match="seqused_k: expected None beside nested tensors"):
        attnx.softmax_attention(x, x, x, seqused_k=torch.ones(2, dtype=INT, device=device))


# Sequences of all keys, of none, of a few, and of a part in the middle that begins within a block.
USED_OF_BLOCKS = ([0, 9, 3, 70], [330, 9, 40, 241])


@pytest.mark.parametrize("block_size", [(64, 64), (128, 64)], ids=str)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_block_map(is_causal: bool, block_size: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    inputs, _ = random_inputs(Shape(200, 330, 16, batch=4, heads=4, kv_heads=2), dtype, device)
    options: dict[str, Any] = {"critical": 0.3, "negligible": 0.3, "protect": 10, "block_size": block_size}
    options |= {"smooth_k": True, "is_causal": is_causal} | _lengths(device, USED_OF_BLOCKS)
    actual = attnx.sparse_linear_block_map(inputs["query"], inputs["key"], **options)
    assert torch.equal(
        actual.labels, reference.sparse_linear_block_map(inputs["query"], inputs["key"], **options).labels
    )
    assert (actual.labels[1] == -1).all()


@pytest.mark.parametrize("scope", ["marginal", "noncritical", "all"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sparse_linear(
    dtype: torch.dtype, is_causal: bool, scope: str, device: torch.device, poisoned_allocations: None
) -> None:
    shape = Shape(200, 330, 16, value_dim=24, batch=4, heads=4, kv_heads=2)
    inputs, _ = random_inputs(shape, dtype, device)
    options: dict[str, Any] = {"linear_scope": scope, "is_causal": is_causal, "feature_map": "elu"}
    options["block_map"] = random_map(shape, (64, 64), device)
    lengths = _lengths(device, USED_OF_BLOCKS)
    actual = results_of(both(attnx.sparse_linear_attention), inputs, **options, **lengths)
    exact = {name: x.double() for name, x in inputs.items()}
    expected = results_of(both(reference.sparse_linear_attention), exact, **options, **lengths)

    def plain(query: Tensor, key: Tensor, value: Tensor, block_map: attnx.SparseLinearMap, **others: Any) -> Tensor:
        outputs = []
        for b, (start, end) in enumerate(zip(*USED_OF_BLOCKS, strict=True)):
            own = query[b : b + 1], key[b : b + 1, :, start:end], value[b : b + 1, :, start:end]
            if start == end:
                outputs.append(own[0].sum(-1, True).expand(-1, -1, -1, 2 * shape.value_dim) * 0)
                continue
            labels = attnx.SparseLinearMap(block_map.labels[b : b + 1], block_map.block_size)
            outputs.append(both(plain_sparse_linear)(*own, block_map=labels, **others))
        return torch.cat(outputs)

    baseline = results_of(plain, inputs, **options)
    for name, x in actual.items():
        assert_close(x, expected[name], baseline[name], name=name)


def test_full_lengths_of_sparse_linear_change_nothing(
    dtype: torch.dtype, device: torch.device, deterministic: None
) -> None:
    inputs, _ = random_inputs(Shape(200, 330, 16, batch=2, heads=4, kv_heads=2), dtype, device)
    attention, options = both(attnx.sparse_linear_attention), {"critical": 0.3, "is_causal": True}
    full = torch.full((2,), 330, dtype=INT, device=device)
    for x, y in zip(
        results_of(attention, inputs, **options, seqused_k=full).values(),
        results_of(attention, inputs, **options).values(),
        strict=True,
    ):
        assert torch.equal(x, y)
