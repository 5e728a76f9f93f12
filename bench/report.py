"""The outcome of a run as a table for people and as JSON for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from measure import Row
from memory import Memory


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 0.1 else f"{seconds * 1e3:.0f}"


def _error(row: Row) -> str:
    if row.accuracy is None:
        return ""
    return f"{row.accuracy.relative:.2f}" if row.accuracy.ok else f"[bold red]{row.accuracy.relative:.3g} too large[/]"


def _cells(row: Row, flops_unit: tuple[float, str]) -> tuple[str, ...]:
    unit, _ = flops_unit
    speedup = f"{row.speedup.value:.2f}x ({row.speedup.low:.2f}-{row.speedup.high:.2f})" if row.speedup else ""
    return (
        _milliseconds(row.seconds),
        _milliseconds(row.spread),
        f"{row.flops_per_second / unit:.4g}",
        f"{row.of_ceiling:.0%}",
        speedup,
        _error(row),
    )


def print_table(console: Console, rows: Sequence[Row], baseline: str, flops_unit: tuple[float, str]) -> None:
    """One table per dtype and direction; what did not run is explained below it."""
    unit, unit_name = flops_unit
    for dtype, direction in dict.fromkeys((row.dtype, row.direction) for row in rows):
        chosen = [row for row in rows if (row.dtype, row.direction) == (dtype, direction)]
        title = f"{dtype} {direction}, ceiling {chosen[0].ceiling / unit:.4g} {unit_name}"
        table = Table(title=title, title_style="bold")
        table.add_column("case\n(batch, heads, length, head_dim)")
        table.add_column("attention")
        for column in ("ms\nmedian", "ms\nIQR", unit_name, "of\nceiling", f"speed-up over {baseline}\n(95 % interval)"):
            table.add_column(column, justify="right")
        table.add_column("error /\neager's", justify="right")
        reasons: dict[str, int] = {}
        for case, in_case in groupby(chosen, lambda r: r.case):
            labels = iter((case.name, f"[dim]{case}[/]"))
            for row in in_case:
                name = f"[bold]{row.contender}[/]" if row.ours else row.contender
                if row.samples:
                    cells = _cells(row, flops_unit)
                else:
                    note = reasons.setdefault(f"{row.contender}: {row.reason}", len(reasons) + 1)
                    cells = (f"[dim]not run \\[{note}][/]",)
                table.add_row(next(labels, ""), name, *cells)
            table.add_section()
        console.print(table)
        for reason, note in reasons.items():
            console.print(f"  [{note}] {reason}", markup=False, highlight=False)


def print_failures(console: Console, rows: Iterable[Row]) -> None:
    for row in rows:
        if row.failed:
            what = f"{row.contender}, {row.case.name}, {row.dtype} {row.direction}"
            accuracy = row.accuracy
            why = row.reason or (
                f"error {accuracy.error:.3g}, at most {accuracy.allowed:.3g} allowed" if accuracy else ""
            )
            console.print(f"[bold red]failed[/] {what}: {escape(why)}")


def print_memory(console: Console, results: Iterable[Memory], case: str) -> None:
    table = Table(title=f"Peak memory above inputs and results, {case}, MiB", title_style="bold")
    table.add_column("attention")
    table.add_column("dtype")
    table.add_column("forward", justify="right")
    table.add_column("forward + backward", justify="right")
    reasons = []
    for (contender, dtype), group in groupby(results, lambda m: (m.task.contender, m.task.dtype)):
        cells = []
        for memory in group:
            if memory.extra_bytes is None:
                reasons.append(f"{contender}, {dtype}, {memory.task.direction}: {memory.reason}")
                cells.append("not run")
            else:
                cells.append(f"{memory.extra_bytes / 2**20:.1f}")
        table.add_row(contender, dtype, *cells)
    console.print(table)
    for reason in reasons:
        console.print(f"  {reason}", markup=False, highlight=False)


def _with(record: Any, *properties: str) -> dict[str, Any]:
    """A dataclass instance as a dictionary, some of its properties included."""
    return asdict(record) | {name: getattr(record, name) for name in properties}


def _row(row: Row) -> dict[str, Any]:
    result = _with(row, *(("seconds", "spread", "flops_per_second", "of_ceiling", "intensity") if row.samples else ()))
    accuracy = _with(row.accuracy, "relative", "allowed", "ok") if row.accuracy else None
    return result | {"shape": str(row.case), "accuracy": accuracy}


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def write_json(
    path: Path,
    facts: Mapping[str, object],
    ceilings: Mapping[str, float],
    bandwidth: float | None,
    rows: Iterable[Row],
    memory: Iterable[Memory],
) -> None:
    """Everything: facts, ceilings in FLOP/s, bandwidth in bytes/s, and per row all samples in seconds."""
    content = {
        "facts": facts,
        "ceilings": ceilings,
        "bandwidth": bandwidth,
        "rows": [_row(row) for row in rows],
        "memory": [asdict(m) for m in memory],
    }
    path.write_text(json.dumps(_finite(content), indent=1) + "\n")
