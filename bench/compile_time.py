"""How long each translation unit took to compile, by the log of ninja. ``python bench/compile_time.py --help``"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

GOAL = 30.0  # seconds for a unit of CUDA


def read(build: Path) -> dict[str, float]:
    """Seconds by object file, each as it was last compiled, the slowest first."""
    header, *lines = (build / ".ninja_log").read_text().splitlines()
    if not header.startswith("# ninja log"):
        raise ValueError(f"expected the log of ninja, got {header}")
    fields = (line.split("\t") for line in lines)
    seconds = {output: (int(end) - int(start)) / 1e3 for start, end, _, output, _ in fields if output.endswith(".o")}
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("build", type=Path, help="the folder that ninja built in")
    parser.add_argument("--slowest", type=int, default=15, metavar="N", help="units to list (default: %(default)s)")
    parser.add_argument(
        "--factor",
        type=float,
        default=1.0,
        help=f"how much slower than the goal of {GOAL:g} s a unit "
        "of CUDA may be, where machines are slow or shared, before this exits 1 (default: %(default)s)",
    )
    arguments = parser.parse_args()
    try:
        seconds = read(arguments.build)
    except (OSError, ValueError) as error:
        parser.error(str(error))

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 130)
    cuda = {unit: time for unit, time in seconds.items() if unit.endswith(".cu.o")}
    table = Table(title=f"Slowest of {len(seconds)} translation units, {len(cuda)} of them CUDA", title_style="bold")
    table.add_column("unit")
    table.add_column("s", justify="right")
    for unit, time in list(seconds.items())[: arguments.slowest]:
        table.add_row(unit.rpartition("/")[2], f"{time:.1f}")
    table.add_section()
    table.add_row("all, one after another", f"{sum(seconds.values()):.0f}")
    table.add_row("all of CUDA", f"{sum(cuda.values()):.0f}")
    console.print(table)
    slow = [unit for unit, time in cuda.items() if time > GOAL * arguments.factor]
    for unit in slow:
        console.print(
            f"[bold red]too slow[/] {unit}: {cuda[unit]:.1f} s, at most {GOAL * arguments.factor:g} s allowed"
        )
    return int(bool(slow))


if __name__ == "__main__":
    sys.exit(main())
