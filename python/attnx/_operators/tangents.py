"""What is special to the operators that differentiate attention along a direction: shapes, and how tangents reach them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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


def along_tangents(name: str) -> Callable[[tuple[Any, ...], Callable[..., Any]], Any]:
    """A function that calls ``{name}_jvp`` in the place of an operator whose arguments have tangents.

    It takes the arguments, and a function that calls the operator itself without tangents, for reverse mode.
    """
    of, along = signature(name), signature(f"{name}_jvp")
    supported = [x for x in of.arguments if x in along.arguments]

    def call(args: tuple[Any, ...], without_tangents: Callable[..., Any]) -> Any:
        duals = [forward_ad.unpack_dual(x) if isinstance(x, Tensor) else None for x in args]
        tangents = {x: dual.tangent for x, dual in zip(of.arguments, duals, strict=True) if dual is not None}
        with_one = " and ".join(x for x, tangent in tangents.items() if tangent is not None)
        primals = tuple(x if dual is None else dual.primal for x, dual in zip(args, duals, strict=True))
        beside = [x for x, value in of.bind(primals).items() if x not in supported and not _is_neutral(value)]
        if beside:
            raise NotImplementedError(
                f"{name}: no forward-mode derivative beside {' and '.join(beside)}, got a tangent of {with_one}; it "
                f"takes {', '.join(supported)} alone, and what attnx.reference has is differentiable in forward mode, "
                "too"
            )
        values = of.bind(primals) | {f"tangent_{x}": _operand(tangents[x]) for x in INPUTS}
        results = dict(zip(along.results, along.call(values), strict=True))
        # The results of that operator refuse a derivative. Those of this one have it, without their tangents.
        outputs = [results[x] for x in of.results]
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in primals):
            alone = without_tangents(*primals)
            outputs = list(alone) if isinstance(alone, tuple) else [alone]
        both = tuple(
            forward_ad.make_dual(x, results[f"tangent_{result}"])
            for x, result in zip(outputs, of.results, strict=True)
        )
        return both if len(both) > 1 else both[0]

    return call


def _is_neutral(value: Any) -> bool:
    return value is None or (not isinstance(value, Tensor) and value == 0)


def _operand(tangent: Tensor | None) -> Tensor | None:
    """A tangent as the kernel takes it. Autograd has zeros without memory, whose products need not be made."""
    if tangent is None or tangent._is_zerotensor():
        return None
    return tangent if tangent.stride(-1) == 1 else tangent.contiguous()
