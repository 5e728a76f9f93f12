"""What torch.autocast makes of the arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnx._operators.description import Operator
from attnx._operators.schema import LIBRARY, signature

DEVICE_TYPES = ("cpu", "cuda")


def register(row: Operator, name: str) -> None:
    if row.autocast:
        for device_type in DEVICE_TYPES:
            _register(row, name, device_type)


def _register(row: Operator, name: str, device_type: str) -> None:
    of = signature(name)

    def cast(argument: str, x: Any, dtype: torch.dtype) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dtype == torch.float64:
            return x  # torch leaves float64 alone, too
        if argument in row.autocast:
            return x.to(dtype)
        return x if row.autocast_like else x.float()

    def kernel(*args: Any) -> Any:
        like = of.arguments.index(row.autocast_like) if row.autocast_like else None
        dtype = torch.get_autocast_dtype(device_type) if like is None else args[like].dtype
        args = tuple(cast(argument, x, dtype) for argument, x in zip(of.arguments, args, strict=True))
        with torch.autocast(device_type, enabled=False):
            return of.operator(*args)

    LIBRARY.impl(name, kernel, f"Autocast{device_type.upper()}")
