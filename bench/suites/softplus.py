"""Softplus attention, plain and sharpened, beside softmax attention and the plain formula."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

import attnx
import attnx.reference
from suite import Attention, Case, Contender, Formula, Inputs, Prepare, Suite
from suites import dense

POWER = 3

CASES = (
    Case("512", 4, 512, 512, 64, quick=True),
    Case("512-causal", 4, 512, 512, 64, is_causal=True),
    Case("2048", 4, 2048, 2048, 64),
    Case("2048-causal", 4, 2048, 2048, 64, is_causal=True),
)


def _ours(sharpen: int | None) -> Prepare:
    def prepare(case: Case, inputs: Inputs) -> Attention:
        return functools.partial(attnx.softplus_attention, sharpen=sharpen, is_causal=case.is_causal)

    return prepare


def _reference(sharpen: int | None) -> Prepare:
    def prepare(case: Case, inputs: Inputs) -> Attention:
        return functools.partial(attnx.reference.softplus_attention, sharpen=sharpen, is_causal=case.is_causal)

    return prepare


def _eager(sharpen: int | None) -> Prepare:
    def prepare(case: Case, inputs: Inputs) -> Attention:
        visible = torch.ones(case.length_q, case.length_k, dtype=torch.bool, device=inputs.query.device)
        visible = visible.tril() if case.is_causal else visible
        keys = visible.sum(-1, keepdim=True)
        factor = (math.log(case.head_dim) * keys.log()).to(inputs.query.dtype)

        def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            logits = factor * normalize(query, dim=-1) @ normalize(key, dim=-1).mT
            a = logits.logaddexp(torch.zeros_like(logits)) * visible
            weights = a / a.sum(-1, keepdim=True)
            if sharpen is not None:
                weights = (keys * weights - (keys > 3).to(weights.dtype)).relu() ** sharpen
                weights = weights / weights.sum(-1, keepdim=True)
            return weights @ value

        return attention

    return prepare


SOFTPLUS = Formula(_reference(None), _eager(None))
SHARPENED = Formula(_reference(POWER), _eager(POWER))

SUITE = Suite(
    "softplus",
    CASES,
    (
        Contender("attnx-softmax", dense.SOFTMAX, dense.softmax),
        Contender("attnx-softplus", SOFTPLUS, _ours(None)),
        Contender("attnx-sharpened", SHARPENED, _ours(POWER)),
        Contender("eager-softplus", SOFTPLUS, SOFTPLUS.eager),
        Contender("eager-sharpened", SHARPENED, SHARPENED.eager),
    ),
    baseline="eager-softplus",
    memory_case=Case("memory", 4, 2048, 2048, 64),
)
