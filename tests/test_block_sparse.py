"""Block-sparse attention against its definition in float64, and against the dense operators."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import attnx
from attnx.block_mask import transpose
from attnx.testing import assert_close, parameter_at_logits
from cases import DTYPES, Shape, random_inputs, random_parameter
from compare import forward_backward, spread_of_sum

SCORES = ["sigmoid", "softmax"]
BLOCK_SIZES = [(64, 64), (128, 128), (128, 64), (64, 128)]
SHAPES = [
    Shape(length_q=200, length_k=330, head_dim=64, heads=2),
    Shape(length_q=256, length_k=256, head_dim=40, value_dim=24, batch=2, heads=4, kv_heads=2),
    Shape(length_q=10, length_k=70, head_dim=128, heads=2, kv_heads=1),
    Shape(length_q=130, length_k=130, head_dim=33, heads=1),
]


def random_mask(shape: Shape, block_size: tuple[int, int], share: float, device: torch.device) -> attnx.BlockMask:
    blocks_q, blocks_k = -(-shape.length_q // block_size[0]), -(-shape.length_k // block_size[1])
    generator = torch.Generator().manual_seed(0)
    visited = torch.rand(shape.batch, shape.heads, blocks_q, blocks_k, generator=generator) < share
    return attnx.BlockMask.from_dense(visited.to(device), block_size)


def eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: attnx.BlockMask,
    *,
    score: str = "softmax",
    is_causal: bool = False,
    block_bias: Tensor | None = None,
    sink: Tensor | None = None,
    constant_sums: bool = False,
) -> Tensor:
    """The same in plain PyTorch, every step rounded to the dtype of query.

    With ``constant_sums`` the gradient leaves the softmax's sums out: it shows how large the terms are that cancel.
    """
    groups, (block_q, block_k) = query.shape[1] // key.shape[1], block_mask.block_size
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    length_q, length_k = query.shape[2], key.shape[2]

    def elements(x: Tensor) -> Tensor:
        return x.repeat_interleave(block_q, 2).repeat_interleave(block_k, 3)[:, :, :length_q, :length_k]

    key_blocks = -(-length_k // block_k)
    visible = elements(block_mask.to_dense(key_blocks))
    if is_causal:
        visible = visible & torch.ones_like(visible).tril(length_k - length_q)
    logits = query @ (key / math.sqrt(query.shape[3])).mT
    if block_bias is not None:
        indices, block_bias = torch.broadcast_tensors(block_mask.kv_indices.long(), block_bias)
        every = block_bias.new_zeros(*indices.shape[:3], key_blocks)
        logits = logits + elements(every.scatter(-1, indices, block_bias)).to(logits.dtype)
    if score == "sigmoid":
        return (logits - math.log(max(length_k, 1))).sigmoid().masked_fill(~visible, 0.0) @ value
    logits = logits.masked_fill(~visible, torch.finfo(logits.dtype).min)
    if sink is not None:
        logits = torch.cat([logits, parameter_at_logits(sink, query).expand(*logits.shape[:-1], 1)], -1)
    weights = (logits - logits.logsumexp(-1, True).detach()).exp() if constant_sums else logits.softmax(-1)
    return weights[..., :length_k].masked_fill(~visible, 0.0) @ value


def check(inputs: dict[str, Tensor], grad_output: Tensor, mask: attnx.BlockMask, **options: Any) -> dict[str, Tensor]:
    results = forward_backward(attnx.block_sparse_attention, inputs, grad_output, block_mask=mask, **options)
    exact = {name: x.double() for name, x in inputs.items()}
    reference = attnx.reference.block_sparse_attention
    expected = forward_backward(reference, exact, grad_output.double(), block_mask=mask, **options)
    baseline = forward_backward(eager, inputs, grad_output, block_mask=mask, **options)
    terms = {}
    if "block_bias" in inputs:
        differences = forward_backward(
            eager, exact, grad_output.double(), block_mask=mask, constant_sums=True, **options
        )
        terms["grad_block_bias"] = differences["grad_block_bias"]
    if "sink" in inputs:
        exact["sink"] = exact["sink"][:, None].expand(-1, inputs["query"].shape[2])
        by_row = forward_backward(eager, exact, grad_output.double(), block_mask=mask, **options)["grad_sink"]
        terms["grad_sink"] = spread_of_sum(by_row, per_head=True)
    for name, actual in results.items():
        assert_close(actual, expected[name], baseline[name], name=name, terms=terms.get(name), dtype=grad_output.dtype)
    return results


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("block_size", BLOCK_SIZES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("score", SCORES)
def test_definition(
    score: str,
    dtype: torch.dtype,
    shape: Shape,
    block_size: tuple[int, int],
    is_causal: bool,
    device: torch.device,
) -> None:
    inputs = random_inputs(shape, dtype, device)
    check(*inputs, random_mask(shape, block_size, 0.6, device), score=score, is_causal=is_causal)


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("score", SCORES)
def test_head_dims(score: str, dtype: torch.dtype, head_dim: int, device: torch.device) -> None:
    shape = Shape(length_q=130, length_k=260, head_dim=head_dim)
    check(*random_inputs(shape, dtype, device), random_mask(shape, (64, 64), 0.5, device), score=score)


@pytest.mark.parametrize("score", SCORES)
def test_block_bias(score: str, dtype: torch.dtype, device: torch.device) -> None:
    shape = Shape(length_q=256, length_k=320, head_dim=64)
    mask = random_mask(shape, (64, 64), 0.6, device)
    bias = torch.randn(mask.kv_indices.shape, generator=torch.Generator().manual_seed(3)).to(device)
    check(*random_inputs(shape, dtype, device), mask, score=score, block_bias=bias)


@pytest.mark.parametrize("block_size", BLOCK_SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sink(dtype: torch.dtype, block_size: tuple[int, int], device: torch.device) -> None:
    """Rows that no block serves have it as well."""
    shape = Shape(length_q=330, length_k=320, head_dim=64, heads=4, kv_heads=2)
    inputs, grad_output = random_inputs(shape, dtype, device)
    inputs["sink"] = random_parameter((shape.heads,), dtype, device) * 8
    mask = random_mask(shape, block_size, 0.3, device)
    assert (mask.kv_num_blocks == 0).any()
    check(inputs, grad_output, mask, score="softmax")


@pytest.mark.parametrize("score", SCORES)
def test_every_block_is_dense_attention(score: str, dtype: torch.dtype, device: torch.device) -> None:
    shape = Shape(length_q=192, length_k=192, head_dim=64, heads=4, kv_heads=2)
    inputs, grad_output = random_inputs(shape, dtype, device)
    mask = random_mask(shape, (64, 64), 2.0, device)
    sparse = check(inputs, grad_output, mask, score=score, is_causal=True)
    dense = forward_backward(getattr(attnx, f"{score}_attention"), inputs, grad_output, is_causal=True)
    for name, x in dense.items():
        torch.testing.assert_close(sparse[name], x, atol=2e-2, rtol=2e-2, msg=name)


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("score", SCORES)
def test_every_instruction_set(score: str, instruction_set: str, device: torch.device) -> None:
    shape = Shape(batch=2, length_q=330, length_k=200, head_dim=40, value_dim=150, heads=4, kv_heads=2)
    for dtype in (torch.float32, torch.bfloat16):
        check(*random_inputs(shape, dtype, device), random_mask(shape, (128, 64), 0.6, device), score=score)


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("score", SCORES)
def test_gradcheck(score: str, is_causal: bool, device: torch.device) -> None:
    shape = Shape(length_q=70, length_k=130, head_dim=3, value_dim=2)
    inputs, _ = random_inputs(shape, torch.float64, device)
    mask = random_mask(shape, (64, 64), 0.6, device)

    def attention(*x: Tensor) -> Any:
        options: dict[str, Any] = {"score": score, "is_causal": is_causal}
        return attnx.block_sparse_attention(*x, mask, return_logsumexp=score == "softmax", **options)

    leaves = tuple(x.requires_grad_() for x in inputs.values())
    assert torch.autograd.gradcheck(attention, leaves, fast_mode=True)


@pytest.mark.needs("hidden_nonfinite")
@pytest.mark.parametrize("score", SCORES)
def test_nan_in_blocks_that_no_list_names(score: str, dtype: torch.dtype, device: torch.device) -> None:
    shape = Shape(length_q=130, length_k=256, head_dim=16)
    inputs, grad_output = random_inputs(shape, dtype, device)
    visited = torch.tensor([[1, 0, 1, 1], [1, 0, 0, 1], [0, 0, 1, 0]], dtype=torch.bool, device=device)
    mask = attnx.BlockMask.from_dense(visited[None, None])
    clean = forward_backward(attnx.block_sparse_attention, inputs, grad_output, block_mask=mask, score=score)
    for name in ("key", "value"):
        inputs[name][:, :, 64:128] = torch.nan
    results = forward_backward(attnx.block_sparse_attention, inputs, grad_output, block_mask=mask, score=score)
    for name, x in clean.items():
        torch.testing.assert_close(results[name], x, atol=0, rtol=0, msg=name)


@pytest.mark.parametrize("score", SCORES)
def test_one_list_for_all_heads_in_any_order(score: str, dtype: torch.dtype, device: torch.device) -> None:
    shape = Shape(batch=2, length_q=128, length_k=256, head_dim=64, heads=4, kv_heads=2)
    inputs, grad_output = random_inputs(shape, dtype, device)
    counts = torch.tensor([[[3, 0]]], dtype=torch.int32, device=device)
    indices = torch.tensor([[[[3, 0, 2, -7], [9, 9, 9, 9]]]], dtype=torch.int32, device=device)
    results = check(inputs, grad_output, attnx.BlockMask(counts, indices), score=score)
    assert not results["output"][:, :, 64:].any(), "rows without a block are 0"
    torch.use_deterministic_algorithms(True)
    first, second = (
        forward_backward(
            attnx.block_sparse_attention, inputs, grad_output, block_mask=attnx.BlockMask(counts, indices), score=score
        )
        for _ in range(2)
    )
    torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("score", SCORES)
def test_long_lists_repeat_bitwise(score: str, dtype: torch.dtype, device: torch.device, deterministic: None) -> None:
    """Lists with more entries than a warp has lanes: the order of the sums is theirs, whatever order they name blocks
    in."""
    shape = Shape(length_q=130, length_k=64 * 45, head_dim=64, heads=2, kv_heads=1)
    inputs, grad_output = random_inputs(shape, dtype, device)
    mask = random_mask(shape, (64, 64), 0.9, device)
    assert mask.kv_num_blocks.min() > 32
    first = check(inputs, grad_output, mask, score=score)
    for _ in range(5):
        again = forward_backward(attnx.block_sparse_attention, inputs, grad_output, block_mask=mask, score=score)
        assert all(torch.equal(again[name], x) for name, x in first.items())


def test_logsumexp(dtype: torch.dtype, device: torch.device) -> None:
    shape = Shape(length_q=128, length_k=256, head_dim=64)
    inputs, _ = random_inputs(shape, dtype, device)
    mask = random_mask(shape, (64, 64), 0.4, device)
    _, logsumexp = attnx.block_sparse_attention(**inputs, block_mask=mask, return_logsumexp=True)
    exact = {name: x.double() for name, x in inputs.items()}
    _, expected = attnx.reference.block_sparse_attention(**exact, block_mask=mask, return_logsumexp=True)
    torch.testing.assert_close(logsumexp.double(), expected, atol=1e-4, rtol=1e-5)


def test_transposing_twice_is_nothing(device: torch.device) -> None:
    mask = random_mask(Shape(length_q=500, length_k=700), (64, 64), 0.5, device)
    bias = torch.rand(mask.kv_indices.shape, device=device)
    counts, indices, transposed = transpose(mask.kv_num_blocks, mask.kv_indices, bias, 11)
    back = transpose(counts, indices, transposed, 8)
    assert torch.equal(back[0], mask.kv_num_blocks)
    assert torch.equal(back[1], mask.kv_indices)
    used = torch.arange(11, device=device) < back[0][..., None]
    assert torch.equal(back[2][used], bias[used])


def int32(*rows: Any) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32)


# The good call: 128 queries, 192 keys: two rows of lists over three blocks.
BAD = {
    "count_above_width": ({"kv_num_blocks": int32([[1, 3]])}, "kv_num_blocks", "width of kv_indices, 2", "3"),
    "negative_count": ({"kv_num_blocks": int32([[-1, 1]])}, "kv_num_blocks", "from 0", "-1"),
    "index_too_large": ({"kv_indices": int32([[[0, 3], [1, 2]]])}, "kv_indices", "from 0 to 2", "3"),
    "index_negative": ({"kv_indices": int32([[[0, -1], [1, 2]]])}, "kv_indices", "from 0 to 2", "-1"),
    "too_few_rows": ({"kv_num_blocks": int32([[1]])}, "kv_num_blocks", "(1 or 1, 2 or 1, 2)", "(1, 1, 1)"),
    "wrong_heads": ({"kv_num_blocks": int32([[1, 1]] * 3)}, "kv_num_blocks", "2 or 1", "(1, 3, 2)"),
    "counts_int64": ({"kv_num_blocks": int32([[1, 2]]).long()}, "kv_num_blocks", "int32", "int64"),
    "indices_float": ({"kv_indices": int32([[[0, 1], [1, 2]]]).float()}, "kv_indices", "int32", "float32"),
    "block_size": ({"block_size": (32, 64)}, "block_size", "64 or 128", "(32, 64)"),
    "bias_width": ({"block_bias": torch.zeros(1, 1, 2, 3)}, "block_bias", "2", "3"),
    "bias_dtype": ({"block_bias": torch.zeros(1, 1, 2, 2).double()}, "block_bias", "float32", "float64"),
    "score": ({"score": "relu"}, "score", '"sigmoid" or "softmax"', "'relu'"),
    "bias": ({"bias": torch.zeros(2)}, "bias", "float", "tensor"),
}


@pytest.mark.parametrize(("arguments", "argument", "expected", "got"), BAD.values(), ids=BAD)
def test_bad_input(
    arguments: dict[str, Any], argument: str, expected: str, got: str, dtype: torch.dtype, device: torch.device
) -> None:
    if device.type != "cpu" and argument in ("kv_num_blocks", "kv_indices") and "from" in expected + argument:
        pytest.skip("values on the GPU are looked at under ATTNX_DEBUG=1 only")
    inputs, _ = random_inputs(Shape(length_q=128, length_k=192, head_dim=64), dtype, device)
    mask: dict[str, Any] = {
        "kv_num_blocks": int32([[2, 1]]),
        "kv_indices": int32([[[0, 1], [2, 1]]]),
        "block_size": (64, 64),
    }
    mask = {name: arguments.get(name, x) for name, x in mask.items()}
    mask = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in mask.items()}
    options = {name: x for name, x in arguments.items() if name not in mask}
    options = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}
    with pytest.raises(RuntimeError, match=rf"^{argument}: expected") as error:
        attnx.block_sparse_attention(**inputs, block_mask=attnx.BlockMask(**mask), **options)
    assert expected in str(error.value)
    assert got in str(error.value)


@pytest.mark.parametrize("shared", ["counts", "indices"])
def test_lists_may_share_one_of_their_halves(shared: str, dtype: torch.dtype, device: torch.device) -> None:
    """Counts or indices serve both heads; the values of the other half are looked at for each head all the same."""
    inputs, grad_output = random_inputs(Shape(length_q=128, length_k=192, head_dim=64), dtype, device)
    counts, indices = int32([[2, 1], [1, 2]]), int32([[[0, 1, 2], [2, 1, 0]], [[2, 0, 1], [1, 2, 0]]])
    if shared == "counts":
        counts = counts[:, :1]
    else:
        indices = indices[:, :1]
    counts, indices = counts.to(device), indices.to(device)
    whole = counts.expand(1, 2, 2).contiguous(), indices.expand(1, 2, 2, 3).contiguous()
    results = [
        forward_backward(
            attnx.block_sparse_attention, inputs, grad_output, block_mask=attnx.BlockMask(*lists, (64, 64))
        )
        for lists in ((counts, indices), whole)
    ]
    for name, x in results[0].items():
        torch.testing.assert_close(x, results[1][name], msg=name)
    if device.type == "cpu" and shared == "counts":
        indices[0, 1, 0, 0] = 10**6
        with pytest.raises(
            RuntimeError, match=r"^kv_indices: expected blocks from 0 to 2, got 1000000 at \(0, 1, 0, 0\)"
        ):
            attnx.block_sparse_attention(**inputs, block_mask=attnx.BlockMask(counts, indices, (64, 64)))
