"""Numbers by distance, as T5 and DeBERTa have them, beside a bias of pairs, flex_attention and the plain formulas."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import attnx
import attnx.reference
from suite import Attention, Case, Contender, Formula, Inputs, Suite
from suites import dense

BUCKETS = 32
SPAN, MAX_DISTANCE = 256, 512  # of DebertaV2's base model

CASES = (
    Case("512", 12, 512, 512, 64, quick=True),
    Case("2048", 12, 2048, 2048, 64),
)


def _draw(inputs: Inputs, *shape: int) -> Tensor:
    query = inputs.query
    drawn = torch.randn(*shape, generator=torch.Generator(query.device).manual_seed(1), device=query.device)
    return drawn.to(torch.float64 if query.dtype == torch.float64 else torch.float32)


def _table(case: Case, inputs: Inputs) -> Tensor:
    return _draw(inputs, case.heads, BUCKETS)


def _pairs(case: Case, inputs: Inputs) -> Tensor:
    """The place of each pair among the distances."""
    i, j = (torch.arange(n, device=inputs.query.device) for n in (case.length_q, case.length_k))
    return i[:, None] - j + case.length_k - 1


def _buckets(case: Case, inputs: Inputs) -> Tensor:
    device = inputs.query.device
    return attnx.relative_position_buckets(case.length_q, case.length_k, buckets=BUCKETS, device=device)


def _relative(case: Case, inputs: Inputs) -> Attention:
    options = {"table": _table(case, inputs), "index": _buckets(case, inputs)}
    return functools.partial(attnx.relative_bias_attention, **options)


def _relative_reference(case: Case, inputs: Inputs) -> Attention:
    bias = _table(case, inputs)[None, :, _buckets(case, inputs)]
    return functools.partial(attnx.reference.softmax_attention, distance_bias=bias)


def _bias_of_pairs(case: Case, inputs: Inputs) -> Tensor:
    return _table(case, inputs)[:, _buckets(case, inputs)[_pairs(case, inputs)]][None].to(inputs.query.dtype)


def _relative_eager(case: Case, inputs: Inputs) -> Attention:
    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        logits = query / math.sqrt(case.head_dim) @ key.mT + _bias_of_pairs(case, inputs)
        return logits.softmax(-1) @ value

    return attention


def _sdpa(case: Case, inputs: Inputs) -> Attention:
    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return scaled_dot_product_attention(query, key, value, attn_mask=_bias_of_pairs(case, inputs))

    return attention


def _flex(case: Case, inputs: Inputs) -> Attention:
    bias = _table(case, inputs)[:, _buckets(case, inputs)]

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + bias[h, i - j + case.length_k - 1]

    return functools.partial(dense.compiled_flex_attention(dynamic=False), score_mod=score_mod)


def _positions(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    drawn = _draw(inputs, 2, case.heads, 2 * SPAN, case.head_dim).to(inputs.query.dtype)
    device = inputs.query.device
    rows = attnx.log_distance_buckets(case.length_q, case.length_k, span=SPAN, max_distance=MAX_DISTANCE, device=device)
    return {"index": rows, "pos_key": drawn[0], "pos_query": drawn[1]}


def _disentangled(case: Case, inputs: Inputs) -> Attention:
    return functools.partial(attnx.disentangled_attention, **_positions(case, inputs))


def _disentangled_reference(case: Case, inputs: Inputs) -> Attention:
    return functools.partial(attnx.reference.disentangled_attention, **_positions(case, inputs))


def _disentangled_eager(case: Case, inputs: Inputs) -> Attention:
    """As transformers has it: products with all positions, from which a number is gathered for each pair."""
    given = _positions(case, inputs)
    at = given["index"][_pairs(case, inputs)].expand(case.batch, case.heads, -1, -1)
    scale = 1 / math.sqrt(3 * case.head_dim)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        logits = query @ (key.mT * scale)
        logits = logits + (query @ given["pos_key"].mT).gather(3, at) * scale
        logits = logits + (key @ given["pos_query"].mT).gather(3, at.mT).mT * scale
        return logits.softmax(-1) @ value

    return attention


RELATIVE = Formula(_relative_reference, _relative_eager)
DISENTANGLED = Formula(_disentangled_reference, _disentangled_eager)

SUITE = Suite(
    "distances",
    CASES,
    (
        Contender("attnx-relative", RELATIVE, _relative),
        Contender("sdpa-bias", RELATIVE, _sdpa),
        Contender("flex-bias", RELATIVE, _flex),
        Contender("eager-relative", RELATIVE, _relative_eager),
        Contender("attnx-disentangled", DISENTANGLED, _disentangled),
        Contender("eager-disentangled", DISENTANGLED, _disentangled_eager),
    ),
    baseline="eager-disentangled",
    memory_case=Case("memory", 12, 2048, 2048, 64),
)
