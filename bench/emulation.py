"""What the CUDA kernels do while they run, counted by cudaemu, an emulator of the CUDA runtime.

The counts are of PTX, before the assembler. They are the same on every machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernels import label

# Devices of 8.6 have less shared memory for a block than those of 8.0, and take narrow tiles for it.
_DEVICES = ({"CUDAEMU_CC": "80"}, {"CUDAEMU_CC": "86"}, {"CUDAEMU_CC": "90", "ATTNX_CUDA_MAINLOOP": "sm90"})
_WARP = 32

Launch = Mapping[str, Any]


@dataclass(frozen=True)
class Excess:
    """An access to memory that takes more than the ideal number of wavefronts or sectors, in one launch."""

    unit: str
    access: str
    source: str
    actual: int
    ideal: int


@dataclass(frozen=True)
class Profile:
    counters: dict[str, float]
    excesses: list[Excess]


def _launches(cudaemu: Path) -> Iterator[Launch]:
    calls = Path(__file__).with_name("emulated_calls.py")
    for device in _DEVICES:
        with tempfile.TemporaryDirectory() as folder:
            environment = os.environ | {
                "LD_LIBRARY_PATH": f"{cudaemu}:{os.environ.get('LD_LIBRARY_PATH', '')}",
                "ATTNX_CUDA_ON_HOST": "1",
                "CUDAEMU_PROFILE": str(Path(folder, "profile.json")),
                **device,
            }
            result = subprocess.run(
                [sys.executable, calls], env=environment, capture_output=True, text=True, check=False
            )
        if result.returncode:
            raise RuntimeError(f"the emulated calls failed:\n{result.stderr.strip()}")
        yield from map(json.loads, result.stdout.splitlines())


def _pair(name: str, launches: Sequence[Launch]) -> tuple[Launch | None, Launch]:
    """A kernel's largest launch, and before it one in which its loop runs half as often."""
    forward = name.startswith(("forward", "staircase_decode"))
    if forward:
        launches = [launch for launch in launches if not launch["backward"]]
    looped, other = ("keys", "rows") if forward else ("rows", "keys")
    large = max(launches, key=lambda launch: launch["rows"] * launch["keys"])
    for small in launches:
        if small[other] == large[other] and small[looped] * 2 == large[looped]:
            return small, large
    return None, large


def _ratios(large: Launch, small: Launch | None) -> Iterator[tuple[str, float]]:
    """Wavefronts and sectors over the ideal numbers: of the whole launch, and of what the larger one has more."""
    for unit, name in (("shared_wavefronts", "wavefronts"), ("global_sectors", "sectors")):
        actual, ideal = large[unit], large[f"{unit}_ideal"]
        if ideal:
            yield name, actual / ideal
        if small and ideal > small[f"{unit}_ideal"]:
            yield f"loop {name}", (actual - small[unit]) / (ideal - small[f"{unit}_ideal"])


def _per_score(large: Launch, small: Launch) -> Iterator[tuple[str, float]]:
    scores = large["rows"] * large["keys"] - small["rows"] * small["keys"]
    for kind in ("mufu", "fp32", "integer"):
        yield f"{kind} per score", (large["classes"].get(kind, 0) - small["classes"].get(kind, 0)) * _WARP / scores


def _source(entry: Mapping[str, str]) -> str:
    """Where the access stands and where the function that it stands in is called; paths from csrc on."""
    places = dict.fromkeys(entry[key].rpartition("csrc/")[2] for key in ("source", "inlined_at"))
    return " < ".join(place for place in places if not place.startswith(":"))


def _profile(name: str, launches: Sequence[Launch]) -> Profile:
    small, large = _pair(name, launches)
    counters = dict(_ratios(large, small))
    if small and name.startswith(("forward", "backward")):
        counters |= _per_score(large, small)
    excesses = [
        Excess(unit, entry["op"], _source(entry), entry["actual"], entry["ideal"])
        for unit, key in (("wavefronts", "bank_conflicts"), ("sectors", "uncoalesced"))
        for entry in large[key]
    ]
    return Profile({counter: round(value, 4) for counter, value in counters.items()}, excesses)


def profiles(cudaemu: Path) -> dict[str, Profile]:
    """Of every kernel that emulated_calls.py launches, by label. ``cudaemu``: the folder of its libcudart.so.13."""
    by_kernel: dict[str, list[Launch]] = defaultdict(list)
    for launch in _launches(cudaemu):
        by_kernel[label(launch["kernel"])].append(launch)
    return {name: _profile(name, launches) for name, launches in by_kernel.items()}
