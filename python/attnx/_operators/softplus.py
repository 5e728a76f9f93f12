"""What is special to sharpened softplus attention."""

from __future__ import annotations

from torch import Tensor

from attnx._operators.schema import Arguments, sum_dtype


def _of_rows(arguments: Arguments) -> Tensor:
    query = arguments["query"]
    shape = query.shape[:3] if query.dim() == 4 else (query.shape[1], query.shape[0])
    return query.new_empty(shape, dtype=sum_dtype(query))


ROW_NUMBERS = {"gain": _of_rows, "shift": _of_rows}
