"""Probabilistic attention at three densities beside dense attention, and beside flex_attention on the same blocks."""

from __future__ import annotations

import functools
from typing import Any

import attnx
from suite import Attention, Case, Contender, Inputs, Prepare, Suite
from suites import blocks, dense

DENSITIES = (0.1, 0.25, 0.5)
ROUND: dict[str, Any] = {"seed": 0, "offset": 0}

Size = tuple[int, int]  # queries and keys of a block

CASES = (
    Case("8192", 4, 8192, 8192, 64),
    Case("8192-causal", 4, 8192, 8192, 64, is_causal=True),
    Case("4096", 8, 4096, 4096, 64),
    Case("2048", 4, 2048, 2048, 64, quick=True),
)
# The sizes of its goals on a GPU, where blocks of 128 fill the tiles.
GPU_CASES = (
    Case("32768-d128", 12, 32768, 32768, 128),
    Case("32768-d128-causal", 12, 32768, 32768, 128, is_causal=True),
    Case("8192-d64", 32, 8192, 8192, 64),
    Case("1024-d128", 4, 1024, 1024, 128, quick=True),
)


def _options(density: float, size: Size, case: Case) -> dict[str, Any]:
    # The diagonal alone is more than a tenth of the few blocks on which errors are measured.
    density = min(max(density, 2 * size[1] / case.length_k), 1)
    return {"density": density, "block_size": size, "is_causal": case.is_causal, **ROUND}


def _mask(density: float, size: Size) -> blocks.MaskOf:
    def mask(case: Case, inputs: Inputs) -> attnx.BlockMask:
        sizes = case.batch, case.heads, case.length_q, case.length_k
        return attnx.probabilistic_block_mask(*sizes, **_options(density, size, case), device=inputs.query.device)

    return mask


def _ours(density: float, size: Size) -> Prepare:
    def prepare(case: Case, inputs: Inputs) -> Attention:
        return functools.partial(attnx.probabilistic_attention, **_options(density, size, case))

    return prepare


def _suite(name: str, cases: tuple[Case, ...], size: Size) -> Suite:
    masks = {p: _mask(p, size) for p in DENSITIES}
    return Suite(
        name=name,
        cases=cases,
        contenders=(
            Contender("attnx-softmax", dense.SOFTMAX, dense.softmax),
            *(Contender(f"attnx-{p:g}", blocks.formula(mask), _ours(p, size)) for p, mask in masks.items()),
            *(Contender(f"flex-{p:g}", blocks.formula(mask), blocks.flex(mask)) for p, mask in masks.items()),
            Contender("sdpa", dense.SOFTMAX, dense.sdpa),
        ),
        baseline="attnx-softmax",
        memory_case=Case("memory", 1, 32768, 32768, 64),
    )


SUITE = _suite("probabilistic", CASES, (64, 64))
GPU_SUITE = _suite("probabilistic-gpu", GPU_CASES, (128, 128))
