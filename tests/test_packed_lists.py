"""Block-sparse and probabilistic attention over sequences of several lengths: packed ones, and parts of dense ones."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import attnx
from attnx import reference
from attnx.testing import assert_close
from cases import DTYPES, Shape, pack, random_inputs, random_parameter
from compare import forward_backward, spread_of_sum
from test_block_sparse import eager

SCORES = ["sigmoid", "softmax"]
# Sequences of more queries than keys, of none of either, of a part of a block, and of several blocks.
LENGTHS = [130, 0, 10, 64, 200], [70, 5, 0, 64, 330]
BLOCKS = [(64, 64), (128, 128), (128, 64), (64, 128)]
HEADS = 4
ROUND = {"seed": 3, "offset": 7}


def packed(dtype: torch.dtype, device: torch.device, head_dim: int = 16) -> tuple[dict[str, Tensor], Tensor, Any]:
    return pack(LENGTHS, dtype, device, heads=HEADS, head_dim=head_dim)


def sequences_of(sizes: dict[str, Any]) -> list[tuple[slice, slice]]:
    """The rows of the queries and keys of each packed sequence."""
    ends = [sizes[name].tolist() for name in ("cu_seqlens_q", "cu_seqlens_k")]
    of_q, of_k = ([slice(*x) for x in itertools.pairwise(x)] for x in ends)
    return list(zip(of_q, of_k, strict=True))


def each(own: Callable[..., Tensor], sizes: dict[str, Any]) -> Callable[..., Tensor]:
    """The packed form of ``own``, which is called with the tensors and the number of a sequence."""

    def attention(query: Tensor, key: Tensor, value: Tensor, **inputs: Tensor) -> Tensor:
        outputs = []
        for b, (of_q, of_k) in enumerate(sequences_of(sizes)):
            tensors = (x.transpose(0, 1)[None] for x in (query[of_q], key[of_k], value[of_k]))
            outputs.append(own(*tensors, b, **inputs)[0].transpose(0, 1))
        return torch.cat(outputs)

    return attention


def lists(share: float, block_size: tuple[int, int], device: torch.device, batch: int = 5, heads: int = HEADS) -> Any:
    rows, blocks = (-(-max(x) // block) for x, block in zip(LENGTHS, block_size, strict=True))
    visited = torch.rand(batch, heads, rows, blocks, generator=torch.Generator().manual_seed(0)) < share
    return attnx.BlockMask.from_dense(visited.to(device), block_size)


def part(mask: attnx.BlockMask, b: int, length_q: int, length_k: int) -> attnx.BlockMask:
    """The lists of one sequence, without what lies beyond its end."""
    rows, blocks = (-(-x // block) for x, block in zip((length_q, length_k), mask.block_size, strict=True))
    visited = mask.to_dense(-(-max(LENGTHS[1]) // mask.block_size[1]))
    own = visited if len(visited) == 1 else visited[b : b + 1]
    return attnx.BlockMask.from_dense(own[:, :, :rows, :blocks], mask.block_size)


def block_sparse_of(mask: attnx.BlockMask, sizes: dict[str, Any], **options: Any) -> Callable[..., Tensor]:
    def own(q: Tensor, k: Tensor, v: Tensor, b: int, **inputs: Tensor) -> Tensor:
        if k.shape[2] == 0:
            return q.sum(-1, True).expand(-1, -1, -1, v.shape[-1]) * 0
        return eager(q, k, v, part(mask, b, q.shape[2], k.shape[2]), **inputs, **options)

    return each(own, sizes)


def check(
    operator: str,
    inputs: dict[str, Tensor],
    grad_output: Tensor,
    plain: Callable[..., Tensor],
    terms: dict[str, Tensor] | None = None,
    **options: Any,
) -> None:
    results = forward_backward(getattr(attnx, operator), inputs, grad_output, **options)
    exact = {name: x.double() for name, x in inputs.items()}, grad_output.double()
    expected = forward_backward(getattr(reference, operator), *exact, **options)
    baseline = forward_backward(plain, inputs, grad_output)
    for name, x in results.items():
        own = None if terms is None else terms.get(name)
        assert_close(x, expected[name], baseline[name], name=name, terms=own, dtype=grad_output.dtype)


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("block_size", BLOCKS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("score", SCORES)
def test_packed_block_sparse(
    score: str, dtype: torch.dtype, block_size: tuple[int, int], is_causal: bool, device: torch.device
) -> None:
    inputs, grad_output, sizes = packed(dtype, device)
    options: dict[str, Any] = {"score": score, "is_causal": is_causal}
    for mask in (lists(0.6, block_size, device), lists(0.6, block_size, device, batch=1, heads=1)):
        plain = block_sparse_of(mask, sizes, **options)
        check("block_sparse_attention_varlen", inputs, grad_output, plain, block_mask=mask, **options, **sizes)


@pytest.mark.backends("cpu")  # a GPU has transposed lists, of as many rows as the longest sequence has blocks
def test_a_longest_sequence_beyond_all_keys(device: torch.device) -> None:
    """It bounds the lists, and not what a backward allocates."""
    inputs, grad_output, sizes = packed(torch.float32, device)
    options: dict[str, Any] = {"block_mask": lists(0.6, (64, 64), device)}
    expected = forward_backward(attnx.block_sparse_attention_varlen, inputs, grad_output, **options, **sizes)
    sizes["max_seqlen_k"] = 2**62
    actual = forward_backward(attnx.block_sparse_attention_varlen, inputs, grad_output, **options, **sizes)
    for name, x in actual.items():
        assert torch.equal(x, expected[name]), name


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("score", SCORES)
def test_head_dims(score: str, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    inputs, grad_output, sizes = packed(dtype, device, head_dim)
    mask = lists(0.6, (64, 64), device)
    plain = block_sparse_of(mask, sizes, score=score)
    check("block_sparse_attention_varlen", inputs, grad_output, plain, block_mask=mask, score=score, **sizes)


def test_sink_of_packed_sequences(dtype: torch.dtype, device: torch.device) -> None:
    inputs, grad_output, sizes = packed(dtype, device)
    mask = lists(0.4, (64, 64), device)
    inputs["sink"] = random_parameter((HEADS,), dtype, device) * 8

    def own(q: Tensor, k: Tensor, v: Tensor, b: int, sink: Tensor) -> Tensor:
        if k.shape[2] == 0:
            return q.sum(-1, True).expand(-1, -1, -1, v.shape[-1]) * 0 + 0 * sink.sum().to(q)
        return eager(q, k, v, part(mask, b, q.shape[2], k.shape[2]), sink=sink)

    terms = {"grad_sink": spread_of_sum(torch.ones(HEADS, sum(LENGTHS[0])), per_head=True)}
    check("block_sparse_attention_varlen", inputs, grad_output, each(own, sizes), terms, block_mask=mask, **sizes)


@pytest.mark.parametrize("score", SCORES)
def test_block_bias_of_packed_sequences(score: str, device: torch.device, dtype: torch.dtype) -> None:
    """Entries of rows and blocks beyond the end of a sequence get the gradient 0."""
    inputs, grad_output, sizes = packed(dtype, device)
    mask = lists(0.6, (64, 64), device)
    bias = torch.randn(mask.kv_indices.shape, generator=torch.Generator().manual_seed(3)).to(device)
    options: dict[str, Any] = {"block_mask": mask, "score": score} | sizes
    results = forward_backward(
        attnx.block_sparse_attention_varlen, inputs | {"block_bias": bias}, grad_output, **options
    )
    for b, (of_q, of_k) in enumerate(sequences_of(sizes)):
        own = {"query": inputs["query"][of_q], "key": inputs["key"][of_k], "value": inputs["value"][of_k]}
        own = {name: x.transpose(0, 1)[None].contiguous() for name, x in own.items()}
        rows = -(-own["query"].shape[2] // 64)
        counts, indices = mask.kv_num_blocks[b : b + 1, :, :rows], mask.kv_indices[b : b + 1, :, :rows]
        used = torch.arange(indices.shape[-1], device=device) < counts[..., None]
        beyond = indices >= -(-own["key"].shape[2] // 64)
        gradient = results["grad_block_bias"][b]
        assert (gradient[:, rows:] == 0).all()
        assert (gradient[None, :, :rows][beyond | ~used] == 0).all()
        if rows == 0 or own["key"].shape[2] == 0:
            continue
        alone = forward_backward(
            reference.block_sparse_attention,
            {name: x.double() for name, x in own.items()} | {"block_bias": bias[b : b + 1, :, :rows].double()},
            grad_output[of_q].transpose(0, 1)[None].double(),
            block_mask=attnx.BlockMask(counts, indices, (64, 64)),
            score=score,
        )["grad_block_bias"]
        precision = torch.finfo(dtype).eps * 64
        assert (gradient[None, :, :rows] - alone).abs().max() <= precision * max(float(alone.abs().max()), 1.0)


@pytest.mark.parametrize("score", SCORES)
def test_padding(score: str, dtype: torch.dtype, device: torch.device) -> None:
    inputs, _, sizes = packed(dtype, device)
    mask = lists(0.6, (64, 64), device)
    longer = {name: torch.cat([x, x[:7] * float("nan")]) for name, x in inputs.items()}
    for name, options in (
        ("block_sparse_attention_varlen", {"block_mask": mask}),
        ("probabilistic_attention_varlen", ROUND),
    ):
        function: Any = getattr(attnx, name)
        output = function(**longer, **sizes, **options, score=score, has_padding=True)
        assert torch.equal(output[:-7], function(**inputs, **sizes, **options, score=score))
        assert (output[-7:] == 0).all()


PROBABILISTIC: list[dict[str, Any]] = [
    {},
    {"is_causal": True},
    {"mode": "topm", "density": 0.5},
    {"block_size": (128, 64), "is_causal": True},
]
CALLS = [*itertools.product(SCORES, PROBABILISTIC), ("softmax", {"importance": True})]


def drawn_mask(
    b: int, longest: tuple[int, int], own: tuple[int, int], options: dict[str, Any], device: torch.device
) -> tuple[attnx.BlockMask, Tensor]:
    """The blocks of one sequence of a call, and the numbers that make up for the others, by the definition."""
    sizes = options.get("block_size", (64, 64)), options.get("is_causal", False)
    solved = reference._solve("harmonic", options.get("density"), options.get("mode", "bernoulli"), longest, *sizes)
    distance, candidate = reference._distances(own, *sizes)
    draw = reference._Draw(distance, candidate, solved[0][distance], solved[1])
    mask = attnx.BlockMask.from_dense(reference._sampled(1, HEADS, draw, sequence=b, **ROUND).to(device), sizes[0])
    corrections = -draw.p.log().to(device).expand(1, HEADS, -1, -1)
    return mask, corrections.gather(-1, mask.kv_indices.long())


def plain_probabilistic(longest: tuple[int, int], options: dict[str, Any], score: str) -> Callable[..., Tensor]:
    def own(q: Tensor, k: Tensor, v: Tensor, b: int) -> Tensor:
        if k.shape[2] == 0:
            return q.sum(-1, True).expand(-1, -1, -1, v.shape[-1]) * 0
        mask, corrections = drawn_mask(b, longest, (q.shape[2], k.shape[2]), options, q.device)
        bias = corrections if options.get("importance") else None
        return eager(q, k, v, mask, score=score, is_causal=options.get("is_causal", False), block_bias=bias)

    return own


@pytest.mark.parametrize(("score", "options"), CALLS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_probabilistic(score: str, dtype: torch.dtype, options: dict[str, Any], device: torch.device) -> None:
    inputs, grad_output, sizes = packed(dtype, device)
    longest = sizes["max_seqlen_q"], sizes["max_seqlen_k"]
    plain = each(plain_probabilistic(longest, options, score), sizes)
    check("probabilistic_attention_varlen", inputs, grad_output, plain, score=score, **options, **sizes, **ROUND)


@pytest.mark.parametrize(("score", "options"), CALLS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_probabilistic_with_lengths(
    score: str, dtype: torch.dtype, options: dict[str, Any], device: torch.device, poisoned_allocations: None
) -> None:
    shape = Shape(length_q=100, length_k=330, head_dim=16, batch=4, heads=HEADS, kv_heads=2)
    inputs, grad_output = random_inputs(shape, dtype, device)
    starts, ends = [0, 9, 3, 70], [330, 9, 40, 241]
    lengths = {
        name: torch.tensor(x, dtype=torch.int32, device=device)
        for name, x in (("leftpad_k", starts), ("seqused_k", ends))
    }
    own = plain_probabilistic((shape.length_q, shape.length_k), options, score)

    def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        used = [(slice(b, b + 1), slice(None), slice(*x)) for b, x in enumerate(zip(starts, ends, strict=True))]
        return torch.cat([own(query[b : b + 1], key[x], value[x], b) for b, x in enumerate(used)])

    check("probabilistic_attention", inputs, grad_output, plain, score=score, **options, **lengths, **ROUND)


def test_full_lengths_change_nothing(dtype: torch.dtype, device: torch.device, deterministic: None) -> None:
    """Dense sequences, the same with lengths, and the same packed draw the same blocks."""
    shape = Shape(length_q=130, length_k=200, head_dim=16, batch=3, heads=4, kv_heads=2)
    inputs, grad_output = random_inputs(shape, dtype, device)
    options: dict[str, Any] = {"is_causal": True, "density": 0.6} | ROUND
    dense = forward_backward(attnx.probabilistic_attention, inputs, grad_output, **options)
    full = torch.full((3,), 200, dtype=torch.int32, device=device)
    with_lengths = forward_backward(attnx.probabilistic_attention, inputs, grad_output, seqused_k=full, **options)
    rows = {name: x.transpose(1, 2).flatten(0, 1) for name, x in inputs.items()}
    offsets = [torch.arange(4, dtype=torch.int32, device=device) * n for n in (130, 200)]
    sizes = {"cu_seqlens_q": offsets[0], "cu_seqlens_k": offsets[1], "max_seqlen_q": 130, "max_seqlen_k": 200}
    grad_rows = grad_output.transpose(1, 2).flatten(0, 1)
    of_packed = forward_backward(attnx.probabilistic_attention_varlen, rows, grad_rows, **sizes, **options)
    for name, x in dense.items():
        assert torch.equal(x, with_lengths[name]), name
        assert torch.equal(x.transpose(1, 2).flatten(0, 1), of_packed[name]), name


@pytest.mark.parametrize("name", ["block_sparse_attention_varlen", "probabilistic_attention_varlen"])
def test_fits_torch(name: str, dtype: torch.dtype, device: torch.device, deterministic: None) -> None:
    inputs, grad_output, sizes = packed(dtype, device)
    options: dict[str, Any] = ROUND if name.startswith("prob") else {"block_mask": lists(0.6, (64, 64), device)}
    function: Any = getattr(attnx, name)
    eager_results = forward_backward(function, inputs, grad_output, **sizes, **options)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for x, y in zip(
        forward_backward(compiled, inputs, grad_output, **sizes, **options).values(),
        eager_results.values(),
        strict=True,
    ):
        assert torch.equal(x, y)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_mask": None}, "block_mask: expected attnx.BlockMask, got None"),
        ({"max_seqlen_q": 129}, "max_seqlen_q: expected at least the longest sequence, 200, got 129"),
        ({"max_seqlen_q": 400}, r"kv_num_blocks: expected shape \(5 or 1, 4 or 1, 7\), got \(5, 4, 4\)"),
        ({"has_padding": 1}, "has_padding: expected True or False, got 1"),
        ({"score": "softmax", "bias": 1.0}, 'bias: expected None with score="softmax"'),
    ],
)
def test_bad_input(change: dict[str, Any], message: str, device: torch.device, dtype: torch.dtype) -> None:
    inputs, _, sizes = packed(dtype, device)
    with pytest.raises(RuntimeError, match=message):
        attnx.block_sparse_attention_varlen(**inputs, **sizes | {"block_mask": lists(0.6, (64, 64), device)} | change)


def test_masks_that_packed_sequences_do_not_take(device: torch.device, dtype: torch.dtype) -> None:
    inputs, _, sizes = packed(dtype, device)
    window = attnx.BlockMask.window(200, 330, (50, 0), device=device)
    with pytest.raises(RuntimeError, match="block_mask: expected lists alone for packed sequences, got a mask that hi"):
        attnx.block_sparse_attention_varlen(**inputs, **sizes, block_mask=window)
    visited = torch.ones(1, 1, 4, 6, dtype=torch.bool, device=device)
    others = attnx.BlockMask.from_dense(visited, lengths=(200, 331))
    with pytest.raises(RuntimeError, match=r"block_mask: expected one of max_seqlen_q and max_seqlen_k, \(200, 330\)"):
        attnx.block_sparse_attention_varlen(**inputs, **sizes, block_mask=others)
