"""The results of an operator without their values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnx import _capability
from attnx._operators.description import Operator
from attnx._operators.schema import Arguments, Signature, signature, sum_dtype

# A number for each row: (batch, heads, length), or (heads, rows) of packed sequences.
OF_ROWS = ("logsumexp", "gain", "shift")


def empty_rows(like: Tensor, dim: int) -> Tensor:
    """A row of dim features for each row of like, with the heads inside the rows in memory where like has them so."""
    if like.dim() == 3:
        return like.new_empty(like.shape[0], like.shape[1], dim)
    batch, heads, length = like.shape[:3]
    if like.stride(1) < like.stride(2):
        return like.new_empty(batch, length, heads, dim).transpose(1, 2)
    return like.new_empty(batch, heads, length, dim)


def logsumexp_of(query: Tensor) -> Tensor:
    shape = query.shape[:3] if query.dim() == 4 else (query.shape[1], query.shape[0])
    return query.new_empty(shape, dtype=sum_dtype(query))


def _by_rule(result: str, of: Signature, arguments: Arguments) -> Tensor:
    query, name = arguments["query"], result.removeprefix("grad_")
    if result in OF_ROWS:
        return logsumexp_of(query)
    if result == name:
        return empty_rows(query, arguments["value"].shape[-1])
    if name in of.optional:
        return query.new_empty(query.shape[1], dtype=sum_dtype(query))
    return empty_rows(arguments[name], arguments[name].shape[-1])


def register(row: Operator, name: str) -> None:
    of = signature(name)

    def fake(*args: Any) -> Any:
        arguments = of.bind(args)
        _capability.check_placement(arguments)
        if row.fake is not None:
            return row.fake(**arguments)
        results = tuple(
            row.shapes[result](arguments) if result in row.shapes else _by_rule(result, of, arguments)
            for result in of.results
        )
        return results if len(results) > 1 else next(iter(results), None)

    torch.library.register_fake(f"attnx::{name}", fake)
