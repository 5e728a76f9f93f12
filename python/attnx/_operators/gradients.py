"""Operators get their gradients here, or a refusal where they have none.

Each has a kernel of its own at the key of autograd, in the place of ``torch.library.register_autograd``, whose kernels
let forward-mode tangents fall and refuse the transforms of ``torch.func``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from operator import itemgetter
from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad

from attnx._operators.description import BackwardOperator, Formula, Operator
from attnx._operators.schema import LIBRARY, Signature, signature
from attnx._operators.tangents import ResultsAlong, along_tangents, may_have_tangents

Along: TypeAlias = Callable[[tuple[Any, ...]], ResultsAlong]  # takes arguments some of which have tangents


def register(row: Operator, name: str) -> None:
    """Registers the derivative of a forward, and a refusal of the second derivative for its backward operator."""
    derivative = row.derivative
    if isinstance(derivative, BackwardOperator):
        _by_operator(name, derivative, along_tangents(name) if row.jvp and name == row.name else None)
        _refuse(f"{name}_backward", f"{name}: no second derivative; attnx.reference.{name} has one")
    elif isinstance(derivative, Formula):
        _register_kernel(name, _function(name, derivative.save, derivative.gradient))
    else:
        _refuse(name, f"{name}: no derivative; {derivative.why}")


_SAVED = object()  # it stands among the arguments for a tensor that autograd keeps


def _by_operator(name: str, derivative: BackwardOperator, along: Along | None) -> None:
    forward, backward = signature(name), signature(f"{name}_backward")
    kept = [i for i, result in enumerate(forward.results) if result in backward.arguments]
    # What the backward operator takes is at these places of one list. A small call takes longer in Python than in its
    # kernel, so that as little as possible is looked up by name.
    names = (*forward.arguments, *(forward.results[i] for i in kept))
    of_results = tuple(f"grad_{result}" for result in forward.results)
    may_be_none = not backward.optional.isdisjoint(of_results)
    asked = tuple(i for i, x in enumerate(forward.arguments) if f"{x}_gradient" in backward.arguments)
    wanted_names = tuple(f"{forward.arguments[i]}_gradient" for i in asked)
    known = (*names, *of_results, "deterministic", *wanted_names)
    others = tuple(argument for argument in backward.arguments if argument not in known)
    arguments_of = itemgetter(*map((*known, *others).index, backward.arguments))
    places = tuple(forward.arguments.index(result.removeprefix("grad_")) for result in backward.results)
    nothing = (None,) * len(forward.arguments)

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        results = output if isinstance(output, tuple) else (output,)
        values = (*inputs, *(results[i] for i in kept))
        ctx.save_for_backward(*(x for x in values if isinstance(x, Tensor)))
        ctx.values = tuple(_SAVED if isinstance(x, Tensor) else x for x in values)
        # Autograd fills in plain zeros for the result that nobody used, also beside a DTensor.
        ctx.set_materialize_grads(type(inputs[0]) is Tensor and not may_be_none)

    def gradient(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        saved = iter(ctx.saved_tensors)
        values = [next(saved) if x is _SAVED else x for x in ctx.values]
        of_all = [
            torch.zeros_like(values[names.index(result)]) if x is None and not may_be_none else x
            for result, x in zip(forward.results, grads, strict=True)
        ]
        values += (x if x is None or x.stride(-1) == 1 else x.contiguous() for x in of_all)
        values.append(torch.are_deterministic_algorithms_enabled())
        wanted = ctx.needs_input_grad[1:]
        values += (wanted[i] for i in asked)
        if derivative.more is not None:
            more = derivative.more(dict(zip(known, values, strict=True)))
            values += (more[argument] for argument in others)
        gradients: list[Any] = list(nothing)
        for place, x in zip(places, _call(backward, arguments_of(values)), strict=True):
            if wanted[place]:
                argument = values[place]
                if x.shape != argument.shape:  # one number may have served every head, and sequence
                    x = x.sum_to_size(argument.shape)
                gradients[place] = x if x.dtype == argument.dtype else x.to(argument.dtype)
        return tuple(gradients)

    get_one = tuple(forward.arguments[place] for place in places)
    _register_kernel(name, _function(name, save, gradient), get_one, along)


def _call(of: Signature, args: tuple[Any, ...]) -> Any:
    """Calls an operator whose kernel at the key of autograd would do nothing but call it below that key."""
    if torch.is_grad_enabled() or may_have_tangents():
        return of.operator(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return of.operator(*args)


def _refuse(name: str, message: str) -> None:
    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None: ...

    def gradient(ctx: Any, *grads: Tensor) -> NoReturn:
        raise NotImplementedError(message)

    # Autograd has no formula for an operator that changes its arguments, so the forward already refuses.
    def refuse(*args: Any) -> NoReturn:
        raise NotImplementedError(message)

    _register_kernel(name, refuse if signature(name).written else _function(name, save, gradient))


def _function(name: str, save: Callable[..., None], gradient: Callable[..., Any]) -> Callable[..., Any]:
    """Calls the operator below autograd, which keeps what ``save`` gives it and calls ``gradient`` in the backward."""
    of = signature(name)

    def forward(ctx: Any, call: tuple[Any, ResultsAlong | None], *args: Any) -> Any:
        keys, given = call
        if given is None:
            # An outer transform of torch.func may differentiate the same call.
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                results = _below_autograd(of, keys, args)
        else:
            results, ctx.tangents = given
        save(ctx, args, results)
        return results

    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, *gradient(ctx, *grads)

    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        return ctx.tangents

    members = {name: staticmethod(f) for name, f in {"forward": forward, "backward": backward, "jvp": jvp}.items()}
    function: Any = type(name, (torch.autograd.Function,), members)
    function_of_one_level: Any = type(name, (torch.autograd.function._SingleLevelFunction,), members)

    def apply(keys: Any, *args: Any, given: ResultsAlong | None = None) -> Any:
        if not torch._C._are_functorch_transforms_active():
            return function.apply((keys, given), *args)
        # The kernel is called once for each transform, innermost first, and records for that alone, so a function of
        # one level is what belongs here. Function.apply takes it for a call from outside of all transforms.
        try:
            from torch._functorch.autograd_function import enable_single_level_autograd_function
        except ImportError:
            raise NotImplementedError(f"{name}: no gradient in a transform of torch.func under this torch") from None
        with enable_single_level_autograd_function():
            return function_of_one_level.apply((keys, given), *args)

    return apply


def _below_autograd(of: Signature, keys: Any, args: tuple[Any, ...]) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return of.operator.redispatch(keys & torch._C._after_autograd_keyset, *args)


def _register_kernel(
    name: str, differentiate: Callable[..., Any], get_one: Collection[str] | None = None, along: Along | None = None
) -> None:
    """Has autograd call ``differentiate`` where an argument requires grad, and be left out otherwise.

    Args:
        get_one: the arguments that get a gradient, where not all of those do that autograd may ask it of.
        along: computes the results and their tangents; without it tangents are refused.
    """
    of = signature(name)
    get_none = frozenset() if get_one is None else frozenset(of.arguments) - frozenset(get_one)

    def kernel(keys: Any, *args: Any) -> Any:
        if may_have_tangents() and (tangents := _with_tangents(of, args)):
            if along is None:
                raise NotImplementedError(
                    f"{name}: no forward-mode derivative, got a tangent of {tangents[0]}; what attnx.reference has is "
                    "differentiable in forward mode, too"
                )
            return differentiate(keys, *args, given=along(args))
        if not torch.is_grad_enabled():
            return _below_autograd(of, keys, args)
        need_one = [i for i, x in enumerate(args) if isinstance(x, Tensor) and x.requires_grad]
        if not need_one:
            return _below_autograd(of, keys, args)
        for i in need_one:
            if of.arguments[i] in get_none:
                raise RuntimeError(
                    f"{of.arguments[i]}: expected a tensor that needs no gradient, as it gets none; detach it"
                )
        return differentiate(keys, *args)

    LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)


def _with_tangents(of: Signature, args: tuple[Any, ...]) -> list[str]:
    return [
        argument
        for argument, x in zip(of.arguments, args, strict=True)
        if isinstance(x, Tensor) and forward_ad.unpack_dual(x, level=0).tangent is not None
    ]
