"""What is added or done to a logit, beside the plain call, SDPA with a mask and flex_attention with a score_mod."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import attnx
import attnx.reference
from suite import Attention, Case, Contender, Formula, Inputs, Suite
from suites import dense

# The arguments of softmax_attention besides the inputs.
Options: TypeAlias = Callable[[Case, Inputs], dict[str, Any]]

CAP = 50.0  # of Gemma 2's layers

CASES = (
    Case("512", 8, 512, 512, 64, quick=True),
    Case("2048", 8, 2048, 2048, 64),
)


def _draw(inputs: Inputs, *shape: int) -> Tensor:
    query = inputs.query
    drawn = torch.randn(*shape, generator=torch.Generator(query.device).manual_seed(1), device=query.device)
    return drawn.to(torch.float64 if query.dtype == torch.float64 else torch.float32)


def _plain(case: Case, inputs: Inputs) -> dict[str, Any]:
    return {}


def _mask(case: Case, inputs: Inputs) -> dict[str, Any]:
    return {"attn_mask": _draw(inputs, 1, case.heads, case.length_q, case.length_k).to(inputs.query.dtype)}


def _bool_mask(case: Case, inputs: Inputs) -> dict[str, Any]:
    return {"attn_mask": _draw(inputs, 1, 1, case.length_q, case.length_k) < 1}


def _key_bias(case: Case, inputs: Inputs) -> dict[str, Any]:
    return {"key_bias": _draw(inputs, case.batch, 1, case.length_k)}


def _key_mask(case: Case, inputs: Inputs) -> dict[str, Any]:
    return {"key_mask": _draw(inputs, case.batch, 1, case.length_k).sigmoid()}


def _softcap(case: Case, inputs: Inputs) -> dict[str, Any]:
    return {"softcap": CAP}


def _sink(case: Case, inputs: Inputs) -> dict[str, Any]:
    return {"sink": _draw(inputs, case.heads)}


def _dropout(case: Case, inputs: Inputs) -> dict[str, Any]:
    return {"dropout_p": 0.1, "seed": 1, "offset": 0}


def _attnx(options: Options) -> Callable[[Case, Inputs], Attention]:
    return lambda case, inputs: functools.partial(attnx.softmax_attention, **options(case, inputs))


def _reference(options: Options) -> Callable[[Case, Inputs], Attention]:
    return lambda case, inputs: functools.partial(attnx.reference.softmax_attention, **options(case, inputs))


def _eager(options: Options) -> Callable[[Case, Inputs], Attention]:
    """The formula in plain PyTorch, every step rounded to the dtype of query."""

    def prepare(case: Case, inputs: Inputs) -> Attention:
        given = options(case, inputs)

        def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            logits = query / math.sqrt(case.head_dim) @ key.mT
            if "softcap" in given:
                logits = CAP * (logits / CAP).tanh()
            if (mask := given.get("attn_mask")) is not None:
                logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask
            if "key_bias" in given:
                logits = logits + given["key_bias"][:, :, None].to(logits.dtype)
            if "key_mask" in given:
                logits = logits + given["key_mask"][:, :, None].log().to(logits.dtype)
            if "sink" in given:
                sink = given["sink"][:, None, None].to(logits.dtype).expand(*logits.shape[:3], 1)
                return torch.cat([logits, sink], -1).softmax(-1)[..., :-1] @ value
            weights = logits.softmax(-1)
            if "dropout_p" in given:
                kept = attnx.reference.dropout_factors(logits.shape, given["dropout_p"], given["seed"], given["offset"])
                weights = weights * kept.to(weights)
            return weights @ value

        return attention

    return prepare


def _sdpa(options: Options) -> Callable[[Case, Inputs], Attention]:
    return lambda case, inputs: functools.partial(scaled_dot_product_attention, **options(case, inputs))


def _flex_softcap(case: Case, inputs: Inputs) -> Attention:
    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return CAP * (score / CAP).tanh()

    return functools.partial(dense.compiled_flex_attention(dynamic=False), score_mod=score_mod)


def _flex_mask(case: Case, inputs: Inputs) -> Attention:
    mask = _mask(case, inputs)["attn_mask"]

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + mask[0, h, i, j]

    return functools.partial(dense.compiled_flex_attention(dynamic=False), score_mod=score_mod)


OPTIONS: dict[str, Options] = {
    "plain": _plain,
    "mask": _mask,
    "bool-mask": _bool_mask,
    "key-bias": _key_bias,
    "key-mask": _key_mask,
    "softcap": _softcap,
    "sink": _sink,
    "dropout": _dropout,
}
FORMULAS = {name: Formula(_reference(options), _eager(options)) for name, options in OPTIONS.items()}

SUITE = Suite(
    "terms",
    CASES,
    (
        *(Contender(f"attnx-{name}", FORMULAS[name], _attnx(options)) for name, options in OPTIONS.items()),
        *(Contender(f"sdpa-{name}", FORMULAS[name], _sdpa(OPTIONS[name])) for name in ("plain", "mask", "bool-mask")),
        Contender("flex-mask", FORMULAS["mask"], _flex_mask),
        Contender("flex-softcap", FORMULAS["softcap"], _flex_softcap),
    ),
    baseline="attnx-plain",
    memory_case=Case("memory", 8, 2048, 2048, 64),
)
