"""Which share of the blocks takes part: families of probabilities, and their parameters from a density."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

Family: TypeAlias = Literal["harmonic", "geometric", "power", "gaussian"]
Mode: TypeAlias = Literal["bernoulli", "topm"]

DEFAULT_PARAMETERS: dict[str, float] = {"harmonic": 1.0, "geometric": 0.9, "power": 0.5, "gaussian": 8.0}


def probabilities(keep: Family, distances: int, parameter: float | None, device: torch.device | str | None) -> Tensor:
    """The probability at each distance, float32, from 0 on."""
    d = torch.arange(distances, dtype=torch.float64, device=device)
    x = DEFAULT_PARAMETERS[keep] if parameter is None else parameter
    return _formula(keep, d, x).clamp(_least(keep), 1.0).where(d > 0, 1.0).float()


def _formula(keep: Family, d: Any, x: float) -> Any:
    """The probability at distance ``d``, a tensor or a float, but for its bounds."""
    if keep == "harmonic":
        return x / (1 + d)
    if keep == "geometric":
        return x**d
    if keep == "power":
        return (1 + d) ** -x
    return math.e ** (-((d / x) ** 2) / 2)


def _least(keep: Family) -> float:
    return 0.01 if keep == "geometric" else 0.0


class BlockGrid(NamedTuple):
    """Blocks of queries by blocks of keys; csrc/attnx/block_sampling.h has the same."""

    length_q: int
    length_k: int
    block_q: int
    block_k: int
    is_causal: bool

    @property
    def query_blocks(self) -> int:
        return -(-self.length_q // self.block_q)

    @property
    def key_blocks(self) -> int:
        return -(-self.length_k // self.block_k)

    @property
    def distances(self) -> int:
        """As many as blocks of keys and one more: torch.compile then need not ask whether there is just one."""
        return self.key_blocks + 1

    def rows(self) -> list[tuple[int, int, int]]:
        """Of each block of queries the first of its diagonal blocks, the end of those, and the end of its candidates.

        A block of keys is diagonal where a query of the row stands at one of its positions, aligned bottom-right.
        """
        return [self._row(i) for i in range(self.query_blocks)]

    def _row(self, i: int) -> tuple[int, int, int]:
        offset = self.length_k - self.length_q
        first = i * self.block_q + offset
        last = min((i + 1) * self.block_q, self.length_q) - 1 + offset
        if self.length_k == 0 or (self.is_causal and last < 0):
            return 0, 0, 0
        begin, end = (min(max(x, 0), self.length_k - 1) // self.block_k for x in (first, last))
        return begin, end + 1, end + 1 if self.is_causal else self.key_blocks


# The solvers know sizes only. They are plain Python.


def _candidates_by_distance(grid: BlockGrid) -> list[int]:
    """How many blocks that may take part lie at each distance."""
    change = [0] * (grid.key_blocks + 1)
    diagonal = 0
    for begin, end, candidates in grid.rows():
        diagonal += end - begin
        # One block at each distance up to the farthest to the left, and likewise to the right.
        for farthest in (begin, candidates - end):
            change[farthest] += 1
    reach = list(itertools.accumulate(reversed(change)))[::-1]
    return [diagonal, *reach[1 : grid.key_blocks]]


def _expected_density(candidates: list[int], keep: Family, parameter: float) -> float:
    """The mean share of the candidates, by distance, that take part."""
    least = _least(keep)
    kept = sum(n * min(max(_formula(keep, float(d), parameter), least), 1.0) for d, n in enumerate(candidates) if d)
    return (candidates[0] + kept) / sum(candidates)


def _any_candidate(grid: BlockGrid) -> bool:
    return any(candidates for _, _, candidates in grid.rows())


@functools.cache
def solve_parameter(keep: Family, density: float, grid: BlockGrid) -> float:
    """The parameter under which the mean share of the candidates that take part is ``density``."""
    if not _any_candidate(grid):
        return DEFAULT_PARAMETERS[keep]
    # From next to no block but the diagonal's to all of them.
    sparse, dense = {
        "harmonic": (0.0, float(grid.key_blocks)),
        "geometric": (0.0, 1.0),
        "power": (64.0, 0.0),
        "gaussian": (1e-3, 1e9 * grid.key_blocks),
    }[keep]
    reached = functools.partial(_expected_density, _candidates_by_distance(grid), keep)
    for _ in range(100):
        middle = (sparse + dense) / 2
        if reached(middle) < density:
            sparse = middle
        else:
            dense = middle
    return dense  # the densest that there is, where rounding keeps all below the density


@functools.cache
def solve_blocks_per_row(keep: Family | None, density: float | None, grid: BlockGrid) -> int:
    """The number of blocks a row whose share of the candidates is nearest to ``density``, or to the family's own."""
    if not _any_candidate(grid):
        return 1
    if density is None:
        assert keep is not None
        density = _expected_density(_candidates_by_distance(grid), keep, DEFAULT_PARAMETERS[keep])
    rows = grid.rows()
    most = sum(candidates for _, _, candidates in rows)

    def reached(blocks: int) -> float:
        return sum(max(min(blocks, candidates), end - begin) for begin, end, candidates in rows) / most

    low, high = 1, grid.key_blocks
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if reached(middle) < density else (low, middle)
    # The smaller of equals, where rounding does not tell them apart.
    return min(max(low - 1, 1), low, key=lambda blocks: round(abs(reached(blocks) - density), 12))
