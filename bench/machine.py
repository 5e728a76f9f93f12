"""The facts that make a measurement readable later: machine, versions, commit."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import torch

import attnx._C

_REPOSITORY = Path(__file__).resolve().parent.parent


def _output(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    result = subprocess.run(command, cwd=_REPOSITORY, capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else None


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    match = re.search(r"^model name\s*: (.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return match[1] if match else platform.processor() or platform.machine()


def _gpu(device: torch.device) -> dict[str, object]:
    properties = torch.cuda.get_device_properties(device)
    query = "driver_version,clocks.current.sm,clocks.max.sm,clocks.current.memory,power.limit"
    nvidia_smi = _output("nvidia-smi", f"--id=GPU-{properties.uuid}", f"--query-gpu={query}", "--format=csv,noheader")
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "nvidia_smi": dict(zip(query.split(","), nvidia_smi.split(", "), strict=True)) if nvidia_smi else None,
    }


def facts(device: torch.device) -> dict[str, object]:
    status = _output("git", "status", "--porcelain")
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": sys.argv,
        "device": device.type,
        "gpu": _gpu(device) if device.type == "cuda" else None,
        "cpu": _cpu_model(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "instruction_set": {
            "attnx": attnx._C.cpu_instruction_set(),
            "torch": torch.backends.cpu.get_cpu_capability(),
        },
        "build": attnx._C.build_info(),
        "commit": os.environ.get("ATTNX_COMMIT") or _output("git", "rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
        "versions": {"attnx": attnx._C.version, "torch": torch.__version__, "python": platform.python_version()},
        "platform": platform.platform(),
    }
