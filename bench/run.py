"""Measures attnx's attention beside its peers: table, JSON and plot. ``python bench/run.py --help``"""

from __future__ import annotations

import argparse
import signal
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from device import Device, open_device
from machine import facts
from measure import Row, bandwidth, ceiling, measure
from memory import Memory, Task, measure_memory
from plot import draw
from report import print_failures, print_memory, print_table, write_json
from suite import DIRECTIONS, DTYPES, Case, Contender, Suite
from suites import SUITES
from timing import Rounds

T = TypeVar("T")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", default="dense", choices=list(SUITES), help="(default: dense)")
    parser.add_argument("--case", action="append", metavar="NAME", help="repeatable (default: all)")
    parser.add_argument("--contender", action="append", metavar="NAME", help="repeatable (default: all)")
    parser.add_argument("--list", action="store_true", help="list cases and contenders, and stop")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    parser.add_argument(
        "--dtype", action="append", choices=list(DTYPES), help="repeatable (default: the device's two usual ones)"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, help="rounds per case (default: 5 to 25, as many as take 4 s)")
    parser.add_argument("--quick", action="store_true", help="only the small cases, few rounds: under a minute")
    parser.add_argument("--memory", action="store_true", help="measure peak memory instead of time")
    parser.add_argument("--output", type=Path, default=Path("results"), metavar="DIR", help="(default: results)")
    return parser


def _choose(option: str, available: Mapping[str, T], names: Iterable[str] | None) -> list[T]:
    """The named entries, or all; ValueError for an unknown name."""
    for name in names or ():
        if name not in available:
            raise ValueError(f"{option}: expected one of {', '.join(available)}, got {name}")
    return [available[name] for name in dict.fromkeys(names or available)]


def _rounds(arguments: argparse.Namespace) -> Rounds:
    if arguments.rounds is not None:
        return Rounds(arguments.rounds, arguments.rounds, 0.0)
    return Rounds(3, 5, 0.5) if arguments.quick else Rounds(5, 25, 4.0)


def _list(console: Console, suite: Suite) -> None:
    console.print("[bold]cases[/]")
    for case in suite.cases:
        console.print(f"  {case.name:18} {case}{'  (quick)' if case.quick else ''}", highlight=False)
    console.print("[bold]contenders[/]")
    for contender in suite.contenders:
        console.print(f"  {contender.name}", highlight=False)


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description:34}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)


def _time(
    console: Console,
    suite: Suite,
    cases: Iterable[Case],
    contenders: list[Contender],
    device: Device,
    ceilings: Mapping[str, float],
    rounds: Rounds,
) -> list[Row]:
    work = [(dtype, case, direction) for dtype in ceilings for case in cases for direction in case.directions]
    rows: list[Row] = []
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with _progress(console) as progress:
            bar = progress.add_task("", total=len(work))
            for dtype, case, direction in work:
                progress.update(bar, description=f"{dtype} {case.name} {direction}")
                rows += measure(suite, contenders, case, dtype, direction, device, ceilings[dtype], rounds)
                progress.advance(bar)
    except KeyboardInterrupt:
        console.print("[bold red]interrupted[/]: what follows is what was measured")
    return rows


def _memory(console: Console, tasks: Sequence[Task]) -> list[Memory]:
    results = []
    with _progress(console) as progress:
        bar = progress.add_task("", total=len(tasks))
        for task in tasks:
            progress.update(bar, description=f"{task.contender} {task.dtype} {task.direction}")
            results.append(measure_memory(task))
            progress.advance(bar)
    return results


def main() -> int:
    parser = _parser()
    arguments = parser.parse_args()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 130)
    suite = SUITES[arguments.suite]
    if arguments.list:
        _list(console, suite)
        return 0
    try:
        for option in ("threads", "rounds"):
            value = getattr(arguments, option)
            if value is not None and value < 1:
                raise ValueError(f"--{option}: expected at least 1, got {value}")
        cases = _choose("--case", {case.name: case for case in suite.cases}, arguments.case)
        contenders = _choose("--contender", {c.name: c for c in suite.contenders}, arguments.contender)
        device = open_device(arguments.device)
    except ValueError as error:
        parser.error(str(error))
    dtypes = list(dict.fromkeys(arguments.dtype or device.dtypes))
    if arguments.quick and not arguments.case:
        cases = [case for case in cases if case.quick]

    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore", module="torch")
    machine = facts(device.torch_device)
    arguments.output.mkdir(parents=True, exist_ok=True)
    stem = arguments.output / f"{datetime.now():%Y%m%d-%H%M%S}-{suite.name}-{device.torch_device.type}"

    ceilings: dict[str, float] = {}
    copied: float | None = None
    rows: list[Row] = []
    memory: list[Memory] = []
    if arguments.memory:
        memory = _memory(
            console,
            [
                Task(suite.name, contender.name, dtype, direction, arguments.device, arguments.threads)
                for contender in contenders
                for dtype in dtypes
                for direction in DIRECTIONS
            ],
        )
        print_memory(console, memory, str(suite.memory_case))
    else:
        ceilings = {dtype: ceiling(device, dtype, Rounds(3, 10, 3.0)) for dtype in dtypes}
        copied = bandwidth(device, Rounds(3, 10, 1.0))
        console.print(f"a copy moves {copied / 1e9:.4g} GB/s, read and written")
        rows = _time(console, suite, cases, contenders, device, ceilings, _rounds(arguments))
        print_table(console, rows, suite.baseline, device.flops_unit)
        print_failures(console, rows)
        if rows:
            draw(stem.with_suffix(".png"), rows, suite, machine)
    write_json(stem.with_suffix(".json"), machine, ceilings, copied, rows, memory)
    console.print(f"wrote {stem}.json" + ("" if arguments.memory else f" and {stem.name}.png"))
    return int(any(row.failed for row in rows))


if __name__ == "__main__":
    sys.exit(main())
