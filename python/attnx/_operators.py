"""What torch must know of the C++ operators besides their kernels: shapes, gradients, batching, autocast, refusals.

Each is registered on ``torch.ops.attnx.*``, so the operators behave alike however they are reached.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnx import _capability

FORWARD = ("sigmoid_attention", "sigmoid_attention_varlen", "softmax_attention", "softmax_attention_varlen")
BACKWARD = tuple(f"{name}_backward" for name in FORWARD)

_library = torch.library.Library("attnx", "FRAGMENT")


def _operator(name: str) -> Any:
    return getattr(torch.ops.attnx, name).default


def _argument_names(name: str) -> list[str]:
    return [argument.name for argument in _operator(name)._schema.arguments]


def _sum_type(query: Tensor) -> torch.dtype:
    """What sums, and with them bias, slopes and logsumexp, are kept in."""
    return torch.float64 if query.dtype == torch.float64 else torch.float32


# Shapes -------------------------------------------------------------------------------------------------------------


def _empty_rows(like: Tensor, dim: int) -> Tensor:
    """A row of dim features for each row of like, with the heads inside the rows in memory where like has them so."""
    if like.dim() == 3:
        return like.new_empty(like.shape[0], like.shape[1], dim)
    batch, heads, length = like.shape[:3]
    if like.stride(1) < like.stride(2):
        return like.new_empty(batch, length, heads, dim).transpose(1, 2)
    return like.new_empty(batch, heads, length, dim)


def _fake_output(arguments: dict[str, Any], result: str) -> Tensor:
    query = arguments["query"]
    if result in ("grad_bias", "grad_alibi_slopes"):
        return query.new_empty(query.shape[1], dtype=_sum_type(query))
    if result == "logsumexp":
        shape = query.shape[:3] if query.dim() == 4 else (query.shape[1], query.shape[0])
        return query.new_empty(shape, dtype=_sum_type(query))
    if result.startswith("grad_"):
        like = arguments[result.removeprefix("grad_")]
        return _empty_rows(like, like.shape[-1])
    return _empty_rows(query, arguments["value"].shape[-1])


def _result_names(name: str) -> list[str]:
    return [result.name or "output" for result in _operator(name)._schema.returns]


def register_fake(name: str) -> None:
    argument_names, result_names = _argument_names(name), _result_names(name)

    def fake(*args: Any) -> Any:
        arguments = dict(zip(argument_names, args, strict=True))
        _capability.check_placement(arguments)
        results = tuple(_fake_output(arguments, result) for result in result_names)
        return results if len(results) > 1 else results[0]

    torch.library.register_fake(f"attnx::{name}", fake)


# Gradients ----------------------------------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)), *outputs)
    ctx.inputs = [None if isinstance(x, Tensor) else x for x in inputs]
    ctx.tensor_at = [i for i, x in enumerate(inputs) if isinstance(x, Tensor)]


def _saved(ctx: Any) -> tuple[list[Any], tuple[Tensor, ...]]:
    inputs, tensors = list(ctx.inputs), ctx.saved_tensors
    for i, x in zip(ctx.tensor_at, tensors, strict=False):
        inputs[i] = x
    return inputs, tensors[len(ctx.tensor_at) :]


def register_autograd(name: str) -> None:
    names = _argument_names(name)
    backward = getattr(torch.ops.attnx, f"{name}_backward")
    gradient_names = [result.removeprefix("grad_") for result in _result_names(f"{name}_backward")]
    keeps_outputs = len(_result_names(name)) > 1  # the softmax's output and logsumexp

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _save(ctx, inputs, output if keeps_outputs else ())

    def gradient(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        inputs, outputs = _saved(ctx)
        grads = tuple(x if x.stride(-1) == 1 else x.contiguous() for x in grads)
        deterministic = torch.are_deterministic_algorithms_enabled()
        gradients = backward(*grads, *inputs[:3], *outputs, *inputs[3:], deterministic)
        result: list[Any] = [None] * len(inputs)
        for argument, x in zip(gradient_names, gradients, strict=True):
            i = names.index(argument)
            if inputs[i] is not None:  # a bias of shape () was used by every head
                result[i] = x.sum() if inputs[i].dim() == 0 else x
        return tuple(result)

    torch.library.register_autograd(f"attnx::{name}", gradient, setup_context=setup_context)


def refuse_double_backward(name: str) -> None:
    forward = name.removesuffix("_backward")

    def gradient(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(f"{forward}: no second derivative; attnx.reference.{forward} has one")

    torch.library.register_autograd(f"attnx::{name}", gradient)


# Batching -----------------------------------------------------------------------------------------------------------


def _heads_at(tensor: str, packed: bool) -> int:
    """The dimension that counts heads, in a tensor of this name."""
    kind = tensor.removeprefix("grad_")
    return 0 if kind in ("bias", "alibi_slopes") or (kind == "logsumexp" and packed) else 1


def _register_vmap(name: str) -> None:
    argument_names, result_names = _argument_names(name), _result_names(name)
    packed = "cu_seqlens_q" in argument_names

    # The examples become more heads: what is summed or shared by head stays apart between them.
    def fold(tensor: str, x: Any, dim: int | None, examples: int, heads: int) -> Any:
        if not isinstance(x, Tensor) or (dim is None and (x.dim() == 0 or tensor.startswith("cu_seqlens"))):
            return x
        if tensor.startswith("cu_seqlens"):
            raise NotImplementedError(f"{tensor}: expected one packing for all examples of vmap, got a batch of them")
        x = x.expand(examples, *x.shape) if dim is None else x.movedim(dim, 0)
        if x.dim() == 1:  # one number for all heads of an example
            x = x[:, None].expand(-1, heads)
        at = _heads_at(tensor, packed)
        return x.movedim(0, at).flatten(at, at + 1)

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        query, dim = args[argument_names.index("query")], in_dims[argument_names.index("query")]
        heads = (query if dim is None else query.movedim(dim, 0)[0]).shape[1]
        folded = (
            fold(tensor, x, dim, info.batch_size, heads)
            for tensor, x, dim in zip(argument_names, args, in_dims, strict=True)
        )
        results = _operator(name)(*folded)
        results = results if isinstance(results, tuple) else (results,)
        dims = tuple(_heads_at(result, packed) for result in result_names)
        results = tuple(x.unflatten(dim, (info.batch_size, -1)) for x, dim in zip(results, dims, strict=True))
        return (results, dims) if len(results) > 1 else (results[0], dims[0])

    torch.library.register_vmap(f"attnx::{name}", rule)


def register_looping_vmap(name: str) -> None:
    """Of operators whose heads cannot stand for examples: each example is a call of its own."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        def example(n: int) -> list[Any]:
            return [x if dim is None else x.select(dim, n) for x, dim in zip(args, in_dims, strict=True)]

        results = [_operator(name)(*example(n)) for n in range(info.batch_size)]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        stacked = tuple(torch.stack(result) for result in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)

    torch.library.register_vmap(f"attnx::{name}", rule)


# Autocast -----------------------------------------------------------------------------------------------------------


def register_autocast(name: str, device_type: str) -> None:
    names = _argument_names(name)

    def cast(argument: str, x: Any, dtype: torch.dtype) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dtype == torch.float64:
            return x  # torch leaves float64 alone, too
        follows = ("query", "key", "value", "memory_key", "memory_value")
        return x.to(dtype if argument in follows else torch.float32)

    def kernel(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device_type)
        args = tuple(cast(argument, x, dtype) for argument, x in zip(names, args, strict=True))
        with torch.autocast(device_type, enabled=False):
            return _operator(name)(*args)

    _library.impl(name, kernel, f"Autocast{device_type.upper()}")


# Refusals -----------------------------------------------------------------------------------------------------------


def register_refusal(name: str) -> None:
    names = _argument_names(name)

    def refuse(*args: Any) -> Any:
        arguments = dict(zip(names, args, strict=True))
        _capability.check_placement(arguments)
        raise NotImplementedError(_capability.refusal(name, arguments))

    _library.impl(name, refuse, "CompositeExplicitAutograd")


def register() -> None:
    for name in FORWARD + BACKWARD:
        register_refusal(name)
        register_fake(name)
        _register_vmap(name)
    for name in FORWARD:
        register_autograd(name)
        for device_type in ("cpu", "cuda"):
            register_autocast(name, device_type)
    for name in BACKWARD:
        refuse_double_backward(name)
