"""Pictures of block maps, masks and clusters, and of a cache. Needs matplotlib: ``pip install 'attnx[demo]'``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from attnx.block_mask import BlockMask
from attnx.routing import Routes
from attnx.sparse_linear import CRITICAL, MARGINAL, NEGLIGIBLE, SparseLinearMap
from attnx.staircase import StaircaseCache

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["block_map", "clusters", "staircase"]

# Dark, light and nearly white: they differ in lightness, so that print and colour-blind readers tell them apart.
_LABELS = (
    (CRITICAL, "critical: softmax", "#0b4f6c"),
    (MARGINAL, "marginal: linear", "#9bd1e5"),
    (NEGLIGIBLE, "negligible: skipped", "#f1f1ee"),
)


def block_map(
    blocks: SparseLinearMap | BlockMask | Sequence[BlockMask],
    *,
    batch: int = 0,
    head: int = 0,
    key_blocks: int | None = None,
    ax: Axes | None = None,
    path: str | Path | None = None,
) -> Axes:
    """Draws what each block of keys is to each block of queries: queries run down, keys to the right.

    Args:
        blocks: a map of :func:`attnx.sparse_linear_block_map`: critical, marginal and negligible blocks. Or a mask, or
            several, such as :func:`attnx.probabilistic_block_mask` draws over several rounds: how often each block is
            in them.
        batch: the sequence.
        head: the query head.
        key_blocks: of masks: how many blocks of keys there are; by default as many as a row of the lists is wide.
        ax: where to draw; a figure of its own by default.
        path: where to save the picture, in the format of its suffix.

    Returns:
        The axes.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        RuntimeError: an argument does not fit; the message names it, what was expected and what came.
    """
    ax = _axes(ax, (5.6, 5.2))
    from matplotlib.ticker import MaxNLocator

    if isinstance(blocks, SparseLinearMap):
        _draw_labels(ax, _one(blocks.labels, batch, head))
        block_size = blocks.block_size
    else:
        masks = [blocks] if isinstance(blocks, BlockMask) else list(blocks)
        if not masks or not all(isinstance(mask, BlockMask) for mask in masks):
            raise RuntimeError(
                f"blocks: expected a SparseLinearMap, a BlockMask or a sequence of BlockMasks, got {blocks!r}"
            )
        _draw_shares(ax, [_one(m.to_dense(key_blocks or m.kv_indices.shape[-1]), batch, head) for m in masks])
        block_size = masks[0].block_size
    ax.set_xlabel(f"blocks of {block_size[1]} keys")
    ax.set_ylabel(f"blocks of {block_size[0]} queries")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    ax.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    ax.spines[:].set_color("#c3c8ce")
    return _saved(ax, path)


def clusters(
    routes: Routes,
    *,
    of: Literal["query", "key"] = "query",
    batch: int = 0,
    head: int = 0,
    ax: Axes | None = None,
    path: str | Path | None = None,
) -> Axes:
    """Draws which tokens share a cluster over time: a line for each cluster, a tick for each token in it.

    Args:
        routes: of :func:`attnx.route`.
        of: the clusters of queries or of keys.
        batch: the sequence.
        head: the query head.
        ax: where to draw; a figure of its own by default.
        path: where to save the picture, in the format of its suffix.

    Returns:
        The axes; clusters run upwards in the order of their mean time, empty ones last.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        RuntimeError: an argument does not fit; the message names it, what was expected and what came.
    """
    ax = _axes(ax, (7.2, 4.2))
    from matplotlib.ticker import MaxNLocator

    if not isinstance(routes, Routes):
        raise RuntimeError(f"routes: expected attnx.Routes, got {routes!r}")
    if of not in ("query", "key"):
        raise RuntimeError(f'of: expected "query" or "key", got {of!r}')
    indices, offsets = routes[:2] if of == "query" else routes[2:4]
    ends, row = _one(offsets, batch, head, False).tolist(), _one(indices, batch, head, False)
    times = sorted((row[a:b].tolist() for a, b in pairwise(ends)), key=lambda t: sum(t) / len(t) if t else math.inf)
    colours = [(_LABELS[0][2], "#1d9a6c", "#c0447a", "#c98b3a")[i % 4] for i in range(len(times))]
    ax.eventplot(times, lineoffsets=range(len(times)), linelengths=0.8, linewidths=0.8, colors=colours)
    length = routes.length_q if of == "query" else routes.length_k
    held = torch.zeros(length, dtype=torch.int64).index_add_(0, row[: ends[-1]].long(), torch.ones(ends[-1]).long())
    shares = [(held == n).double().mean().item() if length else 0.0 for n in (0, 1)]
    ax.set_title(f"tokens in no cluster {shares[0]:.0%}, in one {shares[1]:.0%}, in several {1 - sum(shares):.0%}")
    ax.title.set_fontsize(10)
    ax.set_xlim(-0.5, length - 0.5)
    ax.set_ylim(-0.7, len(times) - 0.3)
    ax.set_xlabel("token")
    ax.set_ylabel("cluster, by mean time")
    ax.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    ax.spines[:].set_color("#c3c8ce")
    return _saved(ax, path)


def staircase(
    cache: StaircaseCache, *, sequence: int = 0, ax: Axes | None = None, path: str | Path | None = None
) -> Axes:
    """Draws how many bits the tokens of a cache have by their age: the newest are on the right.

    Args:
        cache: what to draw.
        sequence: of the batch.
        ax: where to draw; a figure of its own by default.
        path: where to save the picture, in the format of its suffix.

    Returns:
        The axes.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        RuntimeError: the cache has no such sequence.
    """
    bits = cache.bits(sequence)
    ax = _axes(ax, (7.2, 3.0))
    edges = torch.arange(len(bits) + 1)
    ax.stairs(bits.numpy(), edges.numpy(), fill=True, color=_LABELS[1][2])
    ax.stairs(bits.numpy(), edges.numpy(), color=_LABELS[0][2], linewidth=1.2)
    quantised = len(bits) // cache.window * cache.window
    for window in range(0, quantised + 1, cache.window):
        ax.axvline(window, color="#ffffff", linewidth=0.6)
    widths = sorted(set(bits.tolist()))
    ax.set_yscale("log", base=2)
    ax.set_ylim(0.7, 1.25 * max(widths, default=16))
    ax.set_yticks(widths, [str(width) for width in widths])
    ax.minorticks_off()
    ax.set_ylabel("bits of a number")
    ax.set_xlabel(f"tokens, in windows of {cache.window}; the newest at the right")
    mean = f"{bits.double().mean():.2f} bits on average" if len(bits) else "empty"
    ax.set_title(f"{len(bits)} tokens, {mean}", fontsize=10)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#c3c8ce")
    return _saved(ax, path)


def _axes(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """The given axes, or those of a figure of their own."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "attnx.plot: needs matplotlib: pip install 'attnx[demo]'", name="matplotlib"
        ) from error
    return Figure(figsize=size, dpi=150, layout="constrained").subplots() if ax is None else ax


def _saved(ax: Axes, path: str | Path | None) -> Axes:
    if path is not None:
        figure = ax.get_figure(root=True)
        assert figure is not None
        figure.savefig(path)
    return ax


def _one(x: Tensor, batch: int, head: int, one_serves_all: bool = True) -> Tensor:
    """Of one sequence and head."""
    for name, n, size in (("batch", batch, x.shape[0]), ("head", head, x.shape[1])):
        if not 0 <= n < size and not (one_serves_all and size == 1):
            raise RuntimeError(f"{name}: expected from 0 to {size - 1}, got {n}")
    return x[min(batch, x.shape[0] - 1), min(head, x.shape[1] - 1)].cpu()


def _draw_labels(ax: Axes, labels: Tensor) -> None:
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.patches import Patch

    colours = ListedColormap([colour for _, _, colour in reversed(_LABELS)])
    ax.imshow(labels.numpy(), cmap=colours, norm=BoundaryNorm([-1.5, -0.5, 0.5, 1.5], 3), interpolation="nearest")
    shares = ((labels == label).float().mean().item() for label, _, _ in _LABELS)
    handles = [
        Patch(facecolor=colour, edgecolor="#c3c8ce", label=f"{name} ({share:.0%})")
        for (_, name, colour), share in zip(_LABELS, shares, strict=True)
    ]
    ax.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False, fontsize=8)


def _draw_shares(ax: Axes, kept: list[Tensor]) -> None:
    if len({x.shape for x in kept}) > 1:
        raise RuntimeError(f"blocks: expected masks of one size, got {[tuple(x.shape) for x in kept]}")
    from matplotlib.colors import LinearSegmentedColormap

    share = torch.stack(kept).float().mean(0)
    colours = LinearSegmentedColormap.from_list("kept", [colour for _, _, colour in reversed(_LABELS)])
    image = ax.imshow(share.numpy(), cmap=colours, vmin=0, vmax=1, interpolation="nearest")
    rounds = "1 round" if len(kept) == 1 else f"{len(kept)} rounds"
    ax.figure.colorbar(image, ax=ax, shrink=0.8, label=f"share of {rounds} that keep the block")
    ax.set_title(f"{share.mean():.0%} of the blocks kept", fontsize=10)
