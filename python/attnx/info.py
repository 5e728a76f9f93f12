"""``python -m attnx info``: what was built, what this machine has, and which kernel every operator will use."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import attnx
from attnx import _C, _capability


def collect() -> dict[str, Any]:
    """The facts as plain data.

    ``build``: how the binary was made; ``machine``: what it runs on; ``kernels``: the rows of the capability table,
    each with ``kernel``, what serves it on this machine, or None where its backend has no kernels or no device here.
    """
    return {
        "attnx": attnx.__version__,
        "path": str(Path(attnx.__file__).parent),
        "build": _C.build_info(),
        "machine": {
            "system": platform.platform(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cpu": _cpu_model(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "cpu_instruction_sets": _C.cpu_instruction_sets(),
            "cpu_instruction_set_in_use": _C.cpu_instruction_set(),
            "cuda_devices": _cuda_devices(),
        },
        "kernels": [{**asdict(row), "kernel": _kernel(row.backend)} for row in _capability.table()],
    }


def as_text(facts: dict[str, Any]) -> str:
    """``collect()`` for people to read."""
    lines = [f"attnx {facts['attnx']}  {facts['path']}"]
    for section in ("build", "machine"):
        lines += ["", section]
        lines += [f"  {name.replace('_', ' '):<28}{_in_words(value)}" for name, value in facts[section].items()]
    lines += ["", "kernels"]
    for row, capability in zip(facts["kernels"], _capability.table(), strict=True):
        lines.append(f"  {row['operator']:<28}{row['kernel'] or 'not here'}")
        lines.append(f"    {_capability.describe(capability)}")
    return "\n".join(lines)


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _cuda_devices() -> list[str]:
    if not torch.cuda.is_available():
        return []
    devices = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    return [f"{device.name} (sm_{device.major}{device.minor})" for device in devices]


def _kernel(backend: str) -> str | None:
    if backend == "cpu":
        return f"cpu, {_C.cpu_instruction_set()}"
    if _C.build_info()["cuda"] is None:
        return None
    if _C.cuda_emulated():
        return f"{backend}, emulated"
    return next((f"{backend}, {device}" for device in _cuda_devices()), None)


def _in_words(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
