"""Rectified sparse attention: 10 % of the blocks critical; pooling, choice of blocks and correction included."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import attnx
import attnx.reference
from attnx import rectified
from suite import Attention, Case, Contender, Formula, Inputs, Suite
from suites import blocks, dense

BLOCK_SIZE = (rectified.BLOCK, rectified.BLOCK)
# Blocks of normally distributed tokens are alike, so the number of critical ones is that of ``drop``.
OPTIONS: dict[str, Any] = {"top_p": 0.0, "drop": 0.9}


def _pooled(case: Case, inputs: Inputs) -> rectified.Pooled:
    """In a dtype that holds the inputs and their float64 copies alike, so that both have the same blocks."""
    dtype = torch.bfloat16 if inputs.query.is_cuda else torch.float32
    query, key = inputs.query.to(dtype), inputs.key.to(dtype)
    return rectified.pool(query, key, case.length_k, **OPTIONS, neighbours=None, seqused_k=None, scale=None)


def _critical(case: Case, inputs: Inputs) -> attnx.BlockMask:
    return attnx.BlockMask.from_dense(_pooled(case, inputs).critical, BLOCK_SIZE)


def _reference(case: Case, exact: Inputs) -> Attention:
    chosen = _pooled(case, exact)
    return functools.partial(attnx.reference.rectified_attention, blocks=(chosen.critical, chosen.gains))


def _eager(case: Case, inputs: Inputs) -> Attention:
    chosen = _pooled(case, inputs)
    visible = blocks.elements(chosen.critical, BLOCK_SIZE, case)

    def means(x: Tensor) -> Tensor:
        return torch.stack([rows.mean(2) for rows in x.split(BLOCK_SIZE[0], 2)], 2)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        sizes = torch.tensor([rows.shape[2] for rows in key.split(BLOCK_SIZE[0], 2)], device=key.device)
        shares = (means(query) @ means(key).mT / query.shape[-1] ** 0.5).softmax(-1) * sizes.to(key.dtype)
        moved = (shares / shares.sum(-1, keepdim=True)).masked_fill(chosen.critical | ~chosen.gains, 0.0)
        gate, addend = (
            x.repeat_interleave(BLOCK_SIZE[0], 2)[:, :, : query.shape[2]]
            for x in (1 - moved.sum(-1, keepdim=True), moved @ means(value))
        )
        return gate * blocks.softmax(query, key, value, visible) + addend

    return attention


def _ours(case: Case, inputs: Inputs) -> Attention:
    return functools.partial(attnx.rectified_attention, **OPTIONS)


SUITE = Suite(
    name="rectified",
    cases=(
        Case("16384-d128", 2, 16384, 16384, 128),
        Case("8192", 4, 8192, 8192, 64),
        Case("2048", 4, 2048, 2048, 64, quick=True),
    ),
    contenders=(
        Contender("attnx-rectified", Formula(_reference, _eager), _ours),
        # Its critical blocks alone, the lists given.
        Contender("attnx-block-sparse", blocks.formula(_critical), blocks.block_sparse(_critical)),
        Contender("flex-block-sparse", blocks.formula(_critical), blocks.flex(_critical)),
        Contender("sdpa", dense.SOFTMAX, dense.sdpa),
    ),
    baseline="sdpa",
    memory_case=Case("memory", 1, 32768, 32768, 64),
)

# The size of a video of Wan 2.1.
GPU_SUITE = replace(
    SUITE,
    name="rectified-gpu",
    cases=(Case("32760-d128", 12, 32760, 32760, 128), Case("1024-d128", 4, 1024, 1024, 128, quick=True)),
)
