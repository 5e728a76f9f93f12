"""Probabilistic attention at three densities beside dense attention, and beside flex_attention on the same blocks."""

from __future__ import annotations

import functools
from typing import Any

import attnx
from suite import Attention, Case, Contender, Inputs, Prepare, Suite
from suites import blocks, dense

DENSITIES = (0.1, 0.25, 0.5)
ROUND: dict[str, Any] = {"seed": 0, "offset": 0}

CASES = (
    Case("8192", 4, 8192, 8192, 64),
    Case("8192-causal", 4, 8192, 8192, 64, is_causal=True),
    Case("4096", 8, 4096, 4096, 64),
    Case("2048", 4, 2048, 2048, 64, quick=True),
)


def _options(density: float, case: Case) -> dict[str, Any]:
    # The diagonal alone is more than a tenth of the few blocks on which errors are measured.
    return {"density": max(density, 2 * 64 / case.length_k), "is_causal": case.is_causal, **ROUND}


def _mask(density: float) -> blocks.MaskOf:
    def mask(case: Case, inputs: Inputs) -> attnx.BlockMask:
        sizes = case.batch, case.heads, case.length_q, case.length_k
        return attnx.probabilistic_block_mask(*sizes, **_options(density, case))

    return mask


def _ours(density: float) -> Prepare:
    def prepare(case: Case, inputs: Inputs) -> Attention:
        return functools.partial(attnx.probabilistic_attention, **_options(density, case))

    return prepare


SUITE = Suite(
    name="probabilistic",
    cases=CASES,
    contenders=(
        Contender("attnx-softmax", dense.SOFTMAX, dense.softmax),
        *(Contender(f"attnx-{p:g}", blocks.formula(_mask(p)), _ours(p)) for p in DENSITIES),
        *(Contender(f"flex-{p:g}", blocks.formula(_mask(p)), blocks.flex(_mask(p))) for p in DENSITIES),
        Contender("sdpa", dense.SOFTMAX, dense.sdpa),
    ),
    baseline="attnx-softmax",
    memory_case=Case("memory", 1, 32768, 32768, 64),
)
