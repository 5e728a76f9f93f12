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
    heads_inside: bool = False  # stored as (batch, length, heads, head_dim), as projections leave them

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

    def elements(self, direction: Direction) -> int:
        """Numbers that cannot but be read or written: the inputs and the output, and backward their gradients."""
        query, key = (
            self.batch * heads * length * self.head_dim
            for heads, length in ((self.heads, self.length_q), (self.heads // self.groups, self.length_k))
        )
        return 2 * query + 2 * key if direction == "forward" else 3 * query + 4 * key

    def shortened(self, length: int) -> Case:
        return replace(
            self, batch=min(self.batch, 2), length_q=min(self.length_q, length), length_k=min(self.length_k, length)
        )

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Inputs:
        """Normally distributed."""
        generator = torch.Generator(device).manual_seed(seed)
        kv_heads = self.heads // self.groups

        def draw(heads: int, length: int) -> Tensor:
            outer = (length, heads) if self.heads_inside else (heads, length)
            x = torch.randn(self.batch, *outer, self.head_dim, generator=generator, device=device).to(dtype)
            return x.transpose(1, 2) if self.heads_inside else x

        return Inputs(draw(self.heads, self.length_q), draw(kv_heads, self.length_k), draw(kv_heads, self.length_k))

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
    deterministic: bool = False  # runs under PyTorch's deterministic algorithms

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
