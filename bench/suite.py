"""What a benchmark suite consists of: cases (shapes), contenders (implementations) and the formula they compute.

A system adds its suite as one file under ``suites/`` and one line in ``suites/__init__.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Direction = Literal["forward", "backward"]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


class Unsupported(Exception):
    """Raised by ``Contender.prepare`` with the reason why it cannot run a case."""


class Inputs(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor


@dataclass(frozen=True)
class Case:
    name: str
    heads: int
    length_q: int
    length_k: int
    head_dim: int
    batch: int = 1
    kv_heads: int | None = None  # None: as many as heads
    is_causal: bool = False
    directions: tuple[Direction, ...] = DIRECTIONS
    quick: bool = False  # part of --quick

    def __post_init__(self) -> None:
        if self.is_causal and self.length_q != self.length_k:
            raise ValueError(f"{self.name}: a causal case has as many queries as keys, or libraries differ in its mask")

    @property
    def groups(self) -> int:
        """Query heads per key head."""
        return self.heads // (self.kv_heads or self.heads)

    def flops(self, direction: Direction) -> float:
        """4 B H Nq Nk D forward, half of it when causal, 2.5 times as much backward."""
        forward = 4.0 * self.batch * self.heads * self.length_q * self.length_k * self.head_dim
        return forward * (0.5 if self.is_causal else 1.0) * (2.5 if direction == "backward" else 1.0)

    def shortened(self, length: int) -> Case:
        return replace(self, length_q=min(self.length_q, length), length_k=min(self.length_k, length))

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Inputs:
        """Normally distributed, the same numbers on every device."""
        generator = torch.Generator().manual_seed(seed)
        kv_heads = self.heads // self.groups
        sizes = ((self.heads, self.length_q), (kv_heads, self.length_k), (kv_heads, self.length_k))
        return Inputs(
            *(torch.randn(self.batch, *size, self.head_dim, generator=generator).to(device, dtype) for size in sizes)
        )

    def __str__(self) -> str:
        lengths = f"{self.length_q}" if self.length_q == self.length_k else f"{self.length_q}x{self.length_k}"
        heads = f"{self.heads}" if self.groups == 1 else f"{self.heads}/{self.kv_heads}"
        return f"({self.batch}, {heads}, {lengths}, {self.head_dim})" + (" causal" if self.is_causal else "")


Prepare = Callable[[Case, Inputs], Attention]


@dataclass(frozen=True)
class Formula:
    """What a contender computes: its float64 definition, and plain PyTorch in the dtype of the inputs."""

    reference: Prepare
    eager: Prepare


@dataclass(frozen=True)
class Contender:
    """An implementation. ``prepare`` does, untimed, what a user does once (compile, build a mask)."""

    name: str
    formula: Formula
    prepare: Prepare

    @property
    def ours(self) -> bool:
        return self.name.startswith("attnx")


@dataclass(frozen=True)
class Suite:
    name: str
    cases: tuple[Case, ...]
    contenders: tuple[Contender, ...]
    baseline: str  # the contender that speed-ups are relative to
    memory_case: Case  # the shape of --memory
