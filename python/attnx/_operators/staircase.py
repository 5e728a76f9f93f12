"""What is special to the operators of the staircase cache."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnx import _capability
from attnx._operators.schema import Arguments
from attnx._operators.shapes import empty_rows


def refusal(name: str, arguments: Arguments) -> str:
    """The capability table answers, and the cache stands for key and value where the call has none."""
    rows = arguments["tail"][:, :, 0, 0]
    call = {"key": rows, "value": rows} | {argument: x for argument, x in arguments.items() if argument != "state"}
    return _capability.refusal("staircase_attention", {"query": call["key"]} | call)


def output(arguments: Arguments) -> Tensor:
    query = arguments["query"]
    return empty_rows(query, query.shape[-1])


def rows(tail: Tensor, count: int, **others: Any) -> tuple[Tensor, Tensor]:
    shape = (*tail.shape[:2], count, tail.shape[-1])
    return tail.new_empty(shape), tail.new_empty(shape)
