"""The report's picture: loss curves on the left, times on the right, one colour an attention throughout."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator

from attnx.demo.attentions import ATTENTIONS, BASELINE
from attnx.demo.measure import TIMED_SHAPE
from attnx.demo.results import AttentionResult, Results

INK, MUTED, RULE, GRID = "#2b2f36", "#6b7280", "#c3c8ce", "#e6e8eb"


def save_plot(results: Results, path: Path) -> None:
    figure = Figure(figsize=(11, 5.2), dpi=150, layout="constrained")
    grid = figure.add_gridspec(3 if results.caches else 2, 2, width_ratios=(1.6, 1))
    _draw_losses(figure.add_subplot(grid[:, 0]), results.attentions)
    _draw_times(
        figure.add_subplot(grid[0, 1]),
        "Training step, ms",
        results.attentions,
        [result.ms_per_step for result in results.attentions],
    )
    _draw_times(
        figure.add_subplot(grid[1, 1]),
        f"Causal forward at {TIMED_SHAPE[2]} tokens, ms",
        results.attentions,
        [result.forward_ms for result in results.attentions],
    )
    if results.caches:
        _draw_caches(figure.add_subplot(grid[2, 1]), results)
    figure.suptitle(_settings(results), fontsize=9, color=MUTED, x=0.01, ha="left")
    figure.savefig(path)


def _settings(results: Results) -> str:
    model, training, machine = results.config["model"], results.config["training"], results.environment["machine"]
    return (
        f"{model['layers']} layers, width {model['width']}, context {model['context']}, batch {training['batch']}, "
        f"seed {training['seed']}  ·  {results.config['text']}  ·  "
        f"{results.config['device']}, threads {machine['threads']}, torch {machine['torch']}"
    )


def _draw_losses(axes: Axes, results: list[AttentionResult]) -> None:
    """Every step's loss, faint, and its moving average, which ends in its label."""
    steps = max(len(result.training_bits_per_byte) for result in results)
    window = max(1, steps // 20)
    ends = []
    for result in results:
        losses = np.asarray(result.training_bits_per_byte)
        step = np.arange(1, len(losses) + 1)
        smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
        # The baseline is a broad band: another softmax lies right on it.
        width, alpha = (5, 0.45) if result.name == BASELINE.name else (1.8, 1)
        axes.plot(step, losses, color=_colour(result), alpha=0.18, linewidth=0.8)
        axes.plot(step[window - 1 :], smooth, color=_colour(result), linewidth=width, alpha=alpha)
        ends.append(float(smooth[-1]))
    axes.set_xlim(0, steps * 1.02)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(FixedLocator([1, 1.5, 2, 2.5, 3, 4, 5, 6, 8]))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    low, high = np.log(axes.get_ylim())
    heights = np.exp(_apart(list(np.log(ends)), gap=0.055 * (high - low)))
    for result, height in zip(results, heights, strict=True):
        validation = result.validation_bits_per_byte
        text = result.label if validation is None else f"{result.label}  validation {validation:.3f}"
        axes.text(steps * 1.035, height, text, color=_colour(result), fontsize=9, va="center")
    _style(axes, "Loss on the training batches, bits per byte", grid="both")
    axes.set_xlabel("step", color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_times(axes: Axes, title: str, results: list[AttentionResult], times: list[float | None]) -> None:
    lengths = [time or 0.0 for time in times]
    bars = axes.barh(
        [result.label for result in results], lengths, color=[_colour(result) for result in results], height=0.62
    )
    texts = ["not measured" if time is None else f"{time:.3g}" if time < 100 else f"{time:.0f}" for time in times]
    axes.bar_label(bars, texts, padding=4, fontsize=9, color=INK)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.18 * max(lengths) or 1)
    _style(axes, title, grid="x")
    axes.tick_params(axis="y", length=0)


def _draw_caches(axes: Axes, results: Results) -> None:
    """What a cached token takes, and how well the model then predicts."""
    caches = results.caches
    colours = [MUTED, ATTENTIONS["softmax"].colour, GRID]
    sizes = [cache.bytes_per_token for cache in caches]
    bars = axes.barh([cache.label for cache in caches], sizes, color=colours[: len(caches)], height=0.62)
    texts = [f"{cache.bytes_per_token:.0f}: {cache.bits_per_byte:.3f} bits/byte" for cache in caches]
    axes.bar_label(bars, texts, padding=4, fontsize=9, color=INK)
    axes.invert_yaxis()
    axes.set_xlim(0, 2.1 * max(sizes))
    _style(axes, "Cached token, bytes", grid="x")
    axes.tick_params(axis="y", length=0)


def _style(axes: Axes, title: str, grid: Literal["both", "x"]) -> None:
    axes.set_title(title, loc="left", fontsize=10.5, color=INK)
    axes.set_axisbelow(True)
    axes.grid(axis=grid, color=GRID, linewidth=0.8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(RULE)
    axes.tick_params(colors=INK, labelsize=9)


def _colour(result: AttentionResult) -> str:
    return ATTENTIONS[result.name].colour


def _apart(heights: list[float], gap: float) -> list[float]:
    """Moves label heights as little as lets them stand ``gap`` apart, in their order."""
    order = np.argsort(heights)
    ranks = gap * np.arange(len(heights))
    # Isotonic least squares on the heights less their ranks: neighbours out of order share their mean.
    groups: list[list[float]] = []
    for height in np.asarray(heights)[order] - ranks:
        groups.append([float(height)])
        while len(groups) > 1 and np.mean(groups[-2]) > np.mean(groups[-1]):
            groups[-2:] = [groups[-2] + groups[-1]]
    placed = np.empty(len(heights))
    placed[order] = np.concatenate([np.full(len(group), np.mean(group)) for group in groups]) + ranks
    return placed.tolist()
