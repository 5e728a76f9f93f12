"""Hierarchical sparse attention: which tokens a block of queries has, and attention over them."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import attnx
from attnx import reference
from attnx.testing import assert_close, eager_softmax_attention
from cases import DTYPES, Shape, random_inputs
from compare import forward_backward

CPU = torch.device("cpu")
STARTS = torch.tensor([[0, 7, 40, 41, 150, 150, 200, 290, 300], [0, 64, 65, 66, 67, 240, 260, 299, 300]])
STARTS = STARTS.to(torch.int32)
CASES: dict[str, dict[str, Any]] = {
    "few": {"budget": 90, "block_size": 40, "recent": 9},
    "forced_alone": {"budget": 48, "block_size": 40, "recent": 9},
    "one_block": {"budget": 310, "block_size": 512, "recent": 9},
    "shared": {"budget": 90, "block_size": 40, "recent": 9, "share_heads": True},
    "single_queries": {"budget": 70, "block_size": 1, "recent": 64, "scale": 0.4},
}
LENGTHS = {"prefill": 300, "last_rows": 77, "decode": 1}


def _inputs(length_q: int, dtype: torch.dtype, device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
    return random_inputs(Shape(length_q, 300, 16, 24, batch=2, heads=4, kv_heads=2), dtype, device)


def _visible(routes: attnx.Routes, length_q: int) -> Tensor:
    """bool (batch, heads, length_q, length_k): the keys of each query's cluster."""
    batch, heads = routes.key_indices.shape[:2]
    chosen = torch.zeros(batch, heads, length_q, routes.length_k, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            rows, keys = routes.query_offsets[b, h].tolist(), routes.key_offsets[b, h].tolist()
            for c in range(routes.clusters):
                queries = routes.query_indices[b, h, rows[c] : rows[c + 1]].long()
                chosen[b, h, queries[:, None], routes.key_indices[b, h, keys[c] : keys[c + 1]].long()] = True
    return chosen


def _choice(case: str) -> dict[str, Any]:
    return {name: x for name, x in CASES[case].items() if name != "scale"}


def _plain(query: Tensor, key: Tensor, value: Tensor, *, tokens: Tensor, scale: float | None = None) -> Tensor:
    """The logits as a matrix, in the dtype of query."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    seen = tokens & reference.visible_keys(query.shape[2], key.shape[2], query.device, is_causal=True)
    logits = query * (query.shape[3] ** -0.5 if scale is None else scale) @ key.mT
    return logits.masked_fill(~seen, -torch.inf).softmax(-1) @ value


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(case: str, length: str, dtype: torch.dtype, device: torch.device) -> None:
    inputs, grad_output = _inputs(LENGTHS[length], dtype, device)
    starts = STARTS.to(device)
    tokens = _visible(
        attnx.hierarchical_routes(inputs["query"], inputs["key"], starts, **_choice(case)), LENGTHS[length]
    )
    scale = CASES[case].get("scale")
    got = forward_backward(attnx.hierarchical_attention, inputs, grad_output, chunk_starts=starts, **CASES[case])
    exact = {name: x.double() for name, x in inputs.items()}
    given = {"tokens": tokens.to(device), "scale": scale}
    want = forward_backward(reference.hierarchical_attention, exact, grad_output.double(), **given)
    plain = forward_backward(_plain, inputs, grad_output, **given)
    for name, x in got.items():
        assert x.dtype == dtype
        # What one row gives a gradient may be a difference of which only rounding is left.
        assert_close(x, want[name], plain[name], name=name, dtype=dtype)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("case", CASES)
def test_tokens(case: str, length: str, dtype: torch.dtype, device: torch.device) -> None:
    """Scores of these inputs are not so near to each other that rounding decides."""
    inputs, _ = _inputs(LENGTHS[length], dtype, device)
    starts = STARTS.to(device)
    routes = attnx.hierarchical_routes(inputs["query"], inputs["key"], starts, **_choice(case))
    want = reference.hierarchical_tokens(inputs["query"], inputs["key"], starts, **_choice(case))
    assert torch.equal(_visible(routes, LENGTHS[length]), want.cpu())
    budget, block = CASES[case]["budget"], CASES[case]["block_size"]
    last = torch.arange(0, LENGTHS[length], block).add(block).clamp(max=LENGTHS[length]) + 300 - LENGTHS[length]
    assert torch.equal(routes.key_offsets[0, 0].diff().cpu(), last.clamp(max=budget).int())
    first = reference.hierarchical_tokens(inputs["query"], inputs["key"], starts[:1], **_choice(case))
    only = attnx.hierarchical_routes(inputs["query"], inputs["key"], starts[:1], **_choice(case))
    assert torch.equal(_visible(only, LENGTHS[length]), first.cpu())


def test_budget_for_all_is_causal_attention(dtype: torch.dtype, device: torch.device) -> None:
    inputs, _ = _inputs(300, dtype, device)
    got = attnx.hierarchical_attention(**inputs, chunk_starts=STARTS.to(device), budget=300, block_size=64, recent=5)
    exact = reference.softmax_attention(**inputs, is_causal=True)
    assert_close(got, exact, eager_softmax_attention(**inputs, is_causal=True))


def test_later_tokens_have_no_effect(dtype: torch.dtype, device: torch.device) -> None:
    """What comes after a block changes neither its choice nor its output, even within a chunk that reaches beyond."""
    inputs, _ = _inputs(300, dtype, device)
    options: dict[str, Any] = {"chunk_starts": STARTS.to(device), "budget": 90, "block_size": 40, "recent": 9}
    want = attnx.hierarchical_attention(**inputs, **options)
    changed = {name: x.clone() for name, x in inputs.items()}
    for x in changed.values():
        x[:, :, 240:] = 3 - x[:, :, 240:]
    got = attnx.hierarchical_attention(**changed, **options)
    assert torch.equal(got[:, :, :240], want[:, :, :240])
    assert not torch.equal(got[:, :, 240:], want[:, :, 240:])


@pytest.mark.backends("cpu")
def test_gradients(backend: object) -> None:
    inputs, _ = random_inputs(Shape(9, 12, 4, 3, heads=2, kv_heads=1), torch.float64, torch.device("cpu"))
    starts = torch.tensor([[0, 2, 5, 9, 12]], dtype=torch.int32)
    leaves = [x.requires_grad_() for x in inputs.values()]
    options: dict[str, Any] = {"budget": 6, "block_size": 4, "recent": 2}
    assert torch.autograd.gradcheck(lambda *x: attnx.hierarchical_attention(*x, starts, **options), leaves)


@pytest.mark.backends("cpu")
def test_autocast(backend: object) -> None:
    inputs, _ = _inputs(300, torch.float32, torch.device("cpu"))
    options: dict[str, Any] = {"chunk_starts": STARTS, **CASES["few"]}
    with torch.autocast("cpu", torch.bfloat16):
        got = attnx.hierarchical_attention(**inputs, **options)
    half = {name: x.bfloat16() for name, x in inputs.items()}
    assert torch.equal(got, attnx.hierarchical_attention(**half, **options))


@pytest.mark.backends("cpu")
def test_compiled(backend: object) -> None:
    inputs, _ = _inputs(300, torch.float32, torch.device("cpu"))
    compiled = torch.compile(attnx.hierarchical_attention, fullgraph=True, backend="aot_eager")
    options: dict[str, Any] = {"chunk_starts": STARTS, **CASES["few"]}
    assert torch.equal(compiled(**inputs, **options), attnx.hierarchical_attention(**inputs, **options))


@pytest.mark.backends("cpu")
def test_compiled_for_any_length(backend: object) -> None:
    options: dict[str, Any] = {"budget": 90, "block_size": 40, "recent": 9}

    def attention(chunk_starts: Tensor, **inputs: Tensor) -> Tensor:
        return attnx.hierarchical_attention(**inputs, chunk_starts=chunk_starts, **options)

    compiled = torch.compile(attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (300, 333, 512, 640):
        inputs, _ = random_inputs(Shape(length, length, 16, 24, batch=2, heads=4, kv_heads=2), torch.float32, CPU)
        starts = torch.tensor([[0, 30, 200, length]], dtype=torch.int32)
        with torch.compiler.set_stance("default" if length == 300 else "fail_on_recompile"):
            assert torch.equal(compiled(starts, **inputs), attention(starts, **inputs))


def test_explain(dtype: torch.dtype, device: torch.device) -> None:
    inputs, _ = _inputs(300, dtype, device)
    answer = attnx.explain(attnx.hierarchical_attention, **inputs, chunk_starts=STARTS.to(device))
    assert answer.supported
    assert answer.kernel is not None
    assert answer.kernel.startswith("routing_attention [")


def _bad(**change: Any) -> dict[str, Any]:
    return change


@pytest.mark.backends("cpu")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_bad(query=None), "query: expected a tensor, got None"),
        (
            _bad(query=torch.ones(2, 4)),
            "query: expected (batch, heads, length, head_dim), got a tensor of shape (2, 4)",
        ),
        (_bad(query=torch.ones(2, 4, 301, 16)), "query: expected from one to the 300 tokens of key, got a tensor"),
        (_bad(key=torch.ones(2, 3, 300, 16)), "key: expected the batch, the head_dim and a divisor of the heads of"),
        (
            _bad(chunk_starts=STARTS.long()),
            "chunk_starts: expected int32 of shape (2 or 1, chunks + 1), got torch.int64",
        ),
        (
            _bad(chunk_starts=STARTS[0]),
            "chunk_starts: expected int32 of shape (2 or 1, chunks + 1), got torch.int32 of",
        ),
        (_bad(chunk_starts=STARTS[:, :1]), "chunk_starts: expected int32 of shape (2 or 1, chunks + 1), got"),
        (
            _bad(chunk_starts=STARTS[:, 1:]),
            "chunk_starts: expected numbers from 0 to the 300 tokens of key, got [7, 64]",
        ),
        (
            _bad(chunk_starts=STARTS[:, :-1]),
            "chunk_starts: expected numbers from 0 to the 300 tokens of key, got [0, 0]",
        ),
        (_bad(chunk_starts=STARTS[:, [0, 3, 2, 8]]), "chunk_starts: expected rising numbers, got 40 after 41"),
        (_bad(budget=47), "budget: expected at least the 48 tokens that the queries of a block have for sure, got 47"),
        (_bad(block_size=0), "block_size: expected an int, 1 or more, got 0"),
        (_bad(recent=0), "recent: expected an int, 1 or more, got 0"),
        (_bad(share_heads=1), "share_heads: expected True or False, got 1"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str, backend: object) -> None:
    inputs, _ = _inputs(300, torch.float32, torch.device("cpu"))
    options: dict[str, Any] = {"chunk_starts": STARTS, "budget": 90, "block_size": 40, "recent": 9}
    with pytest.raises(RuntimeError, match="^" + re.escape(message)):
        attnx.hierarchical_attention(**inputs | options | change)
