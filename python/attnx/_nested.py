"""Nested tensors of layout torch.jagged, through the operators of packed sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnx._operators.sparse_linear import longest


def expect_no_lengths(**lengths: Tensor | None) -> None:
    """Refuses lengths of keys beside nested tensors, which have lengths of their own."""
    for name, x in lengths.items():
        if x is not None:
            raise RuntimeError(f"{name}: expected None beside nested tensors, got a tensor")


def attend(packed: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
    """Returns what ``packed`` makes of the sequences, as nested tensors like ``query``.

    Args:
        packed: a function of packed sequences, such as :func:`attnx.softmax_attention_varlen`.
        query: (batch, heads, lengths, head_dim), and so key and value: the transposed view of
            (batch, lengths, heads, head_dim), in which they are packed.

    Raises:
        RuntimeError: a tensor is not nested, of another layout, or not packed.
    """
    rows = {name: _rows(name, x) for name, x in (("query", query), ("key", key), ("value", value))}
    of_queries, of_keys = query.offsets(), key.offsets()
    if value.offsets() is not of_keys and not torch.equal(value.offsets(), of_keys):
        raise RuntimeError("value: expected sequences as long as those of key, got others")
    results = packed(
        *rows.values(),
        of_queries.to(torch.int32),
        of_keys.to(torch.int32),
        longest(of_queries),
        longest(of_keys),
        **options,
    )
    if isinstance(results, tuple):
        return tuple(_nested(x, of_queries) for x in results)
    return _nested(results, of_queries)


def _rows(name: str, x: Tensor) -> Tensor:
    if not isinstance(x, Tensor) or not x.is_nested or x.layout != torch.jagged:
        got = f"one of layout {x.layout}" if isinstance(x, Tensor) else str(type(x))
        raise RuntimeError(f"{name}: expected a nested tensor of layout torch.jagged beside others, got {got}")
    rows = x.transpose(1, 2)
    if x.dim() != 4 or getattr(rows, "_ragged_idx", 1) != 1 or rows.lengths() is not None or not rows.is_contiguous():
        raise RuntimeError(
            f"{name}: expected (batch, heads, lengths, head_dim) as a transposed view of a nested (batch, lengths, "
            "heads, head_dim) without holes, got another"
        )
    return rows.values()


def _nested(x: Tensor, offsets: Tensor) -> Tensor:
    """Makes a nested tensor of rows (tokens, heads, dim), or of one number for each, (heads, tokens)."""
    rows = x.transpose(0, 1) if x.dim() == 2 else x
    return torch.nested.nested_tensor_from_jagged(rows, offsets).transpose(1, 2)
