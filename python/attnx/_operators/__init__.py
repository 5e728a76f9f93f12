"""What torch must know of the C++ operators besides their kernels: shapes, gradients, batching, autocast, refusals.

``table`` has a row for each operator, and ``description`` says what stands in one. The modules ``shapes``,
``gradients``, ``batching``, ``autocast``, ``versions``, ``flops`` and ``fallback`` each register one thing for any row;
most of it follows from the operator's schema. What is special to one system is a function in the module of its name.
All of it is registered on ``torch.ops.attnx.*``, so that the operators behave alike however they are reached.
"""

from __future__ import annotations

from attnx._operators import autocast, batching, fallback, flops, gradients, shapes, versions
from attnx._operators.description import Operator
from attnx._operators.schema import LIBRARY
from attnx._operators.table import OPERATORS


def register(row: Operator) -> None:
    """Registers everything for the operators that a row describes."""
    if row.schema is not None:
        LIBRARY.define(row.name + row.schema)
    for name in row.names:
        fallback.register(row, name)
        shapes.register(row, name)
        batching.register(row, name)
        versions.register(name)
        flops.register(row, name)
    for name in row.forward_names:
        gradients.register(row, name)
        autocast.register(row, name)


def register_all() -> None:
    for row in OPERATORS:
        register(row)
