"""One JSON file, one page and two pictures of several runs of run.py on one device. ``python bench/summary.py --help``

The page has a table for each dtype and direction; the pictures are throughput over length, and over arithmetic
intensity beside the device's ceilings, the roofline.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

Row = Mapping[str, Any]  # of the JSON that run.py writes
Run = dict[str, Any]

_TERA = 1e12
_OURS, _PEERS = ("#0b6e99", "#1d9a6c"), ("#3d3d3d", "#9a9a9a", "#b07aa1", "#c98b3a", "#7d5a4f", "#5a6d9a")


def merge(runs: Sequence[Run]) -> Run:
    """Of the same device and build: the facts of the first, the best ceilings, all rows."""
    ceilings: dict[str, float] = {}
    for run in runs:
        for dtype, flops in run["ceilings"].items():
            ceilings[dtype] = max(flops, ceilings.get(dtype, 0.0))
    commands = [run["facts"]["command"] for run in runs]
    return {
        "facts": runs[0]["facts"] | {"command": commands},
        "ceilings": ceilings,
        "bandwidth": max((run["bandwidth"] or 0.0 for run in runs), default=0.0),
        "rows": [row for run in runs for row in run["rows"]],
    }


def device_name(facts: Mapping[str, Any]) -> str:
    return facts["gpu"]["name"] if facts["gpu"] else facts["cpu"]


def stem(facts: Mapping[str, Any]) -> str:
    """The device and commit as a file name: "nvidia-h200-0123abc"."""
    commit = (facts["commit"] or "unknown")[:7]
    return f"{re.sub('[^a-z0-9]+', '-', device_name(facts).lower()).strip('-')}-{commit}"


def _panels(rows: Sequence[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    panels: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        panels.setdefault(tuple(row[key] if key in row else row["case"][key] for key in keys), []).append(row)
    return panels


def _colours(rows: Sequence[Row]) -> dict[str, str]:
    """By contender, in order of appearance."""
    ours, peers = iter(_OURS * 4), iter(_PEERS * 4)
    names = dict.fromkeys((row["contender"], row["ours"]) for row in rows)
    return {name: next(ours if is_ours else peers) for name, is_ours in names}


def _cell(row: Row | None, notes: dict[str, int]) -> str:
    if row is None:
        return ""
    if "seconds" not in row:
        note = notes.setdefault(f"{row['contender']}: {row['reason']}", len(notes) + 1)
        return f"[{note}]"
    text = f"{row['flops_per_second'] / _TERA:.4g}" + (" (wrong)" if not row["accuracy"]["ok"] else "")
    return f"**{text}**" if row["ours"] else text


def markdown(run: Run) -> Iterator[str]:
    facts = run["facts"]
    ceilings = ", ".join(f"{flops / _TERA:.4g} TFLOP/s in {dtype}" for dtype, flops in run["ceilings"].items())
    yield f"# {device_name(facts)}, {facts['commit'] or 'commit unknown'}"
    yield f"\n{facts['date']}, attnx {facts['versions']['attnx']}, torch {facts['versions']['torch']}. "
    yield f"The fastest matrix product: {ceilings}. A copy: {run['bandwidth'] / _TERA:.4g} TB/s."
    notes: dict[str, int] = {}
    for (dtype, direction), rows in _panels(run["rows"], "dtype", "direction").items():
        names = list(_colours(rows))
        yield f"\n## {dtype} {direction}, TFLOP/s\n"
        yield f"| case | (batch, heads, length, head_dim) | {' | '.join(names)} |"
        yield "|---|---|" + "---:|" * len(names)
        for (name,), of_case in _panels(rows, "name").items():
            by_contender = {row["contender"]: row for row in of_case}
            cells = [_cell(by_contender.get(contender), notes) for contender in names]
            yield f"| {name} | {of_case[0]['shape']} | {' | '.join(cells)} |"
    yield ""
    yield from (f"[{note}] {text}  " for text, note in notes.items())


def _draw_lengths(axes: Axes, rows: Sequence[Row], colours: Mapping[str, str], ceiling: float) -> None:
    for (name,), of_contender in _panels(rows, "contender").items():
        points = sorted((row["case"]["length_k"], row["flops_per_second"] / _TERA) for row in of_contender)
        style = "o-" if of_contender[0]["ours"] else "o--"
        axes.plot(*zip(*points, strict=True), style, color=colours[name], markersize=3, linewidth=1.2, label=name)
    axes.axhline(ceiling / _TERA, color="#c0392b", linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)


def draw_lengths(path: Path, run: Run) -> None:
    """A panel per head dimension, and dtype, direction and mask; the dashed line is the fastest matrix product."""
    rows = [row for row in run["rows"] if "seconds" in row and row["case"]["length_q"] == row["case"]["length_k"]]
    keys = ("dtype", "direction", "is_causal", "head_dim")
    panels = {
        key: panel
        for key, panel in _panels([row for row in rows if "lengths" not in row["case"]], *keys).items()
        if len({row["case"]["length_k"] for row in panel}) > 1
    }
    if not panels:
        return
    across = sorted({head_dim for *_, head_dim in panels})
    down = list(dict.fromkeys(key[:3] for key in panels))
    colours = _colours(rows)
    figure = Figure(figsize=(1 + 3.4 * len(across), 1 + 2.4 * len(down)))
    grid = figure.subplots(len(down), len(across), squeeze=False, sharex=True, sharey="row")
    for line, row_key in zip(grid, down, strict=True):
        dtype, direction, is_causal = row_key
        for axes, head_dim in zip(line, across, strict=True):
            axes.set_title(f"{dtype} {direction}{' causal' * is_causal}, D {head_dim}", fontsize=9, loc="left")
            axes.spines[["top", "right"]].set_visible(False)
            if panel := panels.get((*row_key, head_dim)):
                _draw_lengths(axes, panel, colours, run["ceilings"][dtype])
    handles = {label: h for axes in grid.flat for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="upper center", ncols=len(handles), fontsize=8, frameon=False)
    figure.supylabel("TFLOP/s", fontsize=9)
    figure.supxlabel(f"length; {device_name(run['facts'])}", fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.4 / figure.get_figheight()))
    figure.savefig(path, dpi=140)


def draw_roofline(path: Path, run: Run) -> None:
    rows = [row for row in run["rows"] if "seconds" in row]
    if not rows:
        return
    figure = Figure(figsize=(7, 4.6))
    axes = figure.subplots()
    colours = _colours(rows)
    intensities = [row["intensity"] for row in rows]
    low, high = min(intensities) / 2, max(intensities) * 2
    for dtype, ceiling in run["ceilings"].items():
        ridge = ceiling / run["bandwidth"]
        ends = sorted((low, min(max(ridge, low), high), high))
        axes.plot(ends, [min(run["bandwidth"] * x, ceiling) / _TERA for x in ends], color="#c0392b", linewidth=1)
        axes.annotate(dtype, (high, ceiling / _TERA), (-4, 3), textcoords="offset points", ha="right", fontsize=8)
    markers = {"forward": "o", "backward": "^"}
    for (name, direction), panel in _panels(rows, "contender", "direction").items():
        x, y = zip(*((row["intensity"], row["flops_per_second"] / _TERA) for row in panel), strict=True)
        label = f"{name} {direction}"
        axes.scatter(x, y, s=12, marker=markers[direction], color=colours[name], label=label, alpha=0.8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOP per byte that cannot but be moved")
    axes.set_ylabel("TFLOP/s")
    axes.set_title(f"{device_name(run['facts'])}: matrix products and copies, measured", fontsize=10, loc="left")
    axes.legend(fontsize=6.5, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=140)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="JSON", help="what run.py wrote")
    parser.add_argument("--output", type=Path, default=Path("results"), metavar="DIR", help="(default: results)")
    arguments = parser.parse_args()
    run = merge([json.loads(path.read_text()) for path in arguments.runs])
    name = stem(run["facts"])
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / f"{name}.json").write_text(json.dumps(run, indent=1) + "\n")
    page = "\n".join(markdown(run)) + "\n"
    (arguments.output / f"{name}.md").write_text(page)
    draw_lengths(arguments.output / f"{name}-lengths.png", run)
    draw_roofline(arguments.output / f"{name}-roofline.png", run)
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
