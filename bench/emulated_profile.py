"""What the CUDA kernels cost, without a GPU: ``python bench/emulated_profile.py --help``

Registers, spills and the main loop come from the machine code, by sasscost; memory accesses and instructions per score
from a run on cudaemu, an emulator of the CUDA runtime. Both are programs of their own, found by the options below or
in the environment. The numbers depend on the compiler, not on the machine, and have committed budgets.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

import budget
import emulation
import machine_code
from emulation import Excess, Profile
from kernels import in_bfloat16, is_float16, mainloop, order
from machine_code import MachineCode

# Headings and counters.
_MACHINE_CODE = {
    "regis-\nters": "registers",
    "stack\nbytes": "stack",
    "\nspills": "spills",
    "instruc-\ntions": "loop instructions",
    "condi-\ntional": "conditional instructions",
    **{f"{pipe}\ncycles": f"{pipe} cycles" for pipe in machine_code.PIPES},
}
_EMULATED = {
    "wavefronts\n/ ideal, loop": "loop wavefronts",
    "wavefronts\n/ ideal": "wavefronts",
    "sectors\n/ ideal, loop": "loop sectors",
    "sectors\n/ ideal": "sectors",
    "mufu\nper score": "mufu per score",
    "fp32\nper score": "fp32 per score",
    "integer\nper score": "integer per score",
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])

    def from_environment(option: str, variable: str, what: str) -> None:
        default = os.environ.get(variable)
        what = f"{what} (default: ${variable})"
        parser.add_argument(option, type=Path, default=default, required=default is None, help=what)

    from_environment("--sasscost", "SASSCOST", "the program")
    from_environment("--cudaemu", "CUDAEMU", "the folder of its libcudart.so.13")
    parser.add_argument(
        "--code",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="libraries or object files with the machine code (default: libattnx.so of the attnx that Python finds)",
    )
    parser.add_argument(
        "--budgets",
        type=Path,
        default=Path(__file__).with_name("budgets"),
        metavar="FOLDER",
        help="with sm80.json and sm90.json (default: %(default)s)",
    )
    parser.add_argument("--check", action="store_true", help="exit 1 where a kernel exceeds its budget")
    parser.add_argument("--write", action="store_true", help="make what is measured the budget")
    return parser


def _library() -> Path:
    spec = importlib.util.find_spec("attnx")  # not imported: without the emulator its CUDA runtime may be missing
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("--code: expected attnx on Python's path, or --code, got neither")
    return Path(spec.submodule_search_locations[0], "libattnx.so")


def _counters(codes: Mapping[str, MachineCode], profiles: Mapping[str, Profile]) -> dict[str, dict[str, float]]:
    """By kernel, in order; without the float16 kernels that cost the same as on bfloat16."""
    counters = {
        name: (codes[name].counters if name in codes else {}) | (profiles[name].counters if name in profiles else {})
        for name in sorted({*codes, *profiles}, key=order)
    }
    return {
        name: of_kernel
        for name, of_kernel in counters.items()
        if not (is_float16(name) and of_kernel == counters.get(in_bfloat16(name)))
    }


def _print_counters(
    console: Console,
    title: str,
    columns: Mapping[str, str],
    counters: Mapping[str, Mapping[str, float]],
    bounds: Mapping[str, str],
) -> None:
    table = Table(title=title, title_style="bold")
    table.add_column("kernel", no_wrap=True)
    for heading in columns:
        table.add_column(heading, justify="right")
    if bounds:
        table.add_column("bound by")
    for name, of_kernel in counters.items():
        cells = [f"{of_kernel[counter]:g}" if counter in of_kernel else "" for counter in columns.values()]
        if any(cells):
            table.add_row(name, *cells, *([bounds.get(name, "")] if bounds else []))
    console.print(table)


def _print_excesses(console: Console, profiles: Mapping[str, Profile]) -> None:
    lines: dict[tuple[str, str, str], list[tuple[str, Excess]]] = defaultdict(list)
    for name in sorted(profiles, key=order):
        for excess in profiles[name].excesses:
            lines[excess.unit, excess.source, excess.access].append((name, excess))
    table = Table(
        title="Where wavefronts or sectors exceed the ideal (each kernel's worst 12 accesses)", title_style="bold"
    )
    for heading in ("", "line < called at", "access", "kernels", "times ideal", "in"):
        table.add_column(heading, overflow="fold")
    for (unit, source, access), entries in sorted(lines.items()):
        kernels = dict.fromkeys(name for name, _ in entries)
        name, worst = max(entries, key=lambda entry: entry[1].actual / entry[1].ideal)
        table.add_row(unit, source, access, str(len(kernels)), f"{worst.actual / worst.ideal:.3g}", name)
    console.print(table)


def main() -> int:
    parser = _parser()
    arguments = parser.parse_args()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    try:
        codes = machine_code.read(arguments.sasscost, arguments.code or [_library()])
        profiles = emulation.profiles(arguments.cudaemu)
    except (OSError, RuntimeError) as error:
        parser.error(str(error))

    counters = _counters(codes, profiles)
    bounds = {name: code.bound + "*" * code.calls for name, code in codes.items()}
    _print_counters(console, "Machine code, and one iteration of the main loop", _MACHINE_CODE, counters, bounds)
    console.print("* counts what the loop calls, or what follows it, as its own")
    _print_counters(console, "On the emulator, PTX", _EMULATED, counters, {})
    _print_excesses(console, profiles)
    console.print("Kernels on float16 that are not in these tables cost what they cost on bfloat16.")

    by_file: dict[Path, dict[str, dict[str, float]]] = defaultdict(dict)
    for name, of_kernel in counters.items():
        by_file[arguments.budgets / f"{mainloop(name)}.json"][name] = of_kernel
    if arguments.write:
        for file, of_file in by_file.items():
            budget.write(file, of_file)
    if not arguments.check:
        return 0
    complaints = [text for file, of_file in by_file.items() for text in budget.complaints(file, of_file)]
    for complaint in complaints:
        console.print(f"[bold red]over budget[/] {complaint}", soft_wrap=True)
    console.print(f"{len(counters)} kernels, {len(complaints)} complaints")
    return int(bool(complaints))


if __name__ == "__main__":
    sys.exit(main())
