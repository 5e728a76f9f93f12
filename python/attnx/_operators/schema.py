"""What the schema of an operator says of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor

LIBRARY = torch.library.Library("attnx", "FRAGMENT")

Arguments: TypeAlias = dict[str, Any]  # of an operator, by name


@dataclass(frozen=True)
class Signature:
    """An operator and the names in its schema.

    Attributes:
        operator: the operator as torch calls it.
        arguments: their names, in order.
        results: their names, in order; a result without one is "output".
        optional: the arguments that are a tensor or None.
        written: the arguments that the operator changes in place.
    """

    operator: Any
    arguments: tuple[str, ...]
    results: tuple[str, ...]
    optional: frozenset[str]
    written: frozenset[str]

    def bind(self, args: tuple[Any, ...]) -> Arguments:
        return dict(zip(self.arguments, args, strict=True))

    def call(self, arguments: Arguments) -> Any:
        """Calls the operator with those of the arguments that its schema names."""
        return self.operator(*(arguments[name] for name in self.arguments))


@cache
def signature(name: str) -> Signature:
    operator = getattr(torch.ops.attnx, name).default
    arguments = operator._schema.arguments
    return Signature(
        operator,
        tuple(x.name for x in arguments),
        tuple(x.name or "output" for x in operator._schema.returns),
        frozenset(x.name for x in arguments if str(x.type) == "Optional[Tensor]"),
        frozenset(x.name for x in arguments if x.alias_info is not None and x.alias_info.is_write),
    )


def sum_dtype(x: Tensor) -> torch.dtype:
    """The dtype of sums over x, which numbers of a head and logsumexp have, too."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
