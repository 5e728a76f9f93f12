"""What functions do within ``context_parallel``, where the sequences that they get are shards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from attnx import _arguments

# Contexts hold for all threads, as torch's does: checkpoints recompute on those of the backward.
_rings: Mapping[str, Callable[..., Any]] | None = None
_is_whole = False


def ring(function: str) -> Callable[..., Any] | None:
    """The function over shards that takes the place of another; None where sequences are whole.

    Raises:
        NotImplementedError: nothing takes its place.
    """
    if _is_whole or (_rings is None and not _in_context_of_torch()):
        return None
    if _rings is None:
        _refuse(function, "torch's context_parallel, which serves scaled_dot_product_attention alone")
    if function not in _rings:
        _refuse(function, "attnx.distributed.context_parallel, which serves softmax_attention and sigmoid_attention")
    return _rings[function]


def expect_whole(function: str) -> None:
    """Refuses a function that knows of no shards.

    Raises:
        NotImplementedError: its sequences are shards.
    """
    ring(function)


def expect_nothing(**given: Tensor | float | None) -> None:
    """Refuses arguments that a ring does not have."""
    for name, x in given.items():
        if x is not None and (isinstance(x, Tensor) or x):
            _arguments.refuse(name, "nothing within attnx.distributed.context_parallel", x)


@contextmanager
def shared_by(rings: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Within it sequences are shards, and these functions know of that."""
    global _rings
    before, _rings = _rings, rings
    try:
        yield
    finally:
        _rings = before


@contextmanager
def whole() -> Iterator[None]:
    """Within it sequences are whole again."""
    global _is_whole
    before, _is_whole = _is_whole, True
    try:
        yield
    finally:
        _is_whole = before


def _in_context_of_torch() -> bool:
    """Whether torch has its own function in the place of SDPA, which is all that its context does for attention."""
    now = F.scaled_dot_product_attention
    if now is torch._C._nn.scaled_dot_product_attention:
        return False
    return (getattr(now, "__module__", None) or "").startswith("torch.distributed.")


def _refuse(function: str, context: str) -> NoReturn:
    raise NotImplementedError(
        f"{function}: expected whole sequences, got shards of {context}; attnx.distributed has ring_softmax_attention, "
        "ring_sigmoid_attention, ring_sparse_linear_attention, ulysses_attention for all others, and a "
        "context_parallel of its own"
    )
