"""The device under test: how to time a call on it, and how to see a call's peak memory."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch


class Device(Protocol):
    torch_device: torch.device
    matrix_sizes: tuple[int, ...]  # square products among which the ceiling is looked for
    copy_bytes: int  # of the copy that measures bandwidth, far beyond the caches
    dtypes: tuple[str, ...]  # measured by default
    flops_unit: tuple[float, str]

    def seconds(self, call: Callable[[], object]) -> float: ...

    def peak_bytes(self, call: Callable[[], object]) -> int:
        """How far memory rose during the call above where it stood before; the call keeps its results alive."""


class Cpu:
    torch_device = torch.device("cpu")
    matrix_sizes: tuple[int, ...] = (512, 1024, 2048, 3072)
    copy_bytes = 2**28
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    flops_unit = (1e9, "GFLOP/s")

    def seconds(self, call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def peak_bytes(self, call: Callable[[], object]) -> int:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak of resident memory
        before = self._resident("VmRSS")
        call()
        return self._resident("VmHWM") - before

    def _resident(self, field: str) -> int:
        match = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
        if match is None:
            raise RuntimeError(f"/proc/self/status has no {field}; peak memory on the CPU is measured on Linux only")
        return int(match[1]) * 1024


class Cuda:
    matrix_sizes: tuple[int, ...] = (4096, 8192, 16384)
    copy_bytes = 2**31
    dtypes: tuple[str, ...] = ("bfloat16", "float16")
    flops_unit = (1e12, "TFLOP/s")

    def __init__(self, torch_device: torch.device) -> None:
        torch.cuda.set_device(torch_device)
        self.torch_device = torch_device
        # Far larger than any L2: clearing it evicts the inputs, and takes longer than the host needs to launch
        # what is timed, so that the events see the kernels and not the launches.
        self._flush = torch.empty(2**30, dtype=torch.int8, device=torch_device)

    def seconds(self, call: Callable[[], object]) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        self._flush.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def peak_bytes(self, call: Callable[[], object]) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def open_device(name: str) -> Device:
    """The device called "cpu", "cuda" or "cuda:N"; ValueError where there is none."""
    if name == "cpu":
        return Cpu()
    if match := re.fullmatch(r"cuda(?::(\d+))?", name):
        index, count = int(match[1] or 0), torch.cuda.device_count()
        if index < count:
            return Cuda(torch.device("cuda", index))
        raise ValueError(f"--device: expected cpu or one of the CUDA devices torch sees ({count}), got {name}")
    raise ValueError(f"--device: expected cpu, cuda or cuda:N, got {name}")
