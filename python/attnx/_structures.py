"""What the structures of tensors share: comparison, the lengths they were made for, and their place among pytrees."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import torch
import torch.utils._pytree as pytree
from torch import Tensor

Lengths: TypeAlias = tuple[int, int]  # of queries and of keys


def same(a: Tensor, b: Tensor) -> bool:
    """Tells whether they are equal in shape, dtype, device and values."""
    return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device) and torch.equal(a, b)


def check_lengths(name: str, made_for: Lengths | None, query: Tensor, key: Tensor) -> None:
    """Refuses a structure that was made for other lengths, where it is known for which."""
    if made_for is None:
        return
    lengths = query.shape[-2], key.shape[-2]
    if made_for != lengths:
        raise RuntimeError(
            f"{name}: expected one of {lengths[0]} queries and {lengths[1]} keys, got one of {made_for[0]} and "
            f"{made_for[1]}"
        )


def register(cls: type[Any], leaves: Sequence[str], constants: Sequence[str]) -> None:
    """Makes a class a pytree: its leaves move and are traced, its constants are compared where trees are."""

    def constants_of(x: Any) -> tuple[Any, ...]:
        return tuple(getattr(x, name) for name in constants)

    def flatten(x: Any) -> tuple[list[Any], tuple[Any, ...]]:
        return [getattr(x, name) for name in leaves], constants_of(x)

    def flatten_with_keys(x: Any) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
        return [(pytree.GetAttrKey(name), getattr(x, name)) for name in leaves], constants_of(x)

    def unflatten(values: Iterable[Any], context: tuple[Any, ...]) -> Any:
        # Whatever stands in the place of leaves, also what is no tensor, makes a tree of the same form.
        make: Any = cls.__new__
        x = make(cls)
        x.__dict__.update(zip((*leaves, *constants), (*values, *context), strict=True))
        return x

    pytree.register_pytree_node(
        cls,
        flatten,
        unflatten,
        serialized_type_name=f"attnx.{cls.__name__}",
        to_dumpable_context=json.dumps,
        from_dumpable_context=lambda text: _tuples(json.loads(text)),
        flatten_with_keys_fn=flatten_with_keys,
    )
    torch.serialization.add_safe_globals([cls])  # it holds tensors and numbers alone


def register_named_tuple(cls: type[Any], name: str) -> None:
    """Gives a named tuple, which is a pytree as it is, what a saved program calls it by."""
    pytree._register_namedtuple(cls, serialized_type_name=name)
    torch.serialization.add_safe_globals([cls])


def _tuples(x: Any) -> Any:
    return tuple(map(_tuples, x)) if isinstance(x, list) else x
