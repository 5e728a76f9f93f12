"""What the operators are tried on: dtypes, masks and shapes, and random inputs for them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from backends import BACKENDS, OPERATORS

VARLEN_OPERATORS = [f"{operator}_varlen" for operator in OPERATORS]
DTYPES = list(dict.fromkeys(dtype for backend in BACKENDS for dtype in backend.dtypes()))


@dataclass(frozen=True)
class Shape:
    """The sizes of one call; ``kv_heads`` and ``value_dim`` follow ``heads`` and ``head_dim`` where they are None."""

    length_q: int = 33
    length_k: int = 33
    head_dim: int = 16
    value_dim: int | None = None
    batch: int = 1
    heads: int = 2
    kv_heads: int | None = None

    def query(self) -> tuple[int, int, int, int]:
        return self.batch, self.heads, self.length_q, self.head_dim

    def key(self) -> tuple[int, int, int, int]:
        return self.batch, self.kv_heads or self.heads, self.length_k, self.head_dim

    def value(self) -> tuple[int, int, int, int]:
        return *self.key()[:3], self.value_dim or self.head_dim

    def output(self) -> tuple[int, int, int, int]:
        return *self.query()[:3], self.value_dim or self.head_dim

    def __str__(self) -> str:
        return "-".join(f"{letter}{size}" for letter, size in zip("qkdvbhg", self._sizes(), strict=True))

    def _sizes(self) -> tuple[int, ...]:
        return (
            self.length_q,
            self.length_k,
            self.head_dim,
            self.value_dim or self.head_dim,
            self.batch,
            self.heads,
            self.heads // (self.kv_heads or self.heads),
        )


def parameter_dtype(dtype: torch.dtype) -> torch.dtype:
    """What biases, slopes and logsumexps are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def random_inputs(
    shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> tuple[dict[str, Tensor], Tensor]:
    """query, key and value by name, and a gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    draw = partial(_draw, generator=generator, dtype=dtype, device=device)
    inputs = {"query": draw(shape.query()), "key": draw(shape.key()), "value": draw(shape.value())}
    return inputs, draw(shape.output())


def pack(
    lengths: tuple[list[int], list[int]],
    dtype: torch.dtype,
    device: torch.device,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    value_dim: int = 24,
) -> tuple[dict[str, Tensor], Tensor, dict[str, Any]]:
    """query, key and value by name as (tokens, heads, head_dim), a gradient of the output, and the lengths."""
    shape = Shape(sum(lengths[0]), sum(lengths[1]), head_dim, value_dim, heads=heads, kv_heads=kv_heads)
    inputs, grad_output = random_inputs(shape, dtype, device)
    packed = {name: x[0].transpose(0, 1) for name, x in inputs.items()}
    cu_q, cu_k = (torch.tensor([0, *n]).cumsum(0).to(device, torch.int32) for n in lengths)
    longest_q, longest_k = (max(n, default=0) for n in lengths)
    sizes = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": longest_q, "max_seqlen_k": longest_k}
    return packed, grad_output[0].transpose(0, 1), sizes


def random_parameter(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int = 1) -> Tensor:
    """A bias, or ALiBi slopes, that go with inputs of ``dtype``."""
    generator = torch.Generator().manual_seed(seed)
    return _draw(shape, generator, parameter_dtype(dtype), device).abs() / 4


def visible_pairs(shape: Shape, is_causal: bool = False, window: tuple[int, int] = (-1, -1)) -> Tensor:
    """Which query sees which key, (length_q, length_k): aligned so that the last query meets the last key."""
    left, right = window[0], 0 if is_causal else window[1]
    offset = shape.length_k - shape.length_q
    visible = torch.ones(shape.length_q, shape.length_k, dtype=torch.bool)
    if left >= 0:
        visible = visible.triu(offset - left)
    if right >= 0:
        visible = visible.tril(offset + right)
    return visible


def _draw(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


# Head dimensions below, at and between the widths of vector registers and tiles.
HEAD_DIMS = [Shape(head_dim=d) for d in (1, 3, 16, 40, 64, 80, 128, 256)] + [
    Shape(head_dim=64, value_dim=16),
    Shape(head_dim=3, value_dim=256),
    Shape(head_dim=40, value_dim=1),
]
# Lengths around a tile; fewer, as many and more queries than keys.
LENGTHS = [
    Shape(length_q=q, length_k=k) for q, k in ((1, 2), (2, 1), (1, 300), (300, 1), (7, 5), (63, 64), (64, 63))
] + [
    Shape(length_q=64, length_k=64),
    Shape(length_q=65, length_k=65),
    Shape(length_q=33, length_k=300),
    Shape(length_q=300, length_k=65),
]
GROUPS = [Shape(length_k=40, batch=2, heads=h, kv_heads=g) for h, g in ((1, 1), (2, 1), (6, 2), (8, 1), (3, 3))]
# Few rows a key head, as in decoding.
DECODING = [
    Shape(length_q=1, length_k=150, head_dim=40, value_dim=24, heads=3),
    Shape(length_q=2, length_k=150, head_dim=64, heads=8, kv_heads=2),
    Shape(length_q=1, length_k=70, head_dim=3, value_dim=130),
    Shape(length_q=1, length_k=200, head_dim=256, heads=3, kv_heads=1),
    Shape(length_q=5, length_k=65, head_dim=128, value_dim=16),
]
SHAPES = HEAD_DIMS + LENGTHS + GROUPS + DECODING

# A few shapes that together take every branch, for what is repeated many times.
FEW_SHAPES = [
    Shape(length_q=65, length_k=65, heads=4, kv_heads=2),
    Shape(length_q=40, length_k=130, head_dim=40, value_dim=24),
    Shape(length_q=130, length_k=37, head_dim=3),
    Shape(length_q=2, length_k=150, head_dim=64, heads=4, kv_heads=2),
]

MASKS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"is_causal": True},
    "window_left": {"window": (5, -1)},
    "window_right": {"window": (-1, 9)},
    "window_both": {"window": (17, 8)},
    "window_diagonal": {"window": (0, 0)},
    "window_causal": {"is_causal": True, "window": (20, -1)},
    "window_wider_than_keys": {"window": (1000, 1000)},
}
