"""Probabilistic FlashAttention: blocks of keys take part by chance, with a probability of their distance."""

from __future__ import annotations

import functools
import itertools
import math
import operator
from typing import Any, Literal, NamedTuple, TypeAlias, cast, overload

import torch
from torch import Tensor
from typing_extensions import TypedDict, Unpack

from attnx import _arguments, _shards
from attnx._layouts import takes_layouts
from attnx._random import draw_round
from attnx._scores import ScoreName, SigmoidBias, resolve_score
from attnx.block_mask import BlockMask
from attnx.functional import sigmoid_attention, softmax_attention

__all__ = ["keep_probabilities", "probabilistic_attention", "probabilistic_block_mask"]

Family: TypeAlias = Literal["harmonic", "geometric", "power", "gaussian"]
Keep: TypeAlias = Family | Tensor
Mode: TypeAlias = Literal["bernoulli", "topm"]

_ops = torch.ops.attnx

DEFAULT_PARAMETERS: dict[str, float] = {"harmonic": 1.0, "geometric": 0.9, "power": 0.5, "gaussian": 8.0}


def keep_probabilities(
    keep: Family, key_blocks: int, parameter: float | None = None, *, device: torch.device | str | None = None
) -> Tensor:
    r"""The probability of a block to take part, by its distance d from the diagonal, in blocks.

    ============= ================================== ================
    keep          probability                        parameter
    ============= ================================== ================
    ``harmonic``  :math:`\min(1, c / (1 + d))`       c = 1
    ``geometric`` :math:`\max(0.01, \rho^d)`         :math:`\rho` = 0.9
    ``power``     :math:`(1 + d)^{-a}`               a = 0.5
    ``gaussian``  :math:`\exp(-(d / \sigma)^2 / 2)`  :math:`\sigma` = 8
    ============= ================================== ================

    and 1 at d = 0. Under the default about log n of n blocks take part in a row.

    Args:
        keep: the family.
        key_blocks: how many distances, from 0.
        parameter: of the family; its default is in the table.
        device: of the result.

    Returns:
        (key_blocks,) float32, a tensor that the functions of this module take as their ``keep``.

    Raises:
        RuntimeError: an argument does not fit; the message names it, what was expected and what came.
    """
    if not isinstance(keep, str) or keep not in DEFAULT_PARAMETERS:
        _arguments.refuse("keep", f"one of {', '.join(DEFAULT_PARAMETERS)}", keep)
    key_blocks = _arguments.integer("key_blocks", key_blocks, 0)
    expected = "0 or more, and at most 1 for geometric"
    x = DEFAULT_PARAMETERS[keep] if parameter is None else _arguments.number("parameter", parameter, expected)
    if not x >= 0 or (keep == "geometric" and x > 1):
        _arguments.refuse("parameter", expected, parameter)
    d = torch.arange(key_blocks, dtype=torch.float64, device=device)
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


class Sampling(NamedTuple):
    """What the operators draw with."""

    keep: Tensor  # (key_blocks,) float32, by distance
    blocks_per_row: int  # 0: each block on its own


# The solvers know sizes only. They are plain Python, as there are no values of tensors while a graph is traced.


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


def _solve_parameter(keep: Family, density: float, grid: BlockGrid) -> float:
    """The parameter under which the mean share of the candidates that take part is ``density``."""
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


def _solve_blocks_per_row(density: float, grid: BlockGrid) -> int:
    """The number of blocks a row whose share of the candidates is nearest to ``density``."""
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


@functools.cache
def _solve(keep: Family | None, density: float | None, mode: Mode, grid: BlockGrid) -> tuple[float | None, int]:
    """The family's parameter, None for its default, and the number of blocks a row."""
    if not any(candidates for _, _, candidates in grid.rows()):
        return None, int(mode == "topm")  # there is no block to draw
    parameter = None if density is None or keep is None else _solve_parameter(keep, density, grid)
    if mode == "bernoulli":
        return parameter, 0
    if density is None and keep is not None:
        density = _expected_density(_candidates_by_distance(grid), keep, DEFAULT_PARAMETERS[keep])
    assert density is not None
    return parameter, _solve_blocks_per_row(density, grid)


def _solve_numbers(keep: Family | None, density: float | None, mode: Mode, *grid: Any) -> tuple[float | None, int]:
    return _solve(keep, density, mode, BlockGrid(*grid))


# What torch.compiler.assume_constant_result does, without importing dynamo.
_solve_numbers._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _solve_symbols(keep: Family | None, density: float | None, mode: Mode, grid: BlockGrid) -> tuple[float | None, int]:
    """The same where torch.compile put symbols for the numbers: operator.index and hex make them numbers again."""
    share = None if density is None else float.fromhex(float(density).hex())
    return _solve_numbers(keep, share, mode, *map(operator.index, grid))


def _check_choice(keep: Keep, density: float | None, mode: Mode) -> float | None:
    """Refuses what does not go together, whatever the lengths; the density."""
    if not isinstance(mode, str) or mode not in ("bernoulli", "topm"):
        _arguments.refuse("mode", '"bernoulli" or "topm"', mode)
    if density is not None:
        density = _arguments.share("density", density, "None or a share of the blocks from 0 to 1")
    if isinstance(keep, Tensor):
        if keep.requires_grad:
            raise RuntimeError("keep: expected a tensor that needs no gradient, as it gets none, got one that does")
        if (density is None) != (mode == "bernoulli"):
            raise RuntimeError(
                'density: expected a number with mode="topm", and None otherwise, where keep is a tensor, '
                f"got {density!r} with mode={mode!r}"
            )
    elif not isinstance(keep, str) or keep not in DEFAULT_PARAMETERS:
        _arguments.refuse("keep", f"one of {', '.join(DEFAULT_PARAMETERS)} or a tensor", keep)
    return density


def solve(keep: Keep, density: float | None, mode: Mode, grid: BlockGrid, device: torch.device) -> Sampling:
    """What the operators draw with, from what the user gave."""
    density = _check_choice(keep, density, mode)
    if isinstance(keep, Tensor):
        return Sampling(keep, 0 if mode == "bernoulli" else _solve_symbols(None, density, mode, grid)[1])
    family = cast(Family, keep)
    if density is None and mode == "bernoulli":
        return Sampling(keep_probabilities(family, grid.key_blocks, device=device), 0)
    parameter, blocks_per_row = _solve_symbols(family, density, mode, grid)
    return Sampling(keep_probabilities(family, grid.key_blocks, parameter, device=device), blocks_per_row)


def probabilistic_block_mask(
    batch: int,
    heads: int,
    length_q: int,
    length_k: int,
    *,
    keep: Keep = "harmonic",
    density: float | None = None,
    mode: Mode = "bernoulli",
    block_size: tuple[int, int] = (64, 64),
    is_causal: bool = False,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
    device: torch.device | str | None = None,
) -> BlockMask:
    """The blocks that :func:`probabilistic_attention` visits in a round, as lists.

    Args:
        batch: sequences.
        heads: query heads.
        length_q: queries.
        length_k: keys.
        keep, density, mode, block_size, is_causal, generator, seed, offset: as in :func:`probabilistic_attention`.
        device: where the blocks are drawn; by default where keep, seed or offset lie, if one is a tensor, else the CPU.

    Returns:
        Lists for every sequence and head, on the device; they are the same on all devices. They ascend, so that a
        causal row's diagonal block stands last; what of a row is not in use holds 0.

    Raises:
        RuntimeError: an argument does not fit; the message names it, what was expected and what came.
    """
    batch, heads = _arguments.integer("batch", batch, 0), _arguments.integer("heads", heads, 0)
    length_q, length_k = _arguments.integer("length_q", length_q, 0), _arguments.integer("length_k", length_k, 0)
    _arguments.flag("is_causal", is_causal)
    if device is None:
        given = [x.device for x in (keep, seed, offset) if isinstance(x, Tensor)]
        device = given[0] if given else "cpu"
    device = torch.device(device)
    seed, offset = draw_round(generator, seed, offset, device)
    grid = BlockGrid(length_q, length_k, *_arguments.block_size(block_size), is_causal)
    sampling = solve(keep, density, mode, grid, device)
    counts, indices = _ops.probabilistic_block_lists(
        sampling.keep,
        seed,
        offset,
        batch,
        heads,
        length_q,
        length_k,
        grid.block_q,
        grid.block_k,
        sampling.blocks_per_row,
        is_causal,
    )
    return BlockMask(counts, indices, (grid.block_q, grid.block_k), (length_q, length_k))


class ProbabilisticOptions(TypedDict, total=False):
    """These are for type checkers, which tell by ``return_logsumexp`` what comes back."""

    enable_gqa: bool
    keep: Keep
    density: float | None
    mode: Mode
    importance: bool
    score: ScoreName
    bias: SigmoidBias
    scale: float | Tensor | None
    block_size: tuple[int, int]
    is_causal: bool
    generator: torch.Generator | None
    seed: int | Tensor | None
    offset: int | Tensor | None
    training: bool


@overload
def probabilistic_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    return_logsumexp: Literal[False] = False,
    **options: Unpack[ProbabilisticOptions],
) -> Tensor: ...
@overload
def probabilistic_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    return_logsumexp: Literal[True],
    **options: Unpack[ProbabilisticOptions],
) -> tuple[Tensor, Tensor]: ...
@overload
def probabilistic_attention(
    query: Tensor, key: Tensor, value: Tensor, *, return_logsumexp: bool, **options: Unpack[ProbabilisticOptions]
) -> Tensor | tuple[Tensor, Tensor]: ...
@takes_layouts
def probabilistic_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    keep: Keep = "harmonic",
    density: float | None = None,
    mode: Mode = "bernoulli",
    importance: bool = False,
    score: ScoreName = "softmax",
    bias: SigmoidBias = None,
    scale: float | Tensor | None = None,
    block_size: tuple[int, int] = (64, 64),
    is_causal: bool = False,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
    training: bool = True,
    enable_gqa: bool = False,
    return_logsumexp: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Attention over blocks of keys that take part by chance, the fewer the farther they are.

    Queries and keys are cut into blocks. A block of keys at distance d from the diagonal, in blocks, takes part with
    probability p(d), for each sequence, head and block of queries by itself. The diagonal always does: p(0) = 1. It is
    where the queries of a block stand, aligned bottom-right as in :func:`attnx.softmax_attention`, so that every
    query that sees a key keeps one. Where a block of queries stands on several blocks of keys (``block_size`` with
    more queries than keys, or lengths that differ by no multiple of it) all of these are diagonal. Distances count
    from the nearest, to both sides, or to the left alone with ``is_causal``.

    Args:
        query: (batch, heads, length_q, head_dim).
        key: (batch, kv_heads, length_k, head_dim); heads is a multiple of kv_heads.
        value: (batch, kv_heads, length_k, value_dim).
        keep: p, a family of :func:`keep_probabilities` or a float32 tensor of at least as many entries as there are
            blocks of keys, each from 0 to 1, the first 1. It gets no gradient.
        density: the mean share of the blocks to take part, of all those that may (when causal, those on and before
            the diagonal). It sets the family's parameter, which has its default otherwise, and with ``mode="topm"`` m.
            Where the lengths allow no share as small, on short sequences, the diagonal alone takes part. Under
            torch.compile each new length compiles anew with it.
        mode: ``"bernoulli"``: every block by itself. ``"topm"``: the same number m of blocks in each row, or all where
            there are fewer: the diagonal, and of the others a sample without replacement, p being their weights
            (Gumbel-top-m on log p; a block of weight 0 is never in it). The cost is then known ahead. m brings the
            share of the blocks nearest to ``density``, or to what the family keeps on average.
        importance: make up for the blocks left out by weighting those kept with 1/p. With the sigmoid score the
            output's mean over rounds is then that of dense attention. With softmax, where -log p is added to the
            logits, so are the means of exp(logsumexp) and of output * exp(logsumexp); the output itself, their ratio,
            comes near dense attention as the density grows. Not with ``mode="topm"``, where p is not the probability.
        score: "softmax", over the blocks that take part, or "sigmoid".
        bias: with the sigmoid score, as in :func:`attnx.sigmoid_attention`, but not a tensor.
        scale: factor on query . key, 1/sqrt(head_dim) by default; or a tensor as in :func:`attnx.sigmoid_attention`.
        block_size: queries and keys of a block, 64 or 128 each. The last block may be ragged.
        is_causal: hide later keys, aligned bottom-right.
        generator: draws seed and offset where they are not given; by default torch's own of query's device.
        seed: an int or an int64 tensor of shape (), on query's device. The same seed and offset draw the same blocks on
            every backend, and in :mod:`attnx.reference`.
        offset: the round, from 0 to 2^32 - 1, likewise; a new one at each step draws new blocks.
        training: False without a seed: dense attention. With a seed it makes no difference.
        return_logsumexp: with the softmax score, also return (batch, heads, length_q), of the blocks that take part.

    keep, seed and offset on the GPU are trusted: their values are looked at under ``ATTNX_DEBUG=1`` alone, as
    looking waits for the device. Nothing else is read on the host, so that a CUDA graph captures the call, and a
    tensor as seed or offset has every replay draw a round of its own.

    The inputs share one dtype (float32, bfloat16, float16, float64; on CUDA bfloat16, float16) and device. For the
    backward the blocks are drawn again from seed and offset; nothing of the size of the score matrix is kept.

    ``enable_gqa`` and other layouts of query, key and value are taken as by :func:`attnx.sigmoid_attention`.

    Returns:
        (batch, heads, length_q, value_dim) in the dtype of query. A row that sees no key gives 0.

    Raises:
        RuntimeError: an argument does not fit; the message names it, what was expected and what came.
        NotImplementedError: no kernel for these arguments on this device; the message names what is missing.

    Source: Fulu Li, arXiv 2410.18441, which gives the idea in a paragraph: families, modes and weighting are ours. The
    generator is Philox4x32-10 (Salmon et al., SC 2011) with the seed as key and (block of keys, block of queries, head
    counted over the batch, offset) as counter.
    """
    _shards.expect_whole("probabilistic_attention")
    _arguments.flag("enable_gqa", enable_gqa)
    _arguments.tensors(query=query, key=key, value=value)
    for name, x in (("importance", importance), ("is_causal", is_causal), ("training", training)):
        _arguments.flag(name, x)
    sizes = _arguments.block_size(block_size)
    density = _check_choice(keep, density, mode)
    s = resolve_score(score, bias, return_logsumexp=return_logsumexp)
    if importance and mode == "topm":
        raise RuntimeError(
            'importance: expected False with mode="topm", where keep is not the probability of a block, got True'
        )
    if not training and seed is None and offset is None:
        if score == "sigmoid":
            return sigmoid_attention(query, key, value, bias=bias, scale=scale, is_causal=is_causal)
        return softmax_attention(query, key, value, scale=scale, is_causal=is_causal, return_logsumexp=return_logsumexp)
    for name, x in (("query", query), ("key", key)):
        if x.dim() != 4:
            raise RuntimeError(
                f"{name}: expected 4 dimensions, (batch, heads, length, head_dim), got shape {tuple(x.shape)}"
            )
    query, scale = _arguments.with_scale(query, scale)
    seed, offset = draw_round(generator, seed, offset, query.device)
    grid = BlockGrid(query.shape[2], key.shape[2], *sizes, is_causal)
    sampling = solve(keep, density, mode, grid, query.device)
    output, logsumexp = _ops.probabilistic_attention(
        query,
        key,
        value,
        sampling.keep,
        seed,
        offset,
        sampling.blocks_per_row,
        importance,
        grid.block_q,
        grid.block_k,
        s.score,
        s.bias_rule,
        s.bias_value,
        scale,
        is_causal,
    )
    return (output, logsumexp) if return_logsumexp else output
