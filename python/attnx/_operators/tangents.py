"""What is special to the operators that differentiate attention along a direction: shapes, and how tangents come."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad

from attnx._operators.flops import pairs_in_band
from attnx._operators.schema import Arguments, signature
from attnx._operators.shapes import empty_rows, logsumexp_of

INPUTS = ("query", "key", "value")
TANGENTS = tuple(f"tangent_{name}" for name in INPUTS)


def softmax_results(query: Tensor, value: Tensor, **others: Any) -> tuple[Tensor, ...]:
    output, logsumexp = empty_rows(query, value.shape[-1]), logsumexp_of(query)
    return output, logsumexp, empty_rows(query, value.shape[-1]), logsumexp_of(query)


def sigmoid_results(query: Tensor, value: Tensor, **others: Any) -> tuple[Tensor, ...]:
    return empty_rows(query, value.shape[-1]), empty_rows(query, value.shape[-1])


def products(a: Arguments, backward: bool) -> int:
    """S and O, and for each tangent one product like S, or one like O; that of the logits has one with V besides."""
    d, value_dim = a["query"].shape[-1], a["value"].shape[-1]
    of_logits = [a[name] is not None for name in TANGENTS[:2]]
    features = d * (1 + sum(of_logits)) + value_dim * (1 + any(of_logits) + (a[TANGENTS[2]] is not None))
    return 2 * pairs_in_band(a) * features


def may_have_tangents() -> bool:
    """Programs that torch compiled enter a dual level without telling Python, but only in transforms."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


# The results of an operator, and their tangents: a tensor each, or a tuple of several.
ResultsAlong: TypeAlias = tuple[Any, Any]


def along_tangents(name: str) -> Callable[[tuple[Any, ...]], ResultsAlong]:
    """A function that calls ``{name}_jvp`` with the arguments of an operator, some of which have tangents."""
    of, along = signature(name), signature(f"{name}_jvp")
    supported = [x for x in of.arguments if x in along.arguments]

    def call(args: tuple[Any, ...]) -> ResultsAlong:
        duals = {x: forward_ad.unpack_dual(y, level=0) for x, y in of.bind(args).items() if isinstance(y, Tensor)}
        primals = of.bind(args) | {x: dual.primal for x, dual in duals.items()}
        beside = [x for x, value in primals.items() if x not in supported and not _is_neutral(value)]
        if beside:
            tangents = [x for x, dual in duals.items() if dual.tangent is not None]
            raise NotImplementedError(
                f"{name}: no forward-mode derivative beside {' and '.join(beside)}, got a tangent of "
                f"{' and '.join(tangents)}; it takes {', '.join(supported)} alone, and what attnx.reference has is "
                "differentiable in forward mode, too"
            )
        results = along.call(primals | {f"tangent_{x}": duals[x].tangent for x in INPUTS})
        values = dict(zip(along.results, results, strict=True))
        # The tangents keep what refuses their derivative; the results get one from the operator itself.
        outputs = tuple(values[x].detach() for x in of.results)
        tangents_of = tuple(values[f"tangent_{x}"] for x in of.results)
        return (outputs, tangents_of) if len(outputs) > 1 else (outputs[0], tangents_of[0])

    return call


def _is_neutral(value: Any) -> bool:
    return value is None or (not isinstance(value, Tensor) and value == 0)
