"""What is special to the operators that draw blocks, and to those that solve for what is drawn with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnx._capability import expect
from attnx._operators.schema import Arguments
from attnx._operators.symbols import unknown
from attnx._sampling import DEFAULT_PARAMETERS, BlockGrid, Family, probabilities, solve_blocks_per_row, solve_parameter

MOST_TOKENS = 2**26  # the solvers count blocks one by one

# A BlockGrid's fields are arguments of both solvers.
GRID = "SymInt length_q, SymInt length_k, int block_q, int block_k, bool is_causal"


def lists(
    keep: Tensor,
    batch: int,
    heads: int,
    length_q: int,
    length_k: int,
    block_q: int,
    block_k: int,
    **others: Any,
) -> tuple[Tensor, Tensor]:
    rows, width = -(-length_q // block_q), -(-length_k // block_k)
    counts = keep.new_empty((batch, heads, rows), dtype=torch.int32)
    return counts, keep.new_empty((batch, heads, rows, width), dtype=torch.int32)


def refusal(name: str, arguments: Arguments) -> str:
    device = arguments["keep"].device.type
    return (
        f"{name}: no kernel for this call.\n"
        f"  required:  backend {device}\n"
        "  supported: backends cpu, cuda\n"
        f"  missing:   backend {device}; draw the lists on the CPU and move them"
    )


def keep(seed: Tensor, family: Family, density: float, *grid: Any) -> Tensor:
    """The probability at each distance under which ``density`` of the blocks take part on average."""
    sizes = _checked(family, density, *grid)
    return probabilities(family, sizes.distances, solve_parameter(family, density, sizes), seed.device)


def empty_keep(seed: Tensor, family: str, density: float, **grid: Any) -> Tensor:
    return seed.new_empty(_checked(family, density, **grid).distances, dtype=torch.float32)


def blocks_per_row(seed: Tensor, family: Family | None, density: float | None, *grid: Any) -> int:
    return solve_blocks_per_row(family, density, _checked(family, density, *grid))


def unknown_blocks_per_row(
    seed: Tensor, family: Family | None, density: float | None, **grid: Any
) -> int | torch.SymInt:
    sizes = _checked(family, density, **grid)
    symbol = unknown(sizes)
    return solve_blocks_per_row(family, density, sizes) if symbol is None else symbol


def _checked(family: str | None, density: float | None, *sizes: Any, **named: Any) -> BlockGrid:
    """The grid, of what a solver solves for."""
    grid = BlockGrid(*sizes, **named)
    expect(family in (None, *DEFAULT_PARAMETERS), "family", f"None or one of {', '.join(DEFAULT_PARAMETERS)}", family)
    if family is None or density is not None:
        expect(density is not None and 0 <= density <= 1, "density", "a share of the blocks from 0 to 1", density)
    expect({grid.block_q, grid.block_k} <= {64, 128}, "block_size", "64 or 128 on each side", grid[2:4])
    for name, length in (("length_q", grid.length_q), ("length_k", grid.length_k)):
        if isinstance(length, int):  # a symbol is looked at once it has a value
            expect(0 <= length <= MOST_TOKENS, name, f"from 0 to {MOST_TOKENS} tokens", length)
    return grid
