"""Sparse-linear attention: 5 % of the blocks critical, 10 % negligible; its map and its linear branch included."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import attnx
import attnx.reference
from suite import Attention, Case, Contender, Formula, Inputs, Prepare, Suite
from suites import blocks, dense

Shares = Callable[[Case], dict[str, float]]  # of the blocks of keys: what is critical, what is negligible

CASES = (
    Case("8192", 4, 8192, 8192, 64),
    Case("8192-causal", 4, 8192, 8192, 64, is_causal=True),
    Case("4096-d128", 4, 4096, 4096, 128),
    Case("2048", 4, 2048, 2048, 64, quick=True),
)
# The size of its goal on a GPU, a video of Wan 2.1.
GPU_CASES = (Case("32760-d128", 12, 32760, 32760, 128), Case("1024-d128", 4, 1024, 1024, 128, quick=True))
# At a fixed number of critical and of negligible blocks a row the time should grow like the length.
LENGTHS = tuple(Case(str(n), 4, n, n, 64) for n in (4096, 8192, 16384, 32768, 65536))


def _defaults(case: Case) -> dict[str, float]:
    return {}


def _fixed_numbers(case: Case) -> dict[str, float]:
    block = min(64 / case.length_k, 1 / 32)
    return {"critical": 6 * block, "negligible": 12 * block}


def _map(shares: Shares, case: Case, inputs: Inputs) -> attnx.SparseLinearMap:
    """In a dtype that holds the inputs and their float64 copies alike, so that both have the same map."""
    dtype = torch.bfloat16 if inputs.query.is_cuda else torch.float32  # CUDA makes no map of float32
    query, key = inputs.query.to(dtype), inputs.key.to(dtype)
    return attnx.sparse_linear_block_map(query, key, is_causal=case.is_causal, **shares(case))


def _critical(case: Case, inputs: Inputs) -> attnx.BlockMask:
    return _map(_defaults, case, inputs).critical_mask()


def _sum(parts: tuple[Tensor, Tensor]) -> Tensor:
    return parts[0] + parts[1]


def _ours(shares: Shares) -> Prepare:
    def prepare(case: Case, inputs: Inputs) -> Attention:
        options: dict[str, Any] = {"is_causal": case.is_causal, **shares(case)}
        return lambda *x: _sum(attnx.sparse_linear_attention(*x, **options))

    return prepare


def _with_map(shares: Shares) -> Prepare:
    def prepare(case: Case, inputs: Inputs) -> Attention:
        options: dict[str, Any] = {"is_causal": case.is_causal, "block_map": _map(shares, case, inputs)}
        return lambda *x: _sum(attnx.sparse_linear_attention(*x, **options))

    return prepare


def _formula(shares: Shares) -> Formula:
    def reference(case: Case, exact: Inputs) -> Attention:
        options: dict[str, Any] = {"block_map": _map(shares, case, exact), "is_causal": case.is_causal}
        return lambda *x: _sum(attnx.reference.sparse_linear_attention(*x, **options))

    def eager(case: Case, inputs: Inputs) -> Attention:
        block_map = _map(shares, case, inputs)
        labels = blocks.elements(block_map.labels, block_map.block_size, case)
        critical, marginal = labels == 1, labels == 0
        if case.is_causal:
            critical, marginal = critical.tril(), marginal.tril()

        def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            weights = (query.softmax(-1) @ key.softmax(-1).mT).masked_fill(~marginal, 0.0)
            total = weights.sum(-1, keepdim=True)
            linear = weights @ value / total.masked_fill(total == 0, 1.0)
            return blocks.softmax(query, key, value, critical) + linear

        return attention

    return Formula(reference, eager)


SUITE = Suite(
    name="sparse-linear",
    cases=CASES,
    contenders=(
        Contender("attnx-sparse-linear", _formula(_defaults), _ours(_defaults)),
        # Its critical blocks alone, the map given.
        Contender("attnx-block-sparse", blocks.formula(_critical), blocks.block_sparse(_critical)),
        Contender("flex-block-sparse", blocks.formula(_critical), blocks.flex(_critical)),
        Contender("sdpa", dense.SOFTMAX, dense.sdpa),
    ),
    baseline="sdpa",
    memory_case=Case("memory", 1, 32768, 32768, 64),
)

GPU_SUITE = replace(SUITE, name="sparse-linear-gpu", cases=GPU_CASES)
LENGTHS_SUITE = Suite(
    name="sparse-linear-lengths",
    cases=LENGTHS,
    contenders=(
        Contender("attnx-sparse-linear", _formula(_fixed_numbers), _ours(_fixed_numbers)),
        Contender("attnx-sparse-linear-map-given", _formula(_fixed_numbers), _with_map(_fixed_numbers)),
    ),
    baseline="attnx-sparse-linear",
    memory_case=Case("memory", 1, 32768, 32768, 64),
)
