"""The picture of a run: throughput as a share of the ceiling, labelled with the speed-up over the baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from measure import Row
from suite import Suite

_OURS = ("#0b6e99", "#5fb3ce", "#1d9a6c", "#8fd0a8")
_PEERS = ("#3d3d3d", "#7d7d7d", "#a8a8a8", "#cfcfcf")
_THICKEST_BAR = 0.16  # of the distance between two cases


def _colours(suite: Suite, names: Sequence[str]) -> dict[str, str]:
    ours, peers = iter(_OURS * 2), iter(_PEERS * 2)
    return {c.name: next(ours if c.ours else peers) for c in suite.contenders if c.name in names}


def _panel(axes: Axes, rows: Sequence[Row], cases: Sequence[str], colours: Mapping[str, str]) -> None:
    thickness = min(_THICKEST_BAR, 0.84 / len(colours))
    for row in rows:
        y = cases.index(row.case.name) + (list(colours).index(row.contender) - (len(colours) - 1) / 2) * thickness
        share, label = 0.0, "not run"
        if row.samples:
            share, label = row.of_ceiling, f"{row.speedup.value:.2f}x" if row.ours and row.speedup else ""
            axes.barh(y, share, thickness * 0.9, color=colours[row.contender])
        colour = "#333333" if row.ours else colours[row.contender]
        axes.annotate(label, (share, y), (3, 0), textcoords="offset points", va="center", fontsize=6.5, color=colour)
    axes.axvline(1.0, color="#c0392b", linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_title(f"{rows[0].dtype} {rows[0].direction}", fontsize=10, loc="left", fontweight="bold")
    axes.set_yticks(range(len(cases)), cases, fontsize=8)
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.set_xlim(0, max(1.08, *(row.of_ceiling * 1.12 for row in rows if row.samples), 0))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def draw(path: Path, rows: Sequence[Row], suite: Suite, facts: Mapping[str, Any]) -> None:
    """One panel per dtype and direction, one group of bars per case."""
    panels: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        panels.setdefault((row.dtype, row.direction), []).append(row)
    cases = list(dict.fromkeys(row.case.name for row in rows))
    colours = _colours(suite, [row.contender for row in rows])
    height = 1.6 + 0.62 * len(cases)
    figure = Figure(figsize=(1 + 3.1 * len(panels), height))
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)
    for axes, chosen in zip(grid[0], panels.values(), strict=True):
        _panel(axes, chosen, cases, colours)
    for i, (name, colour) in enumerate(colours.items()):
        x = 0.02 + i * 0.98 / max(len(colours), 1)
        figure.text(x, 1 - 0.18 / height, f"\u25a0 {name}", color=colour, fontsize=9, fontweight="bold", va="top")
    gpu = facts["gpu"]
    machine = gpu["name"] if gpu else f"{facts['cpu']}, {facts['threads']} threads"
    axis = f"FLOP/s as a share of the fastest matrix product in that dtype; labels: speed-up over {suite.baseline}"
    figure.supxlabel(f"{axis}\n{machine}, torch {facts['versions']['torch']}", fontsize=8, color="#555")
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.4 / height))
    figure.savefig(path, dpi=160)
