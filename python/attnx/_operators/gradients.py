"""Operators get their gradients here, or a refusal where they have none."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from attnx._operators.description import BackwardOperator, Formula, Operator
from attnx._operators.schema import LIBRARY, signature


def register(row: Operator, name: str) -> None:
    """Registers the derivative of a forward, and a refusal of the second derivative for its backward operator."""
    derivative = row.derivative
    if isinstance(derivative, BackwardOperator):
        _by_operator(name, derivative)
        _refuse(f"{name}_backward", f"{name}: no second derivative; attnx.reference.{name} has one")
    elif isinstance(derivative, Formula):
        torch.library.register_autograd(f"attnx::{name}", derivative.gradient, setup_context=derivative.save)
    else:
        _refuse(name, f"{name}: no derivative; {derivative.why}")


_SAVED = object()  # it stands among the arguments for a tensor that autograd keeps


def _by_operator(name: str, derivative: BackwardOperator) -> None:
    forward, backward = signature(name), signature(f"{name}_backward")
    kept = [i for i, result in enumerate(forward.results) if result in backward.arguments]
    names = (*forward.arguments, *(forward.results[i] for i in kept))
    of_results = tuple(f"grad_{result}" for result in forward.results)
    of_arguments = tuple(result.removeprefix("grad_") for result in backward.results)

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        results = output if isinstance(output, tuple) else (output,)
        values = (*inputs, *(results[i] for i in kept))
        ctx.save_for_backward(*(x for x in values if isinstance(x, Tensor)))
        ctx.values = tuple(_SAVED if isinstance(x, Tensor) else x for x in values)

    def gradient(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        saved = iter(ctx.saved_tensors)
        values = {name: next(saved) if x is _SAVED else x for name, x in zip(names, ctx.values, strict=True)}
        values["deterministic"] = torch.are_deterministic_algorithms_enabled()
        for of_result, x in zip(of_results, grads, strict=True):
            values[of_result] = x if x.stride(-1) == 1 else x.contiguous()
        if derivative.more is not None:
            values |= derivative.more(values)
        gradients: dict[str, Any] = dict.fromkeys(forward.arguments)
        for argument, x in zip(of_arguments, backward.call(values), strict=True):
            if values[argument] is not None:  # one number of shape () was used by every head
                gradients[argument] = x.sum() if values[argument].dim() == 0 else x
        return tuple(gradients.values())

    torch.library.register_autograd(f"attnx::{name}", gradient, setup_context=save)


def _refuse(name: str, message: str) -> None:
    of = signature(name)

    def gradient(ctx: Any, *grads: Tensor) -> NoReturn:
        raise NotImplementedError(message)

    # Torch registers no formula for an operator that changes its arguments, so the forward already refuses.
    def forward(keys: Any, *args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
            raise NotImplementedError(message)
        with torch._C._AutoDispatchBelowAutograd():
            return of.operator.redispatch(keys & torch._C._after_autograd_keyset, *args)

    if of.written:
        LIBRARY.impl(name, forward, "Autograd", with_keyset=True)
    else:
        torch.library.register_autograd(f"attnx::{name}", gradient)
