"""What is special to the operators that tell about weights without values: shapes and gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnx._operators.description import Formula
from attnx._operators.flops import pairs_in_band
from attnx._operators.schema import Arguments, signature, sum_dtype

# Shapes -------------------------------------------------------------------------------------------------------------


def by_key(query: Tensor, key: Tensor, **others: Any) -> Tensor:
    return query.new_empty((*query.shape[:2], key.shape[2]), dtype=sum_dtype(query))


def by_pair(query: Tensor, key: Tensor, **others: Any) -> Tensor:
    return query.new_empty((*query.shape[:3], key.shape[2]), dtype=sum_dtype(query))


def by_row(query: Tensor, **others: Any) -> Tensor:
    return query.new_empty(query.shape[:3], dtype=sum_dtype(query))


def index_by_row(query: Tensor, **others: Any) -> Tensor:
    return query.new_empty(query.shape[:3], dtype=torch.int64)


def products(a: Arguments, backward: bool) -> int:
    """S alone."""
    return 2 * pairs_in_band(a) * a["query"].shape[-1]


# Gradients ----------------------------------------------------------------------------------------------------------


def _arguments_of(name: str, ctx: Any) -> Arguments:
    saved = iter(ctx.saved_tensors)
    values = [next(saved) if x is _SAVED else x for x in ctx.values]
    return signature(name).bind(tuple(values))


_SAVED = object()  # it stands among the arguments for a tensor that autograd keeps


def _save(ctx: Any, inputs: tuple[Any, ...], *more: Tensor) -> None:
    ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)), *more)
    ctx.values = tuple(_SAVED if isinstance(x, Tensor) else x for x in inputs)


def _of_each_head(key: Tensor, query: Tensor) -> Tensor:
    return key.repeat_interleave(query.shape[1] // key.shape[1], 1)


def _of_key_heads(grad: Tensor, key: Tensor) -> Tensor:
    return grad.unflatten(1, (key.shape[1], -1)).sum(2)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _save(ctx, inputs)


@once_differentiable
def _key_weights_gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """The sum over j of c_j dc_j is that over i of w_i O_i, with O attention whose values are the one column dc."""
    a = _arguments_of("attention_key_weights", ctx)
    query, key, weights = a["query"], a["key"], a["row_weights"]
    value, grad_output = _columns(grad, torch.ones_like(query[..., 0], dtype=grad.dtype), query.dtype)
    if weights is not None:
        value, grad_output = _columns(grad, weights.expand(query.shape[:3]), query.dtype)
    output, grad_query, grad_key = _attention(query, _of_each_head(key, query), value, grad_output, a)
    of_weights = None
    if weights is not None:
        parts = output[..., : 2 if value.shape[-1] > 1 else 1]
        of_weights = parts.to(weights.dtype).sum(-1).sum_to_size(weights.shape)
    gradients = dict.fromkeys(a) | {"query": grad_query, "key": _of_key_heads(grad_key, key), "row_weights": of_weights}
    return tuple(gradients.values())


def _attention(
    query: Tensor, key: Tensor, value: Tensor, grad_output: Tensor, a: Arguments
) -> tuple[Tensor, Tensor, Tensor]:
    """The output of attention, and the gradients of query and key."""
    name = f"{a['score']}_attention"
    values = a | {"query": query, "key": key, "value": value, "grad_output": grad_output}
    results = _call(name, values)
    if isinstance(results, tuple):  # of a normalised score
        values |= {"output": results[0], "logsumexp": results[1], "grad_logsumexp": torch.zeros_like(results[1])}
    values["deterministic"] = torch.are_deterministic_algorithms_enabled()
    grad_query, grad_key, *_ = _call(f"{name}_backward", values)
    return values.get("output", results), grad_query, grad_key


def _call(name: str, values: Arguments) -> Any:
    """Calls an operator with what its schema names of the values, and leaves out what else it can take."""
    neutral = {"bool": False, "float": 0.0}
    arguments = signature(name).operator._schema.arguments
    return signature(name).operator(
        *(values[x.name] if x.name in values else neutral.get(str(x.type)) for x in arguments)
    )


def _columns(value: Tensor, grad_output: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Values and gradients of the output whose products are those of these numbers.

    In 16 bits a number is a sum of two, so that little of it is lost, and rows are padded to 16 bytes. The first two
    columns of the output add up to that of value.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return value[..., None], grad_output[..., None]

    def halves(x: Tensor) -> tuple[Tensor, Tensor]:
        high = x.to(dtype)
        return high, (x - high.to(x.dtype)).to(dtype)

    (v, rest_of_v), (g, rest_of_g) = halves(value), halves(grad_output)
    pad = torch.nn.functional.pad
    return pad(torch.stack((v, rest_of_v, v), -1), (0, 5)), pad(torch.stack((g, g, rest_of_g), -1), (0, 5))


def _save_weights(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _save(ctx, inputs, output)


@once_differentiable
def _row_weights_gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Rows are few, so that their logits' gradients fit in memory."""
    a = _arguments_of("attention_row_weights", ctx)
    query, key, weights = a["query"], a["key"], ctx.saved_tensors[-1]
    products = weights * grad
    if a["score"] == "softmax":
        grad_logits = products - weights * products.sum(-1, keepdim=True)
    else:
        grad_logits = products * (1 - weights)
    grad_logits = grad_logits * (query.shape[-1] ** -0.5 if a["scale"] is None else a["scale"])
    grad_query = grad_logits @ _of_each_head(key, query).to(weights.dtype)
    grad_key = _of_key_heads(grad_logits.mT @ query.to(weights.dtype), key)
    gradients = dict.fromkeys(a) | {"query": grad_query.to(query.dtype), "key": grad_key.to(key.dtype)}
    return tuple(gradients.values())


OF_KEYS = Formula(_save_inputs, _key_weights_gradient)
OF_ROWS = Formula(_save_weights, _row_weights_gradient)
