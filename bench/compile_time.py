"""How long each translation unit took to compile, by the log of ninja. ``python bench/compile_time.py --help``"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

GOAL = 30.0  # seconds for a unit of CUDA
BUILD = 2 * 12 * 60.0  # seconds for all units: twelve minutes on two cores


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
        "--check",
        action="store_true",
        help=f"exit 1 if a unit of CUDA takes more than {GOAL:g} s, or, where the whole build takes longer than "
        f"{BUILD:g} s, as on a slow or busy machine, more than the same share of it",
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
    limit = GOAL * max(1.0, sum(seconds.values()) / BUILD)
    slow = [unit for unit, time in cuda.items() if time > limit]
    for unit in slow:
        console.print(f"[bold red]too slow[/] {unit}: {cuda[unit]:.1f} s, at most {limit:.1f} s here")
    return int(arguments.check and bool(slow))


if __name__ == "__main__":
    sys.exit(main())
