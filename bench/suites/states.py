"""Attention with a state of one size, which goes in and comes out, beside what models run without a kernel for it."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

import attnx
import attnx.reference
from suite import Attention, Case, Contender, Formula, Inputs, Suite, Unsupported
from suites import dense

LENGTHS = (512, 2048, 8192)
CHUNK = 64
KEPT = 8  # of NAtS-L's chunks one in so many is a softmax chunk
DECAY = 0.1  # of a token, on average


def _gates(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """What the gated delta rule takes besides rows."""
    query = inputs.query
    generator = torch.Generator(query.device).manual_seed(1)
    drawn = torch.randn(2, case.batch, case.heads, case.length_q, generator=generator, device=query.device)
    decay, beta = drawn.to(torch.float64 if query.dtype == torch.float64 else torch.float32)
    return {"log_decay": -DECAY * decay.abs(), "beta": beta.sigmoid()}


def _delta(function: Any, **options: Any) -> Any:
    def prepare(case: Case, inputs: Inputs) -> Attention:
        gates = _gates(case, inputs)
        return functools.partial(function, **gates, **options)

    return prepare


def _token_by_token(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, beta: Tensor, carry: Tensor | None = None
) -> Tensor:
    """The definition, of rows of norm 1, in the dtype of query."""
    query, key = normalize(query, dim=-1), normalize(key, dim=-1)
    state, outputs = query.new_zeros(*query.shape[:2], query.shape[3], value.shape[3]), []
    before = state
    for t in range(query.shape[2]):
        q, k, v = (x[:, :, t, :, None] for x in (query * query.shape[3] ** -0.5, key, value))
        before, state = (x * log_decay[:, :, t, None, None].exp().to(x.dtype) for x in (before, state))
        state = state + k @ (beta[:, :, t, None, None].to(state.dtype) * (v - state.mT @ k)).mT
        outputs.append((state.mT @ q).mT)
        if carry is not None and t % CHUNK == CHUNK - 1:
            before = state = before + carry[:, :, t // CHUNK, None, None].to(state.dtype) * (state - before)
    return torch.cat(outputs, 2)


def _transformers(case: Case, inputs: Inputs) -> Attention:
    """What Qwen3-Next runs where no package has a kernel: it takes (batch, length, heads, dim)."""
    try:
        qwen = importlib.import_module("transformers.models.qwen3_next.modeling_qwen3_next")
    except ImportError as error:
        raise Unsupported(f"transformers: {error}") from error
    name = "torch_recurrent_gated_delta_rule" if case.length_q == 1 else "torch_chunk_gated_delta_rule"
    options = {"initial_state": None, "output_final_state": False, "use_qk_l2norm_in_kernel": True}
    function = functools.partial(getattr(qwen, name), **options)
    gates = {name: x.transpose(1, 2) for name, x in _gates(case, inputs).items()}

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows = (x.transpose(1, 2) for x in (query, key, value))
        return function(*rows, gates["log_decay"], gates["beta"])[0].transpose(1, 2)

    return attention


def _taylor(function: Any) -> Any:
    return lambda case, inputs: function


def _matrix_of_weights(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    t = query * query.shape[3] ** -0.5 @ key.mT
    weights = (1 + t + t * t / 2).tril()
    return weights @ value / weights.sum(-1, keepdim=True)


def _taylor_eager(case: Case, inputs: Inputs) -> Attention:
    size = case.batch * case.heads * case.length_q * case.length_k * inputs.query.element_size()
    if size > dense.LARGEST_SCORE_MATRIX:
        raise Unsupported(f"its matrix of weights would take {size / 2**30:.3g} GiB")
    return _matrix_of_weights


def _features(x: Tensor) -> Tensor:
    """What BASED's map makes of tokens: 1, x, and the products of pairs of its numbers."""
    i, j = torch.triu_indices(x.shape[-1], x.shape[-1], device=x.device)
    pairs = x[..., i] * x[..., j] * torch.where(i == j, 0.5**0.5, 1.0).to(x.dtype)
    return torch.cat((torch.ones_like(x[..., :1]), x, pairs), -1)


def _by_chunks(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The weights of pairs within a chunk, and a state for the chunks before it."""
    query, key = (x * query.shape[3] ** -0.25 for x in (query, key))
    value = torch.cat((value, torch.ones_like(value[..., :1])), -1)
    q, k, v = (pad(x, (0, 0, 0, -x.shape[2] % CHUNK)).unflatten(2, (-1, CHUNK)) for x in (query, key, value))
    added, t = _features(k).mT @ v, q @ k.mT
    sums = (1 + t + t * t / 2).tril() @ v + _features(q) @ (added.cumsum(2) - added)
    return (sums[..., :-1] / sums[..., -1:]).flatten(2, 3)[:, :, : query.shape[2]]


def _routes(query: Tensor) -> tuple[Tensor, Tensor]:
    """Which chunks see which by softmax, and what share of each the state carries on."""
    kept = torch.arange(-(-query.shape[2] // CHUNK), device=query.device) % KEPT == 0
    own = torch.eye(len(kept), dtype=torch.bool, device=query.device)
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return own | (kept & own.logical_not().tril(-1)), kept.logical_not().to(dtype).expand(*query.shape[:2], -1)


def _hybrid(softmax: Any, rule: Any) -> Any:
    """The two parts of NAtS-L, added up."""

    def prepare(case: Case, inputs: Inputs) -> Attention:
        gates = _gates(case, inputs)
        visited, carry = _routes(inputs.query)
        attend, delta = softmax(visited, inputs.query.shape[2]), functools.partial(rule, carry=carry, **gates)
        return lambda query, key, value: attend(query, key, value) + delta(query, key, value)

    return prepare


def _lists(visited: Tensor, length: int) -> Any:
    mask = attnx.BlockMask.from_dense(visited[None, None], (CHUNK, CHUNK), (length, length))
    return functools.partial(attnx.block_sparse_attention, block_mask=mask, is_causal=True)


def _pairs(function: Any) -> Any:
    def prepare(visited: Tensor, length: int) -> Any:
        pairs = visited.repeat_interleave(CHUNK, 0).repeat_interleave(CHUNK, 1)[:length, :length].tril()
        return functools.partial(function, attn_mask=pairs[None, None])

    return prepare


def _eager_softmax(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor) -> Tensor:
    logits = query * query.shape[3] ** -0.5 @ key.mT
    return logits.masked_fill(~attn_mask, -torch.inf).softmax(-1) @ value


DELTA = Formula(_delta(attnx.reference.gated_delta_rule, normalize_qk=True), _delta(_token_by_token))
HYBRID = Formula(
    _hybrid(
        _pairs(attnx.reference.softmax_attention),
        functools.partial(attnx.reference.gated_delta_rule, normalize_qk=True),
    ),
    _hybrid(_pairs(_eager_softmax), _token_by_token),
)
TAYLOR = Formula(_taylor(attnx.reference.linear_attention), _taylor_eager)

DELTA_SUITE = Suite(
    "delta-rule",
    (
        *(Case(str(n), 16, n, n, 128, is_causal=True, quick=n == LENGTHS[0]) for n in LENGTHS),
        Case("one-head", 1, 8192, 8192, 128, is_causal=True),
        Case("one-head-65536", 1, 65536, 65536, 128, is_causal=True),
        Case("token", 16, 1, 1, 128, is_causal=True, directions=("forward",)),
    ),
    (
        Contender("attnx-delta-rule", DELTA, _delta(attnx.gated_delta_rule, normalize_qk=True)),
        Contender("transformers", DELTA, _transformers),
    ),
    baseline="transformers",
    memory_case=Case("memory", 16, 2048, 2048, 128, is_causal=True),
)
TAYLOR_SUITE = Suite(
    "taylor",
    (
        *(Case(str(n), 16, n, n, 16, is_causal=True, quick=n == LENGTHS[0]) for n in (128, *LENGTHS, 65536)),
        Case("one-head", 1, 8192, 8192, 16, is_causal=True),
    ),
    (
        Contender("attnx-taylor", TAYLOR, _taylor(attnx.linear_attention)),
        Contender("attnx-softmax", dense.SOFTMAX, dense.softmax),
        Contender("eager-taylor", TAYLOR, _taylor_eager),
        Contender("eager-taylor-chunks", TAYLOR, _taylor(_by_chunks)),
    ),
    baseline="eager-taylor-chunks",
    memory_case=Case("memory", 16, 2048, 2048, 16, is_causal=True),
)
HYBRID_SUITE = Suite(
    "hybrid-chunks",
    tuple(Case(str(n), 8, n, n, 128, is_causal=True, quick=n == 2048) for n in (2048, 8192, 32768)),
    (
        Contender(
            "attnx-hybrid", HYBRID, _hybrid(_lists, functools.partial(attnx.gated_delta_rule, normalize_qk=True))
        ),
        Contender("attnx-softmax", dense.SOFTMAX, dense.softmax),
    ),
    baseline="attnx-softmax",
    memory_case=Case("memory", 8, 8192, 8192, 128, is_causal=True),
)
