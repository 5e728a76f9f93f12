"""Peak memory of one call above its inputs and results, each measured in a process of its own."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context

import torch
from torch import Tensor

from device import open_device
from measure import explain
from suite import DTYPES, Direction
from suites import SUITES

_WARM_UP_LENGTH = 256


@dataclass(frozen=True)
class Task:
    suite: str
    contender: str
    dtype: str
    direction: Direction  # "backward": forward and backward together
    device: str
    threads: int


@dataclass(frozen=True)
class Memory:
    task: Task
    extra_bytes: int | None = None
    reason: str | None = None  # why it did not run


def _peak(task: Task, length: int) -> int:
    suite, device = SUITES[task.suite], open_device(task.device)
    contender = next(c for c in suite.contenders if c.name == task.contender)
    case = suite.memory_case.shortened(length)
    inputs = case.inputs(DTYPES[task.dtype], device.torch_device)
    attention = contender.prepare(case, inputs)
    projection = torch.ones_like(inputs.query)
    results: list[Tensor] = []

    def call() -> None:
        if task.direction == "forward":
            with torch.no_grad():
                results.append(attention(*inputs))
        else:
            leaves = [x.requires_grad_() for x in inputs]
            results.append(attention(*leaves))
            results.extend(torch.autograd.grad(results[0], leaves, projection))

    return device.peak_bytes(call) - sum(x.numel() * x.element_size() for x in results)


def _measure(task: Task) -> Memory:
    torch.set_num_threads(task.threads)
    try:
        _peak(task, _WARM_UP_LENGTH)  # loads code, starts threads, compiles
        return Memory(task, _peak(task, SUITES[task.suite].memory_case.length_k))
    except Exception as error:  # whatever stops a contender becomes its row's reason
        return Memory(task, reason=explain(error))


def measure_memory(task: Task) -> Memory:
    # glibc then maps every larger block and returns it when freed, so that each shows in the resident set.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        try:
            return process.submit(_measure, task).result()
        except BrokenProcessPool:
            return Memory(task, reason="the process was killed, most likely for want of memory")
