"""What is special to the gated delta rule: its state, and what has the shape of one."""

from __future__ import annotations

from torch import Tensor

from attnx._operators.schema import Arguments, sum_dtype
from attnx._operators.shapes import empty_rows

_CHUNK = 64


def output(arguments: Arguments) -> Tensor:
    return empty_rows(arguments["value"], arguments["value"].shape[-1])


def state(arguments: Arguments) -> Tensor:
    query, value = arguments["query"], arguments["value"]
    return query.new_empty((*value.shape[:2], query.shape[-1], value.shape[-1]), dtype=sum_dtype(query))


def gate(arguments: Arguments) -> Tensor:
    """It is contiguous, whatever the strides of the argument are."""
    query, value = arguments["query"], arguments["value"]
    return query.new_empty(value.shape[:3], dtype=sum_dtype(query))


def per_chunk(arguments: Arguments) -> Tensor:
    """It is empty where there is no carry."""
    query, value, carry = arguments["query"], arguments["value"], arguments["carry"]
    return query.new_empty((*value.shape[:2], 0 if carry is None else carry.shape[2]), dtype=sum_dtype(query))


SHAPES = {
    "output": output,
    "state": state,
    "grad_log_decay": gate,
    "grad_beta": gate,
    "grad_initial_state": state,
    "grad_carry": per_chunk,
}


def flops(a: Arguments, backward: bool) -> int:
    """Counts products with the state of each chunk of tokens, and those of pairs of tokens of a chunk."""
    value, key_dim = a["value"], a["query"].shape[-1]
    batch, heads, length, value_dim = value.shape
    tokens, size = batch * heads * length, min(_CHUNK, length)
    of_states, of_pairs = 2 * tokens * key_dim * value_dim, 2 * tokens * size
    if backward:
        return 9 * of_states + of_pairs * (6 * key_dim + 4 * value_dim)
    return 3 * of_states + of_pairs * (2 * key_dim + 2 * value_dim)
