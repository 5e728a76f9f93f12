"""Gradients, or that there are none."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from attnx._operators.description import BackwardOperator, Formula, Operator
from attnx._operators.schema import LIBRARY, signature


def register(row: Operator, name: str) -> None:
    """Registers the derivative of a forward, and of its backward operator that there is no second one."""
    derivative = row.derivative
    if isinstance(derivative, BackwardOperator):
        _by_operator(name, derivative)
        _refuse(f"{name}_backward", f"{name}: no second derivative; attnx.reference.{name} has one")
    elif isinstance(derivative, Formula):
        torch.library.register_autograd(f"attnx::{name}", derivative.gradient, setup_context=derivative.save)
    else:
        _refuse(name, f"{name}: no derivative; {derivative.why}")


def _by_operator(name: str, derivative: BackwardOperator) -> None:
    forward, backward = signature(name), signature(f"{name}_backward")

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        results = zip(forward.results, output if isinstance(output, tuple) else (output,), strict=True)
        values = forward.bind(inputs) | {result: x for result, x in results if result in backward.arguments}
        tensors = {argument: x for argument, x in values.items() if isinstance(x, Tensor)}
        ctx.save_for_backward(*tensors.values())
        ctx.tensors = tuple(tensors)
        ctx.others = {argument: x for argument, x in values.items() if argument not in tensors}

    def gradient(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        inputs = ctx.others | dict(zip(ctx.tensors, ctx.saved_tensors, strict=True))
        values = inputs | {"deterministic": torch.are_deterministic_algorithms_enabled()}
        for result, x in zip(forward.results, grads, strict=True):
            values[f"grad_{result}"] = x if x.stride(-1) == 1 else x.contiguous()
        if derivative.more is not None:
            values |= derivative.more(values)
        gradients = {
            result.removeprefix("grad_"): x for result, x in zip(backward.results, backward.call(values), strict=True)
        }

        def of(argument: str) -> Tensor | None:
            x = inputs[argument]
            if x is None or argument not in gradients:
                return None
            # One number of shape () was used by every head.
            return gradients[argument].sum() if x.dim() == 0 else gradients[argument]

        return tuple(of(argument) for argument in forward.arguments)

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
