"""What is special to linear attention with a state."""

from __future__ import annotations

from torch import Tensor

from attnx._operators.schema import Arguments, sum_dtype


def features(feature_map: str, head_dim: int) -> int:
    """Returns the number of rows of a state."""
    return 1 + head_dim + head_dim * (head_dim + 1) // 2 if feature_map == "taylor" else head_dim


def returned_state(arguments: Arguments) -> Tensor:
    """It is empty where it is not wanted."""
    return state(arguments) if arguments["return_state"] else state(arguments)[:, :, :0].contiguous()


def state(arguments: Arguments) -> Tensor:
    query, value = arguments["query"], arguments["value"]
    rows = features(arguments["feature_map"], query.shape[-1])
    return query.new_empty((*value.shape[:2], rows, value.shape[-1] + 1), dtype=sum_dtype(query))


SHAPES = {"state": returned_state, "grad_initial_state": state}

_CHUNK = 64


def flops(a: Arguments, backward: bool) -> int:
    """Counts products with states, and where attention is causal those of pairs of tokens of a chunk."""
    query, key, columns = a["query"], a["key"], a["value"].shape[-1] + 1
    queries, keys = (x.shape[0] * x.shape[1] * x.shape[2] for x in (query, key))
    size = 2 * features(a["feature_map"], query.shape[-1]) * columns
    pairs = 2 * queries * min(_CHUNK, key.shape[2]) * (query.shape[-1] + columns) if a["is_causal"] else 0
    if backward:
        return size * (3 * queries + 3 * keys) + 3 * pairs
    return size * (queries + keys) + pairs
