"""Seeds and offsets of what is drawn."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from attnx import _arguments


def _number(name: str, x: int | Tensor, low: int, high: int, device: torch.device) -> Tensor:
    if isinstance(x, Tensor):
        return x
    return torch.full((), _arguments.integer(name, x, low, high), dtype=torch.int64, device=device)


def draw_round(
    generator: torch.Generator | None, seed: int | Tensor | None, offset: int | Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Seed and offset as int64 tensors; as tensors they may change between replays of a graph."""
    if (seed is None) != (offset is None):
        given, absent = ("seed", "offset") if offset is None else ("offset", "seed")
        raise RuntimeError(f"{absent}: expected one with {given}, got None")
    if seed is None or offset is None:
        draw = functools.partial(torch.randint, size=(), dtype=torch.int64, device=device, generator=generator)
        return draw(2**63 - 1), draw(2**32)
    if generator is not None:
        raise RuntimeError("generator: expected None where seed and offset are given, got a generator")
    return _number("seed", seed, -(2**63), 2**63 - 1, device), _number("offset", offset, 0, 2**32 - 1, device)
