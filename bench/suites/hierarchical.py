"""Hierarchical sparse attention: 2048 tokens for each block of 256 queries, of chunks of 64; the choice included."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

import attnx
import attnx.reference
from suite import Attention, Case, Contender, Formula, Inputs, Suite
from suites import blocks, dense

CHUNK = 64


def _options(case: Case) -> dict[str, Any]:
    """A quarter of a short sequence, so that there is something to choose."""
    return {"budget": min(2048, case.length_k // 4), "block_size": min(256, case.length_k // 8), "recent": 64}


def _starts(case: Case, inputs: Inputs) -> Tensor:
    edges = torch.arange(-(-case.length_k // CHUNK) + 1, dtype=torch.int32, device=inputs.key.device) * CHUNK
    return edges.clamp(max=case.length_k)[None]


def _routes(case: Case, inputs: Inputs) -> attnx.Routes:
    """In a dtype that holds the inputs and their float64 copies alike, so that both have the same tokens."""
    dtype = torch.bfloat16 if inputs.query.is_cuda else torch.float32
    query, key = inputs.query.to(dtype), inputs.key.to(dtype)
    return attnx.hierarchical_routes(query, key, _starts(case, inputs), **_options(case))


def _tokens(case: Case, inputs: Inputs) -> Tensor:
    """bool (batch, heads, length, length): the tokens of each query's block."""
    routes = _routes(case, inputs)
    counts = routes.key_offsets[0, 0].diff()
    rows = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    chosen = torch.zeros(
        *routes.key_indices.shape[:2], len(counts), case.length_k, dtype=torch.bool, device=rows.device
    )
    flat = rows * case.length_k + routes.key_indices.long()
    chosen.flatten(2).scatter_(2, flat, True)
    return chosen.repeat_interleave(_options(case)["block_size"], 2)[:, :, : case.length_q].tril()


def _reference(case: Case, exact: Inputs) -> Attention:
    return functools.partial(attnx.reference.hierarchical_attention, tokens=_tokens(case, exact))


def _eager(case: Case, inputs: Inputs) -> Attention:
    return functools.partial(blocks.softmax, visible=_tokens(case, inputs))


def _ours(case: Case, inputs: Inputs) -> Attention:
    return functools.partial(attnx.hierarchical_attention, chunk_starts=_starts(case, inputs), **_options(case))


def _with_routes(case: Case, inputs: Inputs) -> Attention:
    return functools.partial(attnx.routing_attention, routes=_routes(case, inputs), is_causal=True)


SUITE = Suite(
    name="hierarchical",
    cases=(
        Case("32768", 1, 32768, 32768, 64, is_causal=True),
        Case("16384-d128", 1, 16384, 16384, 128, is_causal=True),
        Case("2048", 4, 2048, 2048, 64, is_causal=True, quick=True),
    ),
    contenders=(
        Contender("attnx-hierarchical", Formula(_reference, _eager), _ours),
        Contender("attnx-hierarchical-tokens-given", Formula(_reference, _eager), _with_routes),
        Contender("sdpa", dense.SOFTMAX, dense.sdpa),
    ),
    baseline="sdpa",
    memory_case=Case("memory", 1, 32768, 32768, 64, is_causal=True),
)
