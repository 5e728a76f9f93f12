"""What the compiled kernels say of themselves: registers, spills and the main loop, read by sasscost.

sasscost is a program of its own: it disassembles a library or object file and models the pipes of the processor. It
counts code that a loop runs under a condition, such as the masks of edge tiles, as always run; and where the assembler
leaves a loop by CALL, what follows the loop as a subroutine that the loop calls.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernels import is_ours, label


@dataclass(frozen=True)
class MachineCode:
    counters: dict[str, float]  # one iteration of the main loop is one of a warp on each of the four sub-cores
    bound: str = ""  # the pipe that the main loop keeps busy longest
    calls: bool = False  # the main loop's counters hold subroutines, or what follows it


PIPES = ("tensor", "mufu", "fma", "alu", "smem")


def _machine_code(kernel: dict[str, Any]) -> MachineCode:
    counters = {"registers": kernel.get("registers", 0), "stack": kernel.get("stack", 0)}
    counters["spills"] = sum(kernel["spills"].values())
    loop = next((loop for loop in kernel["loops"] if loop["id"] == kernel["main"]), None)
    if loop is None:
        return MachineCode(counters)
    counters |= {"loop instructions": loop["instructions"], "conditional instructions": loop["conditional"]}
    counters |= {f"{pipe} cycles": round(loop["cycles"].get(pipe, 0)) for pipe in PIPES}
    return MachineCode(counters, loop["bound"], calls="subroutine calls" in str(loop["warnings"]))


def _read_one(sasscost: Path, code: Path) -> dict[str, MachineCode]:
    result = subprocess.run([sys.executable, sasscost, code, "--json"], capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"sasscost {code}: {result.stderr.strip()}")
    kernels = json.loads(result.stdout)["kernels"]
    return {label(kernel["demangled"]): _machine_code(kernel) for kernel in kernels if is_ours(kernel["demangled"])}


def read(sasscost: Path, codes: Iterable[Path]) -> dict[str, MachineCode]:
    """Of every kernel in these libraries or object files, by label."""
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda code: _read_one(sasscost, code), codes)
        return {name: kernel for kernels in found for name, kernel in kernels.items()}
