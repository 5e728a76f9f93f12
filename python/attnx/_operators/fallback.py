"""This answers where no kernel serves the device of a call."""

from __future__ import annotations

from typing import Any

from attnx import _capability
from attnx._operators.description import Operator
from attnx._operators.schema import LIBRARY, signature


def register(row: Operator, name: str) -> None:
    of = signature(name)

    def answer(*args: Any) -> Any:
        arguments = of.bind(args)
        _capability.check_placement(arguments)
        if row.implementation is not None:
            return row.implementation(*args)
        raise NotImplementedError(row.refusal(name, arguments))

    LIBRARY.impl(name, answer, "CompositeExplicitAutograd")
