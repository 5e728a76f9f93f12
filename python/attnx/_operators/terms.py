"""What is special to the terms of logits: masks, biases of keys, dropout."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from attnx._operators.schema import Arguments, sum_dtype


def _like(argument: str, arguments: Arguments) -> Tensor:
    """The gradient of an argument that gets one on request; without a request it is empty."""
    x, query = arguments[argument], arguments["query"]
    shape = x.shape if x is not None and arguments[f"{argument}_gradient"] else (0,)
    return query.new_empty(shape, dtype=sum_dtype(query))


# These count heads in the dimension that query does.
BY_HEAD = ("attn_mask", "distance_bias", "row_bounds", "key_bias", "key_mask")
TENSORS = ("attn_mask", "distance_bias", "key_bias", "key_mask")
GRADIENTS = {f"grad_{name}": partial(_like, name) for name in TENSORS}
TABLES = ("query_table", "key_table", "key_bias", "key_mask")
TABLE_GRADIENTS = {f"grad_{name}": partial(_like, name) for name in TABLES}
