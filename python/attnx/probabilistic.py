"""Probabilistic FlashAttention: blocks of keys take part by chance, with a probability of their distance."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeAlias, overload

import torch
from torch import Tensor
from typing_extensions import TypedDict, Unpack

from attnx import _arguments, _shards
from attnx._layouts import takes_layouts
from attnx._random import draw_round
from attnx._sampling import DEFAULT_PARAMETERS, BlockGrid, Family, Mode, probabilities
from attnx._scores import ScoreArguments, ScoreName, SigmoidBias, resolve_score
from attnx.block_mask import BlockMask
from attnx.functional import (
    sigmoid_attention,
    sigmoid_attention_varlen,
    softmax_attention,
    softmax_attention_varlen,
)

__all__ = [
    "keep_probabilities",
    "probabilistic_attention",
    "probabilistic_attention_varlen",
    "probabilistic_block_mask",
]

Keep: TypeAlias = Family | Tensor

_ops = torch.ops.attnx


def keep_probabilities(
    keep: Family, key_blocks: int, parameter: float | None = None, *, device: torch.device | str | None = None
) -> Tensor:
    r"""The probability of a block to take part, by its distance d from the diagonal, in blocks.

    * ``harmonic``: :math:`\min(1, c / (1 + d))`, c = 1 by default;
    * ``geometric``: :math:`\max(0.01, \rho^d)`, :math:`\rho` = 0.9;
    * ``power``: :math:`(1 + d)^{-a}`, a = 0.5;
    * ``gaussian``: :math:`\exp(-(d / \sigma)^2 / 2)`, :math:`\sigma` = 8;

    and 1 at d = 0. Under the default about log n of n blocks take part in a row.

    Args:
        keep: the family.
        key_blocks: how many distances, from 0.
        parameter: of the family; its default stands above.
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
    if parameter is not None:
        x = _arguments.number("parameter", parameter, expected)
        if not x >= 0 or (keep == "geometric" and x > 1):
            _arguments.refuse("parameter", expected, parameter)
    return probabilities(keep, key_blocks, parameter, device)


class Sampling(NamedTuple):
    """What the operators draw with."""

    keep: Tensor  # float32, by distance
    blocks_per_row: int  # 0: each block on its own


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


def solve(keep: Keep, density: float | None, mode: Mode, grid: BlockGrid, seed: Tensor) -> Sampling:
    """What the operators draw with, from what the user gave. Solvers are operators, so that lengths stay symbols."""
    density = _check_choice(keep, density, mode)
    family = None if isinstance(keep, Tensor) else keep
    blocks_per_row = 0
    if mode == "topm":
        blocks_per_row = _ops.probabilistic_blocks_per_row(seed, family, density, *grid)
    if isinstance(keep, Tensor):
        return Sampling(keep, blocks_per_row)
    if density is None:
        return Sampling(probabilities(keep, grid.distances, None, seed.device), blocks_per_row)
    return Sampling(_ops.probabilistic_keep(seed, keep, density, *grid), blocks_per_row)


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
    sampling = solve(keep, density, mode, grid, seed)
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


class _Drawn(NamedTuple):
    """The arguments that layouts share, once they are checked."""

    keep: Keep
    density: float | None
    mode: Mode
    importance: bool
    score: ScoreArguments
    block_size: tuple[int, int]
    is_causal: bool

    @classmethod
    def of(
        cls,
        keep: Keep,
        density: float | None,
        mode: Mode,
        importance: bool,
        score: ScoreName,
        bias: SigmoidBias,
        block_size: tuple[int, int],
        is_causal: bool,
        training: bool,
        return_logsumexp: bool,
    ) -> _Drawn:
        for name, x in (("importance", importance), ("is_causal", is_causal), ("training", training)):
            _arguments.flag(name, x)
        sizes = _arguments.block_size(block_size)
        density = _check_choice(keep, density, mode)
        resolved = resolve_score(score, bias, return_logsumexp=return_logsumexp)
        if importance and mode == "topm":
            raise RuntimeError(
                'importance: expected False with mode="topm", where keep is not the probability of a block, got True'
            )
        return cls(keep, density, mode, importance, resolved, sizes, is_causal)

    def arguments(
        self,
        query: Tensor,
        lengths: tuple[int, int],
        generator: torch.Generator | None,
        seed: int | Tensor | None,
        offset: int | Tensor | None,
        scale: float | None,
    ) -> tuple[Any, ...]:
        """What an operator takes after the inputs and their layout; the lengths are those of the longest sequence."""
        seed, offset = draw_round(generator, seed, offset, query.device)
        grid = BlockGrid(*lengths, *self.block_size, self.is_causal)
        sampling = solve(self.keep, self.density, self.mode, grid, seed)
        score = self.score
        return (
            sampling.keep,
            seed,
            offset,
            sampling.blocks_per_row,
            self.importance,
            *self.block_size,
            score.score,
            score.bias_rule,
            score.bias_value,
            scale,
            self.is_causal,
        )


class ProbabilisticOptions(TypedDict, total=False):
    """These are for type checkers, which tell by ``return_logsumexp`` what comes back."""

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


class DenseProbabilisticOptions(ProbabilisticOptions, total=False):
    """Those of tensors that are not packed."""

    enable_gqa: bool
    seqused_k: Tensor | None
    leftpad_k: Tensor | None


class PackedProbabilisticOptions(ProbabilisticOptions, total=False):
    """Those of packed sequences."""

    has_padding: bool


@overload
def probabilistic_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    return_logsumexp: Literal[False] = False,
    **options: Unpack[DenseProbabilisticOptions],
) -> Tensor: ...
@overload
def probabilistic_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    return_logsumexp: Literal[True],
    **options: Unpack[DenseProbabilisticOptions],
) -> tuple[Tensor, Tensor]: ...
@overload
def probabilistic_attention(
    query: Tensor, key: Tensor, value: Tensor, *, return_logsumexp: bool, **options: Unpack[DenseProbabilisticOptions]
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
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
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
            Where the lengths allow no share as small, on short sequences, the diagonal alone takes part.
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
        seqused_k: as in :func:`attnx.sigmoid_attention`. Each sequence has the diagonal, the distances and the blocks
            of its own keys; ``density`` sets the family's parameter, or m, by length_q and length_k.
        leftpad_k: likewise; the blocks of a sequence count from there.
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
    drawn = _Drawn.of(keep, density, mode, importance, score, bias, block_size, is_causal, training, return_logsumexp)
    if not training and seed is None and offset is None:
        lengths: dict[str, Any] = {"seqused_k": seqused_k, "leftpad_k": leftpad_k, "is_causal": is_causal}
        if score == "sigmoid":
            return sigmoid_attention(query, key, value, bias=bias, scale=scale, **lengths)
        return softmax_attention(query, key, value, scale=scale, return_logsumexp=return_logsumexp, **lengths)
    for name, x in (("query", query), ("key", key)):
        if x.dim() != 4:
            raise RuntimeError(
                f"{name}: expected 4 dimensions, (batch, heads, length, head_dim), got shape {tuple(x.shape)}"
            )
    query, scale = _arguments.with_scale(query, scale)
    output, logsumexp = _ops.probabilistic_attention(
        query,
        key,
        value,
        *_arguments.key_lengths(seqused_k, leftpad_k, query, key),
        *drawn.arguments(query, (query.shape[2], key.shape[2]), generator, seed, offset, scale),
    )
    return (output, logsumexp) if return_logsumexp else output


@overload
def probabilistic_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    return_logsumexp: Literal[False] = False,
    **options: Unpack[PackedProbabilisticOptions],
) -> Tensor: ...
@overload
def probabilistic_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    return_logsumexp: Literal[True],
    **options: Unpack[PackedProbabilisticOptions],
) -> tuple[Tensor, Tensor]: ...
@overload
def probabilistic_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    return_logsumexp: bool,
    **options: Unpack[PackedProbabilisticOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...
def probabilistic_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
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
    has_padding: bool = False,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
    training: bool = True,
    return_logsumexp: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`probabilistic_attention` over packed sequences, laid out as in :func:`attnx.sigmoid_attention_varlen`.

    Each sequence has blocks, a diagonal and distances of its own. ``density`` sets the family's parameter, or m, by
    ``max_seqlen_q`` and ``max_seqlen_k``.

    Returns:
        (total_q, heads, value_dim) in the dtype of query; with ``return_logsumexp`` also (heads, total_q), which is
        -inf for padding.

    Raises:
        RuntimeError: an argument does not fit; the message names it, what was expected and what came.
        NotImplementedError: no kernel for these arguments on this device; the message names what is missing.
    """
    _shards.expect_whole("probabilistic_attention_varlen")
    _arguments.tensors(query=query, key=key, value=value)
    drawn = _Drawn.of(keep, density, mode, importance, score, bias, block_size, is_causal, training, return_logsumexp)
    padding = _arguments.flag("has_padding", has_padding)
    packing = _arguments.packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    if not training and seed is None and offset is None:
        options: dict[str, Any] = {"scale": scale, "is_causal": is_causal, "has_padding": has_padding}
        if score == "sigmoid":
            return sigmoid_attention_varlen(query, key, value, *packing, bias=bias, **options)
        options["return_logsumexp"] = return_logsumexp
        return softmax_attention_varlen(query, key, value, *packing, **options)
    query, scale = _arguments.with_scale(query, scale)
    output, logsumexp = _ops.probabilistic_attention_varlen(
        query, key, value, *packing, padding, *drawn.arguments(query, packing[2:], generator, seed, offset, scale)
    )
    return (output, logsumexp) if return_logsumexp else output
