"""The derivative of attention along a direction, beside the forward alone, and what torch makes of the formula."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import attnx
import attnx.reference
from suite import Attention, Case, Contender, Formula, Inputs, Prepare, Suite
from suites import dense

# Which of query, key and value have a tangent.
DIRECTIONS = {
    "q": (True, False, False),
    "v": (False, False, True),
    "qk": (True, True, False),
    "qkv": (True, True, True),
}


def _tangents(inputs: Inputs, given: tuple[bool, bool, bool]) -> list[Tensor | None]:
    generator = torch.Generator(inputs.query.device).manual_seed(1)
    drawn = [torch.randn(x.shape, generator=generator, device=x.device, dtype=torch.float32) for x in inputs]
    return [t.to(x.dtype) if wanted else None for t, x, wanted in zip(drawn, inputs, given, strict=True)]


def _reference(given: tuple[bool, bool, bool]) -> Prepare:
    def prepare(case: Case, inputs: Inputs) -> Attention:
        tangents = _tangents(inputs, given)
        along = attnx.reference.softmax_attention_jvp
        return lambda *x: along(*x, *tangents, is_causal=case.is_causal)[2]

    return prepare


def _along(attention: Prepare, given: tuple[bool, bool, bool]) -> Prepare:
    def prepare(case: Case, inputs: Inputs) -> Attention:
        function, tangents = attention(case, inputs), _tangents(inputs, given)

        def along(*x: Tensor) -> Tensor:
            def of_given(*moved: Tensor) -> Any:
                rest = iter(moved)
                return function(*(y if t is None else next(rest) for y, t in zip(x, tangents, strict=True)))

            primals = tuple(y for y, t in zip(x, tangents, strict=True) if t is not None)
            return torch.func.jvp(of_given, primals, tuple(t for t in tangents if t is not None))[1]

        return along

    return prepare


_EAGER = dense.eager(lambda logits: logits.softmax(-1))
FORMULAS = {name: Formula(_reference(given), _along(_EAGER, given)) for name, given in DIRECTIONS.items()}

SUITE = Suite(
    "jvp",
    tuple(
        Case(name, 8, length, length, head_dim, is_causal=is_causal, directions=("forward",), quick=length == 512)
        for name, length, head_dim, is_causal in (
            ("512", 512, 64, False),
            ("2048", 2048, 64, False),
            ("2048-causal", 2048, 64, True),
        )
    ),
    (
        Contender("attnx-softmax", dense.SOFTMAX, dense.softmax),
        *(Contender(f"attnx-jvp-{name}", FORMULAS[name], _along(dense.softmax, DIRECTIONS[name])) for name in FORMULAS),
        *(Contender(f"torch-jvp-{name}", FORMULAS[name], _along(_EAGER, DIRECTIONS[name])) for name in FORMULAS),
    ),
    baseline="attnx-softmax",
    memory_case=Case("memory", 8, 2048, 2048, 64, directions=("forward",)),
)
